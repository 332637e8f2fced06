"""Feature cache for training: latents and VLM states of a manifest's pairs, computed once by the frozen models.

A cache is a folder of shards and an index.json with a contract, which records models and settings. An interrupted computation resumes
at the first missing shard. C latent channels, T x Y x X latent grid; K chosen layers, S VLM tokens, D_vlm their width.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..data.executor import SKIPPED_ERRORS, Executor, prefetch, run_items
from ..data.journal import fingerprint
from ..data.manifest import ManifestEntry, load_entry, read_source
from ..errors import UserError
from ..formats.checkpoint import read_config
from ..formats.safetensors_file import read_header, resolve, shard_files, write_tensors
from ..media.paths import atomic_write, check_output_folder, remove_partial_files
from ..pipeline import check_device, check_vlm, encode_references
from ..types import Clip, PairedEdit
from ..vae import VAE
from ..vlm import VLM, WEIGHTS
from .objective import latent_mask

INDEX = "index.json"
METADATA_KEY = "mive.cache"
NUM_PER_SHARD = 16  # pairs
STATE_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SCALE_SUFFIX = ".scale"  # key suffix of the scales of 8-bit states, one number per token
FREE_DISK = 1.05  # required free disk space, relative to the bytes still to write


@dataclass(frozen=True)
class CacheSettings:
    """What a cache depends on, besides the models and the pairs."""

    buckets: tuple[tuple[int, int, int], ...] = ()  # (width, height, frames) to fit clips to; (): original sizes
    states: str = "bf16"  # dtype of the VLM states, a key of STATE_DTYPES
    negative: bool = False  # whether to store states of an empty instruction too, for condition dropout


@dataclass(frozen=True)
class CacheEntry:
    """Location of one pair's features, and the shapes that must be equal within a batch."""

    shard: str  # file name
    key: str  # prefix of the tensors' keys: the line in the manifest
    name: str  # name of the pair
    grid: tuple[int, int, int]  # T, Y, X
    num_tokens: int  # S
    num_negative: int = 0  # S of the empty instruction, 0 if not cached; it varies too, since prompts contain timestamps
    num_references: int = 1  # R, the reference and the keyframes


@dataclass(frozen=True)
class Encoders:
    """The frozen models that compute the features, and the config of the DiT to be trained on them."""

    vae: VAE
    vlm: VLM
    config: MiVEConfig
    digest: str  # file_digest of both models

    @classmethod
    def load(cls, models: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Encoders":
        """Loads a folder with dit.safetensors (only its config is read), vae.safetensors and vlm/. Raises UserError."""
        check_device(device)
        folder = Path(models)
        config = read_config(resolve(folder, "dit.safetensors"))
        vlm = VLM.load(folder / "vlm", dtype=dtype, device=device)
        check_vlm(vlm, config, folder)
        vae = resolve(folder, "vae.safetensors")
        digest = file_digest([vae, *shard_files(resolve(folder / "vlm", WEIGHTS)), folder / "vlm" / "tokenizer.json"])
        return cls(VAE.load(vae, dtype=dtype, device=device), vlm, config, digest)

    @torch.inference_mode()
    def features(self, pair: PairedEdit, settings: CacheSettings) -> dict[str, Tensor]:
        """Returns target, source (C, T, Y, X) and reference (C, R, Y, X) in bf16; mask (T, Y, X); states, negative (K, S, D_vlm) and their scales.

        A pair with keyframes has reference_frames (R,) too.
        """
        if pair.target is None:
            raise UserError("the pair has no target, so there is nothing to learn")
        latents = {"target": self.vae.encode(pair.target), "source": self.vae.encode(pair.request.source.frames)}
        latents["reference"], numbers = encode_references(pair.request, self.vae)
        features = {name: values[0].to(torch.bfloat16) for name, values in latents.items()}
        if len(numbers) > 1:
            features["reference_frames"] = torch.tensor(numbers, dtype=torch.float32)
        mask = torch.ones(pair.target.shape[:3], dtype=torch.bool) if pair.mask is None else pair.mask
        features["mask"] = latent_mask(mask).to(torch.bfloat16)
        requests = {"states": pair.request} | ({"negative": replace(pair.request, instruction="")} if settings.negative else {})
        for name, request in requests.items():
            features |= quantize_states(name, self.vlm.condition(request, self.config).states[0], settings.states)
        return features


def file_digest(files: Sequence[Path]) -> str:
    """Hashes names, sizes and headers of safetensors files, which is fast at any size, and the full text of other files (a tokenizer)."""
    digest = hashlib.sha256()
    for file in files:
        header = repr(sorted(read_header(file).shapes.items())) if file.suffix == ".safetensors" else file.read_text(encoding="utf-8")
        digest.update(f"{file.name} {file.stat().st_size} {header}".encode())
    return digest.hexdigest()[:16]


def quantize_states(name: str, states: Tensor, dtype: str) -> dict[str, Tensor]:
    """States (K, S, D_vlm) -> tensors to store: bf16, or fp8 with one scale per token, since single channels are thousands of times larger than the rest."""
    if dtype == "bf16":
        return {name: states.to(torch.bfloat16)}
    scale = states.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / torch.finfo(STATE_DTYPES["fp8"]).max
    return {name: (states.float() / scale).to(STATE_DTYPES["fp8"]), name + SCALE_SUFFIX: scale}


def dequantize_states(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Inverse of quantize_states: stored tensors -> states (K, S, D_vlm) in float32."""
    states = tensors[name].float()
    return states * tensors[name + SCALE_SUFFIX] if name + SCALE_SUFFIX in tensors else states


def fit_bucket(clip: Clip, buckets: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Chooses a bucket no longer than the clip: nearest in aspect ratio, then longest, then widest. Raises UserError if there is none."""
    num_frames, height, width = clip.frames.shape[:3]
    fitting = [bucket for bucket in buckets if bucket[2] <= num_frames]
    if not fitting:
        raise UserError("the clip is shorter than every bucket", got=f"{num_frames} frames", expected=f"{min(b[2] for b in buckets)} or more")
    return min(fitting, key=lambda b: (abs(math.log(b[0] / b[1]) - math.log(width / height)), -b[2], -b[0]))


def read_pair(entry: ManifestEntry, settings: CacheSettings) -> PairedEdit:
    """Reads a pair, fitted to its bucket. Raises UserError if the pair is unusable."""
    if not settings.buckets:
        return load_entry(entry)
    clip = read_source(entry, max(frames for _, _, frames in settings.buckets))
    width, height, num_frames = fit_bucket(clip, settings.buckets)
    return load_entry(entry, (width, height), num_frames, clip)


@dataclass(frozen=True)
class Shard:
    """The contents of one file, before it is written."""

    path: Path
    lines: range  # lines of the manifest, counted from 0
    entries: Sequence[ManifestEntry]  # one entry per line
    fingerprint: str  # hash of contract and entries


@dataclass(frozen=True)
class ShardWorker:
    """Worker of data.executor that writes shards; within a shard, the next pair is read during the encoding of the current one."""

    encoders: Encoders
    settings: CacheSettings
    precomputed: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # features by line, computed for the size estimate

    def read(self, shard: Shard) -> None:
        """Reads nothing ahead: all pairs of a shard at once would not fit in memory."""

    def work(self, shard: Shard, read: None) -> dict:
        write_shard(shard, self.encoders, self.settings, self.precomputed)
        return {}


def cache(
    entries: Sequence[ManifestEntry],
    encoders: Encoders,
    folder: str | Path,
    settings: CacheSettings = CacheSettings(),
    log: Callable[[str], object] = lambda text: None,
    executor: Executor = Executor(),
    load: Callable[[], Encoders] | None = None,
) -> dict:
    """Computes the missing shards of a cache and returns its index.

    Unusable pairs are skipped and listed in the index with the reason. `log` receives the size estimate; `load` loads the encoders of a
    worker, where each has its own. Raises UserError if the folder cannot be written or holds another cache, the disk is too small or no pair is usable.
    """
    folder = check_output_folder(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    contract = cache_contract(encoders, settings)
    check_same(folder, contract)
    shards = plan_shards(entries, folder.absolute(), contract)
    missing = [shard for shard in shards if read_report(shard) is None]
    precomputed = check_space(folder, missing, len(shards), encoders, settings, log) if missing else {}
    make = (lambda: ShardWorker(load(), settings)) if executor.loads_per_worker and load else lambda: ShardWorker(encoders, settings, precomputed)
    for _, outcome in tqdm(run_items(make, missing, executor), total=len(missing), desc="cache", unit="shard", disable=None):
        if "why" in outcome:
            raise UserError(outcome["why"])
    remove_partial_files(folder)
    return write_index(folder, contract, [read_report(shard) for shard in shards])  # type: ignore[misc]  # all shards are written by now


def plan_shards(entries: Sequence[ManifestEntry], folder: Path, contract: dict) -> list[Shard]:
    """Splits the entries into shards."""
    shards = []
    for number, first in enumerate(range(0, len(entries), NUM_PER_SHARD)):
        lines = range(first, min(first + NUM_PER_SHARD, len(entries)))
        group = [entries[line] for line in lines]
        shards.append(Shard(folder / f"{number:06d}.safetensors", lines, group, fingerprint(sorted(contract.items()), *group)))
    return shards


def cache_contract(encoders: Encoders, settings: CacheSettings) -> dict:
    """Returns the models and settings that the features depend on, as JSON values."""
    config = json.loads(json.dumps(asdict(encoders.config)))
    read = {key: config[key] for key in ("vlm", "vlm_width", "vlm_num_layers", "video_fps", "max_video_tokens", "max_instruction_tokens", "latent_format")}
    return {"layers": list(encoders.config.resolved_layers), **read, "models": encoders.digest, **json.loads(json.dumps(asdict(settings)))}


def check_same(folder: Path, contract: dict) -> None:
    """Raises UserError if the folder holds a cache with another contract."""
    if (folder / INDEX).is_file():
        existing = read_index(folder)["contract"]
        differing = [key for key in contract if existing.get(key) != contract[key]]
        if differing:
            raise UserError(
                "the folder holds a cache that was made otherwise",
                where=folder,
                got=f"{differing[0]} {existing.get(differing[0])}",
                expected=f"{contract[differing[0]]}",
                fix="choose another folder, or remove that one",
            )


def check_space(
    folder: Path, missing: Sequence[Shard], num_shards: int, encoders: Encoders, settings: CacheSettings, log: Callable[[str], object]
) -> dict[int, dict[str, Tensor]]:
    """Logs the estimated size of the missing shards, from their first usable pair, and returns that pair's features by line.

    Raises UserError if the disk is too small, or if there is neither a finished shard nor a usable pair.
    """
    skipped: list[dict] = []
    count = sum(len(shard.lines) for shard in missing)
    first = next((found for shard in missing for found in usable(shard, encoders, settings, skipped)), None)
    if first is None and len(missing) < num_shards:
        return {}
    if first is None:
        raise UserError("none of the pairs can be used", got=f"{count}, the first of which says: {skipped[0]['why']}")
    line, _, features = first
    size = sum(tensor.nbytes for tensor in features.values())
    free = shutil.disk_usage(folder).free
    log(f"about {size * count / 1e9:.3g} GB for {count} pairs, {size / 1e6:.3g} MB each; {free / 1e9:.3g} GB are free")
    if size * count * FREE_DISK > free:
        raise UserError(
            "the disk is too small for the cache",
            where=folder,
            got=f"{free} bytes free",
            expected=f"about {size * count}",
            fix="free some space, or store the states in fp8",
        )
    return {line: features}


def usable(
    shard: Shard, encoders: Encoders, settings: CacheSettings, skipped: list[dict], precomputed: dict[int, dict[str, Tensor]] | None = None
) -> Iterator[tuple[int, ManifestEntry, dict[str, Tensor]]]:
    """Yields line, entry and features of the usable pairs; adds the others to `skipped`, with the reason."""
    precomputed = precomputed or {}
    read_one = lambda pair: None if pair[0] in precomputed else read_pair(pair[1], settings)
    for (line, entry), read in prefetch(zip(shard.lines, shard.entries), read_one):
        try:
            features = precomputed.pop(line) if line in precomputed else encoders.features(read(), settings)
        except SKIPPED_ERRORS as error:
            skipped.append({"pair": line, "name": entry.title, "why": str(error)})
            continue
        yield line, entry, features


def write_shard(shard: Shard, encoders: Encoders, settings: CacheSettings, precomputed: dict[int, dict[str, Tensor]]) -> None:
    """Computes and writes one shard."""
    skipped: list[dict] = []
    tensors: dict[str, Tensor] = {}
    kept: list[dict] = []
    for line, entry, features in usable(shard, encoders, settings, skipped, precomputed):
        key = f"{line:08d}"
        tensors |= {f"{key}.{name}": value.cpu() for name, value in features.items()}
        kept.append(
            asdict(
                CacheEntry(
                    shard.path.name,
                    key,
                    entry.name,
                    tuple(features["target"].shape[1:]),
                    features["states"].shape[1],
                    features["negative"].shape[1] if settings.negative else 0,
                    features["reference"].shape[1],
                )
            )
        )
    report = {"fingerprint": shard.fingerprint, "entries": kept, "skipped": skipped}
    write_tensors(shard.path, tensors or {"empty": torch.zeros(1)}, {METADATA_KEY: json.dumps(report)})


def read_report(shard: Shard) -> dict | None:
    """Reads the report in a shard's metadata; None if the shard is missing, damaged or has another fingerprint."""
    try:
        with safe_open(str(shard.path), framework="pt") as file:
            report = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (FileNotFoundError, SafetensorError, ValueError):
        return None
    return report if report.get("fingerprint") == shard.fingerprint else None


def write_index(folder: Path, contract: dict, reports: Sequence[dict]) -> dict:
    """Writes index.json and returns it. Raises UserError if no pair is usable."""
    index: dict[str, Any] = {
        "contract": contract,
        "pairs": sum(len(r["entries"]) for r in reports),
        "bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        "skipped": [item for r in reports for item in r["skipped"]],
        "entries": [item for r in reports for item in r["entries"]],
    }
    if not index["entries"]:
        raise UserError("none of the pairs can be used", where=folder, got=index["skipped"][0]["why"])
    with atomic_write(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def read_index(folder: str | Path) -> dict:
    """Reads the index of a cache, with CacheEntry objects. Raises UserError if it is missing or damaged."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return index | {"entries": [CacheEntry(**{**entry, "grid": tuple(entry["grid"])}) for entry in index["entries"]]}
    except OSError:
        raise UserError("this is no cache of features", where=folder, got=f"no {INDEX}", fix="`mive data cache` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the cache's index is damaged", where=path, got=str(error), fix="run `mive data cache` again: what is there is kept") from None
