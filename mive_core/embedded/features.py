"""A disk cache of the frozen features of paired edits: VAE latents, VLM hidden states, and position and coverage of the edited object.

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

from ..config import SPATIAL_FACTOR, TEMPORAL_FACTOR, MiVEConfig
from ..formats.safetensors_file import read_tensors, write_tensors
from ..train.objective import EditFeatures, latent_mask
from ..types import PairedEdit
from ..vlm import VLM, WEIGHTS
from .synthetic import REVISION, SHAPES, EditedObject, PairedEdits, SyntheticEdit
from .vae_network import read_whole_clip_vae
from .vae_patch_matrix import Encoder, encoder_of

NUM_PER_SHARD = 64


@dataclass(frozen=True)
class Bucket:
    """Training clips of one size and length."""

    size: tuple[int, int]  # width, height in pixels
    num_frames: int
    num_clips: int
    share: float  # fraction of the training steps
    kinds: tuple[str, ...] = ()  # (): all
    edits: tuple[str, ...] = ()  # (): all


@dataclass(frozen=True)
class Shard:
    """Some features of consecutive clips and everything that they depend on, as plain values that can be sent to worker processes."""

    part: str  # "latents" (target, source, reference, reference_frames, mask), "states" or "objects" (track, shape, cover)
    model: str  # VAE file or VLM folder; unused for objects
    config: MiVEConfig
    seed: int
    bucket: Bucket
    number: int
    folder: str

    @property
    def path(self) -> Path:
        """The shard's file."""
        (width, height), frames = self.bucket.size, self.bucket.num_frames
        chosen = "".join(f"_{word.replace(' ', '-')}" for word in (*self.bucket.kinds, *self.bucket.edits))
        return Path(self.folder) / f"{width}x{height}x{frames}{chosen}_{self.part}_{self.number:05d}.safetensors"

    @property
    def indices(self) -> range:
        """Indices of the shard's clips."""
        first = self.number * NUM_PER_SHARD
        return range(first, min(first + NUM_PER_SHARD, self.bucket.num_clips))

    @property
    def fingerprint(self) -> str:
        """A hash of all settings, of the drawing's revision and of the weights that affect the features; a VAE's decoder does not."""
        settings = [REVISION, self.part, self.seed, self.bucket.size, self.bucket.num_frames, self.indices.stop]
        if self.bucket.kinds or self.bucket.edits:
            settings += [self.bucket.kinds, self.bucket.edits]
        model = Path(self.model)
        if self.part == "objects":
            weights = []
        elif self.part == "states":
            settings += [self.config.resolved_layers, self.config.video_fps, self.config.max_video_tokens, self.config.max_instruction_tokens]
            weights = [(model / name).read_bytes() for name in (WEIGHTS, "tokenizer.json", "config.json")]
        else:
            weights = [value.numpy().tobytes() for key, value in sorted(read_tensors(model).items()) if key.startswith(("encoder.", "conv1."))]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for content in weights:
            digest.update(content)
        return digest.hexdigest()

    def is_written(self) -> bool:
        """Whether the file exists with this fingerprint."""
        return is_current(self.path, self.fingerprint)


def is_current(path: Path, fingerprint: str) -> bool:
    """Whether a file of features exists with this fingerprint."""
    if not path.is_file():
        return False
    with safe_open(str(path), framework="pt") as file:
        return (file.metadata() or {}).get("fingerprint") == fingerprint


def shards_of(bucket: Bucket, *, vae: str, vlm: str, config: MiVEConfig, seed: int, folder: str, objects: bool = False) -> list[Shard]:
    """Returns the shards of all parts of a bucket's clips, in order; `objects` includes that part."""
    numbers = range(-(-bucket.num_clips // NUM_PER_SHARD))
    parts = (("states", vlm), ("latents", vae), *([("objects", "")] if objects else []))
    return [Shard(part, model, config, seed, bucket, number, folder) for number in numbers for part, model in parts]


def states_of(pair: PairedEdit, vlm: VLM, config: MiVEConfig) -> dict[str, Tensor]:
    """Returns the hidden states (K, S, D_vlm). bf16, not fp16: some channels are thousands of times larger than the rest."""
    return {"states": vlm.condition(pair.request, config).states[0].to(torch.bfloat16)}


def latents_of(pair: PairedEdit, encode: Encoder, keyframes: Sequence[int] = ()) -> dict[str, Tensor]:
    """Returns latents normalised as by VAE.encode, the references' frame numbers and the latent mask.

    The reference (C, R, Y, X) is followed by the target's frames `keyframes`, each encoded as an image of its own. `encode` is
    encoder_of(vae), many times faster on a CPU.
    """
    assert pair.target is not None and pair.mask is not None  # every synthetic edit has both
    images = torch.stack([pair.request.reference, *(pair.target[number] for number in keyframes)])
    clips = {"target": pair.target[None], "source": pair.request.source.frames[None], "reference": images[:, None]}
    latents = {name: torch.cat([*encode(frames)], dim=1).to(torch.float16) for name, frames in clips.items()}
    return latents | {"reference_frames": torch.tensor([0.0, *keyframes]), "mask": latent_mask(pair.mask).to(torch.float16)}


def object_of(edit: SyntheticEdit) -> dict[str, Tensor]:
    """Averages the edited object over each latent frame: track (T, 3) x, y, radius in latent cells, shape (), cover (T, 2Y, 2X) in 0..1.

    Without an edited object all are zero except the shape, -1.
    """
    frames, height, width, _ = edit.pair.request.source.frames.shape
    edited = edit.edited_object or EditedObject(torch.zeros(frames, 3), "", torch.zeros(frames, height, width))
    cover = torch.cat([edited.cover[:1].expand(TEMPORAL_FACTOR - 1, -1, -1), edited.cover])  # frame 0 is a latent frame of its own
    track = torch.cat([edited.track[:1].expand(TEMPORAL_FACTOR - 1, -1), edited.track])
    return {
        "track": track.unflatten(0, (-1, TEMPORAL_FACTOR)).mean(dim=1) / SPATIAL_FACTOR,
        "shape": torch.tensor(SHAPES.index(edited.shape) if edit.edited_object else -1),
        "cover": F.avg_pool3d(cover[None], (TEMPORAL_FACTOR, SPATIAL_FACTOR // 2, SPATIAL_FACTOR // 2))[0].to(torch.float16),
    }


def features_of(shard: Shard) -> Callable[[SyntheticEdit], dict[str, Tensor]]:
    """Loads the shard's model and returns the function that computes its features of a paired edit."""
    if shard.part == "objects":
        return object_of
    if shard.part == "states":
        vlm = VLM.load(shard.model)
        return lambda edit: states_of(edit.pair, vlm, shard.config)
    encode = encoder_of(read_whole_clip_vae(shard.model))
    return lambda edit: latents_of(edit.pair, encode, edit.keyframes)


@torch.inference_mode()
def write_shards(shards: Sequence[Shard]) -> None:
    """Computes the missing ones of several shards of the same clips; each clip is drawn once."""
    missing = [shard for shard in shards if not shard.is_written()]
    if not missing:
        return
    torch.set_num_threads(1)
    jobs: list[tuple[Shard, Callable[[SyntheticEdit], dict[str, Tensor]], dict[str, Tensor]]] = [(shard, features_of(shard), {}) for shard in missing]
    bucket = missing[0].bucket
    edits = PairedEdits(missing[0].seed, split="train", size=bucket.size, num_frames=bucket.num_frames, kinds=bucket.kinds or None, edits=bucket.edits or None)
    for index in missing[0].indices:
        edit = edits.sample(index)
        for _, features, tensors in jobs:
            tensors.update({f"{index}.{name}": value for name, value in features(edit).items()})
    for shard, _, tensors in jobs:
        write_tensors(shard.path, tensors, {"fingerprint": shard.fingerprint})


class Clips(Sequence[EditFeatures]):
    """The features of a bucket's clips, which worker processes may still be computing: reading an entry waits for its shard."""

    def __init__(self, shards: Sequence[Shard]):
        self.num_clips = shards[0].bucket.num_clips
        self.parts: dict[int, list[Shard]] = {}  # shard number -> all parts of its clips
        for shard in shards:
            self.parts.setdefault(shard.number, []).append(shard)
        self.futures: dict[int, Future] = {}  # by shard number
        self.entries: dict[int, list[EditFeatures]] = {}  # by shard number, those read so far

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> EditFeatures:  # type: ignore[override]  # slices are not needed
        number, offset = divmod(range(self.num_clips)[index], NUM_PER_SHARD)
        if number not in self.entries:
            self.futures[number].result()
            self.entries[number] = read_shards(self.parts[number])
        return self.entries[number][offset]


def compute(buckets: Sequence[Sequence[Shard]], num_processes: int) -> list[Clips]:
    """Starts single-threaded processes that compute the missing shards, and returns at once. All buckets progress at the same relative rate."""
    clips = [Clips(shards) for shards in buckets]
    pool = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=lower_priority)
    for bucket_clips, number in sorted(((c, n) for c in clips for n in c.parts), key=lambda pair: (pair[1] + 1) / len(pair[0].parts)):
        bucket_clips.futures[number] = pool.submit(write_shards, bucket_clips.parts[number])
    pool.shutdown(wait=False)  # the processes end after the last shard
    return clips


def lower_priority() -> None:
    """Lowers this process's CPU priority below that of a concurrent training."""
    if hasattr(os, "nice"):
        os.nice(10)


def wait(clips: Sequence[Clips]) -> list[list[EditFeatures]]:
    """Waits for all shards and returns the entries of each bucket."""
    futures = [future for bucket_clips in clips for future in bucket_clips.futures.values()]
    for future in tqdm(as_completed(futures), total=len(futures), desc="features", unit="shard"):
        future.result()
    return [list(bucket_clips) for bucket_clips in tqdm(clips, desc="reading features", unit="bucket")]


def read_shards(shards: Sequence[Shard]) -> list[EditFeatures]:
    """Reads all parts of some clips: one entry per clip, in the stored dtypes."""
    entries: dict[int, dict[str, Tensor]] = {}
    for shard in shards:
        with safe_open(shard.path, framework="pt") as file:
            for key in file.keys():
                index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = file.get_tensor(key)
    return [EditFeatures(**entries[index]) for index in sorted(entries)]
