"""A LoRA on a loaded model computes what the merged file computes, with 8-bit matrices kept too."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mive_core import cli
from mive_core.attention import torch_attention
from mive_core.bench.against_diffusers import make_forward
from mive_core.cost.flops import Layout
from mive_core.errors import UserError
from mive_core.formats.checkpoint import load_dit, read_config, save_dit
from mive_core.formats.float8 import Float8Linear
from mive_core.formats.lora_apply import LowRankBranch, apply_loras, find_loras
from mive_core.formats.lora_file import lora_metadata, write_lora
from mive_core.formats.merge import merge
from mive_core.formats.quantize import quantize
from mive_core.formats.untrained import NEW_PARTS, untrained_metadata
from mive_core.pipeline import Pipeline

LAYERS = ("self_attn.q", "ffn.0", "ffn.2")


@pytest.fixture(scope="module")
def models(random_models, tmp_path_factory) -> Path:
    """The random models as a start for training."""
    folder = tmp_path_factory.mktemp("start")
    for name in ("vae.safetensors", "vlm"):
        (folder / name).symlink_to(random_models / name)
    state, config = load_file(random_models / "dit.safetensors"), read_config(random_models / "dit.safetensors")
    torch.manual_seed(0)
    save_dit(folder / "dit.safetensors", {name: value + 0.02 * torch.randn_like(value) for name, value in state.items()}, config, metadata=untrained_metadata())
    return folder


@pytest.fixture(scope="module")
def lora(models) -> Path:
    """A LoRA that holds new parts too."""
    state, config = load_file(models / "dit.safetensors"), read_config(models / "dit.safetensors")
    torch.manual_seed(1)
    shapes = {f"blocks.0.{layer}": state[f"blocks.0.{layer}.weight"].shape for layer in LAYERS}
    adapters = {layer: (torch.randn(3, inputs), 0.05 * torch.randn(outputs, 3)) for layer, (outputs, inputs) in shapes.items()}
    differences = {name: 0.1 * torch.randn_like(value) for name, value in state.items() if name.startswith(NEW_PARTS)}
    write_lora(models / "lora.safetensors", adapters, 1.0, differences, lora_metadata(3, "dit.safetensors", config, NEW_PARTS))
    return models / "lora.safetensors"


def result(model) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.inference_mode():
        return make_forward(model, Layout(5, (2, 2, 3)))()


def applied(path: Path, loras: list, **options):
    model = load_dit(path, attention=torch_attention, **options)
    config = read_config(path)
    apply_loras(model, find_loras(loras, {key: tuple(value.shape) for key, value in model.state_dict().items()}, config, path))
    return model


def test_it_is_the_merged_file(models, lora, tmp_path):
    base = models / "dit.safetensors"
    merge(base, [(lora, 0.8), (lora, -0.3)], tmp_path / "merged.safetensors")
    got, merged = applied(base, [(lora, 0.8), (lora, -0.3)]), load_dit(tmp_path / "merged.safetensors", attention=torch_attention)
    assert all(torch.equal(value, merged.state_dict()[name]) for name, value in got.state_dict().items())
    plain = load_dit(base, attention=torch_attention)
    assert (result(got) - result(plain)).norm() > 0.05 * result(plain).norm()
    assert torch.equal(result(applied(base, [(lora, 0.0)])), result(plain))


def test_in_16_bits_the_sum_is_rounded_once(models, lora, tmp_path):
    save_dit(tmp_path / "half.safetensors", load_file(models / "dit.safetensors"), read_config(models / "dit.safetensors"), torch.bfloat16)
    merge(tmp_path / "half.safetensors", [(lora, 1.0)], tmp_path / "merged.safetensors")
    got, merged = applied(tmp_path / "half.safetensors", [(lora, 1.0)], dtype=torch.bfloat16), load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(value, merged[name]) for name, value in got.state_dict().items() if value.dtype == torch.bfloat16)


def test_matrices_kept_in_8_bits_have_the_adapters_beside_them(models, lora, tmp_path):
    quantize(models, tmp_path / "fp8.safetensors")
    loras = [(lora, 0.5), (lora, 0.5)]
    kept, back = (applied(tmp_path / "fp8.safetensors", loras, float8=mode) for mode in ("kept", "scaled_back"))
    branch = kept.get_submodule("blocks.0.ffn.0")
    assert isinstance(branch, LowRankBranch) and isinstance(branch.layer.layer, Float8Linear) and branch.layer.layer.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(result(kept), result(back), rtol=1e-4, atol=1e-5)
    plain = load_dit(tmp_path / "fp8.safetensors", attention=torch_attention, float8="kept")
    assert (result(kept) - result(plain)).norm() > 0.05 * result(plain).norm()


def test_a_difference_of_an_8_bit_matrix_is_refused_with_the_way_out(models, tmp_path):
    quantize(models, tmp_path / "fp8.safetensors")
    shape = load_file(models / "dit.safetensors")["blocks.0.ffn.0.weight"].shape
    write_lora(tmp_path / "whole.safetensors", {}, 1.0, {"blocks.0.ffn.0.weight": torch.ones(shape)}, {})
    with pytest.raises(UserError, match="cannot be added to matrices kept in 8 bits; got a difference of blocks.0.ffn.0.weight; merge it .* `mive merge`"):
        applied(tmp_path / "fp8.safetensors", [(tmp_path / "whole.safetensors", 1.0)], float8="kept")
    applied(tmp_path / "fp8.safetensors", [(tmp_path / "whole.safetensors", 1.0)])


def test_a_start_with_its_new_parts_is_loaded_without_a_warning(models, lora):
    with pytest.warns(UserWarning, match="its edits are noise"):
        Pipeline.load(models, loras=[(lora, 0.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Pipeline.load(models, loras=[(lora, 1.0)])


def test_the_command_edits_with_it_and_edits_a_manifest_again_with_another(models, lora, tmp_path, monkeypatch, capsys):
    from PIL import Image

    from mive_core.media.video import write_video
    from mive_core.types import Clip

    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", Clip(torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0)), 8.0))
    Image.new("RGB", (48, 32), "red").save("reference.png")
    edit = ["edit", "--models", str(models), "--steps", "1"]
    single = ["--source", "clip.mp4", "--reference", "reference.png", "--instruction", "make it red", "--output"]
    assert cli.main([*edit, *single, "plain.mp4"]) == 0 and "its edits are noise" in capsys.readouterr().err
    assert cli.main([*edit, *single, "out.mp4", "--lora", str(lora)]) == 0 and "noise" not in capsys.readouterr().err
    assert Path("plain.mp4").read_bytes() != Path("out.mp4").read_bytes()
    assert cli.main([*edit, *single, "none.mp4", "--lora", "gone.safetensors:2"]) == 2
    assert "LoRA 'gone.safetensors': no such file" in capsys.readouterr().err
    Path("pairs.jsonl").write_text('{"source": "clip.mp4", "reference": "reference.png", "instruction": "make it red"}\n')
    edits = []
    for strength in ("0.5", "0.5", "1"):
        assert cli.main([*edit, "--manifest", "pairs.jsonl", "--output", "many", "--lora", f"{lora}:{strength}"]) == 0
        edits.append(next(Path("many").glob("*.mp4")).stat().st_mtime_ns)
    assert edits[0] == edits[1] < edits[2]
