"""Before and after: what an edit will cost, how far it drifted."""

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..mive_core.evaluation.drift import describe_drift, draw_drift, measure_drift
from ..mive_core.media.fit import SIDE, check_frames, fit_clip, fit_mask
from ..mive_core.types import Clip
from .bridge.estimate import describe_cost
from .bridge.messages import logged, show
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
            hidden=[io.Hidden.unique_id],
            description="Makes a video fit: 4n+1 frames, sides that are multiples of 16. Reports what the edit will cost.",
            search_aliases=["video size", "resize video", "frame count", "vram estimate", "4n+1"],
            inputs=[
                io.Image.Input("video", tooltip="The source video, as frames."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16, tooltip="In pixels, a multiple of 16. 0: the multiple nearest to the video's own."),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, tooltip="In pixels, a multiple of 16. 0: the multiple nearest to the video's own."),
                io.Int.Input("length", default=0, min=0, max=8193, tooltip="Frames to keep, from the first on. 0: all. Brought to 4n+1 as the policy says."),
                io.Combo.Input(
                    "policy",
                    options=[TRIM, PAD],
                    default=TRIM,
                    tooltip="Where the frames are not 4n+1. trim: the last 1 to 3 are dropped. pad: the last frame is repeated.",
                ),
                io.Model.Input("model", optional=True, tooltip="From MiVE Load DiT; the report then counts its memory and time."),
                io.Int.Input("steps", default=20, min=1, max=1000, optional=True, advanced=True, tooltip="For the time in the report."),
            ],
            outputs=[
                io.Image.Output(display_name="video", tooltip="The video that fits, for MiVE Encode and MiVE Reference Latents."),
                io.Int.Output(display_name="width"),
                io.Int.Output(display_name="height"),
                io.Int.Output(display_name="length"),
                io.String.Output(display_name="report", tooltip="Sizes, tokens, memory, time, and what was changed."),
            ],
        )

    @classmethod
    def execute(cls, video, width: int, height: int, length: int, policy: str, model=None, steps: int = 20) -> io.NodeOutput:
        with logged() as said:
            frames = video[:length] if length else video
            missing = -(len(frames) - 1) % 4
            if policy == PAD and missing and len(frames):
                frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
            size = (width or snapped(video.shape[2]), height or snapped(video.shape[1])) if width or height else None
            fitted = fit_clip(Clip(frames, ANY_FPS), size).frames
        length, height, width = fitted.shape[:3]
        changes = [f"padded by {missing} frames"] if policy == PAD and missing else []
        report = "\n".join([f"{length} frames of {width}x{height}", *changes, *said, *describe_cost(length, height, width, steps, model)])
        show(cls, report)
        return io.NodeOutput(fitted, width, height, length, report, ui=ui.PreviewText(report))


class MiVEDriftReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEDriftReport",
            display_name="MiVE Drift Report",
            category="MiVE",
            is_output_node=True,
            description="Measures, frame by frame, how colour and kept regions changed from source to edit.",
            search_aliases=["compare videos", "color drift", "consistency", "difference"],
            inputs=[
                io.Image.Input("source", tooltip="The source video, as MiVE Preflight gives it."),
                io.Image.Input("edited", tooltip="The edited video, of the same size and length."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White where the edit is meant; one for all frames, or one a frame. Without it all counts as kept."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Two curves over the frames."),
                io.String.Output(display_name="report", tooltip="The figures in words."),
            ],
        )

    @classmethod
    def execute(cls, source, edited, mask=None) -> io.NodeOutput:
        with logged():
            source, edited = check_frames(source, "source"), check_frames(edited, "edited")
            if mask is not None:
                mask = fit_mask(mask[..., None].expand(*mask.shape, 3).float(), (source.shape[2], source.shape[1]))
                mask = mask.expand(len(source), -1, -1) if len(mask) == 1 else mask
        drift = measure_drift(source.cpu(), edited.cpu(), mask)
        plot = torch.from_numpy(np.array(draw_drift(drift)))[None].float() / 255
        return io.NodeOutput(plot, describe_drift(drift), ui=ui.PreviewImage(plot, cls=cls))


def snapped(side: int) -> int:
    """The multiple of 16 nearest to a side in pixels."""
    return max(SIDE, int(side / SIDE + 0.5) * SIDE)


NODES = [MiVEPreflight, MiVEDriftReport]
