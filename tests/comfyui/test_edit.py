"""MiVE Edit Video against the library's pipeline: clips of any length, keyframes, and what its node shows."""

from dataclasses import replace

import pytest
import torch

from mive_core.pipeline import Pipeline
from mive_core.types import EditRequest, Keyframe

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny(pack):
    """The embedded models, as the library's pipeline and as the inputs of the node."""
    models = {
        "model": pack.run("MiVELoadDiT", model="tiny/dit.safetensors", weight_dtype="fp32")[0],
        "vlm": pack.run("MiVELoadVLM", model="tiny/vlm", dtype="fp32", device="cpu")[0],
        "vae": pack.submodule("nodes.bridge.vae").HostedVAE(pack.submodule("nodes.bridge.paths").ASSETS / "tiny" / "vae.safetensors").vae,
    }
    return Pipeline.load("tiny"), models


def lengthened(request: EditRequest, num_frames: int) -> EditRequest:
    """The request's clip, played to and fro until it has that many frames."""
    frames = request.source.frames
    there_and_back = torch.cat([frames, frames.flip(0)[1:-1]])
    return replace(request, source=replace(request.source, frames=there_and_back.repeat(9, 1, 1, 1)[:num_frames]), reference=frames[0].flip(-1))


def edit(pack, models: dict, request: EditRequest, **more) -> tuple[torch.Tensor, str]:
    clip = {"source": request.source.frames, "fps": request.source.fps, "reference": request.reference[None], "instruction": request.instruction}
    output = pack.output("MiVEEditVideo", **models, **clip, **{"seed": 3, **more})
    return output.args[0], output.ui["text"][0]


@pytest.mark.parametrize("num_frames, says", [(9, "9 frames, edited at once"), (36, "36 frames, edited in 2 stretches of at most 21")])
def test_equals_the_librarys_edit(pack, tiny, request_, num_frames, says):
    pipeline, models = tiny
    request = lengthened(request_, num_frames)
    frames, text = edit(pack, models, request)
    expected = pipeline.edit(request, seed=3).frames
    assert frames.shape == request.source.frames.shape and text.splitlines()[0] == says
    assert (frames - expected).abs().max() < TOLERANCE


def test_keyframes_count_where_they_lie(pack, tiny, request_):
    pipeline, models = tiny
    keyframes = (Keyframe(10, request_.reference.flip(0)), Keyframe(30, request_.reference.flip(1)))
    request = replace(lengthened(request_, 41), keyframes=keyframes)
    images = {f"keyframe_{index}": keyframe.image[None] for index, keyframe in enumerate(keyframes)}
    frames, _ = edit(pack, models, request, keyframes=images, keyframe_numbers="10, 30")
    assert (frames - pipeline.edit(request, seed=3).frames).abs().max() < TOLERANCE
    without, _ = edit(pack, models, request)
    assert (frames - without)[21:].abs().max() > 0.05 and (frames - without)[:21].abs().max() > 0.05


def test_says_what_is_seen_of_the_reference(pack, tiny, request_):
    request = lengthened(request_, 9)
    _, text = edit(pack, tiny[1], replace(request, reference=request.source.frames[0]))
    assert "without an edit" in text
