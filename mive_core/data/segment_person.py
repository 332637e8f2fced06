"""Segments persons with any semantic segmentation model of transformers that has such a label, e.g. SegFormer on ADE20K.

F frames of H x W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from ..prompt import to_uint8

PERSON = "person"
BATCH_SIZE = 8  # frames
LOW, HIGH = 0.25, 0.75  # probabilities that become alpha 0 and 1


@dataclass(frozen=True)
class Segmenter:
    """A frozen model and its image processor."""

    model: nn.Module
    processor: Callable
    label: int  # of the class "person"

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "Segmenter":
        """Loads a Hugging Face folder with safetensors weights. Raises UserError for anything else, and for a model without the label."""
        try:
            from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
        except ImportError as error:
            raise UserError(
                "finding a person needs transformers", got=str(error), fix="pip install transformers torchvision, or name a mask in each line"
            ) from None
        if not Path(folder).is_dir():
            raise UserError("no such folder", where=f"segmenter {str(folder)!r}", expected="a Hugging Face folder of a semantic segmentation model")
        try:
            model = AutoModelForSemanticSegmentation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                "is no segmentation model that can be read",
                where=f"segmenter {str(folder)!r}",
                got=str(error).splitlines()[0],
                expected="config.json, preprocessor_config.json and model.safetensors",
            ) from None
        labels = {name.lower(): int(number) for number, name in model.config.id2label.items()}
        if PERSON not in labels:
            raise UserError(f"the model knows no {PERSON!r}", where=f"segmenter {str(folder)!r}", got=", ".join(list(labels)[:6]))
        return cls(model.eval().requires_grad_(False).to(device), processor, labels[PERSON])

    @torch.inference_mode()
    def alpha(self, frames: Tensor) -> Tensor:
        """(F, H, W, 3) in 0..1 -> the person's alpha, (F, H, W) in 0..1."""
        parts = []
        for batch in frames.split(BATCH_SIZE):
            pixels = self.processor(images=list(to_uint8(batch)), return_tensors="pt")["pixel_values"].to(self.model.device)
            probability = self.model(pixel_values=pixels).logits.softmax(dim=1)[:, self.label : self.label + 1]
            parts.append(functional.interpolate(probability, frames.shape[1:3], mode="bilinear")[:, 0].cpu())
        return ((torch.cat(parts) - LOW) / (HIGH - LOW)).clamp(0, 1)
