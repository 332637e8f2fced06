"""Keyframes as a node takes them: images in a list of inputs that grows, and the numbers of their frames as text."""

import re

from comfy_api.latest import io
from torch import Tensor

from ...mive_core.errors import UserError
from ...mive_core.media.fit import SAME_SHAPE, fit_reference
from ...mive_core.reference import check_keyframes
from ...mive_core.types import Keyframe

MAX_KEYFRAMES = 16
KEYFRAMES = io.Autogrow.Input(
    "keyframes",
    optional=True,
    template=io.Autogrow.TemplatePrefix(io.Image.Input("keyframe"), prefix="keyframe_", min=0, max=MAX_KEYFRAMES),
    tooltip="Further frames of the source, edited like the reference: how the edit looks later in the clip.",
)
KEYFRAME_NUMBERS = io.String.Input(
    "keyframe_numbers", default="", optional=True, tooltip="The number of each keyframe's frame in the source, counted from 0, separated by commas: 40, 80."
)


def read_keyframes(images: dict[str, Tensor | None] | None, numbers: str, size: tuple[int, int], num_frames: int) -> tuple[Keyframe, ...]:
    """The inputs' images, fitted to size (width, height), and their numbers -> keyframes in order. Raises UserError."""
    given = [image for image in (images or {}).values() if image is not None]
    found = [text for text in re.split(r"[\s,;]+", numbers or "") if text]
    if not all(re.fullmatch("[0-9]{1,9}", text) for text in found):
        raise UserError("these are no numbers of frames", where="keyframe_numbers", got=repr(numbers[:80]), expected="numbers separated by commas: 40, 80")
    if len(given) != len(found):
        raise UserError(
            "each keyframe needs the number of its frame",
            where="keyframe_numbers",
            got=f"{len(given)} images, {len(found)} numbers",
            expected="as many, in the order of the inputs",
        )
    check_keyframes([int(text) for text in found], num_frames, taught=True)
    pairs = sorted(zip(map(int, found), given), key=lambda pair: pair[0])
    return tuple(Keyframe(number, fit_reference(image, size, f"keyframe {number}", max_stretch=SAME_SHAPE)) for number, image in pairs)
