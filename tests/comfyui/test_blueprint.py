"""The blueprints through a real server: a clip of one's own, of an odd shape and length, with sound and without."""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conversion import to_prompt
from serving import Refused
from torch import Tensor

from mive_core.media.images import read_image, write_image
from mive_core.media.video import read_clip

QUICKSTART = Path(__file__).resolve().parents[2] / "workflows" / "MiVE 1 Edit a Video.json"  # a test without ComfyUI compares it with the blueprints
WIDTH, HEIGHT, NUM_FRAMES, FPS = 202, 118, 10, 24
LONG = 36  # frames: more than the 33 that the embedded model knows, and not 4n+1
SAMPLE_RATE, SECONDS_OF_SOUND, AAC_FRAME = 48_000, 1.0, 1024
TINT = torch.tensor([1.0, 0.55, 0.35])


@dataclass(frozen=True)
class Saved:
    frames: Tensor
    fps: float
    sound: tuple[float, float] | None  # seconds, and the loudest sample


def write_own_clip(path: Path, num_frames: int = NUM_FRAMES, *, sound: bool) -> None:
    """Moving stripes; the sound goes on for longer than NUM_FRAMES do."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        video = container.add_stream("h264", rate=FPS, options={"crf": "12"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if sound else None
        for index in range(num_frames):
            bright = 140 + 80 * np.sin((columns + 4 * index) / 9) * np.cos(rows / 15)
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.stack([bright, bright * 0.8, 250 - bright], -1).astype(np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(SECONDS_OF_SOUND * SAMPLE_RATE)) / SAMPLE_RATE)
            frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = SAMPLE_RATE, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def read_saved(path: Path) -> Saved:
    clip = read_clip(path)
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return Saved(clip.frames, clip.fps, None)
        samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    return Saved(clip.frames, clip.fps, (samples.shape[1] / SAMPLE_RATE, float(np.abs(samples).max())))


@pytest.fixture(scope="module")
def own(server) -> Tensor:
    """Puts the clips and the first frame, tinted, into the input folder -> the clip's frames."""
    folder = server.base / "input"
    for name, sound in (("own.mp4", True), ("own_silent.mp4", False)):
        write_own_clip(folder / name, sound=sound)
    write_own_clip(folder / "own_long.mp4", LONG, sound=False)
    frames = read_clip(folder / "own.mp4").frames
    write_image(folder / "own_reference.png", frames[0] * TINT)
    return frames


@pytest.fixture(scope="module")
def quickstart(server, own) -> dict:
    """The quickstart's prompt with a clip of one's own in it."""
    prompt = to_prompt(json.loads(QUICKSTART.read_text(encoding="utf-8")), server.get("/object_info"))
    return changed(prompt, LoadVideo={"file": "own.mp4"}, LoadImage={"image": "own_reference.png"}, MiVEEditVideo={"instruction": "make it warm"})


def changed(prompt: dict, **by_class: dict) -> dict:
    """A copy with other widget values for the nodes of a class."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        node["inputs"] |= by_class.get(node["class_type"], {})
    return prompt


def run(server, prompt: dict) -> tuple[Saved, dict[str, dict]]:
    """Returns what was saved, and what the nodes show, by class."""
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", str(entry["status"])[:2000]
    shown = {prompt[number]["class_type"]: output for number, output in entry["outputs"].items()}
    (file,) = shown["SaveVideo"]["images"]
    return read_saved(server.base / "output" / file["subfolder"] / file["filename"]), shown


def check_sound(saved: Saved, num_frames: int) -> None:
    """The tone of the source, as long as the frames, to within the encoder's blocks."""
    assert saved.sound is not None
    seconds, loudest = saved.sound
    assert 0.2 < loudest < 0.5
    assert seconds == pytest.approx(math.ceil(num_frames / FPS * SAMPLE_RATE / AAC_FRAME) * AAC_FRAME / SAMPLE_RATE, abs=1.5 * AAC_FRAME / SAMPLE_RATE)


def test_own_clip_keeps_size_length_rate_and_sound(server, quickstart, own):
    """A user's clip came back as a silent square of 96x96 and 17 frames."""
    saved, shown = run(server, quickstart)
    assert saved.frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3) and saved.fps == FPS
    check_sound(saved, NUM_FRAMES)
    tinted = own * TINT
    assert (saved.frames - tinted).abs().mean() < 0.5 * (saved.frames - own).abs().mean()
    report = shown["PreviewAny"]["text"][0]
    assert "13 frames of" in report and "padded by 3 frames" in report and f"{WIDTH}x{HEIGHT} is scaled to" in report
    frame = shown["PreviewImage"]["images"][0]
    away = (own - read_image(server.base / frame["type"] / frame["filename"])).abs().mean(dim=(1, 2, 3))  # ComfyUI decodes chroma a little differently
    assert away[0] < 0.01 and away[0] < 0.5 * away[1:].min()


def test_a_long_clip_is_edited_in_stretches_without_losing_a_frame(server, quickstart, own):
    """Frames after the 33rd fell apart when all were sampled at once."""
    saved, shown = run(server, changed(quickstart, LoadVideo={"file": "own_long.mp4"}))
    source = read_clip(server.base / "input" / "own_long.mp4").frames
    assert saved.frames.shape == source.shape == (LONG, HEIGHT, WIDTH, 3) and saved.fps == FPS
    assert "MiVE Edit Video edits 2 stretches of at most 21" in shown["PreviewAny"]["text"][0]
    assert f"{LONG + 1} frames, edited in 2 stretches of at most 21" in shown["MiVEEditVideo"]["text"][0]
    left, asked = ((saved.frames - other).abs().mean(dim=(1, 2, 3)) for other in (source * TINT, source))
    assert (left < 0.5 * asked).all()


def test_length_cuts_frames_and_sound(server, quickstart):
    saved, _ = run(server, changed(quickstart, MiVEPreflight={"length": 5}))
    assert saved.frames.shape == (5, HEIGHT, WIDTH, 3) and saved.fps == FPS
    check_sound(saved, 5)


def test_a_clip_without_sound_stays_without(server, quickstart):
    saved, _ = run(server, changed(quickstart, LoadVideo={"file": "own_silent.mp4"}, MiVEPreflight={"length": 5}))
    assert saved.frames.shape == (5, HEIGHT, WIDTH, 3) and saved.sound is None


def test_missing_model_files_are_named_with_their_folder(server, quickstart):
    """Nothing of the edit is queued; each loader inside the blueprint says what is missing."""
    large = {
        "MiVELoadDiT": {"model": "mive_14b_bf16.safetensors"},
        "MiVELoadVLM": {"model": "Qwen3-VL-8B"},
        "VAELoader": {"vae_name": "wan_2.1_vae.safetensors"},
    }
    prompt = changed(quickstart, **large)
    prompt = {number: node for number, node in prompt.items() if node["class_type"] != "PreviewImage"}  # it shows the first frame all the same
    with pytest.raises(Refused) as refused:
        server.queue(prompt)
    errors = {error["class_type"]: error["errors"][0] for error in json.loads(str(refused.value))["node_errors"].values()}
    assert "models/diffusion_models" in errors["MiVELoadDiT"]["details"] and "mive_14b_bf16.safetensors" in errors["MiVELoadDiT"]["details"]
    assert "models/text_encoders" in errors["MiVELoadVLM"]["details"]
    assert "wan_2.1_vae.safetensors" in errors["VAELoader"]["details"]


def test_blueprints_are_served_once(server):
    served = [entry["name"] for entry in server.get("/global_subgraphs").values() if entry["source"] == "custom_node"]
    assert sorted(served) == ["Video Edit (MiVE)", "Video Edit Frame MiVE"]
