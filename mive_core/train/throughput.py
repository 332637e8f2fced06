"""Training throughput: speed, model FLOPs utilisation (mfu), and the share of time spent waiting for data."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PEAK_TFLOPS = {  # by a substring of the GPU's name: dense bfloat16 products with float32 accumulation
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "H100 PCIe": 756,
    "H20": 148,
    "A100": 312,
    "A10": 125,
    "A10G": 70,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 3090": 71,
}


@dataclass(frozen=True)
class Workload:
    """The amount of work in a batch."""

    num_samples: int
    num_tokens: int  # tokens of the DiT sequences in the loss
    flops: float  # model FLOPs: one forward and backward pass, and the forward pass of one-step predictions; no recomputation


class ThroughputMeter:
    """Measures time and work of this process between two readings; speeds are scaled to `num_processes`, which do equal work."""

    def __init__(self, peak_flops: float | None = None, num_processes: int = 1):
        self.peak_flops, self.num_processes = peak_flops, num_processes
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.num_steps = time.perf_counter(), 0.0, 0
        self.done: list[Workload] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager around the loading of a step's batches."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def count(self, done: Iterable[Workload | None]) -> None:
        """Counts a step and the workloads of its batches; None: unknown."""
        self.num_steps += 1
        self.done += [workload for workload in done if workload is not None]

    def read(self) -> dict[str, float]:
        """Returns seconds per step, the share of them spent loading, samples and tokens per second, and mfu; then restarts."""
        seconds = time.perf_counter() - self.start
        metrics = {"seconds": round(seconds / self.num_steps, 4), "loading_share": round(self.waited / seconds, 4)}
        if self.done:
            total = Workload(*(sum(getattr(workload, name) for workload in self.done) for name in Workload.__dataclass_fields__))
            metrics["samples_per_second"] = round(self.num_processes * total.num_samples / seconds, 4)
            metrics["tokens_per_second"] = round(self.num_processes * total.num_tokens / seconds, 1)
            if self.peak_flops:
                metrics["mfu"] = round(total.flops / seconds / self.peak_flops, 4)
        self.restart()
        return metrics


def peak_flops(device: str, given_tflops: float = 0.0) -> float | None:
    """Returns the peak FLOPs per second of the device: the given ones, else looked up by the GPU's name; None if unknown."""
    if given_tflops:
        return given_tflops * 1e12
    return peak_flops_by_name(torch.cuda.get_device_name()) if device == "cuda" else None


def peak_flops_by_name(card: str) -> float | None:
    """Returns the peak FLOPs per second of a GPU by the longest matching entry of PEAK_TFLOPS; None if none matches."""
    fitting = [name for name in PEAK_TFLOPS if name in card]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None
