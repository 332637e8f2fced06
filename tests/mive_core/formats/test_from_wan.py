"""From Wan to MiVE: what both have is copied to the bit, whatever the layout it comes in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core import cli
from mive_core.attention import torch_attention
from mive_core.errors import UserError
from mive_core.formats import safetensors_file
from mive_core.formats.checkpoint import WAN_TO_DIFFUSERS, load_dit, rename_keys, state_dict_shapes
from mive_core.formats.from_wan import init_from_wan, vlm_fields
from mive_core.formats.untrained import NEW_PARTS, untrained_parts
from mive_core.layers import parse_layers
from mive_core.pipeline import EMBEDDED, Pipeline
from mive_core.types import Clip, EditRequest

DROPPED = {"condition_embedder.text_embedder.": "text_embedding.", ".attn2.": ".cross_attn.", ".norm2.": ".norm3."}
PACKED = ("self_attn.q.weight", "ffn.0.weight")


@pytest.fixture(scope="module")
def theirs():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=32, freq_dim=64, ffn_dim=384, num_layers=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def wan(theirs):
    """The same weights by Wan's own keys."""
    return rename_keys(rename_keys(theirs.state_dict(), DROPPED), WAN_TO_DIFFUSERS, backwards=True)


def layouts(theirs, wan, folder: Path) -> dict[str, Path]:
    save_file(wan, folder / "original.safetensors")
    save_file({f"model.diffusion_model.{key}": value for key, value in wan.items()}, folder / "single.safetensors")
    theirs.save_pretrained(folder / "whole" / "transformer", max_shard_size="1MB")
    assert len(list((folder / "whole" / "transformer").glob("*.safetensors"))) > 1
    theirs.save_pretrained(folder / "one")
    return {"original": folder / "original.safetensors", "single": folder / "single.safetensors", "sharded": folder / "whole", "folder": folder / "one"}


def test_the_file_is_the_same_where_the_system_cannot_send_bytes(theirs, wan, tmp_path, monkeypatch):
    source = layouts(theirs, wan, tmp_path)["original"]
    init_from_wan(source, tmp_path / "sent.safetensors", vlm="4b")

    def refuse(*arguments):
        raise OSError("another kind of disk")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    monkeypatch.setattr(safetensors_file, "CHUNK", 1000)
    init_from_wan(source, tmp_path / "written.safetensors", vlm="4b")
    assert (tmp_path / "sent.safetensors").read_bytes() == (tmp_path / "written.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["original", "single", "sharded", "folder"])
def test_every_layout_gives_the_same_whole_checkpoint(theirs, wan, tmp_path, layout):
    destination = tmp_path / "mive.safetensors"
    config = init_from_wan(layouts(theirs, wan, tmp_path)[layout], destination, vlm="4b", layers="first+last")
    assert (config.width, config.num_heads, config.ffn_width, config.num_blocks, config.freq_dim) == (256, 2, 384, 2, 64)
    assert (config.vlm, config.vlm_width, config.vlm_num_layers, config.layers) == ("Qwen3-VL-4B", 2560, 36, parse_layers("first+last", 36))
    got = load_file(destination)
    for key, value in got.items():
        assert value.dtype == torch.bfloat16
        if key == "patch_embedding.weight":
            assert torch.equal(value[:, :16], wan[key]) and not value[:, 16:].any()
        elif not key.startswith("context."):
            assert torch.equal(value, wan[key].view_as(value)), key
    assert got["context.fuse.weight"].std() > 0.01 and not got["context.fuse.bias"].any()
    assert not any("cross_attn" in key or "norm3" in key or "text_embedding" in key for key in got)
    model = load_dit(destination, attention=torch_attention)
    assert model.config == config


@pytest.mark.parametrize("given", ["tiny", EMBEDDED["tiny"] / "vlm"])
def test_a_small_wan_reads_the_embedded_vlm(wan, tmp_path, given):
    save_file(wan, tmp_path / "wan.safetensors")
    config = init_from_wan(tmp_path / "wan.safetensors", tmp_path / "dit.safetensors", vlm=given)
    assert (config.vlm, config.layers, config.max_instruction_tokens, config.edit_frames) == ("Qwen3-VL-tiny", (1, 4), 48, 33)
    for part in ("vae.safetensors", "vlm"):
        (tmp_path / part).symlink_to(EMBEDDED["tiny"] / part)
    request = EditRequest(Clip(torch.rand(5, 32, 32, 3), 8.0), torch.rand(32, 32, 3), "a red cube")
    assert Pipeline.load(tmp_path).edit(request, steps=1).frames.shape == (5, 32, 32, 3)


def test_the_width_and_depth_of_a_vlm_are_read_from_its_folder(wan, tmp_path):
    save_file(wan, tmp_path / "wan.safetensors")
    folder = tmp_path / "own-vlm"
    folder.mkdir()
    with pytest.raises(UserError, match="VLM config.*no such file"):
        vlm_fields(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "text_config": {"hidden_size": 192, "num_hidden_layers": 6}}))
    config = init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors", vlm=folder)
    assert (config.vlm, config.vlm_width, config.vlm_num_layers, config.layers) == ("own-vlm", 192, 6, (1, 6))
    assert load_file(tmp_path / "mive.safetensors")["context.projections.0.weight"].shape[1] == 192
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 192}))
    with pytest.raises(UserError, match="no config of a Qwen3-VL"):
        vlm_fields(folder)
    with pytest.raises(UserError, match="unknown VLM.*got 9b.*tiny, or a folder"):
        vlm_fields("9b")


@pytest.mark.parametrize("width, patch_size, said", [(384, (1, 1, 1), None), (192, (1, 2, 2), "width 192; expected a multiple of 128")])
def test_heads_and_patches_of_small_wans(tmp_path, width, patch_size, said):
    from diffusers import WanTransformer3DModel

    heads = -(-width // 128)
    WanTransformer3DModel(
        patch_size=patch_size,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=384,
        num_layers=1,
    ).save_pretrained(tmp_path / "wan")
    if said:
        with pytest.raises(UserError, match=said):
            init_from_wan(tmp_path / "wan", tmp_path / "mive.safetensors")
        return
    config = init_from_wan(tmp_path / "wan", tmp_path / "mive.safetensors", vlm="tiny")
    assert (config.num_heads, config.head_dim, config.patch_size) == (3, 128, patch_size)


def test_the_source_half_is_silent_at_first(wan, tmp_path):
    save_file(wan, tmp_path / "wan.safetensors")
    init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors", vlm="2b")
    model = load_dit(tmp_path / "mive.safetensors", attention=torch_attention)
    noisy, source, reference = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 1, 4, 4)
    condition, t = torch.randn(1, 3, 256), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.equal(model(noisy, source, reference, condition, t), model(noisy, 0 * source, reference, condition, t))


def test_scaled_8_bit_weights_are_scaled_back(wan, tmp_path):
    packed = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, value in wan.items():
        if key.endswith(PACKED):
            scale = value.float().abs().max() / 448
            packed |= {key: (value.float() / scale).to(torch.float8_e4m3fn), f"{key.removesuffix('weight')}scale_weight": scale}
        else:
            packed[key] = value
    save_file(packed, tmp_path / "fp8.safetensors")
    init_from_wan(tmp_path / "fp8.safetensors", tmp_path / "mive.safetensors")
    got = load_file(tmp_path / "mive.safetensors")
    for key, value in wan.items():
        if key in got and key != "patch_embedding.weight":
            error = (got[key].view_as(value).float() - value.float()).norm() / value.float().norm()
            assert 0.001 < error < 0.05 if key.endswith(PACKED) else error == 0


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop("blocks.1.ffn.2.bias"), "1 missing .blocks.1.ffn.2.bias"),
        (lambda s: s.pop("time_embedding.0.weight"), "not whole; got no time_embedding.0.weight"),
        (lambda s: s.update({"img_emb.proj.0.bias": torch.ones(1)}), "looks like a Wan I2V checkpoint"),
        (lambda s: s.update({"patch_embedding.weight": torch.ones(256, 36, 1, 2, 2)}), "Wan I2V .*36 input channels"),
        (lambda s: s.update({"ffn.strange": torch.ones(1)}), "1 unexpected .ffn.strange"),
    ],
)
def test_other_checkpoints_are_refused_by_name(wan, tmp_path, change, said):
    state = dict(wan)
    change(state)
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(UserError, match=said):
        init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]


def fun_control(wan: dict, channels: int, version: str) -> dict:
    """Shapes as in alibaba-pai's files: 1.0 and 1.1 read the start image by CLIP too, 1.1 and 2.2 a reference image through a convolution."""
    state = {**wan, "patch_embedding.weight": torch.randn(256, channels, 1, 2, 2).to(torch.bfloat16)}
    if version != "2.2":
        state |= {f"img_emb.proj.{i}.{kind}": torch.ones(8) for i in (0, 1, 3, 4) for kind in ("weight", "bias")}
        for i in range(2):
            for part in ("k_img.weight", "k_img.bias", "v_img.weight", "v_img.bias", "norm_k_img.weight"):
                state[f"blocks.{i}.cross_attn.{part}"] = torch.ones(8)
    if version != "1.0":
        state |= {"ref_conv.weight": torch.ones(256, 16, 2, 2), "ref_conv.bias": torch.ones(256)}
    return state


@pytest.mark.parametrize("channels, version, prefix", [(48, "1.0", ""), (48, "1.1", ""), (52, "2.2", ""), (48, "1.1", "model.diffusion_model.")])
def test_what_reads_the_control_video_reads_the_source(wan, tmp_path, channels, version, prefix):
    state = fun_control(wan, channels, version)
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "wan.safetensors")
    config = init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors", vlm="2b", dtype=torch.bfloat16)
    got = load_file(tmp_path / "mive.safetensors")
    assert torch.equal(got["patch_embedding.weight"], state["patch_embedding.weight"][:, :32])
    assert torch.equal(got["blocks.1.ffn.2.weight"], wan["blocks.1.ffn.2.weight"])
    assert set(got) == set(state_dict_shapes(config))
    assert untrained_parts(tmp_path / "mive.safetensors") == NEW_PARTS
    model = load_dit(tmp_path / "mive.safetensors", attention=torch_attention)
    noisy, source, reference = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 1, 4, 4)
    condition, t = torch.randn(1, 3, 256), torch.tensor([0.5])
    with torch.no_grad():
        told, untold = (model(noisy, s, reference, condition, t) for s in (source, 0 * source))
    assert (told - untold).abs().max() > 0.01


def test_a_fun_control_in_diffusers_layout(tmp_path):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=48,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=384,
        num_layers=1,
        image_dim=64,
        added_kv_proj_dim=256,
    )
    theirs.save_pretrained(tmp_path / "wan")
    init_from_wan(tmp_path / "wan", tmp_path / "mive.safetensors", vlm="2b")
    assert torch.equal(load_file(tmp_path / "mive.safetensors")["patch_embedding.weight"], theirs.patch_embedding.weight[:, :32])


@pytest.mark.parametrize("low, high", [("low_noise_model", "high_noise_model"), ("transformer_2", "transformer")])
def test_each_expert_of_wan_2_2_converts_but_not_both(theirs, wan, tmp_path, low, high):
    theirs.save_pretrained(tmp_path / "wan" / low)
    theirs.save_pretrained(tmp_path / "wan" / high)
    with pytest.raises(UserError, match=f"two experts.*{low}. .low noise"):
        init_from_wan(tmp_path / "wan", tmp_path / "mive.safetensors")
    init_from_wan(tmp_path / "wan" / low, tmp_path / "mive.safetensors")
    key = "blocks.0.ffn.0.weight"
    assert torch.equal(load_file(tmp_path / "mive.safetensors")[key], wan[key])


TI2V_5B = {"patch_embedding.weight": torch.ones(256, 48, 1, 2, 2), "head.head.weight": torch.ones(192, 256), "head.head.bias": torch.ones(192)}


@pytest.mark.parametrize(
    "added, said",
    [
        (TI2V_5B, "another VAE than Wan2.1's .*48 output channels; expected 16"),
        ({**TI2V_5B, "patch_embedding.weight": torch.ones(256, 100, 1, 2, 2)}, "another VAE"),  # Fun-5B-Control
        ({"patch_embedding.weight": torch.ones(256, 36, 1, 2, 2), "img_emb.proj.0.weight": torch.ones(1)}, "Wan I2V checkpoint .I2V, FLF2V, Fun-InP"),  # 2.1
        ({"patch_embedding.weight": torch.ones(256, 36, 1, 2, 2)}, "36 input channels, which read a start image and no video"),  # 2.2
        ({"patch_embedding.weight": torch.ones(256, 20, 1, 2, 2)}, "not made for text to video; got 20 input channels"),
        ({"vace_blocks.0.before_proj.weight": torch.ones(1)}, "Wan VACE checkpoint; got blocks beside the model's own"),
        ({"vace_patch_embedding.weight": torch.ones(1)}, "Wan VACE checkpoint"),
        ({"casual_audio_encoder.encoder.final_linear.weight": torch.ones(1)}, "Wan S2V checkpoint; got layers that read sound"),
        ({"face_adapter.fuser_blocks.0.k_norm.weight": torch.ones(1), "img_emb.proj.0.weight": torch.ones(1)}, "Wan Animate checkpoint; got .* a pose"),
        ({"audio_proj.audio_proj_glob_1.layer.bias": torch.ones(1)}, "HuMo checkpoint; got layers that read sound"),
        ({"patch_embedding_pose.weight": torch.ones(1)}, "SCAIL or WanDancer checkpoint"),
        (
            {"control_adapter.conv.weight": torch.ones(1), "img_emb.proj.0.weight": torch.ones(1)},
            "Control-Camera checkpoint; got an adapter that reads a camera",
        ),
    ],
)
def test_other_wans_are_refused_with_the_reason(wan, tmp_path, added, said):
    save_file({**wan, **added}, tmp_path / "wan.safetensors")
    with pytest.raises(UserError, match=said) as error:
        init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors")
    assert "Wan2.1-T2V (1.3B, 14B)" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key, place", [("blocks.1.ffn.2.weight", -1), ("patch_embedding.weight", 0), ("head.modulation", 3)])
def test_a_wan_that_diverged_is_refused(wan, tmp_path, bad, key, place):
    state = {**wan, key: wan[key].clone()}
    state[key].view(-1)[place] = bad
    save_file(state, tmp_path / "wan.safetensors")
    with pytest.raises(UserError, match=f"NaN or infinity.*got {key}"):
        init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]


def test_what_fp16_cannot_hold_is_refused(wan, tmp_path):
    key = "blocks.0.ffn.0.bias"
    save_file({**wan, key: wan[key] + 1e6}, tmp_path / "wan.safetensors")
    with pytest.raises(UserError, match=f"too large for float16.*got {key}"):
        init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]
    init_from_wan(tmp_path / "wan.safetensors", tmp_path / "mive.safetensors", dtype=torch.bfloat16)


def test_a_mive_checkpoint_is_not_converted_again(random_models, tmp_path):
    with pytest.raises(UserError, match="looks like a MiVE DiT"):
        init_from_wan(random_models / "dit.safetensors", tmp_path / "mive.safetensors")


def test_the_command_says_what_it_wrote(wan, tmp_path, capsys):
    save_file(wan, tmp_path / "wan.safetensors")
    assert cli.main(["init-from-wan", str(tmp_path / "wan.safetensors"), str(tmp_path / "mive.safetensors"), "--layers", "0:36:6", "--dtype", "fp16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "MiVE DiT" and report["vlm"] == "Qwen3-VL-8B" and report["dtype"] == ["F16"] and len(report["layers"]) == 6
    assert cli.main(["init-from-wan", str(tmp_path / "none.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    assert "mive: error:" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_one_tensor_is_held_at_a_time(wan, tmp_path, peak_memory):
    """A file of 230 MB whose largest tensor has 9 MB: the process grows by far less than the file."""
    shapes = {key: value.shape for key, value in wan.items() if ".1." not in key.replace("time_projection.1", "")}
    big = {}
    for key, shape in shapes.items():
        shape = [{256: 1024, 384: 4608, 1536: 6144}.get(n, n) for n in shape]
        for number in range(9) if key.startswith("blocks.0.") else (0,):
            big[key.replace("blocks.0.", f"blocks.{number}.")] = torch.zeros(shape, dtype=torch.bfloat16)
    save_file(big, tmp_path / "wan.safetensors")
    size = (tmp_path / "wan.safetensors").stat().st_size
    assert size > 2e8
    script = peak_memory + (
        "import sys; from mive_core.formats.from_wan import init_from_wan; small, big, result = sys.argv[1:]\n"
        "init_from_wan(small, result)\n"  # what torch loads at its first use is none of the file's
        "before = peak(); init_from_wan(big, result); print(peak() - before)"
    )
    save_file(wan, tmp_path / "small.safetensors")
    files = [tmp_path / name for name in ("small.safetensors", "wan.safetensors", "mive.safetensors")]
    run = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 0.1 * size, run.stdout
