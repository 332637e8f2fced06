"""MiVE Keep Source Detail: brings an edit made by any video model to the source's size, with the source's sharpness."""

import warnings

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..mive_core.config import TEMPORAL_FACTOR
from ..mive_core.delivery import ANCHORS, EditedFrame, check_options, deliver
from ..mive_core.errors import UserError
from ..mive_core.media.fit import SAME_SHAPE, check_frames, fit_reference, resize, resize_and_crop
from ..mive_core.reference_check import edge_correlation
from .bridge.keyframes import KEYFRAME_NUMBERS, KEYFRAMES, read_keyframes
from .bridge.messages import log_warnings
from .bridge.progress import Progress
from .bridge.vae import round_trip

MAX_STRETCH = 1.15  # ratio of the two aspect ratios from which the edit cannot have kept the source's framing
NOTED_STRETCH = 1.01  # from which it matters whether an editor scaled the source to its size, or cropped it
BYTES_PER_PIXEL = 500  # of device memory while a frame is delivered


class MiVEKeepSourceDetail(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEKeepSourceDetail",
            display_name="MiVE Keep Source Detail",
            category="MiVE",
            hidden=[io.Hidden.unique_id],
            description="Brings an edit to the source's size and gives it the source's sharpness. Works with any video editor that keeps the framing.",
            search_aliases=["detail transfer", "restore detail", "upscale edit", "color match", "sharpen"],
            inputs=[
                io.Image.Input("source", tooltip="The video before the edit, at full size. Frames beyond the edit's length are left out."),
                io.Image.Input(
                    "edited",
                    tooltip="The edited video, from VAE Decode: of any size, with the source's framing and frame rate. "
                    "The frames by which MiVE Preflight padded the source are cut off.",
                ),
                io.Vae.Input("vae", tooltip="The VAE that decoded the edit. What it blurs in the source is not counted as a change made by the edit."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="One image: the first frame, edited, as large as possible. It corrects the colours of all frames, see anchor.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit may act; one mask for all frames, or one per frame. Everywhere else the source comes back exactly.",
                ),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default=ANCHORS[0],
                    tooltip="Whether the reference corrects the colours of all frames. auto: if it differs from the source's first frame.",
                ),
                KEYFRAMES,
                KEYFRAME_NUMBERS,
            ],
            outputs=[io.Image.Output(display_name="video", tooltip="The edit at the source's size, for Create Video.")],
        )

    @classmethod
    def execute(
        cls, source, edited, vae, reference=None, mask=None, anchor: str = "auto", keyframes: io.Autogrow.Type | None = None, keyframe_numbers: str = ""
    ) -> io.NodeOutput:
        with log_warnings():
            num_frames = delivered_frames(len(source), len(edited))
            if mask is not None:
                mask = cut_mask(mask.cpu(), (len(source), len(edited)), num_frames)
            edited = check_frames(edited[:num_frames].cpu(), "edited")
            source = check_frames(source[:num_frames].cpu(), "source")
            height, width = edited.shape[1:3]
            check_framing(source, edited)
            if reference is not None:
                reference = fit_reference(reference.cpu(), (source.shape[2], source.shape[1]))
            further = read_keyframes(keyframes, keyframe_numbers, (source.shape[2], source.shape[1]), len(edited))
            check_options(len(edited), reference, mask, anchor, num_keyframes=len(further))
            small = round_trip(vae, torch.stack([resize(frame, (width, height)) for frame in source]))
            delivered, progress = torch.empty_like(source), Progress(cls, "frame", len(source))
            device = comfy.model_management.get_torch_device()
            comfy.model_management.free_memory(BYTES_PER_PIXEL * source[0, :, :, 0].numel(), device)
            frames = (frame.to(device) for frame in source)
            known = [EditedFrame(keyframe.number, source[keyframe.number].to(device), keyframe.image) for keyframe in further]
            for index, frame in enumerate(deliver(frames, edited, small, reference, mask, anchor=anchor, keyframes=known)):
                delivered[index] = frame
                progress.advance()
        return io.NodeOutput(delivered)


def delivered_frames(num_source: int, num_edited: int) -> int:
    """How many frames come out: the edit's, less those that repeat the source's last one up to 4n+1. Warns of the source's that are left out.

    Raises UserError for a shorter source.
    """
    padded = num_source + -(num_source - 1) % TEMPORAL_FACTOR
    if 0 < num_source < num_edited != padded:
        raise UserError("the source is shorter than its edit", got=f"{num_source} frames", expected=f"{num_edited}, as the edit has")
    if num_edited < num_source:
        warnings.warn(f"source: {num_source} frames are cut to the edit's {num_edited}", stacklevel=2)
    return min(num_edited, num_source or num_edited)


def cut_mask(mask: Tensor, lengths: tuple[int, int], num_frames: int) -> Tensor:
    """(F or 1, H, W), where F may be one of `lengths`, the source's and the edit's -> (num_frames or 1, H, W) in 0..1."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1)
    return mask[:num_frames] if len(mask) in lengths else mask


def check_framing(source: Tensor, edited: Tensor) -> None:
    """Raises UserError if the edit's shape rules out that it shows the whole source, and warns if it casts doubt on that."""
    (height, width), (edit_height, edit_width) = source.shape[1:3], edited.shape[1:3]
    stretch = width * edit_height / (height * edit_width)
    stretch = max(stretch, 1 / stretch)
    if stretch > MAX_STRETCH:
        raise UserError(
            "the edit has another shape than the source",
            where="edited",
            got=f"{edit_width}x{edit_height} for a source of {width}x{height}",
            expected="nearly the same ratio of width to height",
            fix="the editor must keep the source's framing: let it crop nothing, or connect as source the video that it was given",
        )
    if stretch > (NOTED_STRETCH if looks_cropped(source[0], edited[0]) else SAME_SHAPE):
        warnings.warn(
            f"edited: {edit_width}x{edit_height} is taken for the whole picture of {width}x{height}, stretched by {stretch - 1:.1%}; if it was cropped "
            "instead, connect the cropped video as source, or edit at a size of the source's shape",
            stacklevel=2,
        )


def looks_cropped(frame: Tensor, edited: Tensor) -> bool:
    """Whether an edited frame (h, w, 3) lies over the middle of the source's (H, W, 3) rather than over the whole of it, by their edges."""
    size = (edited.shape[1], edited.shape[0])
    whole, cropped = (edge_correlation(x, edited) for x in (resize(frame, size), resize_and_crop(frame[None], size)[0]))
    return cropped > whole


NODES = [MiVEKeepSourceDetail]
