"""What a finished run makes of the held-out clips, as latents: as given, and with single layers' states replaced."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ...attention import get_attention
from ...dit import MiVEDiT
from ...evaluation.attention_share import layer_shares, record_attention, rows_of
from ...evaluation.evaluate import write_json
from ...flow import euler, schedule
from ...formats.safetensors_file import write_tensors
from ...train.loop import step_seed
from ...train.objective import EditFeatures
from .arms import ARMS, next_alike
from .dit_task import DIT, load_dit, read_arm_clips
from .states import read_clips

STEPS = 8
BATCH = 16
ATTENTION_ROWS = 64  # target tokens of a clip whose attention is read
SEED = 28  # of the noise, which is the same for all runs
AS_GIVEN = "as given"
REPLACED = {f"layer {k} {how}": (stack, how) for stack, k in ((0, "1"), (1, "-1")) for how in ("by its mean", "by another clip's")}


def replaced_states(states: Sequence[Tensor], types: Sequence[Tensor], stack: int, how: str) -> list[Tensor]:
    """Replaces one stack (S, D_vlm) of each clip's states (K, S, D_vlm).

    by its mean: each token of a picture by the mean over clips of the token in its place, each text token by the mean of all text tokens;
    by another clip's: by that of the next clip with as many tokens, if there is one.
    """
    if how == "by another clip's":
        given = [state.clone() for state in states]
        for state, j in zip(given, next_alike([len(one) for one in types])):
            state[stack] = states[j][stack]
        return given
    pictures = torch.stack([state[stack].float()[kind > 0] for state, kind in zip(states, types)]).mean(dim=0)
    words = torch.cat([state[stack].float()[kind == 0] for state, kind in zip(states, types)]).mean(dim=0)
    given = []
    for state, kind in zip(states, types):
        mean = words.expand(len(kind), -1).clone()
        mean[kind > 0] = pictures
        changed = state.clone()
        changed[stack] = mean.to(state.dtype)
        given.append(changed)
    return given


@torch.inference_mode()
def sample_clips(model: MiVEDiT, clips: Sequence[EditFeatures]) -> Tensor:
    """Edits all clips -> latents (N, C, T, Y, X) in float16. The noise of a clip depends on its number alone."""
    times = schedule(STEPS, DIT.shift)
    made: dict[int, Tensor] = {}
    lengths: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        lengths.setdefault(clip.states.shape[1], []).append(index)
    batches = [group[i : i + BATCH] for _, group in sorted(lengths.items()) for i in range(0, len(group), BATCH)]
    for batch in tqdm(batches, desc="sampling", unit="batch", mininterval=5.0):
        source, reference, states = (torch.stack([getattr(clips[i], name) for i in batch]).float() for name in ("source", "reference", "states"))
        noise = torch.stack([torch.randn(clips[i].source.shape, generator=torch.Generator().manual_seed(step_seed(SEED, i))) for i in batch])
        with torch.autocast("cpu", torch.bfloat16):
            condition = model.embed_condition(states)

            def velocity(x: Tensor, t: float, source=source, reference=reference, condition=condition) -> Tensor:
                return model(x, source, reference, condition, torch.full((len(x),), t)).float()

            latents = euler(velocity, noise, times)
        made |= {i: value.half() for i, value in zip(batch, latents)}
    return torch.stack([made[i] for i in range(len(clips))])


def write_samples(arm_name: str, weights: Path, heldout: Sequence[Path], path: Path) -> None:
    """Edits the held-out clips with a finished run, and, for an arm of two different layers, with each one's states replaced too."""
    arm = ARMS[arm_name]
    model = load_dit(arm, weights, get_attention("auto"))
    clips, _ = read_arm_clips(arm, heldout)
    made: dict[str, Tensor] = {AS_GIVEN: sample_clips(model, clips)}
    if arm_name == "first_last":
        types = [clip["types"] for clip in read_clips(list(heldout), ("types",))]
        for name, (stack, how) in REPLACED.items():
            states = replaced_states([clip.states for clip in clips], types, stack, how)
            made[name] = sample_clips(model, [with_states(clip, given) for clip, given in zip(clips, states)])
    if not arm.variant and arm.tokens != "none":
        write_json(path.with_name("attention.json"), attention_of(model, clips))
    write_tensors(path, made, {"mive.arm": arm_name})


@torch.inference_mode()
def attention_of(model: MiVEDiT, clips: Sequence[EditFeatures]) -> dict:
    """What target tokens attend to in one batch of clips: by block and step, the condition's share divided among the stacks. See attention_share.py."""
    length = clips[0].states.shape[1]
    batch = [clip for clip in clips if clip.states.shape[1] == length][:BATCH]
    with record_attention(model, num_rows=ATTENTION_ROWS) as found:
        sample_clips(model, batch)
    states = torch.stack([clip.states for clip in batch]).float()
    return {"clips": len(batch), "tokens": length, "blocks": rows_of(found, range(states.shape[1]), layer_shares(model.context, states))}


def with_states(clip: EditFeatures, states: Tensor) -> EditFeatures:
    """The clip with other states."""
    values: Mapping[str, Tensor] = {name: getattr(clip, name) for name in ("target", "source", "reference", "mask")}
    return EditFeatures(**values, states=states)
