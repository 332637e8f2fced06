"""What training reads of a manifest's pairs, computed once by frozen models: latents, and the states of the chosen VLM layers.

A cache is a folder of shards and an index.json that says what they were made by and for. An interrupted one goes on where it
stopped, shard by shard. C latent channels, T x Y x X latent grid; K chosen layers, S VLM tokens, D_vlm their width.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..data.executor import SKIPPED_ERRORS, Executor, ahead, run_items
from ..data.journal import mark_of
from ..data.manifest import ManifestEntry, load_entry, read_source
from ..errors import UserError
from ..formats.checkpoint import read_config
from ..formats.safetensors_file import read_header, resolve, shard_files, write_tensors
from ..media.paths import atomic_write, check_output_folder, remove_partial_files
from ..pipeline import check_device, check_vlm
from ..types import Clip, PairedEdit
from ..vae import VAE
from ..vlm import VLM, WEIGHTS
from .objective import latent_mask

INDEX = "index.json"
METADATA_KEY = "mive.cache"
NUM_PER_SHARD = 16
STATES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
SCALE = ".scale"  # beside 8-bit states: one number a token
FREE_DISK = 1.05  # of what is still to be written


@dataclass(frozen=True)
class CacheSettings:
    """What a cache depends on beside the models and the pairs."""

    buckets: tuple[tuple[int, int, int], ...] = ()  # (width, height, frames) to choose from; none: each clip as it is
    states: str = "bf16"
    negative: bool = False  # the states of an empty instruction too, for condition dropout


@dataclass(frozen=True)
class CacheEntry:
    """Where one pair's features are, and the shapes that decide which pairs can share a batch."""

    shard: str
    key: str
    name: str
    grid: tuple[int, int, int]  # T, Y, X
    num_tokens: int  # S
    num_negative: int = 0  # S of the empty instruction, where it is there: timestamps make it differ too


@dataclass(frozen=True)
class Encoders:
    """The frozen models that a cache is made by, and the contract of the DiT that is to read it."""

    vae: VAE
    vlm: VLM
    config: MiVEConfig
    digest: str  # of both models

    @classmethod
    def load(cls, models: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Encoders":
        """A folder with dit.safetensors (only its config is read), vae.safetensors and vlm/. Raises UserError."""
        check_device(device)
        folder = Path(models)
        config = read_config(resolve(folder, "dit.safetensors"))
        vlm = VLM.load(folder / "vlm", dtype=dtype, device=device)
        check_vlm(vlm, config, folder)
        vae = resolve(folder, "vae.safetensors")
        digest = digest_of([vae, *shard_files(resolve(folder / "vlm", WEIGHTS)), folder / "vlm" / "tokenizer.json"])
        return cls(VAE.load(vae, dtype=dtype, device=device), vlm, config, digest)

    @torch.inference_mode()
    def features(self, pair: PairedEdit, settings: CacheSettings) -> dict[str, Tensor]:
        """target, source (C, T, Y, X) and reference (C, 1, Y, X) in bf16; mask (T, Y, X); states, negative (K, S, D_vlm) and scales."""
        if pair.target is None:
            raise UserError("the pair has no target, so there is nothing to learn")
        clips = {"target": pair.target, "source": pair.request.source.frames, "reference": pair.request.reference[None]}
        features = {name: self.vae.encode(frames)[0].to(torch.bfloat16) for name, frames in clips.items()}
        mask = torch.ones(pair.target.shape[:3], dtype=torch.bool) if pair.mask is None else pair.mask
        features["mask"] = latent_mask(mask).to(torch.bfloat16)
        requests = {"states": pair.request} | ({"negative": replace(pair.request, instruction="")} if settings.negative else {})
        for name, request in requests.items():
            features |= stored(name, self.vlm.condition(request, self.config).states[0], settings.states)
        return features


def digest_of(files: Sequence[Path]) -> str:
    """Of the files' names, lengths and headers, which is quick at any size; a tokenizer is read whole."""
    digest = hashlib.sha256()
    for file in files:
        header = repr(sorted(read_header(file).shapes.items())) if file.suffix == ".safetensors" else file.read_text(encoding="utf-8")
        digest.update(f"{file.name} {file.stat().st_size} {header}".encode())
    return digest.hexdigest()[:16]


def stored(name: str, states: Tensor, how: str) -> dict[str, Tensor]:
    """(K, S, D_vlm) as a cache holds it: bf16, or 8 bits with one scale a token, since single channels are thousands of times the rest."""
    if how == "bf16":
        return {name: states.to(torch.bfloat16)}
    scale = states.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / torch.finfo(STATES["fp8"]).max
    return {name: (states.float() / scale).to(STATES["fp8"]), name + SCALE: scale}


def restored(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """The inverse of `stored`, in float32."""
    states = tensors[name].float()
    return states * tensors[name + SCALE] if name + SCALE in tensors else states


def fit_bucket(clip: Clip, buckets: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The bucket nearest in aspect ratio, then the longest, of those that are no longer than the clip. Raises UserError where none is."""
    num_frames, height, width = clip.frames.shape[:3]
    fitting = [bucket for bucket in buckets if bucket[2] <= num_frames]
    if not fitting:
        raise UserError("the clip is shorter than every bucket", got=f"{num_frames} frames", expected=f"{min(b[2] for b in buckets)} or more")
    return min(fitting, key=lambda b: (abs(math.log(b[0] / b[1]) - math.log(width / height)), -b[2], -b[0]))


def read_pair(entry: ManifestEntry, settings: CacheSettings) -> PairedEdit:
    """Raises UserError for whatever makes the pair unusable."""
    if not settings.buckets:
        return load_entry(entry)
    clip = read_source(entry, max(frames for _, _, frames in settings.buckets))
    width, height, num_frames = fit_bucket(clip, settings.buckets)
    return load_entry(entry, (width, height), num_frames, clip)


@dataclass(frozen=True)
class Shard:
    """What is to be written into one file."""

    path: Path
    lines: range  # of the manifest
    entries: Sequence[ManifestEntry]  # one a line
    mark: str


@dataclass(frozen=True)
class ShardWorker:
    """Writes shards; its pairs are read one ahead."""

    encoders: Encoders
    settings: CacheSettings
    known: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # features that are there already, by line

    def read(self, shard: Shard) -> None:
        """Nothing: a shard's pairs would not fit in memory together."""

    def work(self, shard: Shard, read: None) -> dict:
        write_shard(shard, self.encoders, self.settings, self.known)
        return {}


def cache(
    entries: Sequence[ManifestEntry],
    encoders: Encoders,
    folder: str | Path,
    settings: CacheSettings = CacheSettings(),
    say: Callable[[str], None] = lambda text: None,
    executor: Executor = Executor(),
    load: Callable[[], Encoders] | None = None,
) -> dict:
    """Computes what is missing of the cache -> its index.

    A pair that cannot be used is skipped, counted and named in the index. `load` gives each worker on Ray encoders of its own. Raises
    UserError where the folder cannot be written, holds a cache of something else, the disk is too small or no pair is usable.
    """
    folder = check_output_folder(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    contract = contract_of(encoders, settings)
    check_same(folder, contract)
    shards = shards_of(entries, folder.absolute(), contract)
    missing = [shard for shard in shards if report_of(shard) is None]
    known = check_space(folder, missing, len(shards), encoders, settings, say) if missing else {}
    make = (lambda: ShardWorker(load(), settings)) if executor.ray and load else lambda: ShardWorker(encoders, settings, known)
    for _, outcome in tqdm(run_items(make, missing, executor), total=len(missing), desc="cache", unit="shard", disable=None):
        if "why" in outcome:
            raise UserError(outcome["why"])
    remove_partial_files(folder)
    return write_index(folder, contract, [report_of(shard) for shard in shards])


def shards_of(entries: Sequence[ManifestEntry], folder: Path, contract: dict) -> list[Shard]:
    shards = []
    for number, first in enumerate(range(0, len(entries), NUM_PER_SHARD)):
        lines = range(first, min(first + NUM_PER_SHARD, len(entries)))
        group = [entries[line] for line in lines]
        shards.append(Shard(folder / f"{number:06d}.safetensors", lines, group, mark_of(sorted(contract.items()), *group)))
    return shards


def contract_of(encoders: Encoders, settings: CacheSettings) -> dict:
    config = json.loads(json.dumps(asdict(encoders.config)))
    read = {key: config[key] for key in ("vlm", "vlm_width", "vlm_num_layers", "video_fps", "max_video_tokens", "max_instruction_tokens", "latent_format")}
    return {"layers": list(encoders.config.resolved_layers), **read, "models": encoders.digest, **json.loads(json.dumps(asdict(settings)))}


def check_same(folder: Path, contract: dict) -> None:
    """Raises UserError where the folder's index is of a cache made otherwise."""
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
    folder: Path, missing: Sequence[Shard], num_shards: int, encoders: Encoders, settings: CacheSettings, say: Callable[[str], None]
) -> dict[int, dict[str, Tensor]]:
    """Says how many bytes the missing of the shards will take, judged by their first usable pair -> its features, by its line.

    Raises UserError where the disk has no room for them, and where no shard is there and no pair can be used.
    """
    skipped: list[dict] = []
    count = sum(len(shard.lines) for shard in missing)
    line, _, features = next((found for shard in missing for found in usable(shard, encoders, settings, skipped)), (None, None, None))
    if features is None and len(missing) < num_shards:
        return {}
    if features is None:
        raise UserError("none of the pairs can be used", got=f"{count}, the first of which says: {skipped[0]['why']}")
    size = sum(tensor.nbytes for tensor in features.values())
    free = shutil.disk_usage(folder).free
    say(f"about {size * count / 1e9:.3g} GB for {count} pairs, {size / 1e6:.3g} MB each; {free / 1e9:.3g} GB are free")
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
    shard: Shard, encoders: Encoders, settings: CacheSettings, skipped: list[dict], known: dict[int, dict[str, Tensor]] | None = None
) -> Iterator[tuple[int, ManifestEntry, dict[str, Tensor]]]:
    """Line, entry and features of those pairs that can be used; the others are added to `skipped`, with the reason."""
    known = known or {}
    read_one = lambda pair: None if pair[0] in known else read_pair(pair[1], settings)
    for (line, entry), read in ahead(zip(shard.lines, shard.entries), read_one):
        try:
            features = known.pop(line) if line in known else encoders.features(read(), settings)
        except SKIPPED_ERRORS as error:
            skipped.append({"pair": line, "name": entry.title, "why": str(error)})
            continue
        yield line, entry, features


def write_shard(shard: Shard, encoders: Encoders, settings: CacheSettings, known: dict[int, dict[str, Tensor]]) -> None:
    skipped: list[dict] = []
    tensors, kept = {}, []
    for line, entry, features in usable(shard, encoders, settings, skipped, known):
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
                )
            )
        )
    report = {"fingerprint": shard.mark, "entries": kept, "skipped": skipped}
    write_tensors(shard.path, tensors or {"empty": torch.zeros(1)}, {METADATA_KEY: json.dumps(report)})


def report_of(shard: Shard) -> dict | None:
    """What a shard says of itself; None where it is not there, is damaged or was made of something else."""
    try:
        with safe_open(str(shard.path), framework="pt") as file:
            report = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (FileNotFoundError, SafetensorError, ValueError):
        return None
    return report if report.get("fingerprint") == shard.mark else None


def write_index(folder: Path, contract: dict, reports: Sequence[dict]) -> dict:
    index = {
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
    """A cache's index. Raises UserError where there is none, or it is unreadable."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return index | {"entries": [CacheEntry(**{**entry, "grid": tuple(entry["grid"])}) for entry in index["entries"]]}
    except OSError:
        raise UserError("this is no cache of features", where=folder, got=f"no {INDEX}", fix="`mive data cache` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("the cache's index is damaged", where=path, got=str(error), fix="run `mive data cache` again: what is there is kept") from None
