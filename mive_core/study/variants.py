"""Task edit_variant: the task edit with another choice of what init-from-wan and the DiT's forward decide, to compare the choices.

Each variant changes the model of a running training only; the product's forward has no branches for them. Such a model is judged by the
training's own validation, since no other program computes its forward.
B batch, L tokens, K chosen layers, S = N_c condition tokens, D_vlm their width, D model width, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..dit import MiVEDiT
from ..dit.blocks import Block, Modulation, gated_add, modulate
from ..dit.rope import axis_angles, axis_dims, rotary_table
from ..errors import UserError
from ..train.edit_task import EditRecipe, EditTask
from ..train.objective import EditFeatures
from ..train.recipe import parse_recipe
from .small_wan import load_wan


@dataclass(frozen=True, kw_only=True)
class VariantRecipe(EditRecipe):
    """Recipe of a variant's training."""

    variant: str  # a key of VARIANTS
    wan: str = ""  # diffusers' folder of the Wan that start_from was converted from; cross_attention alone reads it
    num_fade_steps: int = 0  # steps in which cross_attention fades out


def reference_at_zero(model: MiVEDiT) -> None:
    """Puts the reference at the first frame's own t = 0 instead of -1."""

    def rotary(num_condition: int, grid: tuple[int, int, int], reference_times: Tensor | None, device, **options) -> Tensor:
        times = torch.zeros(1, 1) if reference_times is None else reference_times
        return rotary_table(num_condition, grid, model.config.head_dim, model.config.rope_theta, device, times + 1)

    model.rotary = rotary  # type: ignore[method-assign]  # as hosts replace it


def condition_positions(model: MiVEDiT) -> None:
    """Gives condition tokens positions of their own before the reference, on all three axes alike, as Qwen-VL numbers text."""

    def rotary(num_condition: int, grid: tuple[int, int, int], reference_times: Tensor | None, device, **options) -> Tensor:
        table = rotary_table(num_condition, grid, model.config.head_dim, model.config.rope_theta, device, reference_times)
        positions = torch.arange(num_condition) - (num_condition + 1)  # the last one is at -2
        angles = torch.cat([axis_angles(positions, dim, model.config.rope_theta) for dim in axis_dims(model.config.head_dim)], dim=-1)[:, None].to(device)
        own = torch.polar(torch.ones_like(angles), angles)
        return torch.cat([own.expand(len(table), *own.shape), table[:, num_condition:]], dim=1)

    model.rotary = rotary  # type: ignore[method-assign]  # as hosts replace it


class FadingCrossAttention:
    """Wan's cross-attention to the last layer's condition states, kept frozen in a converted model and faded out.

    It stands where Wan has it, between self-attention and feed-forward; `strength` is 1 at first and 0 in the finished model.
    """

    def __init__(self, model: MiVEDiT, wan: nn.Module):
        self.wan, self.strength, self.text = wan.requires_grad_(False), 1.0, torch.empty(0)
        project = model.embed_condition

        def embed_condition(states: Tensor) -> Tensor:
            self.text = self.wan.condition_embedder.text_embedder(states[:, -1])
            return project(states)

        model.embed_condition = embed_condition  # type: ignore[method-assign]
        for block, wan_block in zip(model.blocks, wan.blocks):
            block.forward = partial(self.run_block, block, wan_block)

    def run_block(self, block: Block, wan_block: nn.Module, x: Tensor, time: Modulation, rotary: Tensor, **options) -> Tensor:
        """Block.forward with cross-attention: (B, L, D) -> (B, L, D)."""
        m = time.offset(block.modulation)
        x = gated_add(x, block.self_attn(modulate(block.norm1(x), m.row(0), m.row(1)), rotary, **options), m.row(2))
        if self.strength:
            x = x + self.strength * wan_block.attn2(wan_block.norm2(x.float()).to(x.dtype), self.text, None, None)
        return gated_add(x, block.feed_forward(modulate(block.norm2(x), m.row(3), m.row(4))), m.row(5))


VARIANTS: dict[str, Callable[[MiVEDiT], None] | None] = {
    "reference_at_zero": reference_at_zero,
    "condition_positions": condition_positions,
    "cross_attention": None,  # see FadingCrossAttention
}


class VariantTask(EditTask):
    """The task edit with a variant of the model."""

    recipe: VariantRecipe

    def __init__(self, recipe: VariantRecipe, where: object = None):
        if recipe.variant not in VARIANTS:
            raise UserError("unknown variant", where=where, got=recipe.variant, expected=", ".join(VARIANTS))
        super().__init__(recipe, where)
        change = VARIANTS[recipe.variant]
        if change is not None:
            change(self.model)
            self.cross_attention = None
        else:
            self.cross_attention = FadingCrossAttention(self.model, load_wan(recipe.wan))

    def loss(self, step: int, batch: EditFeatures, generator: torch.Generator) -> dict[str, Tensor]:
        """Sets the strength of the cross-attention at this step, and returns the losses of EditTask."""
        if self.cross_attention is not None:
            self.cross_attention.strength = max(0.0, 1 - step / self.recipe.num_fade_steps)
        return super().loss(step, batch, generator)


def build(values: dict, where: object = None) -> VariantTask:
    """Builds the task from a recipe's values."""
    return VariantTask(parse_recipe(VariantRecipe, values, where), where)
