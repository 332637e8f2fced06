"""Frozen features of paired edits, computed once: the VAE's latents and the VLM's chosen layers.

C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..tensors import read_tensors, write_tensors
from ..types import PairedEdit
from ..vlm import VLM, WEIGHTS
from .synth import PairedEdits
from .wan_vae import WholeClipVAE, encode_clips, read_whole_clip_vae

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
class Shard:
    """Some features of some clips, and all that they depend on, in plain values: it crosses into worker processes."""

    part: str  # "latents" (target, source, reference, mask) or "states"
    model: str  # the VAE's file or the VLM's folder
    config: MiVEConfig
    seed: int
    bucket: Bucket
    number: int
    folder: str

    @property
    def path(self) -> Path:
        (width, height), frames = self.bucket.size, self.bucket.num_frames
        return Path(self.folder) / f"{width}x{height}x{frames}_{self.part}_{self.number:05d}.safetensors"

    @property
    def indices(self) -> range:
        first = self.number * NUM_PER_SHARD
        return range(first, min(first + NUM_PER_SHARD, self.bucket.num_clips))

    @property
    def fingerprint(self) -> str:
        """Of all settings and of the weights that the features pass through: a VAE's decoder does not count."""
        settings = [self.part, self.seed, self.bucket.size, self.bucket.num_frames, self.indices.stop]
        model = Path(self.model)
        if self.part == "states":
            settings += [self.config.resolved_layers, self.config.video_fps, self.config.max_video_tokens, self.config.max_instruction_tokens]
            weights = [(model / name).read_bytes() for name in (WEIGHTS, "tokenizer.json", "config.json")]
        else:
            weights = [value.numpy().tobytes() for key, value in sorted(read_tensors(model).items()) if key.startswith(("encoder.", "conv1."))]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for part in weights:
            digest.update(part)
        return digest.hexdigest()


def shards_of(bucket: Bucket, *, vae: str, vlm: str, config: MiVEConfig, seed: int, folder: str) -> list[Shard]:
    """Both parts of every clip of a bucket, in order."""
    numbers = range(-(-bucket.num_clips // NUM_PER_SHARD))
    return [Shard(part, model, config, seed, bucket, number, folder) for number in numbers
            for part, model in (("states", vlm), ("latents", vae))]


def latent_mask(mask: Tensor) -> Tensor:
    """(F, H, W) bool -> (T, Y, X) float: 1 where any pixel of the latent cell is edited; frame 0 is a latent frame of its own."""
    first = F.max_pool3d(mask[None, :1].float(), (1, 8, 8))
    rest = F.max_pool3d(mask[None, 1:].float(), (4, 8, 8)) if len(mask) > 1 else first[:, :0]
    return torch.cat([first, rest], dim=1)[0]


def states_of(pair: PairedEdit, vlm: VLM, config: MiVEConfig) -> dict[str, Tensor]:
    """bf16, never fp16: single channels are thousands of times the rest."""
    return {"states": vlm.condition(pair.request, config).states[0].to(torch.bfloat16)}


def latents_of(pair: PairedEdit, vae: WholeClipVAE) -> dict[str, Tensor]:
    """Normalised as VAE.encode gives them, by a network that a CPU runs five times as fast."""
    clips = {"target": pair.target, "source": pair.request.source.frames, "reference": pair.request.reference[None]}
    latents = {name: encode_clips(vae, frames[None])[0].to(torch.float16) for name, frames in clips.items()}
    return latents | {"mask": latent_mask(pair.mask).to(torch.float16)}


@torch.inference_mode()
def write_shard(shard: Shard) -> None:
    """Computes one shard, unless the same one is there."""
    if shard.path.is_file():
        with safe_open(shard.path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") == shard.fingerprint:
                return
    torch.set_num_threads(1)
    if shard.part == "states":
        vlm = VLM.load(shard.model)
        features = lambda pair: states_of(pair, vlm, shard.config)
    else:
        vae = read_whole_clip_vae(shard.model)
        features = lambda pair: latents_of(pair, vae)
    edits = PairedEdits(shard.seed, split="train", size=shard.bucket.size, num_frames=shard.bucket.num_frames)
    tensors = {f"{index}.{name}": value for index in shard.indices for name, value in features(edits.sample(index).pair).items()}
    write_tensors(shard.path, tensors, {"fingerprint": shard.fingerprint})


def prepare(shards: list[Shard], num_processes: int) -> None:
    """Computes the shards that are missing, in processes of one thread each."""
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for _ in tqdm(pool.map(write_shard, shards), total=len(shards), desc="features", unit="shard"):
            pass


def read_shards(shards: list[Shard]) -> list[EditFeatures]:
    """Both parts of a bucket's clips -> one entry a clip, in their stored dtypes."""
    entries: dict[int, dict[str, Tensor]] = {}
    for shard in tqdm(shards, desc="reading features", unit="shard"):
        with safe_open(shard.path, framework="pt") as file:
            for key in file.keys():
                index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = file.get_tensor(key)
    return [EditFeatures(**entries[index]) for index in sorted(entries)]
