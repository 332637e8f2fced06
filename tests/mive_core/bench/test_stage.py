"""Each stage measured alone, at small shapes: its operations are those that torch counts, its shares sum to one."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mive_core.bench.models import make_request, make_vlm_inputs, random_pipeline, random_vae, random_vlm, vlm_flops, workload
from mive_core.bench.stage import STAGES, bench_stage, shares_of_time, vae_flops
from mive_core.errors import UserError

SMALL = dict(size=(64, 48), num_frames=5, repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "edit"])
def test_a_stage_is_held_against_the_machine(stage):
    report = bench_stage(stage, workload("tiny", **SMALL, blocks=2))
    assert (report["stage"], report["blocks"], report["tokens"]) == (stage, 2, 3 * 6 * 8 + 3 * 6 * 8 // 19)
    for figures in [report[part] for part in ("encode", "decode")] if stage == "vae" else [report]:
        assert figures["seconds"] > 0 and figures["peak_bytes"] > 10_000 and figures["flops_per_second"] == figures["flops"] / figures["seconds"]
        assert figures["share_of_roofline"] == figures["roofline_seconds"] / figures["seconds"] > 0
        shares = figures["shares_of_time"]
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0 and shares["matrix_products"] > 0.1


def test_an_edit_is_the_sum_of_its_stages():
    report = bench_stage("edit", workload("tiny", **SMALL, blocks=2), steps=2)
    assert report["steps"] == 2 and report["denoise"]["flops"] == 2 * bench_stage("dit", workload("tiny", **SMALL, blocks=2))["flops"]
    parts = sum(report[part]["seconds"] for part in ("vlm", "encode", "denoise", "decode"))
    assert 0.2 * parts < report["whole"]["seconds"] < 5 * parts
    assert report["whole"]["peak_bytes"] >= report["decode"]["peak_bytes"]


def test_the_random_pipeline_edits():
    work = workload("tiny", **SMALL, blocks=1)
    assert random_pipeline(work).edit(make_request(work), steps=1).frames.shape == (5, 48, 64, 3)


def test_the_vlms_operations_are_those_that_are_counted():
    """Torch counts the whole of causal attention, the formula its half."""
    work = workload("tiny", **SMALL)
    vlm = random_vlm(work)
    inputs = make_vlm_inputs(work, vlm.processor)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm.encode(inputs, (1, vlm.num_layers))
    text = work.vlm_config["text_config"]
    half = text["num_hidden_layers"] * 2 * inputs.input_ids.shape[1] ** 2 * text["num_attention_heads"] * text["head_dim"]
    assert vlm_flops(work.vlm_config, inputs) + half == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_vaes_operations_are_those_of_the_real_one():
    """Counted on no device, through diffusers' convolutions; run on a CPU, through planes."""
    work = workload("tiny", **SMALL)
    vae, latents = random_vae(work), torch.randn(1, 16, 2, 6, 8)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    assert vae_flops(work)["decode"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_by_matrix_products_is_still_attention():
    """The profile goes by what stands around an operation, not by its name alone."""
    shares = [
        bench_stage("dit", workload("tiny", size=(128, 128), num_frames=17, repeats=1, blocks=1, attention=name))["shares_of_time"]["attention"]
        for name in ("sdpa", "matmul")
    ]
    assert all(0.1 < share < 0.9 for share in shares)


def test_a_profile_of_nothing_is_empty():
    assert shares_of_time(workload("tiny", **SMALL), lambda: None) == {}


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(num_frames=6), "the size does not fit; got 64x48x6"),
        (dict(size=(90, 64)), "the size does not fit"),
        (dict(attention="flush"), "unknown attention"),
        (dict(attention="sage"), "needs the package"),
    ],
)
def test_bad_settings_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        workload("tiny", **SMALL | changed)


def test_real_presets_read_the_real_vlm():
    work = workload("1.3b", **SMALL)
    assert work.vlm_config["text_config"]["hidden_size"] == work.config.vlm_width == 4096
    assert replace(work, config=replace(work.config, num_blocks=3)).description["blocks"] == 3
