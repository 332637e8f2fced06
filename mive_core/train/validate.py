"""How good a DiT is while it is trained: the evaluation of `mive eval`, and the loss, on held-out pairs whose features are cached.

No VLM is needed beside the DiT. C latent channels, T x Y x X latent grid; K chosen layers, S VLM tokens, D_vlm their width.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..config import MiVEConfig
from ..data.manifest import ManifestEntry, read_manifest
from ..errors import UserError
from ..evaluation.evaluate import EvaluationSettings, evaluate, summary
from ..evaluation.loss_curve import draw_losses, read_losses
from ..flow import schedule
from ..formats.safetensors_file import resolve
from ..media.paths import atomic_write, check_input
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
from .objective import EditFeatures, flow_matching_losses, stacked

FOLDER = "validation"  # in output_dir: a folder a step
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which the loss is measured
LOGGED = ("psnr_edited", "psnr_kept", "success_rate")


@dataclass(frozen=True)
class CachedRequest(EditRequest):
    """An edit whose source, reference and instruction frozen models have read already."""

    features: EditFeatures  # of a batch of one


class HeldOut(Sequence):
    """The first pairs of a manifest that a cache holds."""

    def __init__(self, manifest: str, cache: str, count: int):
        """Raises UserError where either is missing, or the cache was made of another manifest."""
        index, self.lines = read_index(cache), read_manifest(check_input(manifest, "validation_manifest"))
        self.folder, self.settings = cache, CacheSettings(tuple(tuple(bucket) for bucket in index["contract"]["buckets"]))
        self.entries: list[CacheEntry] = index["entries"][:count]
        self.reader = CachedBatches((cache,), 1, 0)
        for entry in self.entries:
            if int(entry.key) >= len(self.lines) or self.line(entry).name != entry.name:
                raise UserError(
                    "the validation's cache was not made of its manifest",
                    where=cache,
                    got=f"line {int(entry.key) + 1}, {entry.name!r}",
                    fix="run `mive data cache` with the held-out manifest",
                )

    def line(self, entry: CacheEntry) -> ManifestEntry:
        return self.lines[int(entry.key)]

    def features(self, index: int) -> EditFeatures:
        return stacked([EditFeatures(**self.reader.read(self.folder, self.entries[index]))])

    def __getitem__(self, index: int) -> PairedEdit:
        pair = read_pair(self.line(self.entries[index]), self.settings)
        request = pair.request
        return replace(pair, request=CachedRequest(request.source, request.reference, request.instruction, self.features(index)))

    def __len__(self) -> int:
        return len(self.entries)


class Share(Sequence):
    """The part of a sequence that one process takes: all take as many, the last ones begin again."""

    def __init__(self, whole: Sequence, processes: ProcessGroup):
        count = -(-len(whole) // processes.size)
        self.whole, self.numbers = whole, [processes.rank + i * processes.size for i in range(count)]

    def __getitem__(self, index: int) -> PairedEdit:
        return self.whole[self.numbers[index] % len(self.whole)]

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class TrainedEditor:
    """Edits with the DiT as it is at this step; an Editor of evaluation/evaluate.py."""

    pipeline: Pipeline
    recipe: FlowMatchingRecipe

    @property
    def config(self) -> MiVEConfig:
        return self.pipeline.config

    @property
    def vae(self) -> VAE:
        return self.pipeline.vae

    @torch.no_grad()  # no inference mode: weights that processes share would stay in it
    def edit(
        self, request: CachedRequest, *, steps: int | None, cfg: float | None, shift: float | None, seed: int, progress: Callable[[Iterable], Iterable]
    ) -> Clip:
        config, features = self.config, request.features.to(self.recipe.device)
        states = [features.states] + ([features.negative] if config.cfg != 1.0 and features.negative is not None else [])
        conditions = [Condition(of, config.resolved_layers) for of in states]
        with torch.autocast(torch.device(self.recipe.device).type, torch.bfloat16, enabled=self.recipe.bf16):
            latents = self.pipeline.denoise(
                EditLatents(features.source, features.reference),
                conditions,
                schedule(steps or config.steps, config.shift),
                config.cfg if len(conditions) > 1 else 1.0,
                seed,
                progress,
            )
        return Clip(self.vae.decode(latents), request.source.fps)


class Validation:
    """Every so many steps of a task, and after the last one."""

    def __init__(self, task: FlowMatchingTask, where: object = None):
        """Raises UserError for a recipe without a manifest, cache or VAE, and where they do not fit."""
        self.task, self.recipe = task, task.recipe
        for name in ("validation_manifest", "validation_cache", "validation_vae"):
            if not getattr(self.recipe, name):
                raise UserError(f"a validation needs the recipe's {name}", where=where)
        check_cache(self.recipe.validation_cache, task.config)
        self.pairs = HeldOut(self.recipe.validation_manifest, self.recipe.validation_cache, self.recipe.validation_pairs)
        dtype = torch.bfloat16 if self.recipe.bf16 and self.recipe.device == "cuda" else torch.float32
        vae = VAE.load(resolve(EMBEDDED.get(self.recipe.validation_vae, self.recipe.validation_vae), "vae.safetensors"), dtype=dtype, device=self.recipe.device)
        if self.recipe.device == "cuda":
            vae.network.enable_tiling()  # beside what training holds
        self.editor = TrainedEditor(Pipeline(None, vae, task.model, task.config), self.recipe)

    def due(self, step: int) -> bool:
        return (step + 1) % self.recipe.validate_every == 0 or step == self.recipe.num_steps - 1

    def __call__(self, step: int, processes: ProcessGroup) -> tuple[dict[str, float], Path]:
        """Each process edits its share into a folder of its own: report.json, sheet.png, edited/. -> figures of all, and the first one's sheet."""
        folder = Path(self.recipe.output_dir) / FOLDER / f"step_{step:08d}" / ("" if processes.is_first else f"process_{processes.rank}")
        share = Share(self.pairs, processes)
        settings = EvaluationSettings(steps=self.recipe.validation_steps or None)
        report = evaluate(self.editor, share, folder, settings, command=f"validation of {self.recipe.output_dir} after {step + 1} steps")
        losses = [self.losses(number % len(self.pairs)) for number in share.numbers]
        blocks.part(self.task.model)
        done = [part for one in processes.gather(list(zip(share.numbers, report["per_clip"], losses))) for part in one if part[0] < len(self.pairs)]
        figures = summary([row for _, row, _ in done])
        logged = {name: figures[name] for name in LOGGED} | {f"{name}_ceiling": figures["vae_ceiling"][name] for name in LOGGED[:2]}
        logged |= {name: sum(found[name] for *_, found in done) / len(done) for name in losses[0]}
        if processes.is_first:
            self.draw(logged, step)
        return {name: value for name, value in logged.items() if value is not None}, folder / "sheet.png"

    @torch.no_grad()
    def losses(self, index: int) -> dict[str, float]:
        """The velocity's squared error of one pair, at each of TIMES and in the mean, with noise of its own."""
        features, device = self.pairs.features(index), self.recipe.device
        noise = torch.randn(features.target.shape, generator=torch.Generator().manual_seed(index)).to(device)
        features, found = features.to(device), {}
        for t in TIMES:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.recipe.bf16):
                losses = flow_matching_losses(self.task.model, features, features.states, noise, torch.tensor([t], device=device), self.recipe.edited_weight)
            found[f"loss_t{t}"] = float(losses["loss"])
        return {"loss": sum(found.values()) / len(TIMES), **found}

    def draw(self, newest: dict, step: int) -> None:
        """curves.png in output_dir: the training's loss, the validation's, its PSNR."""
        folder = Path(self.recipe.output_dir)
        validated = folder / FILES["validation"]
        lines = [json.loads(line) for line in validated.read_text(encoding="utf-8").splitlines()] if validated.is_file() else []
        lines.append({"step": step, **newest})
        curves = {"training loss": read_losses(folder / FILES["train"])} | {
            f"validation {name}": {line["step"]: line[name] for line in lines if line.get(name) is not None} for name in ("loss", "psnr_edited", "psnr_kept")
        }
        pictures = [draw_losses(values, name) for name, values in curves.items() if values]
        page = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
        for number, picture in enumerate(pictures):
            page.paste(picture, (0, number * picture.height))
        with atomic_write(folder / "curves.png") as partial:
            page.save(partial, "PNG", optimize=True)


def validation_of(task: Task, where: object = None) -> Validation | None:
    """What the task's recipe asks for."""
    return Validation(task, where) if getattr(task.recipe, "validate_every", 0) else None
