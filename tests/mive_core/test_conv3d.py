import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mive_core.conv3d import conv3d_by_conv2d, use_conv2d


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [((3, 3, 3), (1, 1, 1), (1, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0)), ((1, 1, 1), (1, 1, 1), (0, 0, 0)), ((2, 3, 3), (1, 2, 2), (0, 1, 0))],
)
def test_it_is_conv3d(kernel, stride, padding):
    x, weight, bias = torch.randn(2, 5, 7, 8, 6), torch.randn(4, 5, *kernel), torch.randn(4)
    expected = F.conv3d(x, weight, bias, stride, padding)
    torch.testing.assert_close(conv3d_by_conv2d(x, weight, bias, stride, padding), expected, atol=2e-5, rtol=1e-5)


def test_a_network_keeps_its_keys_and_its_output():
    class Odd(nn.Conv3d):
        def forward(self, x):
            return super().forward(F.pad(x, (0, 0, 0, 0, 2, 0))) * 3

    network = nn.Sequential(nn.Conv3d(3, 4, 1), Odd(4, 2, 3))
    x = torch.randn(1, 3, 5, 6, 6)
    keys, expected = list(network.state_dict()), network(x)
    use_conv2d(network)
    assert list(network.state_dict()) == keys and isinstance(network[1], Odd)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
