"""MiVE Preflight fits a video and estimates what its edit costs; MiVE Drift Report measures how far an edit drifted from its source."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..mive_core.config import SIZE_MULTIPLE
from ..mive_core.evaluation.drift import describe_drift, draw_drift, measure_drift
from ..mive_core.media.fit import check_frames, fit_clip, fit_mask
from ..mive_core.types import Clip
from .bridge.estimate import describe_cost
from .bridge.messages import log_warnings, with_text
from .latents import ANY_FPS

TRIM, PAD = "trim", "pad"


class MiVEPreflight(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEPreflight",
            display_name="MiVE Preflight",
            category="MiVE",
            is_output_node=True,
            description="Fits a video to the model: 4n+1 frames, sides that are multiples of 16. Reports how much memory and time the edit takes.",
            search_aliases=["video size", "resize video", "frame count", "vram estimate", "4n+1"],
            inputs=[
                io.Image.Input("video", tooltip="The source video, as frames."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16, tooltip="In pixels, a multiple of 16. 0: the multiple nearest to the video's own."),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, tooltip="In pixels, a multiple of 16. 0: the multiple nearest to the video's own."),
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
                io.Model.Input("model", optional=True, tooltip="From MiVE Load DiT. If connected, the report estimates memory and time for this model."),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="Number of sampling steps that the report's time is computed for.",
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
    def execute(cls, video, width: int, height: int, length: int, policy: str, model=None, steps: int = 20) -> io.NodeOutput:
        with log_warnings() as warned:
            frames = video[:length] if length else video
            missing = -(len(frames) - 1) % 4
            if policy == PAD and missing and len(frames):
                frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
            size = (width or round_to_multiple(video.shape[2]), height or round_to_multiple(video.shape[1])) if width or height else None
            fitted = fit_clip(Clip(frames, ANY_FPS), size).frames
        length, height, width = fitted.shape[:3]
        changes = [f"padded by {missing} frames"] if policy == PAD and missing else []
        report = "\n".join([f"{length} frames of {width}x{height}", *changes, *warned, *describe_cost(length, height, width, steps, model)])
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


def round_to_multiple(side: int) -> int:
    """Rounds a side in pixels to the nearest multiple of 16."""
    return max(SIZE_MULTIPLE, int(side / SIZE_MULTIPLE + 0.5) * SIZE_MULTIPLE)


NODES = [MiVEPreflight, MiVEDriftReport]
