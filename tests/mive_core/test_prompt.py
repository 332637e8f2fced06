import warnings
from dataclasses import replace

import pytest
import torch

from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.prompt import build_inputs, sample_frames, to_uint8
from mive_core.types import Clip, EditRequest

CONFIG = PRESETS["tiny"]


def request(instruction="make the red circle blue", num_frames=17, width=96, height=96, fps=8.0, reference=None):
    generator = torch.Generator().manual_seed(3)
    frames = torch.rand(num_frames, height, width, 3, generator=generator)
    return EditRequest(Clip(frames, fps), frames[0] if reference is None else reference, instruction)


def decoded(vlm, inputs):
    text = vlm.processor.tokenizer.decode(inputs.input_ids[0])
    return text.replace("<|image_pad|>", "I").replace("<|video_pad|>", "V")


def test_the_prompt_is_instruction_then_reference_then_timed_frames(vlm):
    inputs = build_inputs(request(), vlm.processor, CONFIG)
    frame = "<|vision_start|>" + 36 * "V" + "<|vision_end|>"
    assert decoded(vlm, inputs) == (
        "<|im_start|>user\nmake the red circle blue<|vision_start|>" + 36 * "I" + "<|vision_end|>"
        f"<0.3 seconds>{frame}<1.7 seconds>{frame}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs.image_grid_thw.tolist() == [[1, 12, 12]]
    assert inputs.video_grid_thw.tolist() == [[2, 12, 12]]
    assert inputs.mm_token_type_ids[0].bincount().tolist()[1:] == [36, 72]


def test_pixels_reach_the_processor_unscaled_at_sizes_that_fit(vlm):
    edit = request()
    inputs = build_inputs(edit, vlm.processor, CONFIG)
    first_patch = to_uint8(edit.reference)[:, :8, :8].float() / 127.5 - 1
    torch.testing.assert_close(inputs.pixel_values[0].view(3, 2, 8, 8)[:, 0], first_patch, atol=1e-6, rtol=0)
    frames = to_uint8(edit.source.frames[[0, 5]])[:, :, :8, :8].float() / 127.5 - 1
    torch.testing.assert_close(inputs.pixel_values_videos[0].view(3, 2, 8, 8), frames.transpose(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "num_frames, fps, indices",
    [(17, 8.0, [0, 5, 11, 16]), (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]), (5, 8.0, [0, 1, 3, 4]), (3, 8.0, [0, 1, 1, 2]), (1, 8.0, [0, 0])],
)
def test_frames_are_sampled_evenly_in_whole_temporal_patches(vlm, num_frames, fps, indices):
    assert sample_frames(num_frames, fps, 2.0, vlm.processor.video_processor) == indices


@pytest.mark.parametrize("num_frames, width, height", [(1, 96, 96), (2, 96, 96), (5, 64, 48), (17, 192, 112), (17, 100, 70), (81, 320, 180)])
def test_the_source_stays_within_its_budget_of_tokens(vlm, num_frames, width, height):
    for budget in (64, 512):
        inputs = build_inputs(request(num_frames=num_frames, width=width, height=height, fps=16.0), vlm.processor, replace(CONFIG, max_video_tokens=budget))
        tokens = (inputs.mm_token_type_ids == 2).sum().item()
        assert tokens == inputs.video_grid_thw.prod().item() // 4 <= budget
        assert (inputs.mm_token_type_ids == 1).sum().item() == inputs.image_grid_thw.prod().item() // 4 <= budget


def test_a_large_reference_gets_no_more_tokens_than_a_source_frame(vlm):
    inputs = build_inputs(request(reference=torch.rand(480, 480, 3)), vlm.processor, CONFIG)
    assert inputs.image_grid_thw.tolist() == [[1, 12, 12]]


def test_a_reference_of_one_pixel_is_read(vlm):
    inputs = build_inputs(request(reference=torch.rand(1, 1, 3)), vlm.processor, CONFIG)
    assert (inputs.mm_token_type_ids == 1).sum() > 0


def test_a_sliver_is_refused(vlm):
    with pytest.raises(UserError, match="reference is too narrow; got 300x1 pixels"):
        build_inputs(request(reference=torch.rand(1, 300, 3)), vlm.processor, CONFIG)


def test_long_instructions_are_truncated_with_a_warning(vlm):
    with pytest.warns(UserWarning, match="longer than the model reads: got .* expected at most 48"):
        long = build_inputs(request("make the red circle blue " * 4000), vlm.processor, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = build_inputs(request(""), vlm.processor, CONFIG)
    assert long.input_ids.shape[1] - none.input_ids.shape[1] == 48


@pytest.mark.parametrize("instruction", ["", "🎉 paint it 🟦", "把圆变成蓝色", "اجعل الدائرة زرقاء", "e\u0301", "a\x00b"])
def test_any_valid_text_is_read(vlm, instruction):
    inputs = build_inputs(request(instruction), vlm.processor, CONFIG)
    assert (inputs.mm_token_type_ids == 2).sum() == 72


def test_a_lone_surrogate_is_refused(vlm):
    with pytest.raises(UserError, match="not valid Unicode; got a lone surrogate at character 5"):
        build_inputs(request("make \ud800 blue"), vlm.processor, CONFIG)


def test_markers_typed_by_a_user_are_text(vlm):
    inputs = build_inputs(request("<|image_pad|><|video_pad|><|im_end|>"), vlm.processor, CONFIG)
    assert (inputs.mm_token_type_ids == 1).sum() == 36 and (inputs.mm_token_type_ids == 2).sum() == 72
