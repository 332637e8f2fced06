"""MiVE Reference Latents: encodes source video and reference image with a stock Wan 2.1 VAE and attaches them to the conditioning."""

import warnings

import comfy.model_management
import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional

from ..mive_core.config import TEMPORAL_FACTOR, latent_grid
from ..mive_core.errors import UserError
from ..mive_core.media.fit import SAME_SHAPE, fit_clip, fit_reference, nearest_side, stretch_of
from ..mive_core.reference_check import warn_of_references
from ..mive_core.types import Clip
from ..mive_core.vae import LATENT_CHANNELS
from .bridge.agreement import check_agreement, check_order
from .bridge.conditioning import GUIDES, LAYERS, REFERENCE_FRAMES
from .bridge.keyframes import KEYFRAME_NUMBERS, KEYFRAMES, read_keyframes
from .bridge.messages import log_warnings, with_text
from .bridge.vae import encode

ANY_FPS = 1.0  # the VAE ignores the frame rate


class MiVEReferenceLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEReferenceLatents",
            display_name="MiVE Reference Latents",
            category="MiVE",
            description="Encodes source video and reference image, adds them to both conditionings and creates the empty latent to sample.",
            search_aliases=["vae encode video", "video edit latent", "reference", "source video"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="From MiVE Encode, with the instruction."),
                io.Conditioning.Input("negative", tooltip="From MiVE Encode, with an empty instruction. Not used when cfg is 1."),
                io.Vae.Input("vae", tooltip="A Wan 2.1 VAE: wan_2.1_vae.safetensors, or tiny/vae.safetensors for the embedded models."),
                io.Image.Input(
                    "source", tooltip="The video to edit, as frames. Scaled to width x height, cropped at the centre if the shapes differ, cut to length."
                ),
                io.Image.Input("reference", tooltip="One image: the video's first frame, already edited. Scaled and cropped like the source."),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=16,
                    tooltip="Of the edited video in pixels, a multiple of 16. 0: the multiple nearest to the source's.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=8192,
                    step=16,
                    tooltip="Of the edited video in pixels, a multiple of 16. 0: the multiple nearest to the source's.",
                ),
                io.Int.Input(
                    "length",
                    default=0,
                    min=0,
                    max=8193,
                    tooltip="Number of frames of the edited video: 4n+1, at most as many as the source has. 0: all but the last 1 to 3 that are too many.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the edit may act; one mask for all frames, or one per frame. Elsewhere the sampler keeps the source's latents.",
                ),
                KEYFRAMES,
                KEYFRAME_NUMBERS,
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The positive conditioning with the latents of source and reference."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative conditioning with the same latents."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of the edited video's size; with a mask, the source's latents and the mask."),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        source,
        reference,
        width: int,
        height: int,
        length: int,
        mask=None,
        keyframes: io.Autogrow.Type | None = None,
        keyframe_numbers: str = "",
    ) -> io.NodeOutput:
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if any(LAYERS not in values for _, values in conditioning):
                raise UserError("this conditioning was not made for MiVE", where=name, expected="the output of the MiVE Encode node")
        check_order(source, reference)
        with log_warnings() as warned:
            clip = fit_clip(Clip(source, ANY_FPS), requested_size(source, width, height), length or None, max_stretch=SAME_SHAPE)
            length, height, width = clip.frames.shape[:3]
            image = fit_reference(reference, (width, height), max_stretch=SAME_SHAPE)
            for name, conditioning in (("positive", positive), ("negative", negative)):
                check_agreement(conditioning, clip.frames, image, name)
            noise_mask = None if mask is None else latent_mask(mask, (width, height), length)
            further = read_keyframes(keyframes, keyframe_numbers, (width, height), length)
            warn_of_references(clip.frames, image, further)
        references = torch.cat([encode(vae, picture[None]) for picture in (image, *(keyframe.image for keyframe in further))], dim=2)
        guides = {
            GUIDES["source"]: encode(vae, clip.frames),
            GUIDES["reference"]: references,
            REFERENCE_FRAMES: (0, *(keyframe.number for keyframe in further)),
        }
        shape = guides[GUIDES["source"]].shape
        expected = (1, LATENT_CHANNELS, *latent_grid(length, height, width))
        if tuple(shape) != expected:
            raise UserError("this is not a Wan 2.1 VAE", where="vae", got=f"latents of shape {tuple(shape)}", expected=expected)
        if noise_mask is None:
            latent = {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}
        else:
            latent = {"samples": guides[GUIDES["source"]], "noise_mask": noise_mask}
        conditionings = (node_helpers.conditioning_set_values(conditioning, guides) for conditioning in (positive, negative))
        return io.NodeOutput(*conditionings, latent, ui=with_text("\n".join(warned)))


def requested_size(frames: Tensor, width: int, height: int) -> tuple[int, int] | None:
    """A node's width and height, where 0 stands for the frames' own, rounded to a multiple of 16 -> the size; None if both are 0."""
    if not (width or height) or frames.ndim != 4:
        return None
    return width or nearest_side(frames.shape[2]), height or nearest_side(frames.shape[1])


def latent_mask(mask: Tensor, size: tuple[int, int], length: int) -> Tensor:
    """(F or 1, H, W) with F >= length, 1 where to edit -> (1, 1, T, Y, X): the largest value in each latent cell, cropped like the source.

    Warns of an empty mask. Raises UserError for too few masks, and for NaN or infinity.
    """
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    if len(mask) != 1 and len(mask) < length:
        raise UserError("the mask does not fit the clip", where="mask", got=f"{len(mask)} masks", expected=f"1 or {length}")
    mask = mask[:length]
    if not mask.isfinite().all():
        raise UserError("NaN or infinite values", where="mask", expected="finite values in 0..1")
    (width, height), (rows, columns) = size, mask.shape[1:]
    top, left = 0, 0
    if stretch_of(mask.shape, size) > SAME_SHAPE:
        scale = max(width / columns, height / rows)
        top, left = int((rows - height / scale) / 2), int((columns - width / scale) / 2)
    num_frames, *grid = latent_grid(length, height, width)
    cells = functional.adaptive_max_pool2d(mask[:, top : rows - top, left : columns - left].clamp(0, 1), grid)
    if len(cells) == 1:
        cells = cells.expand(num_frames, -1, -1)
    else:
        cells = torch.cat([cells[:1], cells[1:].unflatten(0, (-1, TEMPORAL_FACTOR)).amax(dim=1)])
    if not cells.any():
        warnings.warn("the mask is empty: the source comes back unchanged", stacklevel=2)
    return cells[None, None].contiguous()


NODES = [MiVEReferenceLatents]
