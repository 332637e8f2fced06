"""The embedded models: what they are, and that they still do what the card says, on clips they never saw."""

from dataclasses import replace

import pytest
import torch

from mive_core.embedded.synthetic import PairedEdits
from mive_core.evaluation.metrics import mean, psnr, region_psnr
from mive_core.evaluation.object_match import match_object
from mive_core.formats.checkpoint import inspect
from mive_core.pipeline import EMBEDDED, Pipeline

FOLDER = EMBEDDED["tiny"]
MAX_BYTES = 32e6
NUM_CLIPS = 12


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("tiny")


@pytest.fixture(scope="module")
def pairs():
    edits = PairedEdits(11, "heldout", (96, 96), 17, kinds=("seen in reference",))
    return [edits.sample(i).pair for i in range(NUM_CLIPS)]


def test_they_fit_in_the_repository_and_say_what_they_are():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= MAX_BYTES
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jinja", ".md"}
    report = inspect(FOLDER)
    assert report["dit.safetensors"]["family"] == "MiVE DiT" and report["vae.safetensors"]["family"] == "Wan VAE"
    assert report["dit.safetensors"]["layers"] == [1, 4]
    assert all(part["metadata"].get("mive.version") for part in (report["dit.safetensors"], report["vae.safetensors"], report["vlm/model.safetensors"]))


@pytest.mark.slow
def test_latents_have_unit_variance(pipeline, pairs):
    latents = torch.cat([pipeline.vae.encode(pair.target) for pair in pairs])
    assert 0.7 < latents.std() < 1.45 and latents.mean().abs() < 0.3  # measured over softer pictures, so drawn edges give more


@pytest.mark.slow
def test_edits_pass_the_gate(pipeline, pairs):
    """Means over a few clips, so the bounds are below the card's figures."""
    figures, decoded = {"ours": [], "copy": [], "ceiling": []}, []
    for pair in pairs:
        edited = pipeline.edit(pair.request, seed=0).frames
        assert edited.shape == pair.target.shape and torch.isfinite(edited).all()
        figures["ours"].append(region_psnr(edited, pair.target, pair.mask))
        figures["copy"].append(region_psnr(pair.request.source.frames, pair.target, pair.mask))
        ceiling = pipeline.vae.decode(pipeline.vae.encode(pair.target))
        figures["ceiling"].append(region_psnr(ceiling, pair.target, pair.mask))
        decoded.append(psnr(ceiling, pair.target, torch.ones_like(pair.mask)))
    means = {name: {key: mean([row[key] for row in rows]) for key in ("psnr_edited", "psnr_kept")} for name, rows in figures.items()}
    assert means["ours"]["psnr_edited"] >= means["copy"]["psnr_edited"] + 13.7, means
    assert means["ours"]["psnr_kept"] >= means["ceiling"]["psnr_kept"] - 0.5, means
    assert mean(decoded) >= 27.8, decoded


@pytest.mark.slow
def test_words_alone_tell_a_new_shape(pipeline):
    """A blob of the right colour in the right place, which earlier weights drew, has an overlap of 0.59 here."""
    edits = PairedEdits(13, "heldout", (96, 96), 17, kinds=("instruction only",), edits=("replace", "add"))
    overlaps, gains = [], []
    for pair in (edits.sample(i).pair for i in range(NUM_CLIPS)):
        source = pair.request.source.frames
        edited = pipeline.edit(pair.request, steps=4, seed=0).frames
        overlaps.append(match_object(edited, source, pair.target, pair.mask, pair.colour).iou)
        gains.append(region_psnr(edited, pair.target, pair.mask)["psnr_edited"] - region_psnr(source, pair.target, pair.mask)["psnr_edited"])
    assert mean(overlaps) >= 0.9 and mean(gains) >= 13.2, (overlaps, gains)


def test_the_same_seed_gives_the_same_video_and_another_gives_another(pipeline):
    request = PairedEdits(12, "heldout", (64, 64), 5).sample(0).pair.request
    first, again, other = (pipeline.edit(request, steps=2, seed=seed).frames for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_guidance_reads_the_empty_instruction(pipeline):
    request = PairedEdits(12, "heldout", (64, 64), 5).sample(1).pair.request
    plain, guided = (pipeline.edit(request, steps=2, cfg=cfg).frames for cfg in (1.0, 3.0))
    assert torch.isfinite(guided).all() and psnr(guided, plain, torch.ones(5, 64, 64, dtype=torch.bool)) < 60


def test_one_frame_works(pipeline):
    request = PairedEdits(12, "heldout", (64, 64), 5, kinds=("seen in reference",)).sample(0).pair.request
    request = replace(request, source=replace(request.source, frames=request.source.frames[:1]))
    assert pipeline.edit(request, steps=1).frames.shape == (1, 64, 64, 3)
