"""The clips of the layer study, encoded once for all arms: latents, and the VLM's states of every layer.

All stacks of states come from one VLM with unchanged weights. S tokens of a prompt, D_vlm their width, L decoder layers;
C latent channels, T x Y x X latent grid.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ...embedded.features import is_current, latents_of
from ...embedded.synthetic import REVISION, PairedEdits, SyntheticEdit
from ...embedded.vae_network import read_whole_clip_vae
from ...embedded.vae_patch_matrix import Encoder, encoder_of
from ...formats.safetensors_file import write_tensors
from ...pipeline import EMBEDDED
from ...prompt import build_inputs, build_prompt
from ...types import VLMInputs
from ...vlm import VLM, WEIGHTS, collect_hidden_states
from .vlm_task import CONFIG, EDITS, FPS, KINDS, NUM_FRAMES, NUM_LAYERS, SIZE, one_shot
from .workers import one_thread_pool

PER_SHARD = 128
FIRST, LAST, MIDDLE = 1, NUM_LAYERS, NUM_LAYERS // 2
LAYERS = tuple(f"layer_{k}" for k in range(NUM_LAYERS + 1))  # hidden_states[k]; each before the DeepStack addition that follows the layer, if any
BEFORE_NORM = "last_before_norm"  # the last layer's output without the language model's final norm
WITHOUT_DEEPSTACK = "last_without_deepstack"  # layer L where no DeepStack addition was made; layer 1 comes before the first one in any case
SEPARATE = "separate"  # last layer, two passes: the instruction without pictures, and the pictures without an instruction; one behind the other
STACKS = (*LAYERS, BEFORE_NORM, WITHOUT_DEEPSTACK, SEPARATE)


@dataclass(frozen=True)
class ClipSet:
    """Some paired edits that are drawn in turn by kind; those of one split never occur in the other."""

    split: str
    num_clips: int
    seed: int

    def edit(self, index: int) -> SyntheticEdit:
        """Draws a clip, without cuts and without keyframes."""
        source = PairedEdits(self.seed, self.split, SIZE, NUM_FRAMES, FPS, (KINDS[index % len(KINDS)],), EDITS)
        return replace(one_shot(source, index // len(KINDS)), keyframes=())

    def edits(self) -> Iterator[SyntheticEdit]:
        """Draws all clips."""
        return map(self.edit, range(self.num_clips))


@contextmanager
def without_deepstack(model: nn.Module) -> Iterator[None]:
    """Leaves out DeepStack's additions within the context."""
    text = model.language_model
    text._deepstack_process = lambda hidden_states, visual_pos_masks, visual_embeds: hidden_states
    try:
        yield
    finally:
        del text._deepstack_process


def all_states(model: nn.Module, inputs: VLMInputs) -> dict[str, Tensor]:
    """The states (B, S, D_vlm) of LAYERS and BEFORE_NORM, by one pass."""
    found: list[Tensor] = []
    hook = model.language_model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        states = collect_hidden_states(model, inputs, tuple(range(NUM_LAYERS + 1)))
    finally:
        hook.remove()
    return {**{name: states[k] for k, name in enumerate(LAYERS)}, BEFORE_NORM: found[0]}


def stacks_of(edit: SyntheticEdit, vlm: VLM) -> dict[str, Tensor]:
    """Returns each of STACKS, (S, D_vlm), and `types` (S,): 0 text, 1 reference, 2 source. bf16: some channels are far larger than the rest."""
    request = edit.pair.request
    inputs = build_inputs(request, vlm.processor, CONFIG)
    stacks = {name: states[0] for name, states in all_states(vlm.model, inputs).items()}
    with without_deepstack(vlm.model):
        stacks[WITHOUT_DEEPSTACK] = collect_hidden_states(vlm.model, inputs, (LAST,))[LAST][0]
    words = build_prompt(request.instruction, vlm.processor, CONFIG.max_instruction_tokens).partition(vlm.processor.image_token)[0]
    ids = vlm.processor.tokenizer(words, return_tensors="pt")["input_ids"]
    alone = vlm.model.language_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    pictures = vlm.encode(build_inputs(replace(request, instruction=""), vlm.processor, CONFIG), (LAST,)).states[0, 0]
    stacks[SEPARATE] = torch.cat([alone, pictures])
    return {name: value.to(torch.bfloat16) for name, value in stacks.items()} | {"types": inputs.mm_token_type_ids[0].to(torch.uint8)}


def write_clips(clips: ClipSet, vlm_folder: Path, folder: Path, num_processes: int = 1) -> list[Path]:
    """Draws and encodes the clips into shards, where these are missing or of another VLM, and returns the shards' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps([REVISION, clips.split, clips.num_clips, clips.seed, STACKS])
    fingerprint = hashlib.sha256(settings.encode() + (vlm_folder / WEIGHTS).read_bytes()).hexdigest()
    paths = [folder / f"{clips.split}_{number:04d}.safetensors" for number in range(-(-clips.num_clips // PER_SHARD))]
    missing = [number for number, path in enumerate(paths) if not is_current(path, fingerprint)]
    if missing:
        parts = [missing[k::num_processes] for k in range(min(num_processes, len(missing)))]
        with one_thread_pool(len(parts)) as pool:
            list(pool.map(partial(write_shards, clips, vlm_folder, paths, fingerprint), parts))
    return paths


@torch.inference_mode()
def write_shards(clips: ClipSet, vlm_folder: Path, paths: Sequence[Path], fingerprint: str, numbers: Sequence[int]) -> None:
    """Draws and encodes the clips of some shards."""
    vlm, encode = VLM.load(vlm_folder), encoder_of(read_whole_clip_vae(EMBEDDED["tiny"] / "vae.safetensors"))
    for number in tqdm(numbers, desc=f"{clips.split} clips", unit="shard", mininterval=5.0):
        tensors: dict[str, Tensor] = {}
        for index in range(number * PER_SHARD, min((number + 1) * PER_SHARD, clips.num_clips)):
            tensors |= {f"{index}.{name}": value.contiguous() for name, value in features(clips.edit(index), vlm, encode).items()}
        write_tensors(paths[number], tensors, {"fingerprint": fingerprint})


def features(edit: SyntheticEdit, vlm: VLM, encode: Encoder) -> dict[str, Tensor]:
    """A clip's latents, mask and states."""
    latents: dict[str, Any] = latents_of(edit.pair, encode)
    del latents["reference_frames"]
    return latents | stacks_of(edit, vlm)


def read_clips(paths: list[Path], names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Reads the named tensors of all clips, in order, as stored."""
    clips: dict[int, dict[str, Tensor]] = {}
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                index, name = key.split(".")
                if name in names:
                    clips.setdefault(int(index), {})[name] = file.get_tensor(key)
    return [clips[index] for index in sorted(clips)]
