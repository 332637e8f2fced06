"""ComfyUI's own Qwen3-VL, as its CLIP loader makes it of a file, against transformers' with the same weights."""

import pytest
import torch
from safetensors.torch import save_file

from mive_core.formats.vlm_file import IMAGE_TOKEN, MROPE_SECTION, ROPE_THETA, VIDEO_TOKEN
from mive_core.prompt import build_inputs
from mive_core.vlm import collect_hidden_states, model_arguments, model_from_config

TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 128, "intermediate_size": 160, "depth": 6, "deepstack_visual_indexes": [1, 3, 4]}
TOLERANCE = 1e-4  # of the largest number in a layer


@pytest.fixture(scope="module")
def reference():
    """transformers' Qwen3-VL with random weights, small, but with the heads, rotations and vocabulary of the published ones."""
    torch.manual_seed(5)
    rotation = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": MROPE_SECTION}
    model = model_from_config(
        {
            "text_config": {**TEXT, "vocab_size": 151936, "head_dim": 128, "rope_theta": ROPE_THETA, "rms_norm_eps": 1e-6, "rope_scaling": rotation},
            "vision_config": {
                **VISION,
                "num_heads": 16,
                "patch_size": 16,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "num_position_embeddings": 2304,
                "out_hidden_size": TEXT["hidden_size"],
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VIDEO_TOKEN,
        }
    )
    for value in model.parameters():
        torch.nn.init.normal_(value, 1.0 if value.ndim == 1 else 0.0, 0.1 if value.ndim == 1 else 0.7 * value[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip(pack, reference, base):
    """The same weights in a file, through ComfyUI's loader of text encoders."""
    import comfy.sd
    import comfy.text_encoders.qwen3vl as core

    path = base / "models" / "text_encoders" / "small_qwen3vl.safetensors"
    save_file({f"model.{key}": value.contiguous() for key, value in reference.state_dict().items()}, path)
    kept = core.QWEN3VL_VISION["qwen3vl_8b"]
    core.QWEN3VL_VISION["qwen3vl_8b"] = VISION
    try:
        return comfy.sd.load_clip([str(path)], model_options={"qwen3vl_8b_model_config": {**TEXT, "lm_head": False}, "dtype": torch.float32})
    finally:
        core.QWEN3VL_VISION["qwen3vl_8b"] = kept


@pytest.fixture(scope="module")
def inputs(pack, clip, request_):
    hosted = pack.submodule("nodes.bridge.clip").vlm_of_clip(clip)
    return build_inputs(request_, hosted.vlm.processor, hosted.default_config)


def test_positions_are_transformers(pack, reference, inputs):
    given = model_arguments(reference.forward, inputs)
    expected, _ = reference.get_rope_index(given["input_ids"], given["mm_token_type_ids"], inputs.image_grid_thw, inputs.video_grid_thw)
    assert torch.equal(pack.submodule("nodes.bridge.clip").positions(inputs), expected[:, 0])
    assert (inputs.input_ids == VIDEO_TOKEN).sum() > (inputs.input_ids == IMAGE_TOKEN).sum() > 0 and inputs.video_grid_thw[0, 0] > 1


@torch.inference_mode()
def test_every_layers_states_are_transformers(pack, clip, reference, inputs):
    """Image and video, layers before their DeepStack features, after them, and the last one after the final norm."""
    hosted = pack.submodule("nodes.bridge.clip").vlm_of_clip(clip)
    layers = tuple(range(hosted.vlm.num_layers + 1))
    expected = collect_hidden_states(reference, inputs, layers)
    got = hosted.vlm.encode(inputs, layers).states
    for k in layers:
        assert (got[:, k] - expected[k]).abs().max() <= TOLERANCE * expected[k].abs().max(), k
    assert torch.equal(hosted.vlm.encode(inputs, (2,)).states[:, 0], got[:, 2])  # the layers after it did not run
    pooled = reference.visual(inputs.pixel_values_videos, grid_thw=inputs.video_grid_thw, return_dict=True)
    assert all(features.abs().max() > 0.1 for features in pooled.deepstack_features)  # so that DeepStack's share is not silent


@torch.inference_mode()
def test_the_node_gives_the_states_of_a_loaded_vlm(pack, clip, reference, request_, inputs):
    """Through MiVE Encode, and as a wire of the same kind that MiVE Load VLM has."""
    (vlm,) = pack.run("MiVEVLMFromCLIP", clip=clip)
    text = pack.output("MiVELayerSelect", preset="first + last (paper)", vlm=vlm).ui["text"][0]
    assert "layers 1, 5 of 5" in text
    pictures = {"source": request_.source.frames, "reference": request_.reference[None]}
    (positive,) = pack.run("MiVEEncode", vlm=vlm, instruction=request_.instruction, fps=request_.source.fps, **pictures)
    expected = collect_hidden_states(reference, inputs, (1, 5))
    states = positive[0][0].unflatten(2, (2, -1))
    for place, k in enumerate((1, 5)):
        assert (states[:, :, place] - expected[k]).abs().max() <= TOLERANCE * expected[k].abs().max()


@torch.inference_mode()
def test_an_image_without_a_video_is_read_too(pack, clip, reference, inputs):
    """As MiVE Layer Diagnostics reads it."""
    from dataclasses import replace

    end = int((inputs.input_ids[0] == IMAGE_TOKEN).nonzero().max()) + 2
    alone = {name: getattr(inputs, name)[:, :end] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    image = replace(inputs, **alone, pixel_values_videos=None, video_grid_thw=None)
    got = pack.submodule("nodes.bridge.clip").vlm_of_clip(clip).vlm.encode(image, (1, 5)).states
    expected = collect_hidden_states(reference, image, (1, 5))
    for place, k in enumerate((1, 5)):
        assert (got[:, place] - expected[k]).abs().max() <= TOLERANCE * expected[k].abs().max()


def test_another_text_encoder_is_refused(pack, clip):
    class Encoder:
        clip = "t5xxl"

    other = type("CLIP", (), {"cond_stage_model": Encoder(), "patcher": clip.patcher})()
    with pytest.raises(ValueError, match="this CLIP is no Qwen3-VL with its vision tower; got Encoder.*flux2 drop the vision tower"):
        pack.run("MiVEVLMFromCLIP", clip=other)
