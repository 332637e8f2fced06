"""A Qwen3-VL in one file: recognised by its shapes, its 8-bit weights scaled back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.formats.quantized import FORMATS, rotate
from mive_core.formats.vlm_file import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, config_from_shapes, read_single_file, vlm_name
from mive_core.prompt import build_inputs
from mive_core.types import Clip, EditRequest
from mive_core.vlm import VLM

LAYERS, WIDTH = 2, 64  # of the body


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes as words, and Qwen's markers at their published numbers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    markers = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": VISION_START,
        "<|vision_end|>": VISION_END,
        "<|image_pad|>": IMAGE_TOKEN,
        "<|video_pad|>": VIDEO_TOKEN,
    }
    by_number = {number: marker for marker, number in markers.items()}
    words.add_tokens([AddedToken(f"<|unused_{n}|>", normalized=False) for n in range(len(alphabet), 151643)])
    words.add_special_tokens([AddedToken(by_number.get(n, f"<|special_{n}|>"), special=True, normalized=False) for n in range(151643, VIDEO_TOKEN + 1)])
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')
    return folder


def states_of(vlm):
    frames = torch.rand(9, 64, 96, 3, generator=torch.Generator().manual_seed(1))
    inputs = build_inputs(EditRequest(Clip(frames, 8.0), frames[0], "make it blue"), vlm.processor, PRESETS["14b"])
    return inputs, vlm.encode(inputs, (1, LAYERS)).states


def published(body):
    return {f"model.{key}": value.clone() for key, value in body.state_dict().items()}


@pytest.mark.slow
def test_a_file_gives_the_states_of_the_model_it_holds(body, tokenizer, tmp_path):
    path = tmp_path / "qwen3vl_bf16.safetensors"
    save_file({**published(body), "lm_head.weight": torch.zeros(3, 3)}, path)
    vlm = VLM.load(path, tokenizer=tokenizer)
    inputs, states = states_of(vlm)
    assert (vlm.width, vlm.num_layers, vlm.name) == (WIDTH, LAYERS, "qwen3vl_bf16")
    assert int((inputs.mm_token_type_ids == 1).sum()) == 2 * 3 and int((inputs.mm_token_type_ids == 2).sum()) == 2 * 2 * 3
    expected = VLM(body, vlm.processor, "").encode(inputs, (1, LAYERS)).states
    assert expected.std() > 0.01
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("suffix, rows", [("weight_scale", False), ("scale_weight", False), ("weight_scale", True)])
def test_8_bit_weights_are_scaled_back(body, tmp_path, suffix, rows):
    state, packed = published(body), {"scaled_fp8": torch.zeros(2)}
    for key, value in state.items():
        if key.endswith("proj.weight") and value.ndim == 2:
            scale = (value.abs().amax(1) if rows else value.abs().max()) / 448
            packed[key] = (value / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
            packed[f"{key.removesuffix('weight')}{suffix}"] = scale
            packed[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        else:
            packed[key] = value
    save_file(packed, tmp_path / "fp8.safetensors")
    _, weights = read_single_file(tmp_path / "fp8.safetensors", torch.float32)
    assert weights.keys() == {key.removeprefix("model.") for key in state}
    for key, value in state.items():
        error = (weights[key.removeprefix("model.")] - value).norm()
        assert error <= 0.04 * value.norm() if f"{key.removesuffix('weight')}{suffix}" in packed else error == 0


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8", "int8_unrotated"])
def test_what_comfyuis_users_have_besides_fp8_is_decoded(body, tmp_path, name):
    """With all that published files hold: quantised embeddings, notes in the header, and factors of a layer's input (AWQ)."""
    pytest.importorskip("comfy_kitchen")
    state, packed, factor = published(body), {}, 1.5
    form = FORMATS[name]
    if name == "int8":  # rotated in smaller groups, which a note says
        form = replace(
            form, note=form.note | {"convrot_groupsize": 64}, multiples=(1, 64), encode=lambda weight: FORMATS["int8_unrotated"].encode(rotate(weight, 64))
        )
    for key, value in state.items():
        layer = key.removesuffix(".weight")
        if value.ndim == 2 and ".language_model." in key and form.fits(tuple(value.shape)):
            packed |= {f"{layer}.{part}": stored.clone() for part, stored in form.encode(value / factor if "o_proj" in key else value).items()}
            packed[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(form.note).encode()), dtype=torch.uint8)
            if "o_proj" in key:
                packed[f"{layer}.pre_quant_scale"] = torch.full((value.shape[1],), factor)
        else:
            packed[key] = value
    assert name.startswith("int8") == ("model.language_model.embed_tokens.comfy_quant" in packed)  # in the others it does not fit
    assert sum(key.endswith("comfy_quant") for key in packed) >= 6 * LAYERS
    save_file(packed, tmp_path / "small.safetensors")
    values, weights = read_single_file(tmp_path / "small.safetensors", torch.float32)
    assert values["text_config"]["hidden_size"] == WIDTH and weights.keys() == {key.removeprefix("model.") for key in state}
    limit = 0.12 if name == "nvfp4" else 0.04
    for key, value in state.items():
        error = (weights[key.removeprefix("model.")] - value).norm()
        assert 0 < error <= limit * value.norm() if f"{key.removesuffix('.weight')}.comfy_quant" in packed else error == 0


def test_an_unknown_format_is_refused_by_its_name(body, tmp_path):
    """Such as the one of 4 and 8 bits in which Qwen3-VL-32B is published too."""
    note = torch.tensor(list(b'{"format": "convrot_w4a8"}'), dtype=torch.uint8)
    save_file({**published(body), "model.language_model.layers.0.mlp.up_proj.comfy_quant": note}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="quantised format cannot be read; got convrot_w4a8"):
        read_single_file(tmp_path / "odd.safetensors", torch.float32)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.pop("model.visual.pos_embed.weight"), "no whole Qwen3-VL; got no visual.pos_embed.weight"),
        (lambda s: [s.pop(key) for key in list(s) if ".visual.blocks." in key], "no whole Qwen3-VL; got no visual.blocks.0"),
        (lambda s: s.pop("model.language_model.norm.weight"), "weights missing or unknown, such as language_model.norm.weight"),
        (lambda s: s.update({"model.visual.blocks.24.norm1.weight": torch.ones(WIDTH)}), "no published Qwen3-VL; got 25 vision layers"),
        (lambda s: s.update({"model.language_model.norm.weight": torch.ones(WIDTH, dtype=torch.uint8)}), "this dtype cannot be read"),
    ],
)
def test_what_is_not_whole_is_refused(body, tokenizer, tmp_path, change, said):
    state = published(body)
    change(state)
    save_file(state, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match=said):
        VLM.load(tmp_path / "strange.safetensors", tokenizer=tokenizer)


def test_a_file_needs_a_tokenizer_of_qwens(body, vlm_folder, tmp_path):
    path = tmp_path / "alone.safetensors"
    save_file(published(body), path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        VLM.load(path)
    with pytest.raises(UserError, match="not Qwen3-VL's tokenizer"):
        VLM.load(path, tokenizer=vlm_folder)


def test_another_model_is_named(random_models, tokenizer):
    with pytest.raises(UserError, match="looks like a MiVE DiT"):
        VLM.load(random_models / "dit.safetensors", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "name, text, vision",
    [
        ("2B", (2048, 6144, 28, 16), (24, 1024, 4096)),
        ("4B", (2560, 9728, 36, 32), (24, 1024, 4096)),
        ("8B", (4096, 12288, 36, 32), (27, 1152, 4304)),
        ("32B", (5120, 25600, 64, 64), (27, 1152, 4304)),
    ],
)
def test_published_sizes_are_recognised_by_their_shapes(name, text, vision):
    """Widths, depths and heads as published; the shapes come from transformers' own class."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    width, inner, layers, heads = text
    depth, vision_width, vision_inner = vision
    published = Qwen3VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_inner,
            "out_hidden_size": width,
            "deepstack_visual_indexes": {24: [5, 11, 17], 27: [8, 16, 24]}[depth],
        },
    )
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Qwen3VLModel(published).state_dict().items()}
    values = config_from_shapes(Path("x"), shapes)
    got = Qwen3VLConfig(**values)
    for part, wanted in (("text_config", published.text_config), ("vision_config", published.vision_config)):
        for key in values[part].keys() - {"rope_theta", "rope_scaling", "max_position_embeddings", "rms_norm_eps"}:
            assert getattr(getattr(got, part), key) == getattr(wanted, key), key
    assert vlm_name(width, Path("x")) == f"Qwen3-VL-{name}"
