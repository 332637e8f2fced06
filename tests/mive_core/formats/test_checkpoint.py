"""Files that say what they are, and what happens when they are something else."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mive_core.attention import torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.errors import UserError
from mive_core.formats import checkpoint
from mive_core.formats.safetensors_file import read_tensors
from mive_core.media import paths

CONFIG = replace(PRESETS["tiny"], num_blocks=2)


@pytest.fixture(scope="module")
def model():
    return MiVEDiT(CONFIG, operations=nn, attention=torch_attention)


@pytest.fixture
def saved(model, tmp_path):
    checkpoint.save_dit(tmp_path / "dit.safetensors", model.state_dict(), CONFIG)
    return tmp_path / "dit.safetensors"


def load(path):
    return checkpoint.load_dit(path, attention=torch_attention)


def test_round_trip_is_bit_equal(model, saved):
    loaded = load(saved)
    assert loaded.config == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]  # nothing half-written beside it


def test_the_config_may_travel_in_a_tensor_of_bytes(model, tmp_path):
    """As ComfyUI's Save Model writes it, whose metadata is its own."""
    path, text = tmp_path / "dit.safetensors", CONFIG.to_metadata()["mive.config"].encode()
    save_file({**model.state_dict(), "mive.config": torch.frombuffer(bytearray(text), dtype=torch.uint8)}, path, metadata={"prompt": "{}"})
    assert load(path).config == CONFIG and checkpoint.inspect(path)["layers"] == [1, -1]
    assert "mive.config" not in read_tensors(path)
    save_file({**model.state_dict(), "mive.config": torch.zeros(9, dtype=torch.uint8)}, path)
    with pytest.raises(UserError, match="config in the file cannot be read"):
        load(path)


def test_sharded_equals_whole(model, saved, tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    state = model.state_dict()
    names = sorted(state)
    parts = {"dit-00001-of-00002.safetensors": names[::2], "dit-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: state[k].contiguous() for k in keys}, folder / file, metadata=CONFIG.to_metadata())
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "dit.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(a, b) for a, b in zip(load(saved).state_dict().values(), load(folder).state_dict().values(), strict=True))
    (folder / "dit-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="dit-00002-of-00002"):
        load(folder)
    index["weight_map"][names[0]] = "../dit.safetensors"
    (folder / "dit.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside"):
        load(folder)


def test_missing_unexpected_and_misshapen_keys_are_named(model, tmp_path):
    path = tmp_path / "dit.safetensors"
    state = dict(model.state_dict())
    removed = state.pop("blocks.1.ffn.2.bias")
    checkpoint.save_dit(path, state, CONFIG)
    with pytest.raises(UserError, match="1 missing .blocks.1.ffn.2.bias"):
        load(path)
    checkpoint.save_dit(path, state | {"blocks.1.ffn.2.bias": removed, "blocks.1.extra": removed.clone()}, CONFIG)
    with pytest.raises(UserError, match="1 unexpected .blocks.1.extra"):
        load(path)
    checkpoint.save_dit(path, state | {"blocks.1.ffn.2.bias": removed[:-1]}, CONFIG)
    with pytest.raises(UserError, match="blocks.1.ffn.2.bias does not fit"):
        load(path)


@pytest.mark.parametrize(
    "keys,family",
    [
        (["decoder.head.0.gamma", "encoder.conv1.weight"], "a Wan VAE"),
        (["blocks.0.cross_attn.q.weight", "blocks.0.self_attn.q.weight", "head.modulation"], "a Wan T2V checkpoint"),
        (["blocks.0.cross_attn.q.weight", "img_emb.proj.0.weight"], "a Wan I2V checkpoint"),
        (["model.visual.merger.norm.weight", "model.language_model.layers.0.self_attn.q_proj.weight"], "a Qwen3-VL model"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "a LoRA"),
    ],
)
def test_other_models_are_called_by_name(tmp_path, keys, family):
    path = tmp_path / "other.safetensors"
    save_file({k: torch.zeros(2) for k in keys}, path)
    with pytest.raises(UserError, match=f"looks like {family}"):
        load(path)
    assert checkpoint.inspect(path)["family"] == family.split(" ", 1)[1]


@pytest.mark.parametrize(
    "content,message",
    [
        (b"<!DOCTYPE html><html>Not found</html>", "a web page"),
        (b"PK\x03\x04" + bytes(64), "a zip archive"),
        (b"", "no safetensors"),
        (b"abc", "no safetensors"),
        (struct.pack("<Q", 10**7) + b"{", "truncated"),
        (b"mive mive mive mive", "no safetensors"),
        (struct.pack("<Q", 4) + b"{abc", "header cannot be read"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, message):
    path = tmp_path / "dit.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b" <"])
def test_a_header_whose_size_begins_like_another_kind_of_file_is_read(saved, start):
    content = saved.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    wanted = struct.unpack("<H", start)[0] + 65_536 * (size // 65_536 + 1)
    saved.write_bytes(struct.pack("<Q", wanted) + content[8 : 8 + size].ljust(wanted) + content[8 + size :])
    assert saved.read_bytes()[:2] == start and load(saved).config == CONFIG


def test_truncated_file_says_both_byte_counts(saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"truncated.*{len(whole) // 2} bytes.*{len(whole)} bytes"):
        load(saved)


def test_pickles_are_refused_unopened(tmp_path):
    path = tmp_path / "dit.ckpt"
    path.write_bytes(b"whatever")
    with pytest.raises(UserError, match="never opened"):
        load(path)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "a\0b"])
def test_paths_that_are_no_files(tmp_path, name):
    with pytest.raises(UserError, match="no such file|NUL"):
        load(tmp_path / name if "\0" not in name else name)


def test_names_translate_to_diffusers_and_back(model):
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("context.")}
    theirs = checkpoint.rename_keys(state, checkpoint.WAN_TO_DIFFUSERS)
    assert "blocks.0.attn1.to_out.0.weight" in theirs and "scale_shift_table" in theirs
    assert list(checkpoint.rename_keys(theirs, checkpoint.WAN_TO_DIFFUSERS, backwards=True)) == list(state)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, model, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(paths.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        checkpoint.save_dit(saved, model.state_dict(), CONFIG)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def test_inspect_says_what_a_checkpoint_is(saved):
    report = checkpoint.inspect(saved)
    assert (report["family"], report["layers"], report["vlm"], report["dtype"]) == ("MiVE DiT", [1, -1], "Qwen3-VL-tiny", ["F32"])
    assert checkpoint.inspect(saved.parent) == {"dit.safetensors": report}
