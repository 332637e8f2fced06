"""Builds the VLM's inputs: instruction, then reference image, then source video, in Qwen3-VL's chat format.

The order is (ours): the VLM is causal, so it reads the pixels knowing the instruction.

F source frames of H x W pixels, N sampled frames; S tokens in the VLM sequence.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .config import MiVEConfig
from .errors import UserError
from .types import EditRequest, VLMInputs

MAX_ASPECT_RATIO = 200  # limit of the processors' resizing
MAX_QUOTED = 60  # characters of an instruction in a message
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_inputs(request: EditRequest, processor: Any, config: MiVEConfig) -> VLMInputs:
    """Builds the VLMInputs of one prompt of S tokens, with a Qwen3VLProcessor.

    The source is sampled at config.video_fps and scaled to at most config.max_video_tokens visual tokens;
    the reference gets no more tokens than one source frame would, nor more than that budget.
    An instruction longer than config.max_instruction_tokens is truncated with a warning.
    Raises UserError for a lone surrogate or an aspect ratio that the processor refuses.
    """
    video = processor.video_processor
    _, height, width, _ = request.source.frames.shape
    check_aspect_ratio("source", height, width)
    check_aspect_ratio("reference", *request.reference.shape[:2])
    indices = sample_frames(len(request.source.frames), request.source.fps, config.video_fps, video)
    token_side = video.patch_size * video.merge_size  # in pixels
    encoded = processor(
        text=[build_prompt(request.instruction, processor, config.max_instruction_tokens)],
        images=[to_uint8(request.reference)],
        videos=[to_uint8(request.source.frames[indices])],
        images_kwargs={"size": image_limits(height, width, processor, config)},
        videos_kwargs={
            "size": size_limits(video, config.max_video_tokens * token_side**2 * video.temporal_patch_size),
            "do_sample_frames": False,
            "video_metadata": [{"fps": request.source.fps, "total_num_frames": len(request.source.frames), "frames_indices": indices}],
            # transformers 5 warns if this is unset
            **({"cap_pixels_per_frame": False} if hasattr(video, "cap_pixels_per_frame") else {}),
        },
        return_tensors="pt",
    )
    ids = encoded["input_ids"]
    token_types = (ids == processor.image_token_id).long() + 2 * (ids == processor.video_token_id).long()
    return VLMInputs(
        ids,
        encoded["attention_mask"],
        token_types,
        encoded["pixel_values"],
        encoded["image_grid_thw"],
        encoded["pixel_values_videos"],
        encoded["video_grid_thw"],
    )


def build_image_inputs(image: Tensor, instruction: str, processor: Any, config: MiVEConfig) -> VLMInputs:
    """Builds the VLMInputs of an instruction and one image (H, W, 3) in 0..1: the beginning of the prompt of `build_inputs`, up to the image's end.

    The VLM is causal, so every state up to there is the one that it has before a source of the image's size. Raises UserError as `build_inputs` does.
    """
    height, width, _ = image.shape
    check_aspect_ratio("image", height, width)
    text = sanitize_instruction(instruction, processor.tokenizer, config.max_instruction_tokens)
    encoded = processor(
        text=[apply_chat_template([{"type": "text", "text": text}, {"type": "image"}], processor)],
        images=[to_uint8(image)],
        images_kwargs={"size": image_limits(height, width, processor, config)},
        return_tensors="pt",
    )
    ids = encoded["input_ids"]
    return VLMInputs(ids, encoded["attention_mask"], (ids == processor.image_token_id).long(), encoded["pixel_values"], encoded["image_grid_thw"])


def build_prompt(instruction: str, processor: Any, max_tokens: int) -> str:
    """The chat text of `build_inputs`."""
    return apply_chat_template(
        [{"type": "text", "text": sanitize_instruction(instruction, processor.tokenizer, max_tokens)}, {"type": "image"}, {"type": "video"}], processor
    )


def instruction_tokens(inputs: VLMInputs, processor: Any) -> Tensor:
    """-> (N,) places in the sequence of the instruction's tokens: those between the header of the user's turn and the first image. None may be left."""
    ids = inputs.input_ids[0].tolist()
    tokenizer = processor.tokenizer
    header = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    start = next(i for i in range(len(ids)) if ids[i : i + len(header)] == header) + len(header)
    return torch.arange(start, ids.index(tokenizer.convert_tokens_to_ids(processor.vision_start_token)))


def apply_chat_template(parts: list[dict[str, str]], processor: Any) -> str:
    """Renders one user turn up to the header of the answer, with image and video markers not yet expanded."""
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    # the processor gives each sampled pair of frames its own start and end markers; transformers 5 would keep the outer ones too
    start, end = processor.vision_start_token, processor.vision_end_token
    return text.replace(f"{start}{processor.video_token}{end}", processor.video_token)


def sanitize_instruction(instruction: str, tokenizer: Any, max_tokens: int) -> str:
    """Returns the instruction without control tokens, truncated to max_tokens with a warning. Raises UserError for a lone surrogate."""
    try:
        instruction.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            "the instruction is not valid Unicode", got=f"a lone surrogate at character {error.start}", fix="save the text as UTF-8 and paste it again"
        ) from error
    text = instruction.replace("<|", "< |")  # typed text must not act as a marker of an image or a turn
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= max_tokens:
        return text
    kept = text[: offsets[max_tokens - 1][1]] if max_tokens else ""
    warnings.warn(
        f"the instruction is longer than the model reads: got {len(offsets)} tokens, expected at most {max_tokens}; "
        f"what follows {kept[-MAX_QUOTED:]!r} is ignored",
        stacklevel=4,
    )
    return kept


def sample_frames(num_frames: int, fps: float, video_fps: float, video_processor: Any) -> list[int]:
    """Indices of the frames that the VLM sees: the processor's own rule, rounded up to whole temporal patches.

    They are evenly spaced from the first frame to the last, video_fps of them per second.
    """
    num_samples = max(int(num_frames / fps * video_fps), video_processor.min_frames)
    num_samples = min(num_samples, video_processor.max_frames, num_frames)
    num_samples += -num_samples % video_processor.temporal_patch_size
    return torch.linspace(0, num_frames - 1, num_samples, dtype=torch.float64).round().long().tolist()


def to_uint8(pixels: Tensor) -> Tensor:
    """(..., H, W, 3) float in 0..1 -> (..., 3, H, W) uint8."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-1, -3).contiguous()


def image_limits(height: int, width: int, processor: Any, config: MiVEConfig) -> dict[str, int]:
    """The size limits of an image that stands beside a source of H x W pixels: as many tokens as one frame of it, within config.max_video_tokens."""
    side = processor.video_processor.patch_size * processor.video_processor.merge_size  # of a token, in pixels
    tokens = min(math.ceil(height / side) * math.ceil(width / side), config.max_video_tokens)
    return size_limits(processor.image_processor, tokens * side**2)


def check_aspect_ratio(what: str, height: int, width: int) -> None:
    """Raises UserError if the processor would refuse a picture of H x W pixels."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UserError(f"the {what} is too narrow", got=f"{width}x{height} pixels", expected=f"an aspect ratio of at most {MAX_ASPECT_RATIO}")


def size_limits(image_processor: Any, max_pixels: int) -> dict[str, int]:
    """The processor's own size limits, lowered to max_pixels."""
    size = image_processor.size
    return {"shortest_edge": min(size["shortest_edge"], max_pixels), "longest_edge": min(size["longest_edge"], max_pixels)}
