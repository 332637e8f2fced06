"""One sign and time convention."""

import math

import pytest
import torch

from mive_core.errors import UserError
from mive_core.flow import classifier_free_guidance, euler, flow_path, schedule, shift_time


def test_ends_of_the_path():
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(flow_path(data, noise, torch.zeros(2)).x_t, data)
    assert torch.equal(flow_path(data, noise, torch.ones(2)).x_t, noise)


def test_velocity_is_the_paths_slope():
    data, noise, t = torch.randn(1, 5).double(), torch.randn(1, 5).double(), torch.tensor([0.4]).double()
    step = 1e-6
    slope = (flow_path(data, noise, t + step).x_t - flow_path(data, noise, t).x_t) / step
    assert torch.allclose(slope, flow_path(data, noise, t).velocity, atol=1e-6)


@pytest.mark.parametrize("num_steps,shift", [(1, 1.0), (4, 3.0), (30, 5.0)])
def test_euler_recovers_the_data_under_the_exact_velocity(num_steps, shift):
    data, noise = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    got = euler(lambda x, t: noise - data, noise, schedule(num_steps, shift))
    assert torch.allclose(got, data, atol=1e-5)


def test_schedule_runs_from_noise_to_data():
    times = schedule(8, 3.0)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all() and len(times) == 9
    assert torch.allclose(shift_time(torch.tensor(0.5), 3.0), torch.tensor(0.75))


@pytest.mark.parametrize("steps,shift", [(0, 3.0), (-1, 3.0), (4, 0.0), (4, math.nan), (4, math.inf)])
def test_schedule_refuses(steps, shift):
    with pytest.raises(UserError, match="steps|shift"):
        schedule(steps, shift)


def test_latents_that_leave_the_finite_numbers_are_an_error_not_a_black_video():
    with pytest.raises(UserError, match="no longer finite"):
        euler(lambda x, t: x / 0, torch.ones(1), schedule(2, 1.0))


def test_guidance():
    positive, negative = torch.tensor([2.0]), torch.tensor([1.0])
    assert (
        classifier_free_guidance(positive, cfg=1.0) == 2
        and classifier_free_guidance(positive, negative, cfg=1.0) == 2
        and classifier_free_guidance(positive, negative, cfg=3.0) == 4
    )
