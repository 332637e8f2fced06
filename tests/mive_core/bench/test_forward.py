"""A forward measured from a few blocks, and what happens where a card cannot multiply float8."""

from dataclasses import replace

import pytest
import torch

from mive_core.bench import forward
from mive_core.bench.card_all import TINY
from mive_core.bench.forward import Forward, float8_product, free_bytes, why_not_multiplied
from mive_core.bench.models import Workload
from mive_core.cost.flops import dit_flops

CPU = torch.device("cpu")
WORK = Workload(TINY, (64, 48), 5, CPU, torch.bfloat16, repeats=1)


def measured(**options) -> dict:
    with torch.inference_mode():
        return Forward(WORK, **options).measure()


@pytest.mark.parametrize("format_name", ["bf16", "fp8"])
def test_a_few_blocks_stand_for_all(format_name):
    few, whole = measured(format_name=format_name), measured(format_name=format_name, whole=True)
    assert few["from"].startswith("1 and 3 blocks") and whole["from"] == "all 5 blocks"
    assert few["seconds"] == pytest.approx(few["seconds_outside_the_blocks"] + 5 * few["block_seconds"])
    assert few["flops"] == whole["flops"] == dit_flops(TINY, WORK.layout)
    assert few["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.01)  # blocks do not add to a step
    assert "shares_of_time" in few and "shares_of_time" not in whole


def test_the_times_of_two_depths_give_that_of_a_block(monkeypatch):
    monkeypatch.setattr(forward, "measure", lambda work, call: {"seconds": 3.0})
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    monkeypatch.setattr(forward, "make_forward", lambda model, layout: None)
    figures = Forward(WORK, "bf16").extrapolate(7.0, replace(WORK, config=replace(TINY, num_blocks=3)), model)
    assert (figures["block_seconds"], figures["seconds_outside_the_blocks"], figures["seconds"]) == (2.0, 1.0, 11.0) and len(model.blocks) == 1


def test_a_profile_that_fails_costs_only_itself(monkeypatch):
    def broken(work, call):
        raise AssertionError("no profiler here")

    monkeypatch.setattr(forward, "shares_of_time", broken)
    figures = measured(format_name="bf16")
    assert figures["seconds"] > 0 and figures["profile"]["failed"] == "AssertionError: no profiler here"


def test_a_card_that_does_not_multiply_float8_scales_back_and_says_so(monkeypatch):
    monkeypatch.setattr(forward, "can_multiply", lambda name, device: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    figures = measured(format_name="fp8")
    assert figures["multiplied"] is False and figures["seconds"] > 0
    assert figures["fallback"].startswith("the card multiplies no float8 (compute capability 8.6, needed 8.9); the matrices are stored in float8")


def test_a_torch_that_does_not_multiply_float8_is_found_out(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("addmm_float8 not implemented\nfor this device")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert why_not_multiplied(CPU) == "torch multiplies no float8 here (addmm_float8 not implemented)"
    assert measured(format_name="fp8")["multiplied"] is False


def test_the_float8_product_is_a_product():
    a = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = (a @ a.T).float()  # the second factor is transposed
    assert torch.linalg.vector_norm(float8_product(a)().float() - exact) < 0.1 * torch.linalg.vector_norm(exact)


def test_attention_that_fell_back_is_told(monkeypatch):
    """8-bit attention that disagrees with torch's is replaced by it, with a warning."""
    import warnings

    from mive_core.bench import models

    def attention(q, k, v, heads, mask=None, **options):
        warnings.warn("sage attention fails (no kernel) beside torch's; torch's is used instead", stacklevel=2)
        return torch.zeros_like(q)

    monkeypatch.setattr(models, "get_attention", lambda name: attention)
    assert measured(format_name="fp8_sage")["warnings"] == ["sage attention fails (no kernel) beside torch's; torch's is used instead"]


def test_free_memory_is_that_of_the_machine():
    free = free_bytes(CPU)
    assert free is None or 1e8 < free < 1e13
