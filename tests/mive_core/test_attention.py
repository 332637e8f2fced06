"""Attention functions of one form give one result."""

import pytest
import torch

from mive_core.attention import matmul_attention, torch_attention


@pytest.mark.parametrize("masked", [False, True])
def test_attention_as_matrix_products_equals_the_kernel(masked):
    q, k, v = torch.randn(3, 2, 11, 12).unbind()
    mask = torch.randn(2, 1, 11, 11) if masked else None
    torch.testing.assert_close(matmul_attention(q, k, v, 3, mask), torch_attention(q, k, v, 3, mask), atol=1e-5, rtol=1e-5)
