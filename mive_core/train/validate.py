"""Validation during training: the metrics of `mive eval`, and the loss, on held-out pairs with cached features.

Thanks to the cache no VLM is loaded. C latent channels, T x Y x X latent grid; K chosen layers, S VLM tokens, D_vlm their width.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..config import MiVEConfig
from ..data.folder import read_pairs
from ..data.manifest import ManifestEntry
from ..errors import UserError
from ..evaluation.evaluate import EvaluationSettings, evaluate, summary
from ..evaluation.loss_curve import draw_losses, read_losses
from ..flow import schedule
from ..formats.safetensors_file import resolve
from ..media.paths import atomic_write
from ..pipeline import EMBEDDED, Pipeline
from ..types import Clip, Condition, EditLatents, EditRequest, PairedEdit
from ..vae import VAE
from . import blocks
from .cache import CacheEntry, CacheSettings, read_index, read_pair
from .distributed import ProcessGroup
from .edit_task import CachedBatches, check_cache
from .flow_matching import FlowMatchingRecipe, FlowMatchingTask
from .log import FILES
from .loop import Task
from .objective import EditFeatures, collate, flow_matching_losses

FOLDER = "validation"  # folder in output_dir, with one folder per validation
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # values of t at which the loss is measured
LOGGED = ("psnr_edited", "psnr_kept", "success_rate")  # metrics of `mive eval` that are logged


@dataclass(frozen=True, kw_only=True)
class CachedRequest(EditRequest):
    """An EditRequest with cached features of its source, reference and instruction."""

    features: EditFeatures  # a batch of one


class HeldOutPairs(Sequence[PairedEdit]):
    """The first `count` pairs of a manifest's cache, with requests of type CachedRequest."""

    def __init__(self, manifest: str, cache: str, count: int):
        """Raises UserError if manifest or cache is missing, or if the cache was made of another manifest."""
        index, self.lines = read_index(cache), read_pairs(manifest)
        self.folder, self.settings = cache, CacheSettings(tuple(tuple(bucket) for bucket in index["contract"]["buckets"]))
        self.entries: list[CacheEntry] = index["entries"][:count]
        self.reader = CachedBatches((cache,), 1, 0)
        for entry in self.entries:
            if int(entry.key) >= len(self.lines) or self.manifest_entry(entry).name != entry.name:
                raise UserError(
                    "the validation's cache was not made of its manifest",
                    where=cache,
                    got=f"line {int(entry.key) + 1}, {entry.name!r}",
                    fix="run `mive data cache` with the held-out manifest",
                )

    def manifest_entry(self, entry: CacheEntry) -> ManifestEntry:
        return self.lines[int(entry.key)]

    def features(self, index: int) -> EditFeatures:
        """Reads the features of a pair, as a batch of one."""
        return collate([EditFeatures(**self.reader.read(self.folder, self.entries[index]))])

    def __getitem__(self, index: int) -> PairedEdit:  # type: ignore[override]  # without slices
        pair = read_pair(self.manifest_entry(self.entries[index]), self.settings)
        request = pair.request
        return replace(pair, request=CachedRequest(request.source, request.reference, request.instruction, request.keyframes, features=self.features(index)))

    def __len__(self) -> int:
        return len(self.entries)


class DistributedSubset(Sequence[PairedEdit]):
    """The items of a sequence for one process; all processes get equally many, for which the sequence is repeated at its end."""

    def __init__(self, sequence: Sequence, processes: ProcessGroup):
        count = -(-len(sequence) // processes.size)
        self.sequence, self.indices = sequence, [processes.rank + i * processes.size for i in range(count)]

    def __getitem__(self, index: int) -> PairedEdit:  # type: ignore[override]  # without slices
        return self.sequence[self.indices[index] % len(self.sequence)]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class TrainedEditor:
    """Edits with the DiT in training; implements Editor of evaluation/evaluate.py."""

    pipeline: Pipeline
    recipe: FlowMatchingRecipe

    @property
    def config(self) -> MiVEConfig:
        return self.pipeline.config

    @property
    def vae(self) -> VAE:
        return self.pipeline.vae

    @torch.no_grad()  # not inference mode, in which sharded weights would stay
    def edit(
        self, request: CachedRequest, *, steps: int | None, cfg: float | None, shift: float | None, seed: int, progress: Callable[[Iterable], Iterable]
    ) -> Clip:
        config, features = self.config, request.features.to(self.recipe.device)
        states = [features.states] + ([features.negative] if config.cfg != 1.0 and features.negative is not None else [])
        conditions = [Condition(of, config.resolved_layers) for of in states]
        with torch.autocast(torch.device(self.recipe.device).type, torch.bfloat16, enabled=self.recipe.bf16):
            latents = self.pipeline.denoise(
                EditLatents(features.source, features.reference, (0, *(keyframe.number for keyframe in request.keyframes))),
                conditions,
                schedule(steps or config.steps, config.shift),
                config.cfg if len(conditions) > 1 else 1.0,
                seed,
                progress,
            )
        return Clip(self.vae.decode(latents), request.source.fps)


class Validation:
    """Validates a task every `validate_every` steps and after the last one; implements loop.Validation."""

    def __init__(self, task: FlowMatchingTask, where: object = None):
        """Raises UserError if the recipe names no manifest, cache or VAE, or if they do not fit."""
        self.task, self.recipe = task, task.recipe
        for name in ("validation_manifest", "validation_cache", "validation_vae"):
            if not getattr(self.recipe, name):
                raise UserError(f"a validation needs the recipe's {name}", where=where)
        check_cache(self.recipe.validation_cache, task.config)
        self.pairs = HeldOutPairs(self.recipe.validation_manifest, self.recipe.validation_cache, self.recipe.validation_pairs)
        dtype = torch.bfloat16 if self.recipe.bf16 and self.recipe.device == "cuda" else torch.float32
        vae = VAE.load(resolve(EMBEDDED.get(self.recipe.validation_vae, self.recipe.validation_vae), "vae.safetensors"), dtype=dtype, device=self.recipe.device)
        if self.recipe.device == "cuda":
            vae.network.enable_tiling()  # little memory is left beside training
        self.editor = TrainedEditor(Pipeline(None, vae, task.model, task.config), self.recipe)  # type: ignore[arg-type]  # denoise needs no VLM

    @property
    def at_start(self) -> bool:
        """Whether to validate before the first step too."""
        return self.recipe.validate_at_start

    def due(self, step: int) -> bool:
        return (step + 1) % self.recipe.validate_every == 0 or step == self.recipe.num_steps - 1

    def __call__(self, step: int, processes: ProcessGroup) -> tuple[dict[str, float], Path]:
        """Evaluates the pairs, split over the processes -> metrics over all pairs, and the path of this process's sheet.png.

        Each process writes report.json, sheet.png and edited/ to its own folder.
        """
        folder = (
            Path(self.recipe.output_dir) / FOLDER / (f"step_{step:08d}" if step >= 0 else "start") / ("" if processes.is_first else f"process_{processes.rank}")
        )
        subset = DistributedSubset(self.pairs, processes)
        settings = EvaluationSettings(steps=self.recipe.validation_steps or None)
        report = evaluate(self.editor, subset, folder, settings, command=f"validation of {self.recipe.output_dir} after {step + 1} steps")
        losses = [self.losses(index % len(self.pairs)) for index in subset.indices]
        blocks.reshard(self.task.model)
        gathered = processes.gather(list(zip(subset.indices, report["per_clip"], losses)))
        results = [result for items in gathered for result in items if result[0] < len(self.pairs)]
        metrics = summary([row for _, row, _ in results])
        logged = {name: metrics[name] for name in LOGGED} | {f"{name}_ceiling": metrics["vae_ceiling"][name] for name in LOGGED[:2]}
        logged |= {f"{name}_copy": metrics["copy_source"][name] for name in LOGGED[:2]}
        logged |= {name: sum(found[name] for *_, found in results) / len(results) for name in losses[0]}
        if processes.is_first:
            self.plot_curves(logged, step)
        return {name: value for name, value in logged.items() if value is not None}, folder / "sheet.png"

    @torch.no_grad()
    def losses(self, index: int) -> dict[str, float]:
        """Returns the velocity's squared error on one pair, at each of TIMES and their mean, with fixed noise for each pair."""
        features, device = self.pairs.features(index), self.recipe.device
        noise = torch.randn(features.target.shape, generator=torch.Generator().manual_seed(index)).to(device)
        features, found = features.to(device), {}
        for t in TIMES:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.recipe.bf16):
                losses = flow_matching_losses(self.task.model, features, features.states, noise, torch.tensor([t], device=device), self.recipe.edited_weight)
            found[f"loss_t{t}"] = float(losses["loss"])
        return {"loss": sum(found.values()) / len(TIMES), **found}

    def plot_curves(self, newest: dict, step: int) -> None:
        """Plots training loss, validation loss and validation PSNR to curves.png in output_dir."""
        folder = Path(self.recipe.output_dir)
        validated = folder / FILES["validation"]
        lines = [json.loads(line) for line in validated.read_text(encoding="utf-8").splitlines()] if validated.is_file() else []
        newest = {name: value for name, value in newest.items() if value is not None and math.isfinite(value)}
        lines.append({"step": step, **newest})
        log = folder / FILES["train"]
        losses = read_losses(log) if log.is_file() else {}
        pictures = [draw_losses(losses, "training loss")] if losses else []
        for name in ("loss", "psnr_edited", "psnr_kept"):
            values = {line["step"]: line[name] for line in lines if line.get(name) is not None}
            levels = {"ceiling (VAE round trip)": newest.get(f"{name}_ceiling"), "copy of the source": newest.get(f"{name}_copy")}
            if values:
                pictures.append(draw_losses(values, f"validation {name}", {level: value for level, value in levels.items() if value is not None}))
        page = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
        for number, picture in enumerate(pictures):
            page.paste(picture, (0, number * picture.height))
        with atomic_write(folder / "curves.png") as partial:
            page.save(partial, "PNG", optimize=True)


def build_validation(task: Task, where: object = None) -> Validation | None:
    """Returns the validation that the task's recipe configures, if any."""
    return Validation(task, where) if isinstance(task, FlowMatchingTask) and task.recipe.validate_every else None
