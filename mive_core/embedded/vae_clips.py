"""Training clips of the VAE: a pool that is drawn once, and random crops of it with flips and colour channel permutations."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from .natural_clips import natural_clip
from .synthetic import random_clip

POOL_SHAPE = (17, 96, 96, 3)


@dataclass(frozen=True)
class Phase:
    """A phase of the curriculum."""

    until: float  # end, as a fraction of the run
    batch_size: int
    num_frames: int
    size: int  # side of a square crop, pixels


class ClipCrops(Dataset):
    """dataset[number] is a batch, (B, F, H, W, 3) uint8; its phase determines its shape.

    A fraction `natural_ratio` of the pool are natural pictures, the rest synthetic scenes, evenly interleaved. The pool is stored once, in `folder`.
    """

    def __init__(self, folder: Path, num_clips: int, num_batches: int, phases: tuple[Phase, ...], seed: int, natural_ratio: float = 0.5):
        self.path = folder / f"pool_{num_clips}_{seed}_{natural_ratio}.npy"
        self.num_clips, self.num_batches, self.phases, self.seed, self.natural_ratio = num_clips, num_batches, phases, seed, natural_ratio

    def phase(self, number: int) -> Phase:
        """Returns the phase of a batch, by its place among all batches of the run: a step takes several of several processes."""
        return next(phase for phase in self.phases if number < phase.until * self.num_batches or phase is self.phases[-1])

    @cached_property
    def pool(self) -> np.ndarray:
        """The pool, (num_clips, 17, 96, 96, 3) uint8, memory-mapped; drawn at first use."""
        if not self.path.is_file():
            self._draw_pool()
        return np.load(self.path, mmap_mode="r")

    def __getitem__(self, number: int) -> Tensor:
        rng = np.random.default_rng([self.seed, number])
        phase = self.phase(number)
        return torch.from_numpy(np.stack([self._crop(rng, phase) for _ in range(phase.batch_size)]))

    def _crop(self, rng: np.random.Generator, phase: Phase) -> np.ndarray:
        """Draws a clip's crop with random time reversal, mirroring, channel permutation and transposition."""
        num_frames, height, width, _ = POOL_SHAPE
        t, y, x = (rng.integers(n + 1) for n in (num_frames - phase.num_frames, height - phase.size, width - phase.size))
        crop = self.pool[rng.integers(self.num_clips), t : t + phase.num_frames, y : y + phase.size, x : x + phase.size]
        crop = crop[:: rng.choice([-1, 1]), :, :: rng.choice([-1, 1])]
        if rng.uniform() < 0.3:
            crop = crop[..., rng.permutation(3)]
        return np.ascontiguousarray(crop.swapaxes(1, 2) if rng.uniform() < 0.3 else crop)

    def _draw_pool(self) -> None:
        """Draws the pool and writes it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial.npy")
        pool = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(self.num_clips, *POOL_SHAPE))
        num_frames, height, width, _ = POOL_SHAPE
        for index in tqdm(range(self.num_clips), desc="draw clips", mininterval=5.0):
            is_natural = int((index + 1) * self.natural_ratio) > int(index * self.natural_ratio)
            draw = natural_clip if is_natural else random_clip
            pool[index] = np.round(draw(self.seed * self.num_clips + index, (width, height), num_frames) * 255).astype(np.uint8)
        pool.flush()
        partial.rename(self.path)
