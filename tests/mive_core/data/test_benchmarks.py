"""Small folders in the layouts of published benchmarks, with real files: what is read from them, and what is said where files are missing."""

import json
import re

import pytest
import torch
import yaml

from mive_core.cli import main
from mive_core.data.benchmarks import EDITED_FRAME, FIVE_KINDS, SOURCE_FRAME, edit_requests, read_benchmark, reference_kinds
from mive_core.data.manifest import load_entry
from mive_core.errors import UserError
from mive_core.media.images import read_image, write_frames, write_image
from mive_core.media.video import write_video
from mive_core.types import Clip

SIDE = 48


@pytest.fixture(scope="module")
def clip() -> Clip:
    """A square that moves over a gradient, 5 frames."""
    frames = torch.linspace(0, 1, SIDE).expand(5, SIDE, SIDE)[..., None].repeat(1, 1, 1, 3).clone()
    for index in range(5):
        frames[index, 16:32, 4 * index : 4 * index + 16] = torch.tensor([0.9, 0.1, 0.1])
    return Clip(frames, 8.0)


def openve(folder, clip):
    rows = [
        ("global_style", "Make it a woodcut, in black", "OpenVE-Bench/videos/0000_global_style_Make.mp4"),
        ("local_add", "Add a hat", "OpenVE-Bench/videos/0001_local_add_Add.mp4"),
    ]
    (folder / "videos").mkdir(parents=True)
    (folder / "benchmark_videos.csv").write_text("edited_type,prompt,original_video\n" + "".join(f'{kind},"{words}",{path}\n' for kind, words, path in rows))
    for _, _, path in rows:
        write_video(folder.parent / path.replace("OpenVE-Bench", folder.name), clip)


def refvie(folder, clip):
    items = [
        {"src_video": "source_videos/a.mp4", "ref_img": "ref_images/subjects/cat.png", "instruction": "Swap in the cat", "edit_type": "subject"},
        {"src_video": "source_videos/a.mp4", "ref_img": "ref_images/background/sea.png", "instruction": "Go to sea", "edit_type": "background"},
    ]
    (folder / "ref_images" / "subjects").mkdir(parents=True)
    (folder / "ref_images" / "background").mkdir()
    (folder / "source_videos").mkdir()
    (folder / "refvie_bench.yaml").write_text(yaml.safe_dump(items))
    write_video(folder / "source_videos" / "a.mp4", clip)
    for item in items:
        write_image(folder / item["ref_img"], clip.frames[0])


def editverse(folder, clip):
    items = {
        "0": {"<text>": "<video1> Add a small golden crown", "<video1>": "videos/17-85.mp4", "<video1> link": "https://x", "type": "add object"},
        "1": {
            "<text>": "Carry <image1> through <video1>",
            "<video1>": "videos/2.mp4",
            "<image1>": "edited_first_frame/2_edited.png",
            "direction": "horizontal",
            "type": "propagation",
        },
        "2": {"<text>": "<video1> Make it rain", "<video1>": "videos/3.mp4", "type": "change weather"},
    }
    root = folder / "EditVerseBench"
    (root / "edited_first_frame").mkdir(parents=True)
    (root / "videos").mkdir()
    (root / "test.json").write_text(json.dumps(items))
    for name in ("17-85", "2", "3"):
        write_video(root / "videos" / f"{name}.mp4", clip)
    write_image(root / "edited_first_frame" / "2_edited.png", 1 - clip.frames[0])
    write_video(root / "edited_first_frame" / "17-85.mp4", Clip(1 - clip.frames, 8.0))


def five(folder, clip):
    (folder / "edit_prompt").mkdir(parents=True)
    for number in range(1, 7):
        items = [{"video_name": "0001_bus", "source_prompt": "A [red] square", "target_prompt": f"A [blue] square {number}", "save_dir": "x"}]
        items += [items[0] | {"instruction": "make it green"}] if number == 3 else []
        (folder / "edit_prompt" / f"edit{number}_FiVE.json").write_text(json.dumps(items))
    mask = (clip.frames[..., :1] > 0.89).float() * (clip.frames[..., 1:2] < 0.11)
    for kind, frames in (("images", clip.frames), ("bmasks", mask.expand_as(clip.frames))):
        write_frames(folder / kind / "0001_bus", frames)


MAKERS = {"openve": openve, "refvie": refvie, "editverse": editverse, "five": five}


@pytest.fixture
def folders(tmp_path, clip):
    for name, make in MAKERS.items():
        make(tmp_path / name, clip)
    return tmp_path


def test_openve(folders):
    first, second = read_benchmark("openve", folders / "openve")
    assert (first.name, first.kind, first.instruction) == ("0000_global_style_Make", "global_style", "Make it a woodcut, in black")
    assert second.source == folders / "openve" / "videos" / "0001_local_add_Add.mp4" and second.reference is second.mask is second.target is None


def test_refvie_references_are_no_first_frames(folders):
    entries = read_benchmark("refvie", folders / "refvie")
    assert [(entry.name, entry.kind, entry.reference.name) for entry in entries] == [("000_a", "subject", "cat.png"), ("001_a", "background", "sea.png")]
    with pytest.warns(UserWarning, match=r"2 of 2 clips have no edited first frame.*000_a, 001_a"):
        requests = edit_requests("refvie", entries)
    assert [entry.reference for entry in requests] == [entry.source for entry in entries] and reference_kinds(requests) == [SOURCE_FRAME] * 2


def test_editverse_first_frames(folders, clip):
    entries = read_benchmark("editverse", folders / "editverse")
    assert [entry.instruction for entry in entries] == ["Add a small golden crown", "Carry through", "Make it rain"]
    with pytest.warns(UserWarning, match="1 of 3 clips"):
        requests = edit_requests("editverse", entries)
    assert reference_kinds(requests) == [EDITED_FRAME, EDITED_FRAME, SOURCE_FRAME]
    references = [load_entry(entry).request.reference for entry in requests]
    assert torch.allclose(references[1], 1 - clip.frames[0], atol=0.01)
    assert (references[0] - (1 - clip.frames[0])).abs().mean() < 0.03  # the first frame of a video
    assert (references[2] - clip.frames[0]).abs().mean() < 0.03


def test_five_has_masks_and_words_of_the_target(folders, clip):
    entries = read_benchmark("five", folders / "five")
    assert [entry.name for entry in entries] == [f"0001_bus_edit{suffix}" for suffix in ("1", "2", "3", "3_2", "4", "5", "6")]
    assert dict.fromkeys(entry.kind for entry in entries) == dict.fromkeys(FIVE_KINDS)
    assert entries[0].instruction == "A blue square 1" and entries[3].instruction == "make it green"
    with pytest.warns(UserWarning, match="7 of 7"):
        pair = load_entry(edit_requests("five", entries)[0])
    assert pair.target is None and pair.mask.sum() == 5 * 16 * 16 and torch.allclose(pair.request.reference, clip.frames[0], atol=0.01)


def test_own_first_frames_can_be_given(folders, clip, tmp_path):
    entries, own = read_benchmark("openve", folders / "openve"), tmp_path / "own"
    own.mkdir()
    write_image(own / "0001_local_add_Add.png", clip.frames[0] ** 2)
    with pytest.warns(UserWarning, match="1 of 2 clips"):
        requests = edit_requests("openve", entries, own)
    assert reference_kinds(requests) == [SOURCE_FRAME, EDITED_FRAME] and torch.allclose(read_image(requests[1].reference), clip.frames[0] ** 2, atol=0.01)
    (own / "0001_local_add_Add.png").rename(own / "other.png")
    with pytest.raises(UserError, match="no image has the name of a clip.*other.*0000_global_style_Make.png"):
        edit_requests("openve", entries, own)


@pytest.mark.parametrize(
    "name, gone, says",
    [
        ("openve", ["videos/0000_global_style_Make.mp4", "videos/0001_local_add_Add.mp4"], r"2 of 2: videos/0000_global_style_Make.mp4, videos/0001"),
        ("refvie", ["ref_images/subjects/cat.png"], r"1 of 3: ref_images/subjects/cat.png"),
        ("editverse", ["EditVerseBench/edited_first_frame/2_edited.png", "EditVerseBench/videos/3.mp4"], r"2 of 5: EditVerseBench/"),
        ("five", ["bmasks/0001_bus/00001.png", "bmasks/0001_bus/00003.png"], r"2 of 7: bmasks/0001_bus/00001.png, bmasks/0001_bus/00003.png"),
    ],
)
def test_missing_files_are_named_and_counted(folders, capsys, name, gone, says):
    for path in gone:
        (folders / name / path).unlink()
    assert main(["eval", "--benchmark", name, "--folder", str(folders / name), "--output", str(folders / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "files of the benchmark are missing" in err and re.search(says, err) and not (folders / "out").exists()


@pytest.mark.parametrize(
    "name, file, content, says",
    [
        ("openve", "benchmark_videos.csv", None, "holds no benchmark_videos.csv"),
        ("openve", "benchmark_videos.csv", "edited_type,prompt\nx,y\n", r"csv:2: the key 'original_video' is missing"),
        ("openve", "benchmark_videos.csv", "edited_type,prompt,original_video\nx,y,../../z.mp4\n", "leads outside"),
        ("openve", "benchmark_videos.csv", "edited_type,prompt,original_video\n", "lists no clips"),
        ("refvie", "refvie_bench.yaml", "a: [", "is no YAML"),
        ("refvie", "refvie_bench.yaml", "a: 1", "holds no list of clips"),
        ("refvie", "refvie_bench.yaml", "- 3", r"refvie_bench.yaml\[0\]: the key 'src_video' is missing"),
        ("editverse", "EditVerseBench/test.json", '{"0": ', "is no JSON"),
        ("editverse", "EditVerseBench/test.json", "[]", "holds no clips by number"),
        ("five", "edit_prompt/edit4_FiVE.json", None, "holds no edit_prompt/edit4_FiVE.json"),
        ("five", "edit_prompt/edit4_FiVE.json", '[{"video_name": ""}]', "the key 'video_name' is missing"),
    ],
)
def test_folders_of_another_layout(folders, name, file, content, says):
    path = folders / name / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=says):
        read_benchmark(name, folders / name)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--output", "x"], "either --manifest or --benchmark is needed; got neither"),
        (["--manifest", "m", "--benchmark", "five", "--output", "x"], "got both"),
        (["--benchmark", "five", "--output", "x"], "add --folder DIR"),
        (["--manifest", "m", "--folder", "five", "--output", "x"], "only a benchmark takes that; got --folder"),
        (["--benchmark", "mine", "--folder", "five", "--output", "x"], "invalid choice"),
    ],
)
def test_options_that_do_not_fit(capsys, arguments, says):
    assert main(["eval", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_eval_and_edit_need_nothing_else(folders, capsys):
    for name in ("openve", "editverse", "five"):
        out = folders / f"out_{name}"
        assert main(["eval", "--benchmark", name, "--folder", str(folders / name), "--steps", "1", "--output", str(out)]) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["clips"] == len(report["per_clip"]) and report["clips_with_target"] == 0 and "delivered" not in report
        assert report["quality"]["warping_error"] is not None and report["quality"]["ssim"] is None
        assert (report["quality"]["kept_ciede2000"] is not None) == (name == "five")
        assert (report["quality"]["reference_psnr"] is not None) == (name == "editverse")
        assert {row["kind"] for row in report["per_clip"]} == set(report["by_kind"]) and SOURCE_FRAME in report["by_reference"]
    capsys.readouterr()
    arguments = ["edit", "--benchmark", "openve", "--folder", str(folders / "openve"), "--steps", "1", "--output", str(folders / "edits")]
    assert main(arguments) == 0 and "2 done, 0 left out" in capsys.readouterr().out
    assert sorted(path.name for path in (folders / "edits").glob("*.mp4")) == ["000000-0000-global-style-Make.mp4", "000001-0001-local-add-Add.mp4"]


def test_the_judge_sees_the_benchmarks_own_references(folders, clip, vlm_folder, capsys):
    edits, output = folders / "edits", folders / "scores.json"
    edits.mkdir()
    for entry in read_benchmark("refvie", folders / "refvie"):
        write_video(edits / f"{entry.name}.mp4", Clip(1 - clip.frames, 8.0))
    arguments = [
        "judge",
        "--folder",
        str(folders / "refvie"),
        "--edited",
        str(edits),
        "--rubric",
        "refvie",
        "--model",
        str(vlm_folder),
        "--output",
        str(output),
    ]
    assert main([*arguments, "--benchmark", "refvie"]) == 0
    report = json.loads(output.read_text())
    assert report["clips"] == 2 and set(report["by_kind"]) == {"subject", "background"} and "no edited first frame" not in capsys.readouterr().err
    assert main([*arguments, "--benchmark", "openve"]) == 2  # another benchmark's folder
    assert "holds no benchmark_videos.csv" in capsys.readouterr().err
