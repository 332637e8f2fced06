"""Blocks that torch.compile has made compute what they computed before."""

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from mive_core.attention import CheckedAttention, matmul_attention, torch_attention
from mive_core.bench.against_diffusers import make_forward
from mive_core.config import PRESETS
from mive_core.cost.flops import Layout
from mive_core.dit import MiVEDiT
from mive_core.dit.rope import apply_rotary, apply_rotary_real, rotary_table
from mive_core.errors import UserError
from mive_core.pipeline import COMPILERS, check_compiler, check_device

LAYOUT = Layout(5, (2, 2, 3))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def both(attention, plain=torch_attention):
    """Two models of the same weights -> the calls of the plain and of the compiled one on the same inputs."""
    calls = []
    for function in (plain, attention):
        torch.manual_seed(0)
        calls.append(make_forward(MiVEDiT(PRESETS["tiny"], operations=torch.nn, attention=function).eval(), LAYOUT))
    return calls


def compiled(call) -> MiVEDiT:
    model = next(cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, MiVEDiT))
    return model.compile_blocks()


@pytest.mark.slow
def test_one_graph_serves_every_block_and_equals_eager():
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS) if name):
        pytest.skip("NO C++ COMPILER: torch.compile is not tested here")
    plain, fast = both(torch_attention)
    compiled(fast)
    with torch.inference_mode():
        expected, got = plain(), fast()
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_checked_attention_stays_outside_and_is_still_checked(monkeypatch):
    """Through the compiler's front alone, which is what a check could break; no code is written."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="eager"))
    checked = CheckedAttention(lambda *given: 2 * matmul_attention(*given), "double")
    plain, fast = both(checked)
    compiled(fast)
    with torch.inference_mode(), pytest.warns(UserWarning, match="double attention differs by 1 "):
        torch.testing.assert_close(fast(), plain(), atol=1e-5, rtol=1e-5)
    assert list(checked.trusted.values()) == [False]


def test_the_compilers_form_of_the_rotation_is_the_same():
    x, rotary = torch.randn(2, 5 + 3 * 6, 3, 64), rotary_table(5, (2, 2, 3), 64, 1e4)
    torch.testing.assert_close(apply_rotary_real(x, rotary), apply_rotary(x.clone(), rotary), atol=1e-6, rtol=1e-6)


def test_nothing_to_compile_with_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="needs a C.. compiler; expected g...or clang"):
        check_compiler("cpu")


def test_a_device_that_is_not_there_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(UserError, match="no CUDA device"):
        check_device("cuda")
