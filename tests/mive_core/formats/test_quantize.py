"""8 bits: what is stored, how far it is off, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mive_core import cli
from mive_core.attention import torch_attention
from mive_core.bench.against_diffusers import make_forward
from mive_core.cost.flops import Layout
from mive_core.errors import UserError
from mive_core.formats.checkpoint import load_dit, read_config, save_dit
from mive_core.formats.float8 import MODES, Float8Linear, to_float8
from mive_core.formats.quantize import MATRIX, quantize


@pytest.fixture
def quantized(random_models, tmp_path):
    report = quantize(random_models, tmp_path / "fp8.safetensors")
    return tmp_path / "fp8.safetensors", report


def test_the_blocks_matrices_are_float8_with_a_scale_and_a_note_and_nothing_else_changes(random_models, quantized):
    before, after = load_file(random_models / "dit.safetensors"), load_file(quantized[0])
    matrices = [key for key in before if MATRIX.fullmatch(key)]
    assert len(matrices) == 6  # q, k, v, o and two of the feed-forward, one block
    assert len(after) == len(before) + 2 * len(matrices)
    for key, value in before.items():
        if key not in matrices:
            assert torch.equal(after[key], value) and after[key].dtype == value.dtype
            continue
        layer = key.removesuffix(".weight")
        scale = after[f"{layer}.weight_scale"]
        assert after[key].dtype == torch.float8_e4m3fn and scale.shape == () and scale.dtype == torch.float32
        assert json.loads(bytes(after[f"{layer}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
        assert after[key].float().abs().max() == 448  # the largest entry uses the whole range
        # three bits after the point: half a step is 1/16 of the power of two below, and 2^-10 of the scale near zero
        assert ((after[key].float() * scale - value).abs() <= value.abs() / 16 + scale * 2**-9).all()
    assert read_config(quantized[0]) == read_config(random_models / "dit.safetensors")


def test_the_model_read_back_is_near_the_first_and_the_report_says_how_near(random_models, quantized):
    path, report = quantized
    first, second = (load_dit(file, attention=torch_attention) for file in (random_models / "dit.safetensors", path))
    assert report["bytes"] == path.stat().st_size < 0.7 * report["bytes_before"]
    assert report["relative_error"].keys() == {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2"}
    for layer, error in report["relative_error"].items():
        weights = [model.get_submodule(f"blocks.0.{layer}").weight for model in (first, second)]
        assert error["weight"] == pytest.approx(float((weights[1] - weights[0]).norm() / weights[0].norm()), rel=1e-3)
        assert 0 < error["product"] < 0.05


def test_kept_in_8_bits_it_computes_what_scaling_back_computes(quantized):
    """And takes one byte an entry of the matrices instead of two, and a scale."""
    path, _report = quantized
    back, kept, multiplied = (load_dit(path, attention=torch_attention, dtype=torch.bfloat16, float8=mode) for mode in MODES)
    assert sum(isinstance(module, Float8Linear) for module in kept.modules()) == 6
    assert kept.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    sizes = [sum(value.numel() * value.itemsize for value in model.state_dict().values()) for model in (back, kept)]
    entries = sum(value.numel() for key, value in back.state_dict().items() if MATRIX.fullmatch(key))
    assert sizes[0] - sizes[1] == entries - 6 * 4
    results = []
    for model in (back, kept, multiplied):
        torch.manual_seed(0)
        with torch.inference_mode():
            try:
                results.append(make_forward(model, Layout(5, (2, 2, 3)))())
            except (RuntimeError, NotImplementedError) as error:
                pytest.skip(f"no float8 products here: {error}")
    assert results[0].std() > 0.05 and torch.equal(results[1], results[0])
    assert 0 < (results[2] - results[0]).norm() < 0.1 * results[0].norm()
    with pytest.raises(UserError, match="unknown handling of 8 bits; got 'thrown'"):
        load_dit(path, attention=torch_attention, float8="thrown")


def test_a_float8_layer_is_near_the_layer_it_was_made_of():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 32).to(torch.bfloat16), torch.randn(2, 16, 64, dtype=torch.bfloat16)
    made = to_float8(layer.weight.detach().float(), torch.float8_e4m3fn)
    for multiplied in (False, True):
        try:
            got = Float8Linear(*made, layer.bias.detach(), multiplied)(x)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"no float8 products here: {error}")
        assert got.shape == (2, 16, 32) and (got - layer(x)).norm() < 0.08 * layer(x).norm()


def test_a_matrix_of_zeros_stays_zero(random_models, tmp_path):
    state, config = load_file(random_models / "dit.safetensors"), read_config(random_models / "dit.safetensors")
    state["blocks.0.ffn.2.weight"].zero_()
    save_dit(tmp_path / "zero.safetensors", state, config, torch.bfloat16)
    quantize(tmp_path / "zero.safetensors", tmp_path / "fp8.safetensors")
    model = load_dit(tmp_path / "fp8.safetensors", attention=torch_attention, dtype=torch.bfloat16)
    assert not model.blocks[0].ffn[2].weight.any() and model.blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_what_cannot_be_quantised_is_refused(random_models, quantized, tmp_path):
    with pytest.raises(UserError, match="in 8 bits already"):
        quantize(quantized[0], tmp_path / "again.safetensors")
    with pytest.raises(UserError, match="looks like a Wan VAE"):
        quantize(random_models / "vae.safetensors", tmp_path / "again.safetensors")
    with pytest.raises(UserError, match="unknown format; got q4_k"):
        quantize(random_models, tmp_path / "again.safetensors", "q4_k")
    state, config = load_file(random_models / "dit.safetensors"), read_config(random_models / "dit.safetensors")
    state.pop("blocks.0.ffn.2.weight")
    save_dit(tmp_path / "part.safetensors", state, config)
    with pytest.raises(UserError, match=r"1 missing \(blocks.0.ffn.2.weight\)"):
        quantize(tmp_path / "part.safetensors", tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


def test_the_command_prints_the_report_and_refuses_in_one_line(random_models, tmp_path, capsys):
    assert cli.main(["quantize", str(random_models), str(tmp_path / "fp8.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "fp8"
    assert cli.main(["quantize", str(tmp_path / "none"), str(tmp_path / "out.safetensors")]) == 2
    assert "no such" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
