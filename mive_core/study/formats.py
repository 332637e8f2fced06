"""What each format of `mive quantize` costs an editor, and which of its layers bear it least.

Three measurements with the embedded models: the error of a forward, the quality of edits whose correct result is known, and the error
that single layers make when only they are quantised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import get_attention
from ..dit import MiVEDiT
from ..evaluation.evaluate import pair_psnr
from ..flow import schedule
from ..formats.checkpoint import load_dit
from ..formats.quantize import MATRIX, quantize
from ..formats.quantized import FORMATS, decode
from ..formats.safetensors_file import resolve
from ..pipeline import EMBEDDED, Pipeline
from ..types import Condition, EditLatents, PairedEdit

SINGLE_FORMAT = "nvfp4"  # the coarsest: layers are quantised to it one by one
OUTSIDE = ("patch_embedding", "context", "time_embedding", "time_projection", "head")


@dataclass(frozen=True)
class Variant:
    """A format, the number of blocks that are kept at either end, and whether inputs are rounded too, as by a card that multiplies it."""

    format_name: str
    keep_blocks: int = 0
    rounded_inputs: bool = False


VARIANTS = (
    *(Variant(name) for name in FORMATS),
    *(Variant(name, rounded_inputs=True) for name in FORMATS),
    *(Variant("nvfp4", keep, True) for keep in (1, 2)),
    Variant("fp8", 1, True),
)


class RoundedInput(nn.Module):
    """A Linear whose input is rounded to a format and back, which is what a product in that format computes up to the order of its sums."""

    def __init__(self, linear: nn.Linear, format_name: str):
        super().__init__()
        self.linear, self.format = linear, FORMATS[format_name]

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        rows = x.flatten(0, -2)
        padded = F.pad(rows, (0, 0, 0, -len(rows) % 32))
        restored = decode(self.format.encode(padded), self.format.note, x.dtype)[: len(rows)]
        return self.linear(restored.unflatten(0, x.shape[:-1]))


@dataclass(frozen=True)
class Prepared:
    """What an edit needs besides the DiT, which every variant shares."""

    pair: PairedEdit
    latents: EditLatents
    conditions: list[Condition]


@torch.inference_mode()
def measure_formats(pairs: Sequence[PairedEdit], save: Callable[[dict[str, Any]], None], models: str = "tiny", variants: Sequence[Variant] = VARIANTS) -> None:
    """Edits every pair with the DiT in 16 bits and in each variant: sizes, errors and PSNR (means over the clips), saved after each.

    Pairs are of at most the DiT's edit_frames, and take the checkpoint's own settings.
    """
    pipeline, path = Pipeline.load(models), resolve(EMBEDDED.get(models, Path(models)), "dit.safetensors")
    prepared = [prepare(pipeline, pair) for pair in pairs]
    forwards: list[tuple[tuple, Tensor]] = []
    hook = pipeline.dit.register_forward_hook(lambda _, given, out: forwards.append((given, out)))
    first = prepared[0]
    pipeline.denoise(first.latents, first.conditions[:1], schedule(pipeline.config.steps, pipeline.config.shift), 1.0, seed=0)
    hook.remove()
    states, plain = first.conditions[0].states, quality(pipeline, prepared)
    report = {"clips": len(pairs), "plain": {"bytes": path.stat().st_size, **plain}, "single_layers": single_layers(pipeline.dit, forwards[::2], states)}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for variant in variants:
            file = Path(folder) / "dit.safetensors"
            written = quantize(path, file, variant.format_name, variant.keep_blocks)
            dit = load_dit(file, attention=get_attention("auto"))
            for key in written["matrices"] if variant.rounded_inputs else ():
                layer = key.removesuffix(".weight")
                dit.set_submodule(layer, RoundedInput(dit.get_submodule(layer), variant.format_name))
            figures = quality(replace(pipeline, dit=dit), prepared)
            sizes = {"bytes": written["bytes"], "share": written["bytes"] / written["bytes_before"]}
            lost = {f"lost_{name}": plain[name] - figures[name] for name in plain}
            rows.append({**vars(variant), **sizes, "forward_error": forward_error(dit, forwards, states), **figures, **lost})
            save({**report, "variants": rows})


def prepare(pipeline: Pipeline, pair: PairedEdit) -> Prepared:
    """Reads and encodes a pair."""
    requests = [pair.request] + ([replace(pair.request, instruction="")] if pipeline.config.cfg != 1.0 else [])
    return Prepared(pair, pipeline.encode(pair.request), [pipeline.vlm.condition(request, pipeline.config) for request in requests])


def edit(pipeline: Pipeline, prepared: Prepared) -> Tensor:
    """-> the edited frames (F, H, W, 3)."""
    config = pipeline.config
    return pipeline.vae.decode(pipeline.denoise(prepared.latents, prepared.conditions, schedule(config.steps, config.shift), config.cfg, seed=0))


def quality(pipeline: Pipeline, prepared: Sequence[Prepared]) -> dict[str, float]:
    """PSNR inside and outside the edit, means over the clips."""
    rows = [pair_psnr(edit(pipeline, one), one.pair) for one in prepared]
    return {name: fmean(value for row in rows if (value := row[name]) is not None) for name in ("psnr_edited", "psnr_kept")}


def forward_error(dit: MiVEDiT, forwards: Sequence[tuple[tuple, Tensor]], states: Tensor) -> float:
    """Relative error of the velocity (root mean square over root mean square), mean over the forwards; `states` is their condition."""
    condition = dit.embed_condition(states)
    return fmean(float((dit(*given[:3], condition, *given[4:]) - out).norm() / out.norm()) for given, out in forwards)


def single_layers(dit: MiVEDiT, forwards: Sequence[tuple[tuple, Tensor]], states: Tensor) -> dict[str, float]:
    """forward_error with one part of the DiT rounded: each block, each kind of matrix over all blocks, each part outside the blocks."""
    keys = {name for name, value in dit.state_dict().items() if name.endswith(".weight") and value.ndim > 1}
    matrices = {key for key in keys if MATRIX.fullmatch(key)}
    parts = {f"block {index}": {key for key in matrices if key.startswith(f"blocks.{index}.")} for index in range(len(dit.blocks))}
    parts |= {kind: {key for key in matrices if key.endswith(f"{kind}.weight")} for kind in sorted({key.split(".", 2)[2][:-7] for key in matrices})}
    parts |= {name: {key for key in keys if key.startswith(f"{name}.")} for name in OUTSIDE}
    return {part: rounded_error(dit, keys, forwards, states) for part, keys in parts.items()}


def rounded_error(dit: MiVEDiT, keys: set[str], forwards: Sequence[tuple[tuple, Tensor]], states: Tensor) -> float:
    """forward_error with the weights `keys` rounded to SINGLE_FORMAT."""
    form, weights = FORMATS[SINGLE_FORMAT], {key: dit.get_parameter(key) for key in keys}
    before = {key: weight.clone() for key, weight in weights.items()}
    for weight in weights.values():
        matrix = weight.flatten(1)
        rounded = decode(form.encode(matrix), form.note, torch.float32) if form.fits(tuple(matrix.shape)) else matrix
        weight.copy_(rounded.view(weight.shape))
    error = forward_error(dit, forwards, states)
    for key, weight in weights.items():
        weight.copy_(before[key])
    return error
