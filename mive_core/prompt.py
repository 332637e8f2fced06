"""What the VLM is told: instruction, then reference image, then source video, in Qwen3-VL's chat format.

The order is (ours): the VLM is causal, so the pixels are read in the light of the instruction.

F source frames of H x W pixels, N sampled frames; S tokens in the VLM sequence.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .config import MiVEConfig
from .errors import UserError
from .types import EditRequest, VLMInputs

MAX_ASPECT_RATIO = 200  # of the processors' own resizing
SHOWN = 60  # characters of an instruction in a message
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


def build_inputs(request: EditRequest, processor: Callable, config: MiVEConfig) -> VLMInputs:
    """EditRequest, Qwen3VLProcessor -> VLMInputs of one prompt, S tokens.

    The source is sampled at config.video_fps and scaled to at most config.max_video_tokens visual tokens;
    the reference gets no more tokens than one source frame would, nor more than that budget.
    Warns where the instruction is longer than config.max_instruction_tokens and truncates it.
    Raises UserError for a lone surrogate or an aspect ratio that the processor refuses.
    """
    video = processor.video_processor
    _, height, width, _ = request.source.frames.shape
    for what, shape in (("source", (height, width)), ("reference", request.reference.shape[:2])):
        if max(shape) > MAX_ASPECT_RATIO * min(shape):
            raise UserError(f"the {what} is too narrow", got=f"{shape[1]}x{shape[0]} pixels", expected=f"an aspect ratio of at most {MAX_ASPECT_RATIO}")
    indices = sample_frames(len(request.source.frames), request.source.fps, config.video_fps, video)
    side = video.patch_size * video.merge_size  # of a token, in pixels
    frame_tokens = math.ceil(height / side) * math.ceil(width / side)
    encoded = processor(
        text=[chat_text(request.instruction, processor, config.max_instruction_tokens)],
        images=[to_bytes(request.reference)],
        videos=[to_bytes(request.source.frames[indices])],
        images_kwargs={"size": token_budget(processor.image_processor, min(frame_tokens, config.max_video_tokens) * side**2)},
        videos_kwargs={
            "size": token_budget(video, config.max_video_tokens * side**2 * video.temporal_patch_size),
            "do_sample_frames": False,
            "video_metadata": [{"fps": request.source.fps, "total_num_frames": len(request.source.frames), "frames_indices": indices}],
            # transformers 5 warns where this is left open
            **({"cap_pixels_per_frame": False} if hasattr(video, "cap_pixels_per_frame") else {}),
        },
        return_tensors="pt",
    )
    ids = encoded["input_ids"]
    kinds = (ids == processor.image_token_id).long() + 2 * (ids == processor.video_token_id).long()
    return VLMInputs(
        ids, encoded["attention_mask"], kinds, encoded["pixel_values"], encoded["image_grid_thw"], encoded["pixel_values_videos"], encoded["video_grid_thw"]
    )


def chat_text(instruction: str, processor: Callable, max_tokens: int) -> str:
    """What `build_inputs` asks, as a conversation."""
    return conversation(
        [{"type": "text", "text": instruction_text(instruction, processor.tokenizer, max_tokens)}, {"type": "image"}, {"type": "video"}], processor
    )


def conversation(parts: list[dict[str, str]], processor: Callable) -> str:
    """One turn of a user before its image and video markers are expanded; the answer's header ends it."""
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    # every sampled pair of frames gets markers of its own; transformers 5 would keep the outer ones around them
    start, end = processor.vision_start_token, processor.vision_end_token
    return text.replace(f"{start}{processor.video_token}{end}", processor.video_token)


def instruction_text(instruction: str, tokenizer: Callable, max_tokens: int) -> str:
    """The instruction as the VLM may read it: valid Unicode, no control tokens, at most max_tokens long."""
    try:
        instruction.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            "the instruction is not valid Unicode", got=f"a lone surrogate at character {error.start}", fix="save the text as UTF-8 and paste it again"
        ) from error
    text = instruction.replace("<|", "< |")  # typed by a person, it is no marker of an image or a turn
    ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(ends) <= max_tokens:
        return text
    kept = text[: ends[max_tokens - 1][1]] if max_tokens else ""
    warnings.warn(
        f"the instruction is longer than the model reads: got {len(ends)} tokens, expected at most {max_tokens}; what follows {kept[-SHOWN:]!r} is ignored",
        stacklevel=4,
    )
    return kept


def sample_frames(num_frames: int, fps: float, video_fps: float, video_processor: Callable) -> list[int]:
    """Indices of the frames that the VLM sees: the processor's own rule, in whole temporal patches.

    Evenly spread from the first frame to the last, video_fps of them a second.
    """
    patch = video_processor.temporal_patch_size
    wanted = max(int(num_frames / fps * video_fps), video_processor.min_frames)
    wanted = min(wanted, video_processor.max_frames, num_frames)
    wanted += -wanted % patch
    return torch.linspace(0, num_frames - 1, wanted, dtype=torch.float64).round().long().tolist()


def to_bytes(pixels: Tensor) -> Tensor:
    """(..., H, W, 3) float in 0..1 -> (..., 3, H, W) uint8."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-1, -3).contiguous()


def token_budget(image_processor: Callable, max_pixels: int) -> dict[str, int]:
    """The processor's own size limits, tightened to max_pixels."""
    size = image_processor.size
    return {"shortest_edge": min(size["shortest_edge"], max_pixels), "longest_edge": min(size["longest_edge"], max_pixels)}
