"""How much of what an instruction's tokens have in common with an image's tokens falls inside a mask, for each layer of the VLM.

The text-to-vision affinity A = E B^T and its attention mask ratio R_mask are those of MiVE (arXiv 2605.14664), which measures them to choose
its layers. What the paper does not say, as far as it was at hand, is (ours):

- States are numbered and read as the DiT reads them, see layers.py: k before the DeepStack addition that follows layer k, L after the final norm.
- E are the tokens of the instruction, without those of the chat format; B are the tokens of the image. The instruction stands first, so its
  states do not depend on the image, and those of the image do on the instruction.
- Both are RMS-normalised per token in float32, as ContextProjection does before its learnt gains: single channels are thousands of times
  larger than the rest and would decide every product.
- A = softmax(E B^T / sqrt(D_vlm)) over the image's tokens: a row per token of the instruction, which sums to 1. The map is the mean of the rows.
- R_mask is the sum of the map over the image's tokens, each weighted by the share of its pixels that lie in the mask: 0 to 1. A map that tells
  nothing of the place has the mask's share of the image.

`linear_ratio` is R_mask of another map, whose rows are the positive parts of the cosines, each divided by its sum: it shows what the softmax does.
N tokens of the instruction, V tokens of the image on a grid of Y x X, D_vlm their width, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import config_for
from ..errors import UserError
from ..media.fit import check_frames
from ..prompt import build_image_inputs, instruction_tokens
from ..types import VLMInputs
from ..vlm import VLM

PAPER = "MiVE, arXiv 2605.14664"
PAPERS_RATIOS = {"Qwen3-VL-8B": (0.366, 0.228), "GLM-4.6V": (0.333, 0.270)}  # the paper's R_mask at the first and the last layer, on its own images
MOST_LOOKED_AT = 0.1  # of the image's tokens


@dataclass(frozen=True)
class LayerAffinity:
    """What one layer's affinity says of the image."""

    layer: int  # 0 to L
    map: Tensor  # (Y, X) float32, sums to 1
    top_share: float  # of the map, in the tenth of the tokens that has most
    ratio: float | None  # R_mask; None without a mask
    linear_ratio: float | None  # the same for the linear map


@dataclass(frozen=True)
class LayerAffinities:
    """The affinities of the chosen layers for one image and instruction."""

    vlm: str
    num_layers: int  # L
    num_text_tokens: int  # N
    mask_share: float | None  # of the image: R_mask of a map that is equal everywhere
    layers: tuple[LayerAffinity, ...]


def measure_layers(vlm: VLM, image: Tensor, instruction: str, layers: Sequence[int], mask: Tensor | None = None) -> LayerAffinities:
    """image (H, W, 3) in 0..1, mask (H, W) bool or None, layers as indices in 0..L -> their affinities, from one forward pass. Raises UserError."""
    inputs = read_image_inputs(vlm, image, instruction, mask)
    return affinities_of(vlm, inputs.to(vlm.model.device), layers, mask)


def read_image_inputs(vlm: VLM, image: Tensor, instruction: str, mask: Tensor | None = None) -> VLMInputs:
    """The checked inputs of `affinities_of`. Raises UserError for an empty instruction, and a mask that is empty, full or of another size."""
    if not instruction.strip():
        raise UserError("the instruction is empty, so it has no affinity with anything", where="instruction", expected="a few words, such as the red circle")
    image = check_frames(image[None], "image")[0]
    if mask is not None:
        check_mask(mask, image)
    return build_image_inputs(image, instruction, vlm.processor, config_for(vlm.name))


def check_mask(mask: Tensor, image: Tensor) -> None:
    """Raises UserError for a mask (H, W) that is not of the image's size, or that holds nothing or everything."""
    if mask.shape != image.shape[:2]:
        raise UserError(
            "the mask has another size than the image",
            where="mask",
            got=f"{mask.shape[1]}x{mask.shape[0]}",
            expected=f"{image.shape[1]}x{image.shape[0]}",
            fix="draw it over the image itself",
        )
    if not mask.any():
        raise UserError("the mask is empty", where="mask", got="no pixel above one half", expected="white where the thing is that the instruction names")
    if mask.all():
        raise UserError("the mask covers the whole image, so the ratio is 1 for any map", where="mask", expected="black around the thing")


def affinities_of(vlm: VLM, inputs: VLMInputs, layers: Sequence[int], mask: Tensor | None) -> LayerAffinities:
    """The inputs of read_image_inputs -> the layers' affinities. Holds the states of one layer at a time."""
    text = instruction_tokens(inputs, vlm.processor)
    (_, rows, columns), merge = inputs.image_grid_thw[0].tolist(), vlm.processor.image_processor.merge_size
    grid, vision = (rows // merge, columns // merge), inputs.mm_token_type_ids[0].nonzero()[:, 0]
    inside = None if mask is None else coverage(mask, grid)
    found: dict[int, LayerAffinity] = {}

    def measure(k: int, state: Tensor) -> None:
        cosines = token_cosines(state[0, text.to(state.device)], state[0, vision]).cpu()
        density = softmax_map(cosines, vlm.width).view(grid)
        ratios = (None, None) if inside is None else (float((density * inside).sum()), float((linear_map(cosines).view(grid) * inside).sum()))
        found[k] = LayerAffinity(k, density, top_share(density), *ratios)

    vlm.visit(inputs, tuple(layers), measure)
    share = None if mask is None else float(mask.float().mean())
    return LayerAffinities(vlm.name, vlm.num_layers, len(text), share, tuple(found[k] for k in layers))


def token_cosines(text: Tensor, vision: Tensor) -> Tensor:
    """E (N, D_vlm), B (V, D_vlm) -> (N, V): D_vlm^-1 times the product of the RMS-normalised states."""
    return F.normalize(text.float(), dim=-1) @ F.normalize(vision.float(), dim=-1).T


def softmax_map(cosines: Tensor, width: int) -> Tensor:
    """(N, V) -> (V,): the mean of the rows of softmax(E B^T / sqrt(D_vlm)); RMS-normalised states are sqrt(D_vlm) long."""
    return (cosines * width**0.5).softmax(dim=-1).mean(dim=0)


def linear_map(cosines: Tensor) -> Tensor:
    """(N, V) -> (V,): the mean of the rows' positive parts, each divided by its sum; a row without one counts as equal everywhere."""
    positive = cosines.clamp(min=0)
    sums = positive.sum(dim=-1, keepdim=True)
    return torch.where(sums > 0, positive / sums.clamp(min=1e-12), 1 / cosines.shape[1]).mean(dim=0)


def coverage(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """(H, W) bool -> (Y, X): the share of each token's pixels that lies in the mask."""
    return F.interpolate(mask.float()[None, None], grid, mode="area")[0, 0]


def top_share(density: Tensor) -> float:
    """(Y, X) that sums to 1 -> the sum over the tenth of the tokens that has most; a tenth where all are equal."""
    values = density.flatten().sort(descending=True).values
    count = MOST_LOOKED_AT * len(values)
    whole = int(count)
    return float(values[:whole].sum() + (count - whole) * values[whole])


def report_of(affinities: LayerAffinities) -> dict:
    """The numbers, as JSON takes them."""
    return {
        "vlm": affinities.vlm,
        "num_layers": affinities.num_layers,
        "num_text_tokens": affinities.num_text_tokens,
        "grid": list(affinities.layers[0].map.shape),
        "mask_share": affinities.mask_share,
        "layers": [{"layer": row.layer, "ratio": row.ratio, "linear_ratio": row.linear_ratio, "top_share": row.top_share} for row in affinities.layers],
        "paper": {"source": PAPER, "ratio_first_and_last": {name: list(values) for name, values in PAPERS_RATIOS.items()}},
    }


def describe_affinities(affinities: LayerAffinities) -> str:
    """A text of a few lines."""
    rows, (y, x) = affinities.layers, affinities.layers[0].map.shape
    lines = [f"{affinities.vlm}: {affinities.num_text_tokens} tokens of the instruction, {y} x {x} of the image"]
    if affinities.mask_share is None:
        lines.append("no mask, so no attention mask ratio; share of the affinity in a tenth of the image:")
        lines += [f"layer {row.layer}: {row.top_share:.3f}" for row in rows]
        return "\n".join(lines)
    first, last = PAPERS_RATIOS["Qwen3-VL-8B"]
    lines.append(f"attention mask ratio; the mask is {affinities.mask_share:.3f} of the image, which a map without a place would have:")
    lines += [f"layer {row.layer}: {row.ratio:.3f} (linear {row.linear_ratio:.3f})" for row in rows]
    lines.append(f"the paper's, on its own images ({PAPER}): Qwen3-VL-8B {first} at the first layer, {last} at the last")
    return "\n".join(lines)
