"""The arms of the layer study: which states a DiT is given, and how. The plan in results/layer_study/README.md says why.

The product's forward has no branches for them: most arms are a choice of states, the others change the model of their own training.
B batch, K stacks of states, S = N_c condition tokens, D_vlm their width, D model width, L tokens in the DiT's sequence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dit import MiVEDiT
from ...dit.blocks import Block, Modulation, gated_add, modulate
from ...dit.context import ContextProjection
from .states import BEFORE_NORM, LAST, LAYERS, MIDDLE, SEPARATE, WITHOUT_DEEPSTACK

TOKENS = ("all", "text", "none", "other")
FIRST_STATE, LAST_STATE, MIDDLE_STATE = LAYERS[1], LAYERS[LAST], LAYERS[MIDDLE]
BLOCK_STATES = tuple(LAYERS[k] for k in (1, 3, 4, 6, 8))  # for each of the five blocks


@dataclass(frozen=True)
class Arm:
    """What is trained in one arm, but for its seeds."""

    title: str
    stacks: tuple[str, ...]  # names of states.STACKS
    tokens: str = "all"  # all, text (no tokens of pictures), none, or other: those of another clip with as many tokens
    seeds: tuple[int, ...] = (0,)
    variant: str = ""  # a key of VARIANTS, or mean: the stacks, each layer-normalised, as one
    ffn_width: int = 480

    @property
    def num_stacks(self) -> int:
        """K of the DiT's config."""
        return 1 if self.variant in ("mean", "learned") else len(self.stacks)


CORE = (0, 1, 2)
PAPER = (FIRST_STATE, LAST_STATE)
ARMS: Mapping[str, Arm] = {
    "first_last": Arm("[1, -1]", PAPER, seeds=CORE),
    "last_twice": Arm("[-1, -1]", (LAST_STATE, LAST_STATE), seeds=CORE),
    "last": Arm("[-1]", (LAST_STATE,), seeds=CORE),
    "first": Arm("[1]", (FIRST_STATE,), seeds=CORE),
    "none": Arm("no VLM tokens", (LAST_STATE,), "none", seeds=CORE),
    "text": Arm("[1, -1], text tokens only", PAPER, "text", seeds=CORE),
    "middle_last": Arm("[4, -1]", (MIDDLE_STATE, LAST_STATE), seeds=CORE),
    "mean": Arm("mean of all, layer-normalised", LAYERS, seeds=CORE, variant="mean"),
    "other_clip": Arm("[1, -1] of another clip", PAPER, "other"),
    "without_deepstack": Arm("[1, -1] without DeepStack", (FIRST_STATE, WITHOUT_DEEPSTACK)),
    "embedding": Arm("[0]", (LAYERS[0],)),
    "quarter": Arm("[2]", (LAYERS[2],)),
    "three_quarters": Arm("[6]", (LAYERS[6],)),
    "last_before_norm": Arm("[-1] before the final norm", (BEFORE_NORM,)),
    "learned": Arm("learned weights over all", LAYERS, variant="learned"),
    "by_block": Arm("a layer for each block", BLOCK_STATES, variant="by_block"),
    "cross_attention": Arm("[1, -1] by cross-attention", PAPER, variant="cross_attention"),
    "wider": Arm("[1, -1], wider feed-forward", PAPER, ffn_width=800),  # 5 * 2 * 160 * 320 weights more, as 5 cross-attentions of 4 * 160 * 160 have
    "separate": Arm("two encoders", (SEPARATE,)),
}


def arm_states(arm: Arm, clip: Mapping[str, Tensor]) -> Tensor:
    """A clip's states as the arm gives them, (K, S, D_vlm) in the stored dtype; for learned weights all layers."""
    stacks = torch.stack([clip[name] for name in arm.stacks])
    if arm.variant == "mean":
        stacks = F.layer_norm(stacks.float(), stacks.shape[-1:]).mean(dim=0, keepdim=True).to(stacks.dtype)
    if arm.tokens == "text":
        return stacks[:, clip["types"] == 0]
    return stacks[:, :0] if arm.tokens == "none" else stacks


def with_other_clips(arm: Arm, states: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """Gives each clip the states of the next one with a prompt of as many tokens, if the arm asks for that."""
    return [states[j] for j in next_alike(lengths)] if arm.tokens == "other" else list(states)


def next_alike(lengths: Sequence[int]) -> list[int]:
    """For each clip the number of the next one of the same length, after the last the first; its own if there is no other."""
    others = list(range(len(lengths)))
    for length in set(lengths):
        alike = [i for i, other in enumerate(lengths) if other == length]
        for i, j in zip(alike, alike[1:] + alike[:1]):
            others[i] = j
    return others


class LearnedWeights(nn.Module):
    """Stands for a DiT's context projection: a mean of layer-normalised stacks by learned weights, then the projection of one stack."""

    def __init__(self, context: ContextProjection, num_stacks: int):
        super().__init__()
        self.context, self.logits = context, nn.Parameter(torch.zeros(num_stacks))

    def forward(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K, S, D_vlm) -> (B, N_c, D)."""
        normalised = F.layer_norm(states.float(), states.shape[-1:])
        return self.context(torch.einsum("k,bksd->bsd", self.logits.softmax(0), normalised)[:, None], dtype)


class LayerByBlock(nn.Module):
    """Stands for a DiT's context projection: the first stack enters the sequence, each other one is added to the condition tokens before its block."""

    def __init__(self, model: MiVEDiT, num_stacks: int):
        super().__init__()
        config = model.config
        self.parts = nn.ModuleList(ContextProjection(config.vlm_width, config.width, 1, config.eps, operations=nn) for _ in range(num_stacks))
        self.later: list[Tensor] = []
        for index, block in enumerate(model.blocks):
            if index:
                block.register_forward_pre_hook(lambda _, args, index=index: (self.added(args[0], index), *args[1:]))

    def forward(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K, S, D_vlm) -> (B, N_c, D)."""
        first, *self.later = (part(states[:, k : k + 1], dtype) for k, part in enumerate(self.parts))
        return first

    def added(self, sequence: Tensor, index: int) -> Tensor:
        """(B, L, D) -> the same with a block's stack added to the condition tokens."""
        given = self.later[index - 1]
        return torch.cat([sequence[:, : given.shape[1]] + given, sequence[:, given.shape[1] :]], dim=1)


class CrossAttention(nn.Module):
    """Stands for a DiT's context projection: the tokens stay out of the sequence, and every block reads them by cross-attention before its feed-forward."""

    def __init__(self, model: MiVEDiT):
        super().__init__()
        config, self.context = model.config, model.context
        self.norms = nn.ModuleList(nn.LayerNorm(config.width, eps=config.eps) for _ in model.blocks)
        self.layers = nn.ModuleList(nn.MultiheadAttention(config.width, config.num_heads, batch_first=True) for _ in model.blocks)
        for layer in self.layers:
            nn.init.zeros_(layer.out_proj.weight)
        self.tokens = torch.empty(0)
        for index, block in enumerate(model.blocks):
            block.forward = partial(self.run_block, index, block)

    def forward(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K, S, D_vlm) -> no tokens in the sequence, (B, 0, D)."""
        self.tokens = self.context(states, dtype)
        return self.tokens[:, :0]

    def run_block(self, index: int, block: Block, x: Tensor, time: Modulation, rotary: Tensor, **options) -> Tensor:
        """Block.forward with cross-attention where Wan has it: (B, L, D) -> (B, L, D)."""
        m, tokens = time.offset(block.modulation), self.tokens.to(x.dtype)
        x = gated_add(x, block.self_attn(modulate(block.norm1(x), m.row(0), m.row(1)), rotary, **options), m.row(2))
        x = x + self.layers[index](self.norms[index](x), tokens, tokens, need_weights=False)[0]
        return gated_add(x, block.feed_forward(modulate(block.norm2(x), m.row(3), m.row(4))), m.row(5))


VARIANTS: Mapping[str, Callable[[MiVEDiT, int], nn.Module]] = {
    "learned": lambda model, num: LearnedWeights(model.context, num),
    "by_block": LayerByBlock,
    "cross_attention": lambda model, _: CrossAttention(model),
}


def apply_variant(model: MiVEDiT, arm: Arm) -> None:
    """Changes the model as the arm's variant asks for."""
    if arm.variant in VARIANTS:
        model.context = VARIANTS[arm.variant](model, len(arm.stacks))  # type: ignore[assignment]
