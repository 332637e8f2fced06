"""Frozen features of paired edits, computed once: the VAE's latents and the VLM's chosen layers.

C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..tensors import write_tensors
from ..types import PairedEdit
from ..vae import VAE
from ..vlm import VLM
from .synth import PairedEdits

NUM_PER_SHARD = 64


@dataclass(frozen=True)
class Bucket:
    """Clips of one size and length; their share of the training steps."""

    size: tuple[int, int]  # width, height in pixels
    num_frames: int
    num_clips: int
    share: float


@dataclass(frozen=True)
class EditFeatures:
    """One paired edit as the DiT sees it."""

    target: Tensor  # (C, T, Y, X)
    source: Tensor  # (C, T, Y, X)
    reference: Tensor  # (C, 1, Y, X)
    states: Tensor  # (K, S, D_vlm)
    mask: Tensor  # (T, Y, X) 1 where the edit acts


@dataclass(frozen=True)
class FeatureJob:
    """Everything that a shard's content depends on, in plain values: it crosses into worker processes."""

    vae: str
    vlm: str
    config: MiVEConfig
    seed: int
    bucket: Bucket
    shard: int
    folder: str

    @property
    def path(self) -> Path:
        (width, height), frames = self.bucket.size, self.bucket.num_frames
        return Path(self.folder) / f"{width}x{height}x{frames}_{self.shard:05d}.safetensors"

    @property
    def fingerprint(self) -> str:
        """Of the two models' bytes and all settings."""
        digest = hashlib.sha256(json.dumps([asdict(self.config), self.seed, self.bucket.size, self.bucket.num_frames, self.shard]).encode())
        for path in (Path(self.vae), Path(self.vlm) / "model.safetensors"):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def latent_mask(mask: Tensor) -> Tensor:
    """(F, H, W) bool -> (T, Y, X) float: 1 where any pixel of the latent cell is edited; frame 0 is a latent frame of its own."""
    first = F.max_pool3d(mask[None, :1].float(), (1, 8, 8))
    rest = F.max_pool3d(mask[None, 1:].float(), (4, 8, 8)) if len(mask) > 1 else first[:, :0]
    return torch.cat([first, rest], dim=1)[0]


def edit_features(pair: PairedEdit, vae: VAE, vlm: VLM, config: MiVEConfig) -> EditFeatures:
    """Pixels and words -> what the DiT trains on."""
    condition = vlm.condition(pair.request, config)
    target, source, reference = (vae.encode(frames)[0] for frames in
                                 (pair.target, pair.request.source.frames, pair.request.reference[None]))
    return EditFeatures(target, source, reference, condition.states[0], latent_mask(pair.mask))


@torch.inference_mode()
def write_shard(job: FeatureJob) -> None:
    """Computes one shard, unless the same one is there."""
    if job.path.is_file():
        with safe_open(job.path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") == job.fingerprint:
                return
    torch.set_num_threads(1)
    vae, vlm = VAE.load(job.vae), VLM.load(job.vlm)
    edits = PairedEdits(job.seed, split="train", size=job.bucket.size, num_frames=job.bucket.num_frames)
    tensors = {}
    first = job.shard * NUM_PER_SHARD
    for index in range(first, min(first + NUM_PER_SHARD, job.bucket.num_clips)):
        features = edit_features(edits.sample(index).pair, vae, vlm, job.config)
        tensors |= {f"{index}.{name}": value.to(torch.bfloat16 if name == "states" else torch.float16)
                    for name, value in vars(features).items()}
    write_tensors(job.path, tensors, {"fingerprint": job.fingerprint})


def prepare(jobs: list[FeatureJob], num_processes: int) -> None:
    """Computes the shards that are missing, in processes of one thread each."""
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for _ in tqdm(pool.map(write_shard, jobs), total=len(jobs), desc="features", unit="shard"):
            pass


def read_shards(jobs: list[FeatureJob]) -> list[EditFeatures]:
    """Shards in the order of the jobs -> one entry a clip, in their stored dtypes."""
    entries = []
    for job in tqdm(jobs, desc="reading features", unit="shard"):
        with safe_open(job.path, framework="pt") as file:
            indices = sorted({int(key.split(".")[0]) for key in file.keys()})
            entries += [EditFeatures(**{name: file.get_tensor(f"{index}.{name}") for name in EditFeatures.__dataclass_fields__})
                        for index in indices]
    return entries
