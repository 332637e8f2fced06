"""Frozen dataclasses that the stages pass to one another.

F pixel frames (4n+1), H x W pixels; C latent channels, T x Y x X latent grid; B batch,
R edited frames, K chosen layers, S tokens in the VLM sequence, D_vlm its width.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """A video in memory."""

    frames: Tensor  # (F, H, W, 3) float32 in 0..1
    fps: float


@dataclass(frozen=True)
class Keyframe:
    """A frame of the clip after the first, already edited."""

    number: int  # of the frame, counted from 0
    image: Tensor  # (H, W, 3) float32 in 0..1


@dataclass(frozen=True)
class EditRequest:
    """The three inputs of an edit, and further edited frames."""

    source: Clip
    reference: Tensor  # (H, W, 3) float32 in 0..1: the first frame, already edited
    instruction: str
    keyframes: tuple[Keyframe, ...] = ()


@dataclass(frozen=True)
class EditResult:
    """An edit at the model's size, and the source as the VAE renders it."""

    edited: Clip
    round_trip: Tensor | None  # (F, H, W, 3) float32 in 0..1: the source, encoded and decoded


@dataclass(frozen=True)
class PairedEdit:
    """An edit with its known result, for training and evaluation."""

    request: EditRequest
    target: Tensor | None  # (F, H, W, 3) float32 in 0..1
    mask: Tensor | None  # (F, H, W) bool, True where source and target are meant to differ
    name: str = ""
    colour: tuple[float, float, float] | None = None  # RGB of the single edited object after the edit, or before its removal


@dataclass(frozen=True)
class VLMInputs:
    """Inputs of one forward pass of Qwen3-VL. The fields are named as in its processor; a prompt without a video has None in the last two."""

    input_ids: Tensor  # (1, S) int64
    attention_mask: Tensor  # (1, S)
    mm_token_type_ids: Tensor  # (1, S) 0 text, 1 image, 2 video
    pixel_values: Tensor  # (num_image_patches, patch_features)
    image_grid_thw: Tensor  # (1, 3)
    pixel_values_videos: Tensor | None = None  # (num_video_patches, patch_features)
    video_grid_thw: Tensor | None = None  # (1, 3)

    def to(self, device: torch.device | str) -> "VLMInputs":
        return VLMInputs(**{f.name: None if (value := getattr(self, f.name)) is None else value.to(device) for f in fields(self)})


@dataclass(frozen=True)
class Condition:
    """Hidden states of the chosen layers for one prompt. They do not depend on the timestep."""

    states: Tensor  # (B, K, S, D_vlm)
    layers: tuple[int, ...]  # resolved to 0..L, in the order of the K axis


@dataclass(frozen=True)
class EditLatents:
    """Clean latents that condition the denoising, normalised to unit variance."""

    source: Tensor  # (B, C, T, Y, X)
    reference: Tensor  # (B, C, R, Y, X): the reference and the keyframes
    reference_frames: tuple[int, ...] = (0,)  # the pixel frame of each
