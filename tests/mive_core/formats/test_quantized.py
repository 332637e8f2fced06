"""The formats of `mive quantize`: what they store, what is read back, and what is refused."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core import cli
from mive_core.attention import torch_attention
from mive_core.bench.against_diffusers import make_forward
from mive_core.config import PRESETS
from mive_core.cost.flops import Layout
from mive_core.dit import MiVEDiT
from mive_core.errors import UserError
from mive_core.formats import quantized_linear
from mive_core.formats.checkpoint import load_dit, save_dit
from mive_core.formats.merge import merge
from mive_core.formats.quantize import MATRIX, quantize
from mive_core.formats.quantized import FORMATS, decode, hadamard
from mive_core.formats.quantized_file import note_of, notes_of, read_dequantized
from mive_core.formats.quantized_linear import QuantizedLinear, can_multiply
from mive_core.formats.safetensors_file import read_header

pytest.importorskip("comfy_kitchen")  # of the extra `formats`; half of the formats need it

PRODUCT_ERROR = {"fp8": 0.04, "mxfp8": 0.04, "nvfp4": 0.12, "int8": 0.01, "int8_unrotated": 0.01}  # of normal weights and inputs
CONFIG = replace(PRESETS["tiny"], num_blocks=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three blocks of the embedded DiT's size, with random weights that are nowhere zero."""
    torch.manual_seed(0)
    dit = MiVEDiT(CONFIG, operations=torch.nn, attention=torch_attention)
    path = tmp_path_factory.mktemp("formats") / "dit.safetensors"
    save_dit(path, {key: value + 0.02 * torch.randn_like(value) for key, value in dit.state_dict().items()}, CONFIG, torch.bfloat16)
    return path


@pytest.fixture(scope="module")
def made(checkpoint):
    """The checkpoint in every format: name -> path and report."""
    paths = {name: checkpoint.with_name(f"{name}.safetensors") for name in FORMATS}
    return {name: (path, quantize(checkpoint, path, name, keep_blocks=0)) for name, path in paths.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_the_layout_announces_and_what_comfy_kitchen_reads(name):
    """comfy-kitchen is what ComfyUI's quantised layers read with."""
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout, TensorCoreMXFP8Layout, TensorCoreNVFP4Layout, TensorWiseINT8Layout

    torch.manual_seed(0)
    weight, form = torch.randn(160, 512), FORMATS[name]
    parts = form.encode(weight)
    assert {part: (value.dtype, tuple(value.shape)) for part, value in parts.items()} == form.parts(160, 512)
    common = {"orig_dtype": torch.float32, "orig_shape": (160, 512)}
    if name == "nvfp4":
        params = TensorCoreNVFP4Layout.Params(scale=parts["weight_scale_2"], block_scale=parts["weight_scale"], **common)
    elif name == "mxfp8":
        params = TensorCoreMXFP8Layout.Params(scale=parts["weight_scale"].view(torch.float8_e8m0fnu), **common)
    elif name == "fp8":
        params = TensorCoreFP8Layout.Params(scale=parts["weight_scale"], **common)
    else:
        rotated = {key: value for key, value in form.note.items() if key != "format"}
        params = TensorWiseINT8Layout.Params(scale=parts["weight_scale"], **rotated, **common)
    layout = {"nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout", "fp8": "TensorCoreFP8Layout"}.get(name, "TensorWiseINT8Layout")
    theirs, ours = QuantizedTensor(parts["weight"], layout, params).dequantize(), decode(parts, form.note, torch.float32)
    assert (theirs - ours).abs().max() < 1e-5
    assert 0 < (ours - weight).norm() / weight.norm() < PRODUCT_ERROR[name]


def test_the_rotation_is_its_own_inverse_and_spreads_an_outlier():
    matrix = hadamard(256)
    assert torch.equal(matrix, matrix.T) and torch.allclose(matrix @ matrix, torch.eye(256), atol=1e-6)
    torch.manual_seed(0)
    weight = torch.randn(64, 512)
    weight[:, 7] *= 40
    errors = {name: (decode(form.encode(weight), form.note, torch.float32) - weight).norm() for name, form in FORMATS.items() if name.startswith("int8")}
    assert errors["int8"] < 0.5 * errors["int8_unrotated"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_line_reads_back_what_it_wrote(name, made, checkpoint):
    path, report = made[name]
    header, before = read_header(path), load_file(checkpoint)
    matrices = [key for key in before if MATRIX.fullmatch(key)]
    assert sorted(report["matrices"]) == sorted(matrices) and report["kept"] == []
    assert notes_of([header]).keys() == set(matrices)
    assert {key: shape for key, shape in header.shapes.items() if key in before} == {key: tuple(value.shape) for key, value in before.items()}
    for key in before:
        got = read_dequantized(header, key, torch.float32)
        error = (got - before[key].float()).norm() / before[key].float().norm()
        assert 0 < error < PRODUCT_ERROR[name] if key in matrices else error == 0


@pytest.mark.parametrize("name", FORMATS)
def test_kept_in_its_format_a_model_computes_what_scaling_back_computes(name, made):
    back, kept = (load_dit(made[name][0], attention=torch_attention, float8=mode) for mode in ("scaled_back", "kept"))
    assert 3 * sum(v.numel() * v.itemsize for v in kept.state_dict().values()) < 2 * sum(v.numel() * v.itemsize for v in back.state_dict().values())
    results = []
    for model in (back, kept):
        torch.manual_seed(0)
        with torch.inference_mode():
            results.append(make_forward(model, Layout(5, (2, 2, 3)))())
    assert torch.allclose(*results, atol=1e-5) and results[0].std() > 0.05


@pytest.mark.parametrize("name", ["int8", "int8_unrotated"])
def test_int8_is_multiplied_as_comfy_kitchen_multiplies_it(name):
    torch.manual_seed(0)
    weight, bias, x, form = torch.randn(96, 512), torch.randn(96), torch.randn(2, 5, 512), FORMATS[name]
    parts = form.encode(weight)
    ours = QuantizedLinear(parts, form.note, bias, multiplied=True)(x)
    theirs = torch.ops.comfy_kitchen.int8_linear(x, parts["weight"], parts["weight_scale"], bias, 0, name == "int8", 256)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert ours.shape == (2, 5, 96) and (ours - theirs).abs().max() < 1e-3 * exact.abs().max()
    assert 0.003 < (ours - exact).norm() / exact.norm() < 0.02


def test_where_it_cannot_be_multiplied_it_is_kept_and_says_so(made, monkeypatch):
    with pytest.warns(UserWarning, match="nvfp4 is not multiplied on the command line: the matrices stay so in memory and are scaled back at each use"):
        model = load_dit(made["nvfp4"][0], attention=torch_attention, float8="multiplied")
    assert model.blocks[0].ffn[0].weight.dtype == torch.uint8 and not model.blocks[0].ffn[0].multiplied
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_dit(made["int8"][0], attention=torch_attention, float8="multiplied").blocks[0].ffn[0].multiplied
    # a card before Turing, and one of the generation before fp8
    for capability, can in (((7, 0), set()), ((7, 5), {"int8", "int8_unrotated"}), ((8, 9), FORMATS.keys() - {"mxfp8", "nvfp4"}), ((10, 0), FORMATS.keys())):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert {name for name in FORMATS if can_multiply(name, "cuda")} == can
    monkeypatch.setattr(quantized_linear, "can_multiply", lambda name, device: False)
    for name in ("fp8", "int8"):
        with pytest.warns(UserWarning, match=f"{name} is not multiplied by this device, cpu"):
            assert not load_dit(made[name][0], attention=torch_attention, float8="multiplied").blocks[0].ffn[0].multiplied


def test_blocks_and_matrices_that_do_not_fit_are_kept(checkpoint, random_models, tmp_path):
    report = quantize(checkpoint, tmp_path / "out.safetensors", "int8", keep_blocks=1)
    assert {key.split(".")[1] for key in report["matrices"]} == {"1"} and {key.split(".")[1] for key in report["kept"]} == {"0", "2"}
    report = quantize(checkpoint, tmp_path / "out.safetensors", "nvfp4")  # by default the ends, which bear four bits least
    assert {key.split(".")[1] for key in report["matrices"]} == {"1"}
    for number in (-1, 2):
        with pytest.raises(UserError, match="no block would be quantised; got"):
            quantize(checkpoint, tmp_path / "none.safetensors", "int8", keep_blocks=number)
    with pytest.raises(UserError, match="holds none of the matrices.*multiples of 1 and 256"):
        small = replace(PRESETS["tiny"], num_blocks=1, width=96, num_heads=3, ffn_width=96)
        save_dit(tmp_path / "small.safetensors", MiVEDiT(small, operations=torch.nn, attention=torch_attention).state_dict(), small)
        quantize(tmp_path / "small.safetensors", tmp_path / "none.safetensors", "int8")
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_a_merge_keeps_the_bases_format(name, made, tmp_path):
    lora = {}
    for layer in ("blocks.0.self_attn.q", "blocks.2.ffn.2"):
        outputs, inputs = read_header(made[name][0]).shapes[f"{layer}.weight"]
        lora |= {f"diffusion_model.{layer}.lora_A.weight": torch.randn(4, inputs), f"diffusion_model.{layer}.lora_B.weight": 0.2 * torch.randn(outputs, 4)}
    save_file(lora, tmp_path / "lora.safetensors")
    merge(made[name][0], [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "out.safetensors")
    base, merged = read_header(made[name][0]), read_header(tmp_path / "out.safetensors")
    assert notes_of([merged]) == notes_of([base])
    key = "blocks.2.ffn.2.weight"
    down, up = (lora[f"diffusion_model.blocks.2.ffn.2.lora_{part}.weight"] for part in "AB")
    expected = read_dequantized(base, key, torch.float32) + up @ down
    assert (read_dequantized(merged, key, torch.float32) - expected).norm() < PRODUCT_ERROR[name] * expected.norm()


def test_notes_in_the_metadata_are_read(made, tmp_path):
    """As ComfyUI's first quantised files had them."""
    path, _ = made["int8"]
    tensors, header = load_file(path), read_header(path)
    notes = {key.removesuffix(".weight"): note for key, note in notes_of([header]).items()}
    kept = {key: value for key, value in tensors.items() if not key.endswith(".comfy_quant")}
    save_file(kept, tmp_path / "old.safetensors", {**header.metadata, "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": notes})})
    old = read_header(tmp_path / "old.safetensors")
    assert notes_of([old]) == notes_of([header])
    key = "blocks.1.ffn.0.weight"
    assert torch.equal(read_dequantized(old, key, torch.float32), read_dequantized(header, key, torch.float32))
    save_file(kept, tmp_path / "old.safetensors", {**header.metadata, "_quantization_metadata": "{"})
    with pytest.raises(UserError, match="notes on quantised matrices are damaged"):
        notes_of([read_header(tmp_path / "old.safetensors")])


LAYER = "blocks.1.ffn.0"
DAMAGE = [  # format, part that is replaced, by what (None: taken away), message
    ("nvfp4", "weight_scale_2", None, "got no blocks.1.ffn.0.weight_scale_2"),
    ("int8", "weight_scale", None, "got no blocks.1.ffn.0.weight_scale"),
    ("int8", "comfy_quant", None, "no note that says how to read it"),
    ("int8", "comfy_quant", '{"format": "mxfp8"}', "not what its note says; got blocks.1.ffn.0.weight as I8; expected mxfp8"),
    ("mxfp8", "comfy_quant", '{"format": "float8_e4m3fn"}', "got blocks.1.ffn.0.weight_scale as U8; expected float8_e4m3fn"),
    ("fp8", "comfy_quant", '{"format": "convrot_w4a4"}', "this quantised format cannot be read; got convrot_w4a4"),
    ("fp8", "comfy_quant", '{"format": ', "note on a quantised matrix is damaged"),
    ("int8", "comfy_quant", '{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 3}', "rotated in groups of 3"),
]


@pytest.mark.parametrize(("name", "part", "text", "says"), DAMAGE, ids=range(len(DAMAGE)))
def test_files_that_are_not_what_they_say_are_refused(name, part, text, says, made, tmp_path):
    tensors, header = load_file(made[name][0]), read_header(made[name][0])
    if text is None:
        tensors.pop(f"{LAYER}.{part}")
    else:
        tensors[f"{LAYER}.{part}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "dit.safetensors", header.metadata)
    with pytest.raises(UserError, match=says):
        load_dit(tmp_path / "dit.safetensors", attention=torch_attention)


def test_a_factor_of_a_layers_input_is_part_of_the_weight(made, tmp_path):
    """Calibrated files (AWQ) multiply a layer's input by `pre_quant_scale`; without it every number would be off."""
    path, factors = tmp_path / "dit.safetensors", torch.rand(256) + 0.5
    save_file({**load_file(made["int8"][0]), f"{LAYER}.pre_quant_scale": factors}, path, read_header(made["int8"][0]).metadata)
    plain = read_dequantized(read_header(made["int8"][0]), f"{LAYER}.weight", torch.float32)
    assert torch.allclose(read_dequantized(read_header(path), f"{LAYER}.weight", torch.float32), plain * factors)
    x = torch.randn(4, 256)
    for mode in ("scaled_back", "kept", "multiplied"):
        layer = load_dit(path, attention=torch_attention, float8=mode).blocks[1].ffn[0]
        expected = torch.nn.functional.linear(x * factors, plain, layer.bias)
        assert (layer(x) - expected).norm() < 0.02 * expected.norm()


def test_half_a_file_is_refused(made, tmp_path):
    data = made["nvfp4"][0].read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="the file is truncated"):
        load_dit(tmp_path / "half.safetensors", attention=torch_attention)


def test_the_command_refuses_in_one_line(checkpoint, made, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "out.safetensors")
    assert cli.main(["quantize", str(checkpoint), out, "--format", "q4_k"]) == 2
    assert "invalid choice: 'q4_k'" in capsys.readouterr().err
    assert cli.main(["quantize", str(made["mxfp8"][0]), out, "--format", "nvfp4"]) == 2
    assert "in 8 bits already, or fewer" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "comfy_kitchen", None)
    assert cli.main(["quantize", str(checkpoint), out, "--format", "nvfp4"]) == 2
    assert "need the package comfy-kitchen" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
    assert cli.main(["quantize", str(checkpoint), out, "--format", "int8"]) == 0  # plain torch
    assert note_of(read_header(tmp_path / "out.safetensors"), f"{LAYER}.weight")["convrot"]
