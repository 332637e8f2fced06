"""A training of one name, from pairs to the file in models/loras: what it reads, where it writes, how it goes on."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ...mive_core.data.folder import read_pairs
from ...mive_core.data.manifest import ManifestEntry
from ...mive_core.errors import UserError
from ...mive_core.evaluation.loss_curve import read_losses
from ...mive_core.media.remote import is_url
from ...mive_core.train.cache import CacheSettings, cache, contract_of
from ...mive_core.train.checkpoints import PATTERN, RecipeMismatch
from ...mive_core.train.edit_task import EditRecipe, EditTask
from ...mive_core.train.loop import run
from ...mive_core.train.lora import check_peft
from .messages import logged, logger, show
from .training import HostedEncoders, OutOfMemory, alone, make_room

LOG = "log.jsonl"
INPUTS = {
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "start_from": "model",
    "caches": "pairs, vlm, vae, width, height or length",
    "bf16": "dtype",
    "weight_dtype": "dtype",
    "float8": "dtype",
}  # where a recipe's field has another name on the node
SAID_EVERY = 0.5  # seconds


class Progress:
    """A phase on the node's bar and face; the place where Cancel is heard."""

    def __init__(self, node, what: str, total: int, done: int = 0):
        self.node, self.what, self.total, self.done, self.said_at = node, what, total, done, 0.0
        self.bar = comfy.utils.ProgressBar(total)

    def advance(self, remark: str = "") -> None:
        """To the next item. Raises ComfyUI's interruption where Cancel was pressed."""
        self.done = min(self.done + 1, self.total)
        self.bar.update_absolute(self.done)
        if time.monotonic() - self.said_at > SAID_EVERY or self.done == self.total:
            show(self.node, f"{self.what} {self.done} of {self.total}{remark}")
            self.said_at = time.monotonic()
        comfy.model_management.throw_exception_if_processing_interrupted()


@dataclass(frozen=True)
class Job:
    """Everything that decides what is trained; `recipe` holds fields of EditRecipe."""

    pairs: Path
    model: Path
    vlm: Path
    vae: Path
    lora: Path  # the file to be
    folder: Path  # checkpoints, log, cache
    size: tuple[int, int]  # width, height of a wide clip, in pixels
    num_frames: int
    recipe: dict

    def check(self) -> list[ManifestEntry]:
        """What can be known before anything is loaded -> the pairs. Raises UserError."""
        check_peft()
        if self.lora.exists() and not (self.folder / LOG).exists():
            raise UserError("the file is there already", where="lora_name", got=self.lora.name, fix="choose another name, or delete the file")
        entries = read_pairs(self.pairs)
        if any(is_url(place) for entry in entries for place in (entry.source, entry.target, entry.reference, entry.mask)):
            raise UserError(
                "the manifest names a URL",
                where=self.pairs,
                expected="files in ComfyUI's input folder",
                fix="download them, or run `mive data cache` and `mive train`",
            )
        return entries

    def forget(self) -> None:
        """Takes away what an earlier run has learnt, not the cache."""
        for path in (*self.folder.glob(PATTERN), self.folder / LOG):
            path.unlink(missing_ok=True)

    def run(self, node, entries: Sequence[ManifestEntry]) -> list[dict]:
        """Trains to the end -> the pairs that could not be used, and why. Raises UserError, and ComfyUI's interruption after a checkpoint."""
        device = comfy.model_management.get_torch_device()
        with alone(device):
            folder, skipped = self._cached(node, entries)
            make_room()
            self._trained(node, str(folder), str(device))
        return skipped

    def _cached(self, node, entries: Sequence[ManifestEntry]) -> tuple[Path, list[dict]]:
        """Latents and states of the pairs, those that are not there yet; an upright clip lies in the bucket turned by 90 degrees."""
        progress = Progress(node, "reading pair", len(entries))
        encoders = HostedEncoders.of(self.model, self.vlm, self.vae, progress.advance)
        settings = CacheSettings(tuple({(*side, self.num_frames): None for side in (self.size, self.size[::-1])}))
        mark = hashlib.sha256(json.dumps([contract_of(encoders, settings), str(self.pairs)]).encode()).hexdigest()[:12]
        folder = self.folder / "cache" / mark
        with logged():
            try:
                skipped = cache(entries, encoders, folder, settings, logger.info)["skipped"]
            except OutOfMemory as error:
                raise error.__cause__ from None
        for item in skipped:
            logger.warning("MiVE: the pair %s is left out: %s", item["name"], item["why"])
        return folder, skipped

    def _trained(self, node, cached: str, device: str) -> None:
        recipe = EditRecipe(
            task="edit",
            start_from=str(self.model),
            caches=(cached,),
            output_dir=str(self.folder),
            export=str(self.lora),
            device=device,
            num_threads=0,
            num_workers=0,
            log_every=1,
            **self.recipe,
        )
        progress = None

        def watch(step: int, losses: dict[str, torch.Tensor]) -> None:
            nonlocal progress
            progress = progress or Progress(node, "step", recipe.num_steps, step)
            loss = float(losses["loss"])
            if not math.isfinite(loss):
                raise UserError(
                    "the loss is no longer finite", where=f"step {step + 1}", got=loss, fix="set resume to 'start anew' and lower the learning rate"
                )
            progress.advance(f": loss {loss:.4f}")

        self.lora.parent.mkdir(parents=True, exist_ok=True)
        try:
            run(EditTask(recipe), watch=watch)
        except RecipeMismatch as error:
            differ = ", ".join(dict.fromkeys(INPUTS.get(field, field) for field in error.differ))
            raise UserError(
                "the training of that name was begun with other settings",
                where="lora_name",
                got=f"another {differ}",
                fix="set resume to 'start anew', or choose another name",
            ) from None

    def losses(self) -> dict[int, float]:
        return read_losses(self.folder / LOG)
