"""Drawn clips with captions, as a text-to-video model is trained on: VAE latents, and states of a frozen text encoder.

C latent channels, T x Y x X latent grid, S text tokens, D_text their width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..embedded.features import is_current
from ..embedded.synthetic.background import Backdrop
from ..embedded.synthetic.labels import PLACES, RGB
from ..embedded.synthetic.random_scenes import clip_times, draw_scene
from ..embedded.synthetic.scene import Body, Scene, render
from ..embedded.vae_network import read_whole_clip_vae
from ..embedded.vae_patch_matrix import encoder_of
from ..formats.safetensors_file import write_tensors
from ..train.loop import step_seed
from ..vlm import VLM

SIZE, NUM_FRAMES, FPS = (96, 96), 17, 8.0
NUM_TOKENS = 48  # S; a longer caption is truncated
BODY_ODDS = (0.05, 0.55, 0.28, 0.12)  # of none to three bodies
TEXT_BATCH = 64
REVISION = 1  # of what is drawn and said: stored clips of another one are out of date
RESTS, LARGE, SMALL = 0.08, 0.42, 0.32  # path and diameter, as parts of the frame's shorter side
NOUNS = {
    "stars": "a sky full of stars",
    "grass": "green grass",
    "bricks": "a brick wall",
    "gravel": "gray gravel",
    "tissue": "tissue",
    "coins": "coins",
    "eye": "an eye",
    "paper": "paper",
}


def draw_captioned_scene(seed: int) -> tuple[Scene, str]:
    """Draws a scene of up to three moving bodies and describes it: things, colours, places, motion, background."""
    rng = np.random.default_rng((seed, 27))
    scene = draw_scene(rng, SIZE, int(rng.choice(len(BODY_ODDS), p=BODY_ODDS)))
    return scene, caption_of(scene)


def caption_of(scene: Scene) -> str:
    """Describes a scene, the bodies from the front to the back: 'a large red star on the left moves to the right, over green grass'."""
    parts = [describe_body(body) for body in reversed(scene.bodies)]
    return ", ".join([*parts, f"over {describe_backdrop(scene.backdrop)}"])


def describe_body(body: Body) -> str:
    """Describes a body: size, colour, shape, place at the start, motion."""
    track, side = body.motion.track(clip_times(NUM_FRAMES, FPS), SIZE), min(SIZE)
    column, row = (int(np.clip(3 * track[0, axis] / SIZE[axis], 0, 2)) for axis in (0, 1))
    place = PLACES[1 + 3 * row + column]
    right, down = (track[-1, :2] - track[0, :2]) / side
    ways = [word for moved, word in ((-down, "up"), (down, "down"), (-right, "to the left"), (right, "to the right")) if moved > RESTS]
    size = "large " if 2 * track[0, 2] > LARGE * side else "small " if 2 * track[0, 2] < SMALL * side else ""
    where = "at the " if place in ("top", "bottom") else "on the " if place in ("left", "right") else "in the "
    return f"a {size}{body.colour} {body.shape} {where}{place} {'moves ' + ' and '.join(ways) if ways else 'rests'}"


def describe_backdrop(backdrop: Backdrop) -> str:
    """Describes a background: 'gray and blue stripes', 'a rocket'."""
    if backdrop.camera is not None:
        return NOUNS.get(backdrop.style, f"a {backdrop.style}")
    first, second = nearest_colour(backdrop.first), nearest_colour(backdrop.second)
    return {
        "flat": f"a plain {first} surface",
        "gradient": f"a gradient from {first} to {second}",
        "stripes": f"{first} and {second} stripes",
        "checkers": f"a {first} and {second} checkerboard",
    }[backdrop.style]


def nearest_colour(rgb: Sequence[float]) -> str:
    """Names an RGB colour in 0..1: the nearest of the shapes' colours, or gray."""
    named = {**RGB, "gray": (0.5, 0.5, 0.5), "dark": (0.25, 0.25, 0.25), "pale": (0.75, 0.75, 0.75)}
    return min(named, key=lambda name: float(np.linalg.norm(np.subtract(named[name], rgb))))


class TextEncoder:
    """The language model of a frozen Qwen3-VL: the last hidden states of a caption's tokens, padded with zeros as Wan pads its text."""

    def __init__(self, vlm: str | Path):
        loaded = VLM.load(vlm)
        self.tokenizer, self.model, self.width = loaded.processor.tokenizer, loaded.model.language_model, loaded.width

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """N captions -> (N, S, D_text); zeros for an empty one. The model is causal, so that padding on the right changes nothing before it."""
        tokens = [self.tokenizer(caption)["input_ids"][:NUM_TOKENS] for caption in captions]
        ids = torch.tensor([one + [0] * (NUM_TOKENS - len(one)) for one in tokens])
        is_text = torch.arange(NUM_TOKENS) < torch.tensor([len(one) for one in tokens])[:, None]
        return self.model(input_ids=ids, use_cache=False).last_hidden_state * is_text[..., None]


@dataclass(frozen=True)
class CaptionedLatents:
    """A batch of clips as a text-to-video model sees them."""

    latents: Tensor  # (B, C, T, Y, X) normalised
    states: Tensor  # (B, S, D_text)


class CaptionedClips(Dataset):
    """dataset[step] is a batch of a fixed set of clips, a function of (seed, step). Reads and, where missing, writes the clips' file."""

    def __init__(self, path: Path, *, vae: str, vlm: str, num_clips: int, clips_seed: int, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        settings = json.dumps([REVISION, Path(vae).stat().st_size, num_clips, clips_seed, NUM_TOKENS, BODY_ODDS])
        fingerprint = hashlib.sha256(settings.encode()).hexdigest()
        if not is_current(path, fingerprint):
            write_tensors(path, compute(vae, vlm, range(clips_seed, clips_seed + num_clips)), {"fingerprint": fingerprint})
        with safe_open(str(path), framework="pt") as file:
            self.latents, self.states = file.get_tensor("latents"), file.get_tensor("states")

    def __getitem__(self, step: int) -> CaptionedLatents:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        chosen = torch.randint(len(self.latents), (self.batch_size,), generator=generator)
        return CaptionedLatents(self.latents[chosen].float(), self.states[chosen].float())


@torch.inference_mode()
def compute(vae: str, vlm: str, seeds: range) -> dict[str, Tensor]:
    """Draws and encodes clips -> latents (N, C, T, Y, X) and states (N, S, D_text) in fp16."""
    encode, text, times = encoder_of(read_whole_clip_vae(vae)), TextEncoder(vlm), clip_times(NUM_FRAMES, FPS)
    latents, captions = [], []
    for seed in tqdm(seeds, desc="clips", unit="clip", mininterval=5.0):
        scene, caption = draw_captioned_scene(seed)
        latents.append(encode(torch.from_numpy(render(scene, times, SIZE))[None])[0].half())
        captions.append(caption)
    states = [text(captions[first : first + TEXT_BATCH]).half() for first in range(0, len(captions), TEXT_BATCH)]
    return {"latents": torch.stack(latents), "states": torch.cat(states)}
