"""MiVE Preflight fits a video and estimates what its edit costs; MiVE Drift Report measures how far an edit drifted from its source."""

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..mive_core.config import MiVEConfig
from ..mive_core.evaluation.drift import describe_drift, draw_drift, measure_drift
from ..mive_core.media.fit import SAME_SHAPE, check_frames, edit_size, fit_clip, fit_mask, stretch_of
from ..mive_core.stretches import find_stretches
from ..mive_core.types import Clip
from .bridge.estimate import describe_cost
from .bridge.messages import log_warnings, with_text
from .bridge.model import config_of
from .bridge.untrained import untrained_warning
from .latents import ANY_FPS, requested_size

TRIM, PAD = "trim", "pad"
OWN_SIZE = "0 in both: the video's own, or the size that the connected model knows best where the video is larger. 0 in one: the video's own."


class MiVEPreflight(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEPreflight",
            display_name="MiVE Preflight",
            category="MiVE",
            is_output_node=True,
            description="Fits a video to the model: 4n+1 frames, the size that the model knows best. Reports how much memory and time the edit takes.",
            search_aliases=["video size", "resize video", "frame count", "vram estimate", "4n+1"],
            inputs=[
                io.Image.Input("video", tooltip="The source video, as frames."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16, tooltip=f"In pixels, a multiple of 16. {OWN_SIZE}"),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, tooltip=f"In pixels, a multiple of 16. {OWN_SIZE}"),
                io.Int.Input(
                    "length",
                    default=0,
                    min=0,
                    max=8193,
                    tooltip="Number of frames to keep, from the first on. 0: all. Then trimmed or padded to 4n+1, see policy.",
                ),
                io.Combo.Input(
                    "policy",
                    options=[TRIM, PAD],
                    default=TRIM,
                    tooltip="If the number of frames is not 4n+1. trim: drop the last 1 to 3 frames. pad: repeat the last frame.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="From MiVE Load DiT. If connected, a video that is larger than this model knows is scaled down, "
                    "and the report estimates memory and time.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="Number of sampling steps that the report's time is computed for. 0: the model's own number, as in MiVE Sampler.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="video", tooltip="The fitted video, for MiVE Encode and MiVE Reference Latents."),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
                io.Int.Output(display_name="length"),
                io.String.Output(display_name="report", tooltip="Size, tokens, memory, time, and the changes made to the video."),
            ],
        )

    @classmethod
    def execute(cls, video, width: int, height: int, length: int, policy: str, model=None, steps: int = 0) -> io.NodeOutput:
        changes, reason = [], "as asked"
        with log_warnings() as warned:
            frames = video[:length] if length else video
            missing = -(len(frames) - 1) % 4
            if policy == PAD and missing and len(frames):
                frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
                changes.append(f"{len(frames)} frames: the model takes 4n+1; padded by {missing} frames")
            size = requested_size(video, width, height)
            if model is not None and size is None and video.ndim == 4:
                size, reason = known_size(video, config_of(model))
            fitted = fit_clip(Clip(frames, ANY_FPS), size, max_stretch=SAME_SHAPE).frames
        length, height, width = fitted.shape[:3]
        if size is not None and fitted.shape[1:3] != video.shape[1:3]:
            how = "scaled" if stretch_of(video.shape, size) <= SAME_SHAPE else "scaled and cropped at the centre"
            changes.append(f"{video.shape[2]}x{video.shape[1]} is {how} to {width}x{height}: {reason}")
        longest = length
        if model is not None and length > (known := config_of(model).edit_frames):
            spans = find_stretches(fitted, known)
            longest = max(last - first for first, last in spans)
            changes.append(f"the model knows {known} frames: MiVE Edit Video edits {len(spans)} stretches of at most {longest}. For one of them:")
        if model is not None and (warning := untrained_warning(model)):
            warned.append(warning)
        report = "\n".join([f"{length} frames of {width}x{height}", *warned, *changes, *describe_cost(longest, height, width, steps, model)])
        return io.NodeOutput(fitted, width, height, length, report, ui=with_text(report))


class MiVEDriftReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEDriftReport",
            display_name="MiVE Drift Report",
            category="MiVE",
            is_output_node=True,
            description="Measures, frame by frame, how much the colours and the regions meant to stay changed from source to edit.",
            search_aliases=["compare videos", "color drift", "consistency", "difference"],
            inputs=[
                io.Image.Input("source", tooltip="The source video, fitted by MiVE Preflight."),
                io.Image.Input("edited", tooltip="The edited video, with the same size and length."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit belongs; one mask for all frames, or one per frame. Without a mask the whole frame is meant to stay.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Curves over the frames: colour change by channel, and change in the regions meant to stay."),
                io.String.Output(display_name="report", tooltip="The measured numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, source, edited, mask=None) -> io.NodeOutput:
        with log_warnings():
            source, edited = check_frames(source, "source"), check_frames(edited, "edited")
            if mask is not None:
                mask = fit_mask(mask[..., None].expand(*mask.shape, 3).float(), (source.shape[2], source.shape[1]))
                mask = mask.expand(len(source), -1, -1) if len(mask) == 1 else mask
        drift = measure_drift(source.cpu(), edited.cpu(), mask)
        plot = torch.from_numpy(np.array(draw_drift(drift)))[None].float() / 255
        report = describe_drift(drift)
        return io.NodeOutput(plot, report, ui=with_text(report, ui.PreviewImage(plot, cls=cls)))


def known_size(frames: Tensor, config: MiVEConfig) -> tuple[tuple[int, int] | None, str]:
    """Frames (F, H, W, C) that are larger than the checkpoint knows -> the size to edit them at, and why; None for smaller ones."""
    if frames.shape[1] * frames.shape[2] <= config.edit_pixels:
        return None, ""
    return edit_size((frames.shape[2], frames.shape[1]), config.edit_pixels), f"the model knows frames of about {config.edit_pixels} pixels best"


NODES = [MiVEPreflight, MiVEDriftReport]
