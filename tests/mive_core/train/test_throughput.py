import time

import pytest

from mive_core.train.throughput import ThroughputMeter, Workload, peak_flops, peak_flops_by_name


def test_figures_are_of_the_time_between_two_readings():
    meter = ThroughputMeter(peak_flops=1e9, num_processes=2)
    for _ in range(2):
        with meter.waiting():
            time.sleep(0.05)
        time.sleep(0.05)
        meter.count([Workload(3, 100, 2e6), None])
    figures = meter.read()
    assert figures["seconds"] == pytest.approx(0.1, rel=0.3) and figures["loading_share"] == pytest.approx(0.5, abs=0.1)
    seconds = 2 * figures["seconds"]
    assert figures["samples_per_second"] == pytest.approx(2 * 6 / seconds, rel=0.01)
    assert figures["tokens_per_second"] == pytest.approx(2 * 200 / seconds, rel=0.01)
    assert figures["mfu"] == pytest.approx(4e6 / seconds / 1e9, rel=0.1)
    meter.count([None])
    assert meter.read().keys() == {"seconds", "loading_share"}  # nothing is left of what was read


@pytest.mark.parametrize(
    "card, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_card_is_known_by_its_name(card, tflops):
    assert peak_flops_by_name(card) == (None if tflops is None else tflops * 1e12)


def test_a_given_peak_goes_before_and_a_cpu_has_none():
    assert peak_flops("cpu") is None and peak_flops("cpu", 0.1) == 1e11
