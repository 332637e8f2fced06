"""Teaches the tiny Qwen3-VL to name an edit and to locate it; then it is frozen and its states are read."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..formats.safetensors_file import write_tensors
from ..train.loop import Task
from ..train.recipe import Recipe, parse_recipe
from ..types import VLMInputs
from ..vlm import VLM, WEIGHTS, load_processor, new_model, tap
from .synthetic import PairedEdits
from .vlm_examples import HEADS, Example, Heads, Readings, Sentences, VLMBatch, as_typed, batch_of, example, load_heads, losses, misheard, phrases, sentences_of
from .vlm_folder import write_tiny_folder

LOCAL_EDITS = ("recolour", "replace", "remove", "add")


@dataclass(frozen=True, kw_only=True)
class VLMRecipe(Recipe):
    """The tiny VLM's training. The export is a folder."""

    num_new_clips: int = 8  # newly drawn edits in a step; as many again are repeated
    replay_steps: int = 300  # steps whose edits may be repeated
    learning_rate: float = 1.2e-3
    final_learning_rate_ratio: float = 0.04  # of lr
    num_warmup_steps: int = 60
    weight_decay: float = 0.01
    sizes: tuple = ((96, 96), (160, 96), (192, 112))  # width, height
    size_probabilities: tuple = (0.86, 0.09, 0.05)  # of each size
    num_sentences: int = 0  # instructions without pictures in each step; their loss is added to "heard"
    local_edit_ratio: float = 0.0  # of a step whose new edits are all of single objects
    loss_weights: tuple = (2.0, 3.0, 0.0, 2.0, 2.0, 0.3)  # of the losses heard, words, meant, where, becomes, first
    start_from: str = ""  # an exported folder to begin with


class VLMBatches(Dataset):
    """lessons[step]: half of a batch new, half drawn in an earlier step of the same size; a function of the step alone."""

    def __init__(self, recipe: VLMRecipe, folder: Path):
        self.recipe, self.processor = recipe, load_processor(folder)
        self.edits = [[PairedEdits(recipe.seed, size=size, edits=edits) for edits in (None, LOCAL_EDITS)] for size in recipe.sizes]
        self.drawn: dict[int, list[Example]] = {}

    def __getitem__(self, step: int) -> VLMBatch:
        size = self.size_of(step)
        earlier = [s for s in range(max(0, step - self.recipe.replay_steps), step) if self.size_of(s) == size]
        repeated = self.random(step, 1).choice(earlier) if earlier else step
        self.drawn = {s: found for s, found in self.drawn.items() if s > step - self.recipe.replay_steps}
        batch = batch_of([*self.half(step), *self.half(int(repeated))], self.processor.tokenizer.pad_token_id)
        return replace(batch, said=self.sentences(step)) if self.recipe.num_sentences else batch

    def sentences(self, step: int) -> Sentences:
        num, edits = self.recipe.num_sentences, self.edits[0][0]
        spoken = (edits.say(step * num + j) for j in range(num))
        return sentences_of([(as_typed(text, j % 3), labels) for j, (text, labels) in enumerate(spoken)], self.processor)

    def size_of(self, step: int) -> int:
        return int(self.random(step, 0).choice(len(self.recipe.sizes), p=self.recipe.size_probabilities))

    def random(self, step: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng((self.recipe.seed, step, purpose))

    def half(self, step: int) -> list[Example]:
        if step not in self.drawn:
            local = int(self.random(step, 2).uniform() < self.recipe.local_edit_ratio)
            edits, num = self.edits[self.size_of(step)][local], self.recipe.num_new_clips
            self.drawn[step] = [example(edits.sample(step * num + j), j % 3, self.processor) for j in range(num)]
        return self.drawn[step]


class VLMTask(Task):
    """What the loop needs to train the tiny VLM."""

    def __init__(self, recipe: VLMRecipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir) / "folder"
        write_tiny_folder(self.folder, phrases())
        torch.manual_seed(recipe.seed)
        if recipe.start_from:
            vlm = VLM.load(recipe.start_from)
            self.model, self.heads = vlm.model.requires_grad_(True).train(), load_heads(Path(recipe.start_from), vlm.width)
            carry_words(self.model.get_input_embeddings().weight, vlm.processor.tokenizer, load_processor(self.folder).tokenizer)
        else:
            self.model = new_model(self.folder).train()
            self.heads = Heads(self.model.config.text_config.hidden_size)
        self.modules = {"vlm": self.model, "heads": self.heads}
        decayed = [p for module in self.modules.values() for p in module.parameters() if p.ndim > 1]
        kept = [p for module in self.modules.values() for p in module.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        self.optimizers = {"adamw": torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)}
        self.dataset = VLMBatches(recipe, self.folder)

    def rate(self, step: int) -> float:
        if step < self.recipe.num_warmup_steps:
            return (step + 1) / self.recipe.num_warmup_steps
        done = (step - self.recipe.num_warmup_steps) / (self.recipe.num_steps - self.recipe.num_warmup_steps)
        return self.recipe.final_learning_rate_ratio + (1 - self.recipe.final_learning_rate_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    def loss(self, step: int, batch: VLMBatch, generator: torch.Generator) -> dict[str, Tensor]:
        found = losses(read(self.model, self.heads, batch.inputs), batch, self.recipe.loss_weights)
        if batch.said is not None:
            said = batch.said
            states = self.model.language_model(input_ids=said.input_ids, attention_mask=said.attention_mask, use_cache=False)
            found["said"] = misheard(self.heads.hear(states.last_hidden_state, said), said)
            found["loss"] = found["loss"] + self.recipe.loss_weights[0] * found["said"]
        return found

    def export(self, path: Path) -> None:
        """The folder, its weights in float16 under the names of Qwen's own checkpoints, and the heads beside it."""
        write_tiny_folder(path, phrases())
        weights = {f"model.{name}": value.half() for name, value in self.model.state_dict().items()}
        write_tensors(path / WEIGHTS, weights, {"format": "pt", **self.recipe.about})
        write_tensors(path / HEADS, {name: value.half() for name, value in self.heads.state_dict().items()}, {"format": "pt"})
        for name in (WEIGHTS, HEADS):
            os.chmod(path / name, 0o644)


@torch.no_grad()
def carry_words(embeddings: Tensor, old: Callable, new: Callable) -> None:
    """Renumbers the rows (V, D) from one tokenizer to another; a token that is new gets the mean of the old ones that spell it."""
    known, before = old.get_vocab(), embeddings.clone()
    for token, row in new.get_vocab().items():
        spelt = [known[token]] if token in known else old(new.convert_tokens_to_string([token]), add_special_tokens=False).input_ids
        if spelt:
            embeddings[row] = before[spelt].mean(dim=0)


def read(model: torch.nn.Module, heads: Heads, inputs: VLMInputs) -> Readings:
    """VLM inputs of a batch -> what the heads read in layers 1 and L."""
    last = len(model.language_model.layers)
    states = tap(model, inputs, (1, last))
    return heads(states[1], states[last], inputs)


def build(values: dict, where: object = None) -> VLMTask:
    """A recipe's mapping -> the task."""
    return VLMTask(parse_recipe(VLMRecipe, values, where))
