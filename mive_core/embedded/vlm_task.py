"""Task vlm: trains the tiny Qwen3-VL to classify and localise edits. It is then frozen and provides hidden states for the DiT."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..formats.safetensors_file import write_tensors
from ..train.loop import Task
from ..train.optim import warmup_cosine
from ..train.recipe import Recipe, parse_recipe
from ..types import VLMInputs
from ..vlm import VLM, WEIGHTS, collect_hidden_states, load_processor, new_model
from .synthetic import KINDS, PairedEdits
from .vlm_examples import (
    HEADS,
    Example,
    HeadOutputs,
    Heads,
    InstructionBatch,
    VLMBatch,
    as_typed,
    batch_of,
    example,
    instruction_batch,
    instruction_loss,
    load_heads,
    losses,
    tokenizer_corpus,
)
from .vlm_folder import write_tiny_folder

LOCAL_EDITS = ("recolour", "replace", "remove", "add")


@dataclass(frozen=True, kw_only=True)
class VLMRecipe(Recipe):
    """Training settings of the tiny VLM. The export is a folder."""

    num_new_clips: int = 8  # newly drawn edits per step; as many are repeated from earlier steps
    replay_steps: int = 300  # number of previous steps whose edits may be repeated
    learning_rate: float = 1.2e-3  # peak learning rate
    final_learning_rate_ratio: float = 0.04  # final learning rate, relative to the peak
    num_warmup_steps: int = 60  # steps of linear learning rate warmup
    weight_decay: float = 0.01  # of matrices only
    sizes: tuple = ((96, 96), (160, 96), (192, 112))  # width and height of the clips
    size_probabilities: tuple = (0.86, 0.09, 0.05)  # of each size
    num_sentences: int = 0  # instructions without pictures per step; their loss has the weight of "heard"
    local_edit_ratio: float = 0.0  # probability that all new edits of a step are of single objects
    loss_weights: tuple = (2.0, 3.0, 0.0, 2.0, 2.0, 0.3)  # of the losses heard, words, meant, where, becomes, first; see vlm_examples.losses
    start_from: str = ""  # exported folder with the initial weights; "": random ones


class VLMBatches(Dataset):
    """dataset[step]: half of the batch is new, half was drawn in an earlier step with clips of the same size; a function of the step alone."""

    def __init__(self, recipe: VLMRecipe, folder: Path):
        self.recipe, self.processor = recipe, load_processor(folder)
        self.edits = [[PairedEdits(recipe.seed, size=size, kinds=KINDS[1:], edits=edits) for edits in (None, LOCAL_EDITS)] for size in recipe.sizes]
        self.drawn: dict[int, list[Example]] = {}  # step -> its new edits

    def __getitem__(self, step: int) -> VLMBatch:
        size = self.size_of(step)
        earlier = [s for s in range(max(0, step - self.recipe.replay_steps), step) if self.size_of(s) == size]
        repeated = self.random(step, 1).choice(earlier) if earlier else step
        self.drawn = {s: examples for s, examples in self.drawn.items() if s > step - self.recipe.replay_steps}
        batch = batch_of([*self.new_examples(step), *self.new_examples(int(repeated))], self.processor.tokenizer.pad_token_id)
        return replace(batch, instructions=self.instructions(step)) if self.recipe.num_sentences else batch

    def instructions(self, step: int) -> InstructionBatch:
        """Returns the step's instructions without pictures."""
        num, edits = self.recipe.num_sentences, self.edits[0][0]
        labelled = (edits.sample_instruction(step * num + j) for j in range(num))
        return instruction_batch([(as_typed(text, j % 3), labels) for j, (text, labels) in enumerate(labelled)], self.processor)

    def size_of(self, step: int) -> int:
        """Returns the index of the step's size in recipe.sizes."""
        return int(self.random(step, 0).choice(len(self.recipe.sizes), p=self.recipe.size_probabilities))

    def random(self, step: int, purpose: int) -> np.random.Generator:
        """Returns a generator for the step; each purpose has its own."""
        return np.random.default_rng((self.recipe.seed, step, purpose))

    def new_examples(self, step: int) -> list[Example]:
        """Returns the edits that are new in the step."""
        if step not in self.drawn:
            local = int(self.random(step, 2).uniform() < self.recipe.local_edit_ratio)
            edits, num = self.edits[self.size_of(step)][local], self.recipe.num_new_clips
            self.drawn[step] = [example(edits.sample(step * num + j), j % 3, self.processor) for j in range(num)]
        return self.drawn[step]


class VLMTask(Task):
    """The training loop's task for the tiny VLM."""

    recipe: VLMRecipe

    def __init__(self, recipe: VLMRecipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir) / "folder"
        write_tiny_folder(self.folder, tokenizer_corpus())
        torch.manual_seed(recipe.seed)
        if recipe.start_from:
            vlm = VLM.load(recipe.start_from)
            self.model, self.heads = vlm.model.requires_grad_(True).train(), load_heads(Path(recipe.start_from), vlm.width)
            remap_embeddings(self.model.get_input_embeddings().weight, vlm.processor.tokenizer, load_processor(self.folder).tokenizer)
        else:
            self.model = new_model(self.folder).train()
            self.heads = Heads(self.model.config.text_config.hidden_size)
        self.modules = {"vlm": self.model, "heads": self.heads}
        decayed = [p for module in self.modules.values() for p in module.parameters() if p.ndim > 1]
        not_decayed = [p for module in self.modules.values() for p in module.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]
        self.optimizers = {"adamw": torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)}
        self.dataset = VLMBatches(recipe, self.folder)

    def lr_factor(self, step: int) -> float:
        """Linear warmup, then a cosine decay to final_learning_rate_ratio."""
        recipe = self.recipe
        return warmup_cosine(step, recipe.num_steps, recipe.num_warmup_steps, recipe.final_learning_rate_ratio)

    def loss(self, step: int, batch: VLMBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns the losses of vlm_examples.losses and, as 'said', that of instructions without pictures."""
        values = losses(run_heads(self.model, self.heads, batch.inputs), batch, self.recipe.loss_weights)
        if batch.instructions is not None:
            instructions = batch.instructions
            states = self.model.language_model(input_ids=instructions.input_ids, attention_mask=instructions.attention_mask, use_cache=False)
            values["said"] = instruction_loss(self.heads.classify_instructions(states.last_hidden_state, instructions), instructions)
            values["loss"] = values["loss"] + self.recipe.loss_weights[0] * values["said"]
        return values

    def export(self, path: Path) -> None:
        """Writes the model folder, with float16 weights under the names of Qwen's checkpoints and the heads in a file of their own."""
        write_tiny_folder(path, tokenizer_corpus())
        weights = {f"model.{name}": value.half() for name, value in self.model.state_dict().items()}
        write_tensors(path / WEIGHTS, weights, {"format": "pt", **self.recipe.metadata})
        write_tensors(path / HEADS, {name: value.half() for name, value in self.heads.state_dict().items()}, {"format": "pt"})


@torch.no_grad()
def remap_embeddings(embeddings: Tensor, old: Any, new: Any) -> None:
    """Reorders the rows (V, D) in place from one tokenizer to another; a new token gets the mean of the old tokens that spell it."""
    known, before = old.get_vocab(), embeddings.clone()
    for token, row in new.get_vocab().items():
        pieces = [known[token]] if token in known else old(new.convert_tokens_to_string([token]), add_special_tokens=False).input_ids
        if pieces:
            embeddings[row] = before[pieces].mean(dim=0)


def run_heads(model: torch.nn.Module, heads: Heads, inputs: VLMInputs) -> HeadOutputs:
    """Runs the VLM on a batch and the heads on the states of layers 1 and L."""
    last = len(model.language_model.layers)
    states = collect_hidden_states(model, inputs, (1, last))
    return heads(states[1], states[last], inputs)


def build(values: dict, where: object = None) -> VLMTask:
    """Builds the task from a recipe's values."""
    return VLMTask(parse_recipe(VLMRecipe, values, where))
