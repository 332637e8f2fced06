"""Frozen features of paired edits, computed once: the VAE's latents, the VLM's chosen layers, and where the edited thing is.

C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..formats.safetensors_file import read_tensors, write_tensors
from ..train.objective import EditFeatures, latent_mask
from ..types import PairedEdit
from ..vae import SPATIAL_FACTOR, TEMPORAL_FACTOR
from ..vlm import VLM, WEIGHTS
from .synthetic import SHAPES, EditedObject, PairedEdits, SyntheticEdit
from .vae_network import read_whole_clip_vae
from .vae_patch_matrix import Encoder, encoder_of

NUM_PER_SHARD = 64


@dataclass(frozen=True)
class Bucket:
    """Clips of one size and length; their share of the training steps."""

    size: tuple[int, int]  # width, height in pixels
    num_frames: int
    num_clips: int
    share: float
    kinds: tuple[str, ...] = ()  # all
    edits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """Some features of some clips, and all that they depend on, in plain values: it crosses into worker processes."""

    part: str  # "latents" (target, source, reference, mask), "states" or "things" (track, shape, cover)
    model: str  # the VAE's file or the VLM's folder; things need none
    config: MiVEConfig
    seed: int
    bucket: Bucket
    number: int
    folder: str

    @property
    def path(self) -> Path:
        (width, height), frames = self.bucket.size, self.bucket.num_frames
        chosen = "".join(f"_{word.replace(' ', '-')}" for word in (*self.bucket.kinds, *self.bucket.edits))
        return Path(self.folder) / f"{width}x{height}x{frames}{chosen}_{self.part}_{self.number:05d}.safetensors"

    @property
    def indices(self) -> range:
        first = self.number * NUM_PER_SHARD
        return range(first, min(first + NUM_PER_SHARD, self.bucket.num_clips))

    @property
    def fingerprint(self) -> str:
        """Of all settings and of the weights that the features pass through: a VAE's decoder does not count."""
        settings = [self.part, self.seed, self.bucket.size, self.bucket.num_frames, self.indices.stop]
        if self.bucket.kinds or self.bucket.edits:
            settings += [self.bucket.kinds, self.bucket.edits]
        model = Path(self.model)
        if self.part == "things":
            weights = []
        elif self.part == "states":
            settings += [self.config.resolved_layers, self.config.video_fps, self.config.max_video_tokens, self.config.max_instruction_tokens]
            weights = [(model / name).read_bytes() for name in (WEIGHTS, "tokenizer.json", "config.json")]
        else:
            weights = [value.numpy().tobytes() for key, value in sorted(read_tensors(model).items()) if key.startswith(("encoder.", "conv1."))]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for part in weights:
            digest.update(part)
        return digest.hexdigest()

    def is_written(self) -> bool:
        """Whether the file is there and of this fingerprint."""
        if not self.path.is_file():
            return False
        with safe_open(self.path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint") == self.fingerprint


def shards_of(bucket: Bucket, *, vae: str, vlm: str, config: MiVEConfig, seed: int, folder: str, things: bool = False) -> list[Shard]:
    """All parts of every clip of a bucket, in order; things only where asked for."""
    numbers = range(-(-bucket.num_clips // NUM_PER_SHARD))
    parts = (("states", vlm), ("latents", vae), *([("things", "")] if things else []))
    return [Shard(part, model, config, seed, bucket, number, folder) for number in numbers for part, model in parts]


def states_of(pair: PairedEdit, vlm: VLM, config: MiVEConfig) -> dict[str, Tensor]:
    """bf16, never fp16: single channels are thousands of times the rest."""
    return {"states": vlm.condition(pair.request, config).states[0].to(torch.bfloat16)}


def latents_of(pair: PairedEdit, encode: Encoder) -> dict[str, Tensor]:
    """Normalised as VAE.encode gives them; `encode` is encoder_of(vae), many times faster on a CPU."""
    clips = {"target": pair.target, "source": pair.request.source.frames, "reference": pair.request.reference[None]}
    latents = {name: encode(frames[None])[0].to(torch.float16) for name, frames in clips.items()}
    return latents | {"mask": latent_mask(pair.mask).to(torch.float16)}


def object_of(edit: SyntheticEdit) -> dict[str, Tensor]:
    """Means over each latent frame's pixels: track (T, 3) x, y, radius in latent cells, shape (), cover (T, 2Y, 2X) in 0..1.

    Without a thing: zeros, and the shape -1.
    """
    frames, height, width = edit.pair.mask.shape
    thing = edit.thing or EditedObject(torch.zeros(frames, 3), "", torch.zeros(frames, height, width))
    cover = torch.cat([thing.cover[:1].expand(TEMPORAL_FACTOR - 1, -1, -1), thing.cover])  # frame 0 is a latent frame of its own
    track = torch.cat([thing.track[:1].expand(TEMPORAL_FACTOR - 1, -1), thing.track])
    return {
        "track": track.unflatten(0, (-1, TEMPORAL_FACTOR)).mean(dim=1) / SPATIAL_FACTOR,
        "shape": torch.tensor(SHAPES.index(thing.shape) if edit.thing else -1),
        "cover": F.avg_pool3d(cover[None], (TEMPORAL_FACTOR, SPATIAL_FACTOR // 2, SPATIAL_FACTOR // 2))[0].to(torch.float16),
    }


def features_of(shard: Shard) -> Callable[[SyntheticEdit], dict[str, Tensor]]:
    """The shard's part of a paired edit, its model loaded."""
    if shard.part == "things":
        return object_of
    if shard.part == "states":
        vlm = VLM.load(shard.model)
        return lambda edit: states_of(edit.pair, vlm, shard.config)
    encode = encoder_of(read_whole_clip_vae(shard.model))
    return lambda edit: latents_of(edit.pair, encode)


@torch.inference_mode()
def write_shards(shards: Sequence[Shard]) -> None:
    """Computes shards of the same clips, those that are not there yet; each clip is drawn once."""
    wanted = [shard for shard in shards if not shard.is_written()]
    if not wanted:
        return
    torch.set_num_threads(1)
    computed = [(shard, features_of(shard), {}) for shard in wanted]
    bucket = wanted[0].bucket
    edits = PairedEdits(wanted[0].seed, split="train", size=bucket.size, num_frames=bucket.num_frames, kinds=bucket.kinds or None, edits=bucket.edits or None)
    for index in wanted[0].indices:
        edit = edits.sample(index)
        for _, features, tensors in computed:
            tensors.update({f"{index}.{name}": value for name, value in features(edit).items()})
    for shard, _, tensors in computed:
        write_tensors(shard.path, tensors, {"fingerprint": shard.fingerprint})


class Clips(Sequence[EditFeatures]):
    """A bucket's clips, one entry each, while processes still compute the later ones: an entry is waited for where it is asked for."""

    def __init__(self, shards: Sequence[Shard]):
        self.num = shards[0].bucket.num_clips
        self.parts: dict[int, list[Shard]] = {}  # all parts of the same clips, by number
        for shard in shards:
            self.parts.setdefault(shard.number, []).append(shard)
        self.computed: dict[int, Future] = {}
        self.entries: dict[int, list[EditFeatures]] = {}

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> EditFeatures:
        number, place = divmod(range(self.num)[index], NUM_PER_SHARD)
        if number not in self.entries:
            self.computed[number].result()
            self.entries[number] = read_shards(self.parts[number])
        return self.entries[number][place]


def compute(buckets: Sequence[Sequence[Shard]], num_processes: int) -> list[Clips]:
    """Starts to compute the shards that are missing, in processes of one thread each, and goes on at once: all buckets' clips grow alike."""
    clips = [Clips(shards) for shards in buckets]
    pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=give_way)
    for of_bucket, number in sorted(((c, n) for c in clips for n in c.parts), key=lambda pair: (pair[1] + 1) / len(pair[0].parts)):
        of_bucket.computed[number] = pool.submit(write_shards, of_bucket.parts[number])
    pool.shutdown(wait=False)  # once all of them are done
    return clips


def give_way() -> None:
    """This process is to leave the cores to a training that runs meanwhile."""
    if hasattr(os, "nice"):
        os.nice(10)


def wait(clips: Sequence[Clips]) -> list[list[EditFeatures]]:
    """All entries of each bucket, once they are computed."""
    shards = [future for of_bucket in clips for future in of_bucket.computed.values()]
    for future in tqdm(as_completed(shards), total=len(shards), desc="features", unit="shard"):
        future.result()
    return [list(of_bucket) for of_bucket in tqdm(clips, desc="reading features", unit="bucket")]


def read_shards(shards: Sequence[Shard]) -> list[EditFeatures]:
    """All parts of some clips -> one entry a clip, in their stored dtypes."""
    entries: dict[int, dict[str, Tensor]] = {}
    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            for key in file.keys():
                index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = file.get_tensor(key)
    return [EditFeatures(**entries[index]) for index in sorted(entries)]
