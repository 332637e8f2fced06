"""The conversion's benchmark: a file of Wan's real shapes, figures that hang together, nothing left behind."""

import shutil
from collections import namedtuple

import pytest
import torch

from mive_core.bench.convert import bench_convert, wan_layout
from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.formats.checkpoint import WAN_TO_DIFFUSERS, rename_keys

DROPPED = {
    "condition_embedder.text_embedder.linear_1.": "text_embedding.0.",
    "condition_embedder.text_embedder.linear_2.": "text_embedding.2.",
    ".attn2.to_q.": ".cross_attn.q.",
    ".attn2.to_k.": ".cross_attn.k.",
    ".attn2.to_v.": ".cross_attn.v.",
    ".attn2.to_out.0.": ".cross_attn.o.",
    ".attn2.norm_q.": ".cross_attn.norm_q.",
    ".attn2.norm_k.": ".cross_attn.norm_k.",
    ".norm2.": ".norm3.",
}


@pytest.mark.parametrize("preset", ["1.3b", "14b"])
def test_the_shapes_are_those_of_diffusers_wan(preset):
    from diffusers import WanTransformer3DModel

    config = PRESETS[preset]
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, ffn_dim=config.ffn_width, num_layers=config.num_blocks
        )
    theirs = rename_keys(rename_keys(theirs.state_dict(), DROPPED), WAN_TO_DIFFUSERS, backwards=True)
    assert {key: shape for key, (_, shape) in wan_layout(config).items()} == {key: tuple(value.shape) for key, value in theirs.items()}


def test_the_figures_hang_together_and_nothing_is_left(tmp_path):
    figures = bench_convert("tiny", folder=tmp_path, repeats=2)
    rates = figures["bytes_per_second"]
    assert figures["speed_ratio"] == rates["convert"] / rates["copy"] and len(figures["seconds"]["convert"]) == 2
    assert figures["bytes_read"] > 6_000_000 and figures["bytes_written"] > 3_000_000
    assert figures["peak_rss"] >= figures["rss_before"] > 50e6
    assert not list(tmp_path.iterdir())


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    with pytest.raises(UserError, match="no room for the benchmark; got 0.0 GB free; expected 0.1"):
        bench_convert("tiny", folder=tmp_path)
    assert not list(tmp_path.iterdir())
