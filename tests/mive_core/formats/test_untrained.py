"""A start for training says what it is, and so does one that was written before starts were marked."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.formats.checkpoint import inspect, read_config, save_dit
from mive_core.formats.from_wan import init_from_wan
from mive_core.formats.quantize import quantize
from mive_core.formats.safetensors_file import read_headers
from mive_core.formats.untrained import NEW_PARTS, PATCH_KEY, UNTRAINED_KEY, untrained_metadata, untrained_parts
from mive_core.pipeline import EMBEDDED, Pipeline


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("start")
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=32, freq_dim=64, ffn_dim=384, num_layers=1
    ).save_pretrained(folder / "wan")
    init_from_wan(folder / "wan", folder / "start.safetensors", vlm="2b")
    return folder / "start.safetensors"


def test_a_converted_wan_is_marked_untrained(start):
    assert read_headers(start)[0].metadata[UNTRAINED_KEY] == "context,patch_embedding"
    assert untrained_parts(start) == NEW_PARTS


def test_without_the_mark_a_patch_embedding_that_ignores_the_source_tells(start, tmp_path):
    state, config = load_file(start), read_config(start)
    save_dit(tmp_path / "older.safetensors", state, config)
    assert untrained_parts(tmp_path / "older.safetensors") == NEW_PARTS
    state[PATCH_KEY] = torch.ones_like(state[PATCH_KEY])
    save_dit(tmp_path / "trained.safetensors", state, config)
    assert untrained_parts(tmp_path / "trained.safetensors") == ()


def test_the_embedded_dit_is_trained():
    assert untrained_parts(EMBEDDED["tiny"] / "dit.safetensors") == ()


def test_shards_are_read(start, tmp_path):
    state = load_file(start)
    keys = sorted(state)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, own in halves.items():
        save_file({key: state[key] for key in own}, tmp_path / name, read_config(start).to_metadata())
    weight_map = {key: name for name, own in halves.items() for key in own}
    (tmp_path / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert untrained_parts(tmp_path / "dit.safetensors.index.json") == NEW_PARTS


def test_inspect_says_so(start):
    report = inspect(start)
    assert report["untrained"] == ["context", "patch_embedding"] and "its edits are noise" in report["note"]
    assert "untrained" not in inspect(EMBEDDED["tiny"] / "dit.safetensors")


def test_quantize_keeps_the_mark_and_all_other_metadata(start, tmp_path):
    state, config = load_file(start), read_config(start)
    state[PATCH_KEY] = torch.ones_like(state[PATCH_KEY])  # only the mark tells
    save_dit(tmp_path / "start.safetensors", state, config, metadata={**untrained_metadata(("context",)), "mive.version": "7", "author": "me"})
    quantize(tmp_path / "start.safetensors", tmp_path / "fp8.safetensors")
    assert untrained_parts(tmp_path / "fp8.safetensors") == ("context",)
    assert inspect(tmp_path / "fp8.safetensors")["metadata"] == {"mive.untrained": "context", "mive.version": "7", "author": "me"}


def test_loading_it_to_edit_warns(random_models, tmp_path):
    state, config = load_file(random_models / "dit.safetensors"), read_config(random_models / "dit.safetensors")
    for name in ("vae.safetensors", "vlm"):
        (tmp_path / name).symlink_to(random_models / name)
    save_dit(tmp_path / "dit.safetensors", state, config, metadata=untrained_metadata())
    with pytest.warns(UserWarning, match="start for training: its context and patch_embedding have not been trained yet, .* its edits are noise"):
        Pipeline.load(tmp_path)
    save_dit(tmp_path / "dit.safetensors", state, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Pipeline.load(tmp_path)
