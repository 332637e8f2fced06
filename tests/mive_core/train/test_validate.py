"""Validation between steps: what mive eval measures, on cached features, without a trace in what is trained."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.evaluation.loss_curve import SIZE
from mive_core.pipeline import Pipeline
from mive_core.train.cache import CacheSettings, Encoders, cache
from mive_core.train.distributed import ProcessGroup
from mive_core.train.edit_task import EditRecipe, EditTask
from mive_core.train.loop import run
from mive_core.train.recipe import parse_recipe
from mive_core.train.validate import DistributedSubset, Validation


@pytest.fixture(scope="module")
def held_out(random_models, tmp_path_factory):
    """A manifest of three pairs and the cache of them, at another size."""
    folder = tmp_path_factory.mktemp("heldout")
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "heldout", (48, 48), 9), 3), folder / "pairs")
    cache(read_manifest(manifest), Encoders.load(random_models), folder / "cache", CacheSettings(((32, 32, 5),)))
    return folder


def recipe(held_out, random_models, folder, **changes) -> EditRecipe:
    values = {
        "task": "edit",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(held_out / "cache")],
        "output_dir": str(folder / "run"),
        "export": str(folder / "out.safetensors"),
        "num_steps": 5,
        "num_warmup_steps": 1,
        "num_workers": 0,
        "learning_rate": "1e-2",
        "log_every": 1,
        "checkpoint_every_s": 0.0,
        "ema_decay": 0.5,
        "validate_every": 2,
        "validation_manifest": str(held_out / "pairs" / "pairs.jsonl"),
        "validation_cache": str(held_out / "cache"),
        "validation_vae": str(random_models),
        "validation_steps": 2,
    }
    return parse_recipe(EditRecipe, values | changes)


def lines(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


@pytest.mark.slow
def test_figures_sheets_and_curves_and_no_trace_in_what_is_trained(held_out, random_models, tmp_path):
    run(EditTask(recipe(held_out, random_models, tmp_path / "alone")))
    task = EditTask(recipe(held_out, random_models, tmp_path / "watched"))
    run(task, validation=Validation(task))
    alone, watched = (load_file(tmp_path / name / "out.safetensors") for name in ("alone", "watched"))
    assert all(torch.equal(alone[key], watched[key]) for key in alone)
    assert [line["loss"] for line in lines(tmp_path / "alone", "log.jsonl")] == [line["loss"] for line in lines(tmp_path / "watched", "log.jsonl")]
    figures = lines(tmp_path / "watched", "validation.jsonl")
    assert [line["step"] for line in figures] == [1, 3, 4]  # every second, and the last
    assert {"loss", "loss_t0.1", "loss_t0.9", "psnr_edited", "psnr_kept", "psnr_edited_ceiling"} <= figures[0].keys()
    for number in (1, 3, 4):
        folder = tmp_path / "watched" / "run" / "validation" / f"step_{number:08d}"
        report = json.loads((folder / "report.json").read_text())
        assert report["clips"] == 3 and report["psnr_edited"] == next(line for line in figures if line["step"] == number)["psnr_edited"]
        assert Image.open(folder / "sheet.png").width > 100 and len(list((folder / "edited").iterdir())) == 3
    assert Image.open(tmp_path / "watched" / "run" / "curves.png").height == 4 * SIZE[1]


def test_what_is_edited_is_what_the_pipeline_edits(held_out, random_models, tmp_path):
    task = EditTask(recipe(held_out, random_models, tmp_path))
    validation, pair = Validation(task), None
    pair = validation.pairs[1]
    options = {"steps": 2, "cfg": None, "shift": None, "seed": 0, "progress": iter}
    ours, theirs = validation.editor.edit(pair.request, **options), Pipeline.load(random_models).edit(pair.request, **options)
    assert ours.frames.shape == pair.target.shape == (5, 32, 32, 3)
    assert (ours.frames - theirs.frames).abs().mean() < 0.01  # features are cached in bf16


def test_processes_share_the_pairs_and_take_as_many_each():
    pairs = list("abcde")
    shares = [DistributedSubset(pairs, ProcessGroup(rank, 2)) for rank in (0, 1)]
    assert [[share[i] for i in range(len(share))] for share in shares] == [["a", "c", "e"], ["b", "d", "a"]]
    assert sorted(number for share in shares for number in share.indices if number < 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["validation_manifest", "validation_cache", "validation_vae"])
def test_what_is_missing_is_named(held_out, random_models, tmp_path, name):
    task = EditTask(recipe(held_out, random_models, tmp_path, **{name: ""}))
    with pytest.raises(UserError, match=f"a validation needs the recipe's {name}"):
        Validation(task)


def test_a_cache_of_another_manifest_is_refused(held_out, random_models, tmp_path):
    other = export_pairs(drawn_pairs(PairedEdits(6, "heldout", (48, 48), 9), 2), tmp_path / "other")
    task = EditTask(recipe(held_out, random_models, tmp_path, validation_manifest=str(other)))
    with pytest.raises(UserError, match="cache was not made of its manifest"):
        Validation(task)


def test_a_cache_made_by_other_models_is_refused(held_out, random_models, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in (held_out / "cache").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    index = json.loads((folder / "index.json").read_text())
    index["contract"]["models"] = "another"
    (folder / "index.json").write_text(json.dumps(index))
    for changes in ({"validation_cache": str(folder)}, {"caches": [str(held_out / "cache"), str(folder)]}):
        with pytest.raises(UserError, match="made by another VAE or VLM than the first one; got models another"):
            EditTask(recipe(held_out, random_models, tmp_path, **changes))


@pytest.mark.slow
def test_a_validation_may_be_added_to_a_run(held_out, random_models, tmp_path):
    plain = recipe(held_out, random_models, tmp_path, validate_every=0, validation_manifest="", validation_cache="", validation_vae="")
    run(EditTask(plain), stop_at=3)
    task = EditTask(replace(recipe(held_out, random_models, tmp_path), gradient_checkpointing=True))
    run(task, validation=Validation(task))
    assert [line["step"] for line in lines(tmp_path, "log.jsonl")] == list(range(5))
