"""GGUF files: what they hold, read back by the models; damaged ones refused."""

import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from mive_core.attention import torch_attention
from mive_core.bench.convert import wan_layout
from mive_core.config import METADATA_KEY, PRESETS
from mive_core.dit import MiVEDiT
from mive_core.errors import UserError
from mive_core.formats.checkpoint import inspect, load_dit, read_config
from mive_core.formats.from_wan import init_from_wan
from mive_core.formats.gguf_file import SHAPE_KEY, TYPES
from mive_core.formats.quantize import quantize
from mive_core.formats.safetensors_file import read_header, read_tensor

CONFIG = replace(PRESETS["tiny"], num_blocks=1, patch_size=(1, 2, 2))  # Wan's
NUMBERS = {name: number for number, (name, *_) in TYPES.items()}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def write_gguf(path, tensors: dict, entries: dict[str, str] = {}, version: int = 3):
    """tensors: name -> (torch's shape, type, bytes). Written here by hand, not by the package that reads it."""
    shapes = {f"{SHAPE_KEY}{name}": shape for name, (shape, *_) in tensors.items() if len(shape) > 4}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries) + len(shapes))
    for key, value in entries.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    for key, shape in shapes.items():
        head += text(key) + struct.pack("<IIQ", 9, 5, len(shape)) + struct.pack(f"<{len(shape)}i", *shape)
    body = b""
    for name, (shape, kind, data) in tensors.items():
        sides = [int(np.prod(shape))] if len(shape) > 4 else [*shape][::-1]
        head += text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, NUMBERS[kind], len(body))
        body += data + b"\0" * (-len(data) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def plain(value: torch.Tensor, kind: str = "F32"):
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return tuple(value.shape), kind, value.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return MiVEDiT(CONFIG, operations=torch.nn, attention=torch_attention).state_dict()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_dit_in_full_numbers_is_read_back(state, tmp_path, kind):
    """Five-dimensional patches travel in one dimension and their shape beside them, as in ComfyUI's GGUF files."""
    path = write_gguf(tmp_path / "dit.gguf", {key: plain(value, kind) for key, value in state.items()}, CONFIG.to_metadata())
    assert read_config(path) == CONFIG
    model = load_dit(path, attention=torch_attention)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key].to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()), key
    told = inspect(path)
    assert (told["family"], told["dtype"], told["tensors"]) == ("MiVE DiT", [kind], len(state))
    assert inspect(tmp_path).keys() == {"dit.gguf"}


@pytest.mark.parametrize("kind, error", [("Q8_0", 0.01), ("Q4_0", 0.15)])
def test_quantised_matrices_are_scaled_back(state, tmp_path, kind, error):
    quants = pytest.importorskip("gguf.quants", reason="THE PACKAGE gguf IS NOT INSTALLED: quantised files are not tested")
    from gguf import GGMLQuantizationType

    matrices = [key for key, value in state.items() if value.ndim == 2 and value.shape[1] % 32 == 0]
    tensors = {key: plain(value) for key, value in state.items()}
    tensors |= {key: (tuple(state[key].shape), kind, quants.quantize(state[key].numpy(), GGMLQuantizationType[kind]).tobytes()) for key in matrices}
    path = write_gguf(tmp_path / "dit.gguf", tensors, CONFIG.to_metadata())
    model = load_dit(path, attention=torch_attention, dtype=torch.float32).state_dict()
    assert len(matrices) > 8
    for key, value in state.items():
        off = float((model[key] - value).norm() / value.norm().clamp(min=1e-9))
        assert (0 < off < error) if key in matrices else off == 0, (key, off)
    with pytest.raises(UserError, match="in 8 bits already, or fewer"):
        quantize(path, tmp_path / "out.safetensors")


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # as where it is not installed
    path = write_gguf(tmp_path / "a.gguf", {"a": ((2, 32), "Q8_0", bytes(68))})
    with pytest.raises(UserError, match="need the package gguf.*pip install gguf"):
        read_tensor(read_header(path), "a")


def test_a_wan_in_gguf_becomes_a_mive(tmp_path):
    torch.manual_seed(0)
    layout = wan_layout(CONFIG)
    wan = {key: torch.randn(shape) for key, (_, shape) in layout.items()}
    path = write_gguf(tmp_path / "wan.gguf", {key: plain(value, "F16") for key, value in wan.items()}, {"general.architecture": "wan"})
    init_from_wan(path, tmp_path / "mive.safetensors", vlm="2b")
    made = load_dit(tmp_path / "mive.safetensors", attention=torch_attention).state_dict()
    assert torch.equal(made["blocks.0.ffn.0.weight"], wan["blocks.0.ffn.0.weight"].half().float())
    assert read_header(tmp_path / "mive.safetensors").dtypes["blocks.0.ffn.0.weight"] == "F16"


def whole(tmp_path) -> bytes:
    return write_gguf(tmp_path / "whole.gguf", {"a": plain(torch.ones(2, 32)), "b": plain(torch.ones(3))}, {"name": "x"}).read_bytes()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda data: data[:-40], "the file is truncated; got"),
        (lambda data: data[:50], "the file is truncated; got 50 bytes"),
        (lambda data: data[:2], "the file is truncated"),
        (lambda data: b"PK34" + data[4:], "no GGUF file that can be read"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "number of tensors is not believable"),
        (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], "number of entries is not believable"),
        (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], "the file is truncated"),
        (lambda data: data.replace(text("name") + struct.pack("<I", 8), text("name") + struct.pack("<I", 77)), "kind of value that is not known; got 77"),
        (lambda data: data.replace(text("a") + struct.pack("<IQQI", 2, 32, 2, 0), text("a") + struct.pack("<IQQI", 2, 32, 2, 99)), "got a as type 99"),
        (lambda data: data.replace(text("a") + struct.pack("<IQQI", 2, 32, 2, 0), text("a") + struct.pack("<IQQI", 2, 31, 2, 8)), "do not hold together"),
        (lambda data: data.replace(text("a") + struct.pack("<IQQI", 2, 32, 2, 0), text("a") + struct.pack("<IQQI", 2, 2**50, 2, 0)), "the file is truncated"),
        (lambda data: data.replace(text("a") + struct.pack("<IQQI", 2, 32, 2, 0), text("a") + struct.pack("<IQQI", 9, 32, 2, 0)), "too many dimensions"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, said):
    data = change(whole(tmp_path))
    assert data != whole(tmp_path)
    (tmp_path / "damaged.gguf").write_bytes(data)
    with pytest.raises(UserError, match=said):
        read_header(tmp_path / "damaged.gguf")


def test_cut_anywhere_it_is_a_users_error(tmp_path):
    data = whole(tmp_path)
    for length in range(len(data) - 20):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(UserError):
            read_header(tmp_path / "cut.gguf")


def test_a_gguf_without_our_config_is_told(state, tmp_path):
    path = write_gguf(tmp_path / "dit.gguf", {key: plain(value) for key, value in state.items()})
    with pytest.raises(UserError, match=METADATA_KEY):
        load_dit(path, attention=torch_attention)
