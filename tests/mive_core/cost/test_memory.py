"""The memory model against a forward whose tensors are counted as they come and go, at the real shapes, on no device at all."""

from dataclasses import replace

import pytest
import torch

from mive_core.attention import matmul_attention, torch_attention
from mive_core.bench.against_diffusers import make_forward
from mive_core.bench.memory_counter import MemoryCounter
from mive_core.bench.models import fill_random, make_processor, make_request, make_vlm_inputs, random_vae, workload
from mive_core.bench.stage import decoded_pairs, exhaust
from mive_core.config import PRESETS
from mive_core.cost.flops import Layout
from mive_core.cost.memory import activation_bytes, vae_decode_bytes, vae_encode_bytes, vae_stream_bytes, vlm_bytes, weight_bytes
from mive_core.dit import MiVEDiT
from mive_core.vlm import VLM, model_from_config


def test_the_counter_counts():
    with MemoryCounter() as counted:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        c = b.view(50, 10)
        d = torch.empty(200, dtype=torch.uint8)
    assert (counted.current, counted.peak) == (700, 1500) and len(c) == 50 and len(d) == 200


@pytest.mark.parametrize(
    "preset, layout, dtype",
    [
        ("14b", Layout(4600, (21, 45, 80)), torch.bfloat16),
        ("14b", Layout(1500, (21, 30, 52)), torch.bfloat16),
        ("1.3b", Layout(1500, (21, 30, 52)), torch.bfloat16),
        ("1.3b", Layout(400, (5, 30, 52)), torch.float32),
        ("1.3b", Layout(4600, (61, 45, 80)), torch.bfloat16),
        ("tiny", Layout(40, (5, 8, 8)), torch.float32),
    ],
)
def test_formula_equals_what_a_forward_holds(preset, layout, dtype):
    config = replace(PRESETS[preset], num_blocks=2)
    with torch.device("meta"), torch.inference_mode():
        call = make_forward(MiVEDiT(config, operations=torch.nn, attention=torch_attention, dtype=dtype), layout)
        with MemoryCounter() as counted:
            call()
    assert activation_bytes(config, layout.num_tokens, dtype.itemsize) == pytest.approx(counted.peak, rel=0.1)


def test_scores_are_counted_where_attention_holds_them():
    config = replace(PRESETS["tiny"], num_blocks=2)
    layout = Layout(40, (5, 12, 12))
    with torch.device("meta"), torch.inference_mode():
        call = make_forward(MiVEDiT(config, operations=torch.nn, attention=matmul_attention), layout)
        with MemoryCounter() as counted:
            call()
    assert activation_bytes(config, layout.num_tokens, 4, scores=True) == pytest.approx(counted.peak, rel=0.1)


@pytest.mark.parametrize(
    "frames, rows, columns, dtype, tiled",
    [(1, 90, 160, torch.bfloat16, False), (9, 60, 104, torch.float32, False), (17, 60, 104, torch.bfloat16, False), (5, 34, 60, torch.float32, True)],
)
def test_decoding_holds_what_the_formula_says(frames, rows, columns, dtype, tiled):
    """diffusers' VAE at Wan 2.1's width; at 720p x 81 whole 18.8 GB in float32, in tiles 4.2 GB."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"), torch.inference_mode():
        network = AutoencoderKLWan().to(dtype)
        if tiled:
            network.enable_tiling()
        latents = torch.empty(1, 16, (frames - 1) // 4 + 1, rows, columns, dtype=dtype)
        with MemoryCounter() as counted:
            network.decode(latents)
    assert vae_decode_bytes(frames, 8 * rows, 8 * columns, dtype.itemsize, tiled=tiled) == pytest.approx(counted.peak, rel=0.1)


def test_the_8b_and_32b_by_the_formula():
    """Counted by hand once, in float32 at 175 and 319 tokens, for they take minutes: 67.08, 126.5 and 104.6 MB."""
    assert vlm_bytes(4096, 12288, 175, 144, 4, num_video=96) == pytest.approx(67.08e6, rel=0.05)
    assert vlm_bytes(4096, 12288, 319, 288, 4, num_video=192) == pytest.approx(126.5e6, rel=0.05)
    assert vlm_bytes(5120, 25600, 175, 144, 4, num_video=96) == pytest.approx(104.6e6, rel=0.05)


def test_tiles_at_720p_x_81_by_the_formula():
    """Counted by hand once, for it takes a minute: whole 18.84 GB, in tiles 4.180 GB, in float32; encoding 13.01 GB."""
    assert vae_decode_bytes(81, 720, 1280, 4) == pytest.approx(18.84e9, rel=0.03)
    assert vae_decode_bytes(81, 720, 1280, 4, tiled=True) == pytest.approx(4.180e9, rel=0.03)
    assert vae_encode_bytes(81, 720, 1280, 4) == pytest.approx(13.01e9, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("size, frames", [((96, 64), 17), ((128, 128), 9)])
def test_a_cpu_holds_what_the_formula_says(size, frames):
    """The library's own VAE, in planes, run for real at the embedded model's width."""
    work = workload("tiny", size=size, num_frames=frames)
    vae, request = random_vae(work), make_request(work)
    with torch.inference_mode():
        with MemoryCounter() as encoding:
            latents = vae.encode(request.source.frames)
        with MemoryCounter() as decoding:
            vae.decode(latents)
        with MemoryCounter() as streaming:
            exhaust(vae.decode_pieces(latents))
        with MemoryCounter() as streaming_two:
            exhaust(decoded_pairs(vae, latents))
    width, height = size
    assert vae_decode_bytes(frames, height, width, 4, channels=16, conv2d=True) == pytest.approx(decoding.peak, rel=0.15)
    for num_clips, counted in ((1, streaming), (2, streaming_two)):
        assert vae_stream_bytes(height, width, 4, num_clips=num_clips, channels=16, conv2d=True) == pytest.approx(counted.peak, rel=0.1)
    assert vae_encode_bytes(frames, height, width, 4, channels=16, conv2d=True) == pytest.approx(encoding.peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text, vision", [((2048, 6144, 16), (1024, 4096))], ids=["2b"])
def test_the_vlm_holds_what_the_formula_says(text, vision, dtype):
    """The published widths, two layers and a small vocabulary; run for real. The 4B, 8B and 32B, counted once by hand, are as near."""
    work = workload("1.3b", size=(256, 192), num_frames=33, dtype=dtype)
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in work.vlm_config.items()}
    values["text_config"] |= {"vocab_size": 1000, "num_hidden_layers": 2, "hidden_size": text[0], "intermediate_size": text[1], "num_attention_heads": text[2]}
    values["vision_config"] |= {
        "depth": 4,
        "deepstack_visual_indexes": [0, 1, 2],
        "out_hidden_size": text[0],
        "hidden_size": vision[0],
        "intermediate_size": vision[1],
    }
    with torch.device("meta"):
        model = model_from_config(values)
    vlm = VLM(fill_random(model, work), make_processor(work), "")
    inputs = make_vlm_inputs(work, vlm.processor)
    with torch.inference_mode(), MemoryCounter() as counted:
        vlm.encode(inputs, (1, 2))
    num_visual, num_video = (int((inputs.mm_token_type_ids > kind).sum()) for kind in (0, 1))
    predicted = vlm_bytes(text[0], text[1], inputs.input_ids.shape[1], num_visual, dtype.itemsize, num_video=num_video, vision=vision)
    assert predicted == pytest.approx(counted.peak, rel=0.15)


def test_weights_are_those_of_the_model():
    with torch.device("meta"):
        model = MiVEDiT(PRESETS["1.3b"], operations=torch.nn, attention=torch_attention)
    count = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    assert weight_bytes(PRESETS["1.3b"], 2) == 2 * count
    assert weight_bytes(PRESETS["1.3b"], 2, 1) == 2 * count - matrices
    assert 9.5e9 < weight_bytes(PRESETS["14b"], 1) < 10.2e9  # the paper's 9.9 B parameters
