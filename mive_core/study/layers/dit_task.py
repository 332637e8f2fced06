"""Task study_layers: trains a small DiT from scratch on the states of one arm of the layer study.

All arms see the same clips in the same order. B batch, K stacks of states, S tokens of a prompt, D_vlm their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...config import MiVEConfig
from ...dit import MiVEDiT
from ...embedded.dit_task import initialise, initialise_identity
from ...errors import UserError
from ...formats.safetensors_file import read_tensors, write_tensors
from ...train.flow_matching import FlowMatchingRecipe, FlowMatchingTask, check_recipe, training_attention
from ...train.loop import step_seed
from ...train.objective import EditFeatures, collate
from ...train.recipe import parse_recipe
from .arms import ARMS, Arm, apply_variant, arm_states, with_other_clips
from .states import read_clips
from .vlm_task import CONFIG

LATENTS = ("target", "source", "reference", "mask")
DIT = replace(CONFIG, width=160, num_blocks=5, patch_size=(1, 2, 2), fix_first_frame=False, keyframes=False, guided_above=0.0)


@dataclass(frozen=True, kw_only=True)
class LayerStudyRecipe(FlowMatchingRecipe):
    """Recipe of one run. The export holds the model's weights alone, variants' modules included."""

    start_from: str = ""  # not used: every run starts from random weights
    arm: str  # a key of ARMS
    clips: tuple  # shards of the training clips
    batch_size: int = 16
    learning_rate: float = 1.2e-3
    betas: tuple = (0.9, 0.98)
    muon_learning_rate: float = 5.0e-3
    num_warmup_steps: int = 40
    decay_ratio: float = 0.25
    time_shift: float = 3.0
    edited_weight: float = 4.0
    ema_decay: float = 0.99
    bf16: bool = True
    num_workers: int = 0


class ArmClips(Dataset):
    """dataset[step]: a batch of clips whose prompts have the same number of tokens, a function of (seed, step) alone, the same for all arms."""

    def __init__(self, clips: Sequence[EditFeatures], lengths: Sequence[int], batch_size: int, seed: int):
        self.clips, self.batch_size, self.seed = clips, batch_size, seed
        self.by_length: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            self.by_length.setdefault(length, []).append(index)
        self.groups = [group for _, group in sorted(self.by_length.items())]

    def __getitem__(self, step: int) -> EditFeatures:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        odds = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(odds, 1, generator=generator))]
        chosen = torch.randint(len(group), (self.batch_size,), generator=generator).tolist()
        return collate([self.clips[group[i]] for i in chosen])


def read_arm_clips(arm: Arm, paths: Sequence[Path]) -> tuple[list[EditFeatures], list[int]]:
    """Reads the clips as an arm sees them, and the number of tokens of each clip's whole prompt."""
    found = read_clips(list(paths), (*LATENTS, "types", *arm.stacks))
    lengths = [len(clip["types"]) for clip in found]
    states = with_other_clips(arm, [arm_states(arm, clip) for clip in found], lengths)
    return [EditFeatures(**{name: clip[name] for name in LATENTS}, states=given) for clip, given in zip(found, states)], lengths


def new_dit(arm: Arm, attention) -> MiVEDiT:
    """An arm's DiT with fresh weights."""
    config: MiVEConfig = replace(DIT, layers=tuple(range(1, arm.num_stacks + 1)), ffn_width=arm.ffn_width)
    model = MiVEDiT(config, operations=nn, attention=attention)
    initialise(model)
    initialise_identity(model)
    apply_variant(model, arm)
    return model


def load_dit(arm: Arm, path: Path, attention) -> MiVEDiT:
    """Loads what a run exported, in float32."""
    model = new_dit(arm, attention)
    model.load_state_dict({name: value.float() for name, value in read_tensors(path).items()})
    return model.eval().requires_grad_(False)


class LayerStudyTask(FlowMatchingTask):
    """The training loop's task for one run."""

    recipe: LayerStudyRecipe

    def __init__(self, recipe: LayerStudyRecipe, where: object = None):
        if recipe.arm not in ARMS:
            raise UserError("unknown arm", where=where, got=recipe.arm, expected=", ".join(ARMS))
        check_recipe(recipe, where)
        arm = ARMS[recipe.arm]
        clips, lengths = read_arm_clips(arm, [Path(path) for path in recipe.clips])
        torch.manual_seed(recipe.seed)
        super().__init__(recipe, new_dit(arm, training_attention(recipe)).train(), ArmClips(clips, lengths, recipe.batch_size, recipe.seed))

    def export(self, path: Path) -> None:
        """Writes the weights in float16."""
        weights: dict[str, Tensor] = {name: value.half().contiguous() for name, value in self.model.state_dict().items()}
        write_tensors(path, weights, {"format": "pt", "mive.arm": self.recipe.arm})


def build(values: dict, where: object = None) -> LayerStudyTask:
    """Builds the task from a recipe's values."""
    return LayerStudyTask(parse_recipe(LayerStudyRecipe, values, where), where)
