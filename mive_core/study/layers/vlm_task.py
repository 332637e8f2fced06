"""Task study_vlm: trains the layer study's own Qwen3-VL by next-token prediction of answers about drawn clips, and by nothing else.

No loss reads a hidden state, a mask or a label: what its layers hold, they hold because it helps the next word. An edit's
instruction stands before the pictures, as in an edit, and questions behind them. Each turn sees instruction and pictures but no other turn:
else answers are copied from earlier answers instead of read from the pictures.
B batch, S tokens in the sequence, A tokens of answers in the batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...config import PRESETS, MiVEConfig
from ...embedded.synthetic import PairedEdits, SyntheticEdit
from ...embedded.synthetic.random_scenes import draw_scene
from ...embedded.synthetic.scene import Scene, render
from ...embedded.vlm_examples import HALF, as_typed, pad, to_byte, tokenizer_corpus
from ...embedded.vlm_folder import MODEL, write_tiny_folder
from ...formats.safetensors_file import write_tensors
from ...prompt import build_image_inputs, build_inputs, sample_frames
from ...train.loop import Task
from ...train.optim import Muon, warmup_cosine
from ...train.recipe import Recipe, parse_recipe
from ...types import VLMInputs
from ...vlm import WEIGHTS, load_processor, model_arguments, new_model
from .conversations import EditConversation, StillConversation, Turn, corpus

NUM_LAYERS = 8
SIZE, NUM_FRAMES, FPS = (64, 64), 17, 8.0
KINDS = ("seen in reference", "two alike", "enters late", "instruction only")
EDITS = ("recolour", "replace", "remove", "add")  # of single things, so that "where" has an answer
CONFIG = replace(PRESETS["tiny"], vlm="study", vlm_num_layers=NUM_LAYERS, max_video_tokens=512)
IGNORED = -100  # label of a token that is no answer, as in transformers
MAX_BODIES = 3  # in a still image
POSITION_STD = 0.5  # of the vision's embeddings of positions at first: beside what a patch shows, a smaller one is not heard for long
NEXT_CLIP = 1_000_003  # added to the index of a clip with a cut, of which places in a path would be ambiguous

# Eight layers of Qwen3-VL, whose DeepStack adds the states of three vision blocks after the first three decoder layers, as published
VLM_CONFIG: dict[str, Any] = {
    **MODEL,
    "text_config": {**MODEL["text_config"], "num_hidden_layers": NUM_LAYERS},
    "vision_config": {**MODEL["vision_config"], "depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
}


@dataclass(frozen=True, kw_only=True)
class StudyVLMRecipe(Recipe):
    """Training settings of the study's VLM. The export is a folder."""

    batch_size: int = 16
    num_new_clips: int = 8  # newly drawn clips per step; the others are repeated from earlier steps, with other questions
    replay_steps: int = 200  # number of previous steps whose clips may be repeated
    num_turns: int = 5  # questions and answers about a clip
    num_still_steps: int = 0  # first steps that ask about still images instead, as VLMs learn images before videos
    still_batch_size: int = 64  # images per step
    num_still_turns: int = 4  # questions and answers about an image
    instruction_ratio: float = 0.5  # part of the conversations that begin with the edit's instruction
    learning_rate: float = 1.2e-3  # peak learning rate of AdamW
    muon_learning_rate: float = 0.0  # peak learning rate of Muon on the layers' matrices, a fraction of their norm; 0: AdamW for all
    final_learning_rate_ratio: float = 0.04  # final learning rate, relative to the peak
    num_warmup_steps: int = 60  # steps of linear learning rate warmup
    weight_decay: float = 0.01  # of matrices only


@dataclass(frozen=True)
class Dialogue:
    """Questions and answers about a clip, tokenized."""

    inputs: VLMInputs  # pixel values uint8
    labels: Tensor  # (1, S) int64: the tokens of answers, IGNORED elsewhere
    turns: Tensor  # (1, S) int64: 0 for instruction and pictures, which all turns see, then the number of the turn
    topics: tuple[tuple[str, int, int], ...]  # of each turn: topic, first token of the answer, number of its tokens


@dataclass(frozen=True)
class DialogueBatch:
    """Dialogues of equal pictures, padded on the right."""

    inputs: VLMInputs
    labels: Tensor  # (B, S)
    turns: Tensor  # (B, S)
    topics: tuple[tuple[tuple[str, int, int], ...], ...]  # see Dialogue, of each


def one_shot(edits: PairedEdits, index: int) -> SyntheticEdit:
    """Returns the edit of that index, or of the next that has no cut."""
    while len((edit := edits.sample(index)).shots) > 1:
        index += NEXT_CLIP
    return edit


def dialogue(
    edit: SyntheticEdit, processor: Any, rng: np.random.Generator, num_turns: int, instructed: bool, topic: str | None = None, config: MiVEConfig = CONFIG
) -> Dialogue:
    """Asks about a clip, on one topic alone if it is given; `instructed`: what the edit's instruction, before the pictures, asks for, comes first."""
    request = edit.pair.request
    frames = sample_frames(len(request.source.frames), request.source.fps, config.video_fps, processor.video_processor)
    instruction = as_typed(request.instruction, int(rng.integers(3))) if instructed else ""
    talk = EditConversation(edit, frames, rng)
    if topic is not None and topic != "asked":
        asked = [talk.turn(topic)]
    else:
        asked = list(talk.instructed_turns(num_turns, instruction) if instructed else talk.turns(num_turns))
    return dialogue_of(build_inputs(replace(request, instruction=instruction), processor, config), asked, processor)


def still_dialogue(scene: Scene, processor: Any, rng: np.random.Generator, num_turns: int, config: MiVEConfig = CONFIG) -> Dialogue:
    """Asks about the first frame of a scene."""
    asked = list(StillConversation(scene, SIZE, rng).turns(num_turns))
    image = torch.from_numpy(render(scene, np.zeros(1), SIZE)[0])
    return dialogue_of(build_image_inputs(image, "", processor, config), asked, processor)


def dialogue_of(inputs: VLMInputs, asked: Sequence[Turn], processor: Any) -> Dialogue:
    """Tokenizes turns behind a prompt."""
    ids, labels, topics = inputs.input_ids, torch.full_like(inputs.input_ids, IGNORED), []
    turns = torch.zeros_like(ids)
    for number, turn in enumerate(asked, 1):
        question = "" if turn.topic == "asked" else f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        ids, labels = extended(ids, labels, processor, question, spoken=False)
        first = ids.shape[1]
        ids, labels = extended(ids, labels, processor, f"{turn.answer}<|im_end|>", spoken=True)
        topics.append((turn.topic, first, ids.shape[1] - first))
        turns = F.pad(turns, (0, ids.shape[1] - turns.shape[1]), value=number)
    added = ids.shape[1] - inputs.input_ids.shape[1]
    inputs = replace(
        inputs,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=F.pad(inputs.mm_token_type_ids, (0, added)),
        pixel_values=to_byte(inputs.pixel_values),
        pixel_values_videos=None if inputs.pixel_values_videos is None else to_byte(inputs.pixel_values_videos),
    )
    return Dialogue(inputs, labels, turns, tuple(topics))


def extended(ids: Tensor, labels: Tensor, processor: Any, text: str, spoken: bool) -> tuple[Tensor, Tensor]:
    """Appends a text to tokens and labels, (1, S) each; `spoken`: its tokens are to be predicted."""
    new = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)
    return torch.cat([ids, new], dim=1), torch.cat([labels, new if spoken else torch.full_like(new, IGNORED)], dim=1)


def batch_of(dialogues: Sequence[Dialogue], pad_token: int) -> DialogueBatch:
    """Collates dialogues, all about clips or all about images."""
    inputs = pad([one.inputs for one in dialogues], pad_token)
    scaled = lambda pixels: None if pixels is None else pixels.float() / HALF - 1
    inputs = replace(inputs, pixel_values=scaled(inputs.pixel_values), pixel_values_videos=scaled(inputs.pixel_values_videos))
    longest = inputs.input_ids.shape[1]
    labels, turns = (
        torch.cat([F.pad(getattr(one, name), (0, longest - one.labels.shape[1]), value=IGNORED) for one in dialogues]) for name in ("labels", "turns")
    )
    return DialogueBatch(inputs, labels, turns, tuple(one.topics for one in dialogues))


def seen(turns: Tensor) -> Tensor:
    """-> (B, 1, S, S) True where a token (the first S) sees another: those before it of its own turn and of what all turns see."""
    same = turns[:, :, None] == turns[:, None]
    return ((same | (turns == 0)[:, None]).tril())[:, None]


def positions(model: nn.Module, batch: DialogueBatch) -> Tensor:
    """-> (3, B, S) the model's positions, where each turn begins right behind the pictures."""
    found, _ = model.get_rope_index(**model_arguments(model.get_rope_index, batch.inputs))
    starts = (batch.turns[:, :, None] == batch.turns[:, None]).int().argmax(-1)  # the first token of each token's turn
    common = (batch.turns == 0).sum(1, keepdim=True)
    return found - torch.where(batch.turns > 0, starts - common, 0)


def next_token_logits(model: nn.Module, batch: DialogueBatch) -> tuple[Tensor, Tensor]:
    """Returns logits (A, V) of the answers' tokens, each read from the state before it, and these tokens (A,), in the order of the batch."""
    arguments = {**model_arguments(model.forward, batch.inputs), "attention_mask": seen(batch.turns), "position_ids": positions(model, batch)}
    states = model(**arguments, use_cache=False).last_hidden_state
    spoken = batch.labels[:, 1:] != IGNORED
    return F.linear(states[:, :-1][spoken], model.get_input_embeddings().weight), batch.labels[:, 1:][spoken]


class Dialogues(Dataset):
    """dataset[step]: at first still images; then newly drawn clips, and earlier ones with other questions. A function of the step alone."""

    def __init__(self, recipe: StudyVLMRecipe, folder: Path):
        self.recipe, self.processor = recipe, load_processor(folder)
        self.edits = PairedEdits(recipe.seed, size=SIZE, num_frames=NUM_FRAMES, fps=FPS, kinds=KINDS, edits=EDITS)
        self.drawn: dict[int, list[SyntheticEdit]] = {}

    def __getitem__(self, step: int) -> DialogueBatch:
        recipe = self.recipe
        rng = np.random.default_rng((recipe.seed, step, 1))
        if step < recipe.num_still_steps:
            return self.stills(step, rng)
        self.drawn = {number: clips for number, clips in self.drawn.items() if number > step - recipe.replay_steps}
        earlier = [clip for number, clips in self.drawn.items() if number != step for clip in clips] or self.new(step)
        repeated = [earlier[int(rng.integers(len(earlier)))] for _ in range(recipe.batch_size - recipe.num_new_clips)]
        clips = [*self.new(step), *repeated]
        made = [dialogue(clip, self.processor, rng, recipe.num_turns, bool(rng.uniform() < recipe.instruction_ratio)) for clip in clips]
        return batch_of(made, self.processor.tokenizer.pad_token_id)

    def stills(self, step: int, rng: np.random.Generator) -> DialogueBatch:
        """Returns dialogues about newly drawn images, of few bodies at first."""
        recipe = self.recipe
        most = 1 + int(MAX_BODIES * step / recipe.num_still_steps)
        scenes = (draw_scene(rng, SIZE, int(rng.integers(1, most + 1))) for _ in count())
        named = (scene for scene in scenes if len({(body.colour, body.shape) for body in scene.bodies}) == len(scene.bodies))
        made = [still_dialogue(scene, self.processor, rng, recipe.num_still_turns) for scene in islice(named, recipe.still_batch_size)]
        return batch_of(made, self.processor.tokenizer.pad_token_id)

    def new(self, step: int) -> list[SyntheticEdit]:
        """Returns the clips that are new in the step."""
        if step not in self.drawn:
            num = self.recipe.num_new_clips
            self.drawn[step] = [one_shot(self.edits, step * num + j) for j in range(num)]
        return self.drawn[step]


class StudyVLMTask(Task):
    """The training loop's task for the study's VLM."""

    recipe: StudyVLMRecipe

    def __init__(self, recipe: StudyVLMRecipe):
        self.recipe = recipe
        self.folder = Path(recipe.output_dir) / "folder"
        write_folder(self.folder)
        torch.manual_seed(recipe.seed)
        self.model = new_model(self.folder).train()
        nn.init.normal_(self.model.visual.pos_embed.weight, std=POSITION_STD)
        self.modules = {"vlm": self.model}
        layers = [*self.model.language_model.layers.parameters(), *self.model.visual.blocks.parameters()]
        matrices = [p for p in layers if p.ndim == 2] if recipe.muon_learning_rate else []
        taken = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in taken]
        groups = [{"params": [p for p in rest if p.ndim > 1]}, {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0}]
        self.optimizers = {"adamw": torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)}
        if matrices:
            self.optimizers["muon"] = Muon(matrices, lr=recipe.muon_learning_rate, dtype=torch.bfloat16 if recipe.bf16 else torch.float32)
        self.dataset = Dialogues(recipe, self.folder)

    def lr_factor(self, step: int) -> float:
        """Linear warmup, then a cosine decay to final_learning_rate_ratio."""
        recipe = self.recipe
        return warmup_cosine(step, recipe.num_steps, recipe.num_warmup_steps, recipe.final_learning_rate_ratio)

    def loss(self, step: int, batch: DialogueBatch, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns the cross entropy of the answers' tokens, and the share of them that is foretold."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            logits, tokens = next_token_logits(self.model, batch)
        logits = logits.float()
        return {"loss": F.cross_entropy(logits, tokens), "accuracy": (logits.argmax(-1) == tokens).float().mean()}

    def export(self, path: Path) -> None:
        """Writes the model folder with float16 weights under the names of Qwen's checkpoints."""
        write_folder(path)
        weights = {f"model.{name}": value.half() for name, value in self.model.state_dict().items()}
        write_tensors(path / WEIGHTS, weights, {"format": "pt", **self.recipe.metadata})


def write_folder(path: Path) -> None:
    """Writes all files of the study's VLM except its weights."""
    write_tiny_folder(path, [*tokenizer_corpus(), *corpus()], VLM_CONFIG)


def build(values: dict, where: object = None) -> StudyVLMTask:
    """Builds the task from a recipe's values."""
    return StudyVLMTask(parse_recipe(StudyVLMRecipe, values, where))
