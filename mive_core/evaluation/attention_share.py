"""What the DiT's target tokens attend to: condition, reference or target, by block and time. (ours)

Read at the attention functions that the blocks were given, which are wrapped while it is measured; the DiT's own result stays the same, bit for bit.

- Mass: of a target token's query, the softmax's weights, averaged over the heads. They sum to 1 over all tokens.
- Weighted: the weights times the norm of each head's value, summed over the heads and divided by the sum over all tokens (norm-based analysis,
  Kobayashi et al. 2020, without the output matrix). A token that is attended to but has a small value adds little; mass alone hides that.

Both are means over sampled target tokens, the same ones in every block.

A condition token holds all K chosen layers: it is fuse(concat of their projections), so attention to it cannot be told apart by layer. But the
sum over the layers is exact: c = sum of W_k p_k + b, W_k the fusing matrix's columns of layer k's part p_k. `layer_shares` divides each token by
the norms of its K terms. This says whose features make up the token that enters the first block, not which of them a block makes use of, and terms
may cancel each other. Later blocks have written into the condition tokens too: `origin` is the cosine between what enters the block and c.

B batch, L tokens, N_c condition tokens, Q sampled target tokens, K chosen layers, D model width, H heads.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import AttentionFn
from ..config import MiVEConfig
from ..dit import MiVEDiT
from ..dit.context import ContextProjection
from ..flow import schedule
from ..pipeline import Pipeline
from ..prompt import build_inputs
from ..types import Clip, EditRequest

TOKEN_TYPES = ("text", "image", "video")  # of VLMInputs.mm_token_type_ids
PARTS = ("condition", "reference", "target")


@dataclass(frozen=True)
class Share:
    """Where attention goes. The condition tokens' values, the reference's and the target's sum to 1."""

    condition: Tensor  # (B, N_c) float32, of each token
    reference: Tensor  # (B,) keyframes included
    target: Tensor  # (B,)


@dataclass(frozen=True)
class BlockAttention:
    """One block in one forward pass."""

    block: int  # from 0
    t: Tensor  # (B,)
    mass: Share
    weighted: Share  # by the norm of the values
    origin: Tensor  # (B,) mean cosine between the condition tokens that enter the block and those that entered the first


@dataclass
class _Recorder:
    """Collects the blocks' attention during forward passes of a DiT."""

    num_rows: int
    rows: Sequence[int] | None
    seed: int
    found: list[BlockAttention] = field(default_factory=list)
    condition: Tensor | None = None  # of the running pass
    t: Tensor | None = None
    num_reference: int = 0
    origin: Tensor | None = None  # of the block that is about to run

    def begin(self, dit: MiVEDiT, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(MiVEDiT.forward).bind(dit, *args, **kwargs).arguments
        _, height, width = dit.config.patch_grid(*given["noisy"].shape[2:])
        self.condition, self.t, self.num_reference = given["condition"], given["t"].detach().cpu(), given["reference"].shape[2] * height * width

    def enter_block(self, sequence: Tensor) -> None:
        assert self.condition is not None
        entered = sequence[:, : self.condition.shape[1]].detach()
        self.origin = F.cosine_similarity(entered.float(), self.condition.detach().float(), dim=-1).mean(dim=-1).cpu()

    @torch.no_grad()
    def note(self, block: int, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> None:
        assert self.condition is not None and self.t is not None and self.origin is not None
        num_condition = self.condition.shape[1]
        rows = num_condition + self.num_reference + self.target_rows(q.shape[1] - num_condition - self.num_reference).to(q.device)
        queries, keys, values = (x.unflatten(-1, (heads, -1)) for x in (q[:, rows], k, v))
        mass = weighted = torch.zeros(len(q), len(rows), q.shape[1], device=q.device)
        bias = None if mask is None else mask.expand(len(q), heads, q.shape[1], q.shape[1])[:, :, rows]
        for head in range(heads):  # one at a time: a 720p clip has 80,000 keys
            scores = queries[:, :, head].float() @ keys[:, :, head].float().transpose(-1, -2) * keys.shape[-1] ** -0.5
            weights = (scores if bias is None else scores + bias[:, head]).softmax(dim=-1)
            mass, weighted = mass + weights / heads, weighted + weights * values[:, :, head].float().norm(dim=-1)[:, None]
        weighted /= weighted.sum(dim=-1, keepdim=True)
        self.found.append(BlockAttention(block, self.t, self.share_of(mass.mean(dim=1)), self.share_of(weighted.mean(dim=1)), self.origin))

    def target_rows(self, num_target: int) -> Tensor:
        if self.rows is not None:
            return torch.tensor(self.rows)
        return torch.randperm(num_target, generator=torch.Generator().manual_seed(self.seed))[: self.num_rows].sort().values

    def share_of(self, tokens: Tensor) -> Share:
        """(B, L) that sums to 1 -> its parts."""
        assert self.condition is not None
        num_condition = self.condition.shape[1]
        condition, reference, target = tokens.cpu().split([num_condition, self.num_reference, tokens.shape[1] - num_condition - self.num_reference], dim=1)
        return Share(condition, reference.sum(dim=1), target.sum(dim=1))


@dataclass(frozen=True)
class _Recorded:
    """An AttentionFn that shows a recorder what it is called with."""

    function: AttentionFn
    block: int
    recorder: _Recorder

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
        self.recorder.note(self.block, q, k, v, heads, mask)
        return self.function(q, k, v, heads, mask, **kwargs)


@contextmanager
def record_attention(dit: MiVEDiT, num_rows: int = 64, seed: int = 0, rows: Sequence[int] | None = None) -> Iterator[list[BlockAttention]]:
    """Inside the block, every forward pass of the DiT adds a BlockAttention for each of its blocks to the list.

    `rows` are target tokens, by their number in the target's patch grid, such as those of an edit; without them `num_rows` are drawn. The DiT
    must not be compiled.
    """
    recorder = _Recorder(num_rows, rows, seed)
    attentions = [block.self_attn.attention for block in dit.blocks]
    hooks = [dit.register_forward_pre_hook(lambda dit, args, kwargs: recorder.begin(dit, args, kwargs), with_kwargs=True)]
    try:
        for index, block in enumerate(dit.blocks):
            block.self_attn.attention = _Recorded(attentions[index], index, recorder)
            hooks.append(block.register_forward_pre_hook(lambda _, args: recorder.enter_block(args[0])))
        yield recorder.found
    finally:
        for hook in hooks:
            hook.remove()
        for block, attention in zip(dit.blocks, attentions):
            block.self_attn.attention = attention


def layer_terms(context: ContextProjection, states: Tensor) -> Tensor:
    """(B, K, S, D_vlm) -> (B, K, N_c, D): the terms W_k p_k whose sum, with the fusing bias, is the condition tokens."""
    dtype = context.fuse.weight.dtype
    parts = [project(norm(layer.float()).to(dtype)) for norm, project, layer in zip(context.norms, context.projections, states.unbind(1))]
    columns = context.fuse.weight.split([part.shape[-1] for part in parts], dim=1)
    return torch.stack([F.linear(part, matrix) for part, matrix in zip(parts, columns)], dim=1)


@torch.no_grad()
def layer_shares(context: ContextProjection, states: Tensor) -> Tensor:
    """(B, K, S, D_vlm) -> (B, K, N_c): the norm of each layer's term of a condition token, over the sum of the K norms."""
    norms = layer_terms(context, states).float().norm(dim=-1).cpu()
    return norms / norms.sum(dim=1, keepdim=True)


def by_layer(share: Share, layers: Tensor) -> Tensor:
    """A Share and layer_shares (B or 1, K, N_c) -> (B, K): the condition's share, divided among the layers."""
    return (share.condition[:, None] * layers).sum(dim=-1)


def by_type(share: Share, token_types: Tensor) -> dict[str, Tensor]:
    """A Share and the types (1, S) of the VLM's tokens -> by the name of each type the share (B,) of its condition tokens."""
    return {name: share.condition[:, token_types[0].cpu() == kind].sum(dim=1) for kind, name in enumerate(TOKEN_TYPES)}


def rows_of(found: Sequence[BlockAttention], chosen: Sequence[int], layers: Tensor, token_types: Tensor | None = None) -> list[dict]:
    """The figures of each block and pass, as JSON takes them: means over the batch. `chosen` are the layers' numbers, `layers` their layer_shares."""
    rows = []
    for one in found:
        row: dict = {"block": one.block, "t": float(one.t.mean()), "origin": float(one.origin.mean())}
        for name, share in (("mass", one.mass), ("weighted", one.weighted)):
            figures: dict = {"condition": float(share.condition.sum(dim=1).mean())}
            figures |= {"reference": float(share.reference.mean()), "target": float(share.target.mean())}
            figures["condition_by_layer"] = {str(k): float(value) for k, value in zip(chosen, by_layer(share, layers).mean(dim=0), strict=True)}
            if token_types is not None:
                figures["condition_by_type"] = {kind: float(value.mean()) for kind, value in by_type(share, token_types).items()}
            row[name] = figures
        rows.append(row)
    return rows


def mean_by_block(rows: Sequence[dict], measure: str) -> list[dict]:
    """The rows of rows_of -> for each block the mean over its passes of one measure, mass or weighted: condition, reference, target, condition_by_layer."""
    means = []
    for block in sorted({row["block"] for row in rows}):
        own = [row[measure] for row in rows if row["block"] == block]
        mean: dict = {part: sum(figures[part] for figures in own) / len(own) for part in PARTS}
        mean["condition_by_layer"] = {k: sum(figures["condition_by_layer"][k] for figures in own) / len(own) for k in own[0]["condition_by_layer"]}
        means.append(mean)
    return means


@torch.inference_mode()
def measure_edit(
    pipeline: Pipeline, request: EditRequest, steps: int | None = None, seed: int = 0, num_rows: int = 64, progress: Callable[[Iterable], Iterable] = iter
) -> dict:
    """Edits the first stretch of a clip without guidance -> what its target tokens attended to, as JSON takes it. Nothing is decoded."""
    config = pipeline.config
    request = replace(request, source=Clip(request.source.frames[: config.edit_frames], request.source.fps))
    request = replace(request, keyframes=tuple(keyframe for keyframe in request.keyframes if keyframe.number < len(request.source.frames)))
    times = schedule(config.steps if steps is None else steps, config.shift)
    inputs = build_inputs(request, pipeline.vlm.processor, config).to(pipeline.vlm.model.device)
    condition, latents = pipeline.vlm.encode(inputs, config.resolved_layers), pipeline.encode(request)
    with record_attention(pipeline.dit, num_rows, seed) as found:
        pipeline.denoise(latents, [condition], times, 1.0, seed, progress)
    rows = rows_of(found, condition.layers, layer_shares(pipeline.dit.context, condition.states), inputs.mm_token_type_ids)
    first = found[0]
    return {
        "num_rows": num_rows,
        "tokens": {"condition": first.mass.condition.shape[1], **dict(zip(PARTS[1:], _grid_tokens(latents.reference, latents.source, config)))},
        "blocks": rows,
    }


def _grid_tokens(reference: Tensor, source: Tensor, config: MiVEConfig) -> list[int]:
    """The numbers of reference and target tokens."""
    return [math.prod(config.patch_grid(*latents.shape[2:])) for latents in (reference, source)]


def summary(report: dict) -> str:
    """A text of a few lines: means over blocks and passes, and the tokens' share of the sequence to compare with."""
    total = sum(report["tokens"].values())
    lines = [f"{'':12}{'tokens':>9}{'mass':>9}{'weighted':>9}"]
    for part in PARTS:
        means = [sum(row[measure][part] for row in report["blocks"]) / len(report["blocks"]) for measure in ("mass", "weighted")]
        lines.append(f"{part:12}{report['tokens'][part] / total:9.3f}{means[0]:9.3f}{means[1]:9.3f}")
    for k in report["blocks"][0]["mass"]["condition_by_layer"]:
        means = [sum(row[measure]["condition_by_layer"][k] for row in report["blocks"]) / len(report["blocks"]) for measure in ("mass", "weighted")]
        lines.append(f"{'  layer ' + k:12}{'':9}{means[0]:9.3f}{means[1]:9.3f}")
    return "\n".join(lines)
