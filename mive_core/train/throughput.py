"""How fast a run goes, what share of the device's peak that is, and how long it waits for data."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PEAK_TFLOPS = {  # by a part of the card's name: dense products in bfloat16, summed in float32
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
    "RTX 3090": 71,
}


@dataclass(frozen=True)
class Work:
    """What a batch amounts to."""

    num_samples: int
    num_tokens: int  # of the DiT's sequences that are learned from
    flops: float  # forward and backward, each once, and forward of drafts: recomputation does not count


class ThroughputMeter:
    """Time and work of one process between two readings; figures are of all `num_processes`, which do alike."""

    def __init__(self, peak_flops: float | None = None, num_processes: int = 1):
        self.peak_flops, self.num_processes = peak_flops, num_processes
        self.restart()

    def restart(self) -> None:
        self.began, self.waited, self.num_steps, self.done = time.perf_counter(), 0.0, 0, []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever fetches a step's batches."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def count(self, done: Iterable[Work | None]) -> None:
        """A step, and what its batches amounted to, where that is known."""
        self.num_steps += 1
        self.done += [work for work in done if work is not None]

    def read(self) -> dict[str, float]:
        """Seconds a step, the share of them without data, samples and tokens a second, mfu; and it starts anew."""
        seconds = time.perf_counter() - self.began
        figures = {"seconds": round(seconds / self.num_steps, 4), "loading_share": round(self.waited / seconds, 4)}
        if self.done:
            total = Work(*(sum(getattr(work, name) for work in self.done) for name in Work.__dataclass_fields__))
            figures["samples_per_second"] = round(self.num_processes * total.num_samples / seconds, 4)
            figures["tokens_per_second"] = round(self.num_processes * total.num_tokens / seconds, 1)
            if self.peak_flops:
                figures["mfu"] = round(total.flops / seconds / self.peak_flops, 4)
        self.restart()
        return figures


def peak_flops(device: str, given_tflops: float = 0.0) -> float | None:
    """Operations a second of the device at most: those given, else the card's own; None where neither is known."""
    if given_tflops:
        return given_tflops * 1e12
    return peak_of(torch.cuda.get_device_name()) if device == "cuda" else None


def peak_of(card: str) -> float | None:
    """The same by a card's name: the longest entry that is a part of it."""
    fitting = [name for name in PEAK_TFLOPS if name in card]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None
