"""A LoRA training run, from pairs to the file in models/loras. A run is identified by the LoRA's name and can be resumed."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import torch

from ...mive_core.data.folder import read_pairs
from ...mive_core.data.manifest import ManifestEntry
from ...mive_core.errors import UserError
from ...mive_core.evaluation.loss_curve import read_losses
from ...mive_core.formats.lora_file import NEW_PARTS_KEY
from ...mive_core.formats.safetensors_file import read_header
from ...mive_core.media.remote import is_url
from ...mive_core.train.cache import CacheSettings, cache, cache_contract
from ...mive_core.train.checkpoints import PATTERN, FurtherThanAsked, RecipeMismatch
from ...mive_core.train.edit_task import EditRecipe, EditTask
from ...mive_core.train.finite import NotFinite
from ...mive_core.train.loop import run
from ...mive_core.train.lora import check_peft
from .messages import log_warnings, logger
from .progress import Progress
from .training import HostedEncoders, OutOfMemory, exclusive_training, free_device_memory
from .training_errors import in_words_of_the_node

LOG = "log.jsonl"
RESUMES = "; run again to continue"


@dataclass(frozen=True)
class Job:
    """All settings of a training run; `recipe` holds keys of EditRecipe."""

    pairs: Path
    model: Path
    vlm: Path
    vae: Path
    lora: Path  # the file to write
    folder: Path  # for checkpoints, log and cache
    size: tuple[int, int]  # width and height in pixels; swapped for portrait clips
    num_frames: int
    recipe: dict

    def check(self) -> list[ManifestEntry]:
        """Checks what can be checked before models are loaded -> the pairs. Raises UserError."""
        check_peft()
        if self.lora.exists() and not (self.folder / LOG).exists():
            raise UserError("the file is there already", where="lora_name", got=self.lora.name, fix="choose another name, or delete the file")
        entries = read_pairs(self.pairs, absolute=False)
        if any(path and is_url(path) for entry in entries for path in (entry.source, entry.target, entry.reference, entry.mask)):
            raise UserError(
                "the manifest names a URL",
                where=self.pairs,
                expected="files in ComfyUI's input folder",
                fix="download them, or run `mive data cache` and `mive train`",
            )
        return entries

    def discard_progress(self) -> None:
        """Deletes the checkpoints and the log of an earlier run, but not its cache."""
        for path in (*self.folder.glob(PATTERN), self.folder / LOG):
            path.unlink(missing_ok=True)

    def run(self, node, entries: Sequence[ManifestEntry]) -> list[dict]:
        """Trains to the end -> the skipped pairs and the reasons. Raises UserError; on Cancel saves a checkpoint and raises ComfyUI's interruption."""
        device = comfy.model_management.get_torch_device()
        with exclusive_training(device):
            folder, skipped = self._cache(node, entries)
            free_device_memory()
            self._train(node, str(folder), str(device))
        return skipped

    def _cache(self, node, entries: Sequence[ManifestEntry]) -> tuple[Path, list[dict]]:
        """Encodes the pairs that are not cached yet -> the cache's folder and the skipped pairs. Portrait clips use the size with sides swapped."""
        progress = Progress(node, "reading pair", len(entries), after_cancel=RESUMES)
        encoders = HostedEncoders.of(self.model, self.vlm, self.vae, progress.advance)
        settings = CacheSettings(tuple({(*side, self.num_frames): None for side in (self.size, self.size[::-1])}))
        cache_key = hashlib.sha256(json.dumps([cache_contract(encoders, settings), str(self.pairs)]).encode()).hexdigest()[:12]
        folder = self.folder / "cache" / cache_key
        with log_warnings():
            try:
                skipped = cache(entries, encoders, folder, settings, logger.info)["skipped"]
            except OutOfMemory as error:
                raise error.original from None
        for item in skipped:
            logger.warning("MiVE: the pair %s is left out: %s", item["name"], item["why"])
        return folder, skipped

    def _train(self, node, cache_folder: str, device: str) -> None:
        recipe = EditRecipe(
            task="edit",
            start_from=str(self.model),
            caches=(cache_folder,),
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
            progress = progress or Progress(node, "step", recipe.num_steps, step, after_cancel=RESUMES)
            progress.advance(f": loss {float(losses['loss']):.4f}")

        self.lora.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log_warnings():
                run(EditTask(recipe), on_step_end=watch)
        except (NotFinite, FurtherThanAsked, RecipeMismatch) as error:
            refusal = in_words_of_the_node(error)
        else:
            return
        raise refusal  # outside the handler, so that no context keeps the training's frames and with them the model

    def losses(self) -> dict[int, float]:
        """Returns step -> loss, without the skipped steps."""
        return read_losses(self.folder / LOG)

    def trained_new_parts(self) -> str:
        """Returns the modules that the file holds whole beside the LoRA, separated by commas; "" for none."""
        return read_header(self.lora).metadata.get(NEW_PARTS_KEY, "")

    def num_skipped(self) -> int:
        """Returns the number of steps that were skipped, since they were not finite."""
        return sum(json.loads(line).get("skipped_steps", 0) for line in (self.folder / LOG).read_text(encoding="utf-8").splitlines())
