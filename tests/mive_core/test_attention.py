"""Attention functions of one form give one result, and one that does not is found out."""

import sys
import types
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mive_core import attention
from mive_core.attention import BACKENDS, KERNEL_ORDER, CheckedAttention, best_kernels, get_attention, matmul_attention, torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.errors import UserError


@pytest.mark.parametrize("masked", [False, True])
def test_attention_as_matrix_products_equals_the_kernel(masked):
    q, k, v = torch.randn(3, 2, 11, 12).unbind()
    mask = torch.randn(2, 1, 11, 11) if masked else None
    torch.testing.assert_close(matmul_attention(q, k, v, 3, mask), torch_attention(q, k, v, 3, mask), atol=1e-5, rtol=1e-5)


class Told:
    """A real attention function that counts its calls and may spoil its result."""

    def __init__(self, spoil=lambda result: result):
        self.spoil, self.calls = spoil, 0

    def __call__(self, q, k, v, heads, mask=None, **kwargs):
        self.calls += 1
        return self.spoil(matmul_attention(q, k, v, heads, mask))


def noisy(result):
    return torch.randn_like(result) * result.std()


def of_8_bits(result):
    return (result / result.abs().max() * 100).round() / 100 * result.abs().max()


@pytest.mark.parametrize("spoil", [lambda result: result, of_8_bits], ids=["equal", "rounded"])
def test_a_sound_function_is_checked_once_and_kept(spoil):
    function = Told(spoil)
    checked = CheckedAttention(function, "told")
    q, k, v = torch.randn(3, 1, 40, 24).unbind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = checked(q, k, v, 3), checked(q, k, v, 3)
    assert function.calls == 2 and checked.trusted == {(8, torch.float32, torch.device("cpu")): True}
    assert torch.equal(first, second) and torch.equal(first, spoil(matmul_attention(q, k, v, 3)))


def fails(result):
    raise RuntimeError("no kernel for this card\nand a long story")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            noisy,
            r"told attention differs by 1\.\d+ of the result's size \(allowed: 0\.1\) beside torch's at 40 tokens, "
            r"3 heads of 8, torch\.float32 on cpu; torch's is used",
        ),
        (lambda result: result * 1.2, "differs by 0.2 of"),
        (lambda result: result * float("nan"), "differs by inf of"),
        (fails, r"told attention fails \(no kernel for this card\) beside"),
    ],
)
def test_a_wrong_function_is_named_and_never_asked_again(spoil, said):
    """Sage attention gives noise on some cards, without an error."""
    function = Told(spoil)
    checked = CheckedAttention(function, "told")
    q, k, v = torch.randn(3, 1, 40, 24).unbind()
    with pytest.warns(UserWarning, match=said) as warned:
        results = [checked(q, k, v, 3) for _ in range(3)]
    assert function.calls == 1 and len(warned) == 1
    assert all(torch.equal(result, torch_attention(q, k, v, 3)) for result in results)


def test_another_head_width_or_dtype_is_another_check():
    function = Told(noisy)
    checked = CheckedAttention(function, "told")
    q, k, v = torch.randn(3, 1, 40, 24).unbind()
    with pytest.warns(UserWarning):
        checked(q, k, v, 3), checked(q, k, v, 3), checked(q, k, v, 2), checked(q.bfloat16(), k.bfloat16(), v.bfloat16(), 3)
    assert function.calls == 3 and len(checked.trusted) == 3


def test_no_memory_is_no_disagreement():
    def full(result):
        raise torch.OutOfMemoryError("no more memory")

    checked = CheckedAttention(Told(full), "told")
    with pytest.raises(torch.OutOfMemoryError):
        checked(*torch.randn(3, 1, 40, 24).unbind(), 3)
    assert not checked.trusted


def test_a_whole_dit_goes_through_one_check():
    function = Told()
    checked = CheckedAttention(function, "told")
    model = MiVEDiT(PRESETS["tiny"], operations=torch.nn, attention=checked)
    noisy = torch.randn(1, 16, 2, 4, 4)
    with torch.inference_mode():
        model(noisy, noisy, noisy[:, :, :1], torch.randn(1, 3, PRESETS["tiny"].width), torch.tensor([0.5]))
    assert function.calls == PRESETS["tiny"].num_blocks and len(checked.trusted) == 1


def test_back_ends_by_name(monkeypatch):
    assert [get_attention(name) for name in BACKENDS if name != "sage"] == [torch_attention, torch_attention, matmul_attention]
    with pytest.raises(UserError, match="unknown attention; got 'flush'; expected auto, sdpa, sage, matmul"):
        get_attention("flush")
    monkeypatch.setitem(sys.modules, "sageattention", None)  # as where it is not installed
    with pytest.raises(UserError, match="needs the package sageattention.*or take sdpa"):
        get_attention("sage")


def test_sage_gets_its_own_layout_and_no_mask(monkeypatch):
    """A package of that name whose kernel is torch's."""

    def sageattn(q, k, v, tensor_layout, is_causal):
        assert q.shape == (2, 11, 3, 4) and tensor_layout == "NHD" and not is_causal
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "sageattention", types.SimpleNamespace(sageattn=sageattn))
    q, k, v = torch.randn(3, 2, 11, 12).unbind()
    chosen = get_attention("sage")
    assert isinstance(chosen, CheckedAttention) and chosen.function is attention.sage_attention
    torch.testing.assert_close(chosen(q, k, v, 3), torch_attention(q, k, v, 3))
    mask = torch.randn(2, 1, 11, 11)
    torch.testing.assert_close(chosen(q, k, v, 3, mask), torch_attention(q, k, v, 3, mask))


def test_a_cpu_is_left_to_torch():
    before = torch._C._get_sdp_priority_order()
    with best_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before
    with sdpa_kernel(KERNEL_ORDER, set_priority=True):
        order = torch._C._get_sdp_priority_order()
    assert order[:4] == [int(kernel) for kernel in KERNEL_ORDER] and order[0] == int(SDPBackend.CUDNN_ATTENTION)
