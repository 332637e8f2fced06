"""The card's benchmark at small shapes on a CPU: every part runs, counts what it says, and goes on where something fails."""

import pytest
import torch

from mive_core import bench_card as card
from mive_core.bench_card import PARTS, Float8Linear, bench_card
from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.quantize import to_float8

SMALL = dict(size=(96, 64), num_frames=5, device="cpu", dtype=torch.float32, repeats=1)


@pytest.fixture
def small_vlm(monkeypatch):
    """Qwen3-VL-8B's config with everything narrow."""
    values = {kind: dict(config) for kind, config in card.QWEN3_VL_8B.items()}
    values["text_config"] |= {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
                              "num_key_value_heads": 2, "vocab_size": 900, "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}}
    values["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                                "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    monkeypatch.setattr(card, "QWEN3_VL_8B", values)


def test_every_part_runs_and_is_held_against_the_devices_own_speed(small_vlm):
    report = bench_card("tiny", blocks=2, **SMALL)
    assert set(PARTS) <= set(report)
    assert report["tokens"] == 3 * 4 * 6 + 3 * 4 * 6 // 19 and report["device"] == "cpu" and report["blocks"] == 2
    for part in ("dit", "training_block"):
        figures = report[part]
        assert figures["seconds"] > 0 and figures["flops_per_second"] == figures["flops"] / figures["seconds"]
        assert figures["share_of_matrix_product"] == figures["flops_per_second"] / report["speed"]["flops_per_second"]
    assert report["dit"]["seconds_of_28"] == 28 * report["dit"]["seconds"]
    assert report["attention"]["torch's choice"]["flops"] == 4 * report["tokens"] ** 2 * PRESETS["tiny"].width
    assert any("relative_difference" in found and found["relative_difference"] < 1e-3 for found in report["attention"].values())
    assert report["vlm"]["tokens"] > 10 and report["vlm"]["seconds"] > 0
    assert report["vae"]["whole"]["seconds"] > 0 and report["vae"]["tiled"]["seconds"] > 0
    assert "failed" in report["dit_fp8"] or report["dit_fp8"]["weight_bytes"] < 0.6 * report["dit"]["weight_bytes"]


def test_what_fails_is_said_and_the_rest_goes_on(monkeypatch):
    def full(work):
        raise torch.OutOfMemoryError("no more memory\nand a long story")

    monkeypatch.setitem(PARTS, "attention", full)
    report = bench_card("tiny", blocks=1, parts=("attention", "training_block"), **SMALL)
    assert report["attention"] == {"failed": "OutOfMemoryError: no more memory"}
    assert report["training_block"]["seconds"] > 0 and "dit" not in report


@pytest.mark.parametrize("changed, said", [
    (dict(parts=("paint",)), "unknown preset or part; got paint"),
    (dict(num_frames=6), "the size does not fit; got 96x64x6"),
    (dict(size=(90, 64)), "the size does not fit"),
])
def test_bad_settings_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        bench_card("tiny", **SMALL | changed)


def test_a_missing_card_is_refused_with_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(UserError, match="no CUDA device.*--device cpu"):
        bench_card("tiny", **SMALL | {"device": "cuda"})


def test_a_float8_layer_is_near_the_layer_it_was_made_of():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32).to(torch.bfloat16)
    small = Float8Linear(*to_float8(layer.weight.detach().float(), torch.float8_e4m3fn), layer.bias.detach())
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16)
    try:
        got = small(x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no float8 products here: {error}")
    assert got.shape == (2, 16, 32) and (got - layer(x)).norm() < 0.08 * layer(x).norm()
