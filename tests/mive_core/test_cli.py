"""The command line with good and bad input: exit codes, one line on stderr, no partial files."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import mive_core
from mive_core.cli import build_parser, main
from mive_core.config import PRESETS
from mive_core.media.images import write_frames
from mive_core.media.video import read_clip, write_video
from mive_core.types import Clip


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The working directory of the test: a folder with a video, a folder of frames and a reference image."""
    frames = torch.rand(6, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "clip.mp4", Clip(frames, 8.0))
    write_frames(tmp_path / "frames", frames)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "reference.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


EDIT = ["edit", "--source", "clip.mp4", "--reference", "reference.png", "--instruction", "make it red", "--output", "out.mp4"]


def edit(**changes: str | None) -> list[str]:
    """Returns EDIT with options replaced, added or (None) removed."""
    options = dict(zip(EDIT[1::2], EDIT[2::2]))
    options |= {f"--{name}": value for name, value in changes.items()}
    return ["edit", *(text for name, value in options.items() if value is not None for text in (name, value))]


def refused(capsys, arguments: list[str], folder: Path) -> str:
    """Runs a command that must fail and returns its one line on stderr."""
    before = listing(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mive: error: ") and err.count("\n") == 1, err
    assert listing(folder) == before
    return err


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"source": None}, "required: --source"),
        ({"reference": None}, "required: --reference"),
        ({"source": "gone.mp4"}, "source 'gone.mp4': no such file"),
        ({"reference": "gone.png"}, "reference 'gone.png': no such file"),
        ({"reference": "frames"}, "is a folder; expected one image"),
        ({"reference": "clip.mp4"}, "is not an image"),
        ({"reference": "one.png"}, "got 1x1; expected sides of 16 to 16384"),
        ({"reference": "long.png"}, "got 20000x16; expected sides of 16 to 16384"),
        ({"source": "empty"}, "the folder holds no frames"),
        ({"source": "page.mp4"}, "an HTML or XML page"),
        ({"source": "cut.mp4"}, "not a video that can be read"),
        ({"source": "C:\\clips\\a.mp4"}, "looks like a Windows path"),
        ({"source": "a\0b"}, "NUL"),
        ({"output": "gone/out.mp4"}, "its folder does not exist"),
        ({"output": "out.avi"}, "unsupported file type"),
        ({"output": "frames"}, "the folder is not empty"),
        ({"codec": "ffv1"}, ".mp4 does not hold ffv1 here; expected .mkv"),
        ({"crf": "99"}, "h264 takes no such crf; got 99; expected 0 to 51"),
        ({"output": "D:\\out.mp4"}, "backslash"),
        ({"output": "o\0.mp4"}, "NUL"),
        ({"output": "clip.mp4"}, "would replace an input"),
        ({"size": "100x96"}, "expected 96x96, the nearest that fits"),
        ({"size": "96"}, "expected WIDTHxHEIGHT"),
        ({"size": "0x0"}, "expected 16x16"),
        ({"frames": "4"}, "expected 1 or 5"),
        ({"frames": "17"}, "got 6 frames; expected 17; ask for 5 or fewer"),
        ({"frames": "0"}, "expected 1 or more"),
        ({"steps": "0"}, "expected 1 or more"),
        ({"steps": "1e9"}, "expected a whole number"),
        ({"cfg": "nan"}, "expected a finite number"),
        ({"attention": "flush"}, "unknown attention; got 'flush'; expected auto, sdpa, sage, matmul"),
        ({"attention": "sage"}, "needs the package sageattention"),
        ({"device": "cuda"}, "there is no CUDA device"),
        ({"dtype": "fp8"}, "invalid choice: 'fp8'"),
        ({"cfg": "inf"}, "expected a finite number"),
        ({"shift": "nan"}, "expected a finite number"),
        ({"shift": "-1"}, "expected more than 0"),
        ({"shift": "0"}, "expected more than 0"),
        ({"seed": "one"}, "expected a whole number"),
        ({"instruction": "a\ud800b"}, "lone surrogate at character 1"),
        ({"models": "gone"}, "no such folder of models"),
        ({"fps": "0"}, "expected more than 0"),
        ({"sauce": "x"}, "unrecognized arguments"),
    ],
)
def test_bad_input_to_edit(work, capsys, changes, says):
    (work / "empty").mkdir()
    (work / "page.mp4").write_text("<html>not found</html>")
    (work / "cut.mp4").write_bytes((work / "clip.mp4").read_bytes()[:2000])
    Image.new("L", (1, 1)).save(work / "one.png")
    Image.new("1", (20000, 16)).save(work / "long.png")
    assert says in refused(capsys, edit(**{"frames": "5", **changes}), work)


def test_more_than_one_reference(work, capsys):
    assert "given more than once" in refused(capsys, [*EDIT, "--reference", "other.png"], work)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["data"], ["bench"], ["train"], ["eval"], ["inspect"]])
def test_incomplete_commands(work, capsys, arguments):
    assert "--help` lists what it takes" in refused(capsys, arguments, work)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["eval", "--manifest", "gone.jsonl", "--output", "out"], "no such file"),
        (["eval", "--manifest", "bad.jsonl", "--output", "out"], "bad.jsonl:1: the key 'instruction' is missing"),
        (["eval", "--manifest", "bad.jsonl", "--output", "clip.mp4"], "'clip.mp4' is a file; expected a folder"),
        (["eval", "--manifest", "bad.jsonl", "--output", "clip.mp4/out"], "is a file"),
        (["eval", "--manifest", "bad.jsonl", "--output", "out", "--instruction-mode", "rude"], "invalid choice: 'rude'"),
        (["train", "gone.yaml"], "no such file"),
        (["train", "bad.jsonl"], "task"),
        (["inspect", "gone.safetensors"], "no such file"),
        (["inspect", "a\0b"], "NUL"),
        (["inspect", "frames"], "no .safetensors or .gguf file"),
        (["bench", "dit", "--preset", "huge"], "invalid choice: 'huge'"),
        (["bench", "dit", "--output", "gone/figures.json"], "its folder does not exist"),
        (["data", "synth", "--output", "out", "--size", "90x90"], "got 90x90"),
        (["data", "synth", "--output", "out", "--frames", "16"], "got 16 frames"),
        (["data", "synth", "--output", "clip.mp4", "--num", "1"], "is a file"),
        (["data", "looks", "--source", "gone.mp4", "--output", "out"], "no such file"),
        (["demo", "--output", "clip.mp4"], "is a file"),
    ],
)
def test_bad_input_to_the_other_commands(work, capsys, arguments, says):
    (work / "bad.jsonl").write_text('{"source": "clip.mp4"}\n')
    assert says in refused(capsys, arguments, work)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--output", "out"],
        ["data", "cache", "--manifest", "pairs.jsonl", "--models", "tiny", "--output", "out"],
        ["bench", "load"],
        ["study", "layers", "--work", "out", "--output", "out"],
    ],
)
def test_several_processes_of_a_command_that_shares_nothing(work, capsys, monkeypatch, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    assert "each process would write the same files; got 2 processes; start one process" in capsys.readouterr().err and not (work / "out").exists()
    assert main(["train", "nowhere.yaml"]) == 2 and "nowhere.yaml" in capsys.readouterr().err


def test_edit(work, random_models, capsys):
    arguments = edit(models=str(random_models), instruction="make the red circle blue 🎬 青 مرحبا", seed="3")
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "out.mp4\n"
    assert err == ""
    first = (work / "out.mp4").read_bytes()
    assert read_clip("out.mp4").frames.shape == (6, 32, 48, 3) and read_clip("out.mp4").fps == 8
    assert main(arguments) == 0 and (work / "out.mp4").read_bytes() == first
    assert sorted(os.listdir(work)) == ["clip.mp4", "frames", "out.mp4", "reference.png"]


@pytest.mark.parametrize(
    "changes, frames",
    [
        ({"source": "frames", "frames": "1", "fps": "8"}, (1, 32, 48, 3)),
        ({"instruction": "", "frames": "5", "size": "32x32", "steps": "1"}, (5, 32, 48, 3)),
        ({"instruction": "", "frames": "5", "size": "32x32", "steps": "1", "detail": "off"}, (5, 32, 32, 3)),
        ({"frames": "5", "anchor": "on", "mask": "reference.png"}, (5, 32, 48, 3)),
        ({"layers": "2+last", "frames": "5", "cfg": "2"}, (5, 32, 48, 3)),
        ({"source": "reference.png"}, (1, 32, 48, 3)),
        ({"output": "out.mkv", "codec": "ffv1", "frames": "5"}, (5, 32, 48, 3)),
        ({"output": "out.webm", "crf": "40", "frames": "5"}, (5, 32, 48, 3)),
        ({"output": "pictures", "frames": "5"}, (5, 32, 48, 3)),
    ],
)
def test_edit_with_options(work, random_models, capsys, changes, frames):
    assert main(edit(models=str(random_models), **changes)) == 0
    assert read_clip(changes.get("output", "out.mp4")).frames.shape == frames


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"layers": "last"}, "not made for that many layers"),
        ({"layers": "last+first"}, "in another order than the DiT was trained with; got 2 (4, 1); expected 2 (1, 4)"),
        ({"layers": "1,,2"}, "column 3"),
        ({"layers": ""}, "column 1"),
        ({"layers": "99,1"}, "99"),
        ({"cfg": "1e30"}, "cfg"),
    ],
)
def test_what_only_the_models_can_refuse(work, random_models, capsys, changes, says):
    assert says in refused(capsys, edit(models=str(random_models), frames="5", **changes), work)


def test_eval(work, random_models, capsys):
    assert main(["data", "looks", "--source", "clip.mp4", "--output", "set", "--frames", "5"]) == 0
    manifest = capsys.readouterr().out.strip()
    assert manifest == "set/pairs.jsonl" and len(Path(manifest).read_text().splitlines()) == 8
    Path(manifest).write_text("".join(Path(manifest).read_text().splitlines(keepends=True)[:2]))
    arguments = ["eval", "--manifest", manifest, "--output", "out", "--models", str(random_models), "--instruction-mode", "wrong"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "out/report.json\nout/sheet.png\n"
    report = json.loads((work / "out" / "report.json").read_text())
    assert report["clips"] == 2 and report["by_kind"]["footage"]["clips"] == 2 and report["psnr_kept"] is None
    assert report["command"].startswith("mive eval --manifest set/pairs.jsonl") and report["settings"]["instruction_mode"] == "wrong"


def test_unseen_looks_are_others_and_point_at_the_reference(work):
    for output, more in (("seen", []), ("unseen", ["--unseen"])):
        assert main(["data", "looks", "--source", "clip.mp4", "--output", output, "--frames", "5", *more]) == 0
    seen, unseen = ([json.loads(line) for line in (work / name / "pairs.jsonl").read_text().splitlines()] for name in ("seen", "unseen"))
    assert len({line["edit"] for line in seen + unseen}) == 16
    assert not [line["instruction"] for line in unseen if line["edit"] in line["instruction"]]


def test_data_synth(work, capsys):
    assert main(["data", "synth", "--output", "set", "--num", "2", "--frames", "5", "--size", "64x48", "--seed", "4"]) == 0
    lines = [json.loads(line) for line in (work / "set" / "pairs.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["heldout-4-0", "heldout-4-1"]
    assert read_clip(f"set/{lines[1]['target']}").frames.shape == (5, 48, 64, 3)


def test_data_synth_of_one_kind(work, capsys):
    assert main(["data", "synth", "--output", "set", "--num", "3", "--frames", "5", "--size", "64x48", "--kind", "two alike", "--edit", "replace"]) == 0
    lines = [json.loads(line) for line in (work / "set" / "pairs.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["edit"]) for line in lines] == [("two alike", "replace")] * 3
    assert main(["data", "synth", "--output", "other", "--kind", "three alike"]) == 2
    assert "expected kinds among seen in reference" in capsys.readouterr().err


def test_data_recolour(work, capsys):
    sample = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"
    assert main(["data", "recolour", "--source", str(sample), "--output", "set", "--frames", "5", "--size", "96x64"]) == 0
    lines = [json.loads(line) for line in (work / "set" / "pairs.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["green-to-red", "green-to-blue", "green-to-purple"]
    source, target, mask = (read_clip(f"set/{lines[0][key]}").frames for key in ("source", "target", "mask"))
    green = mask[..., 0] > 0.5
    assert 0.2 < green.float().mean() < 0.8
    assert torch.equal(target[~green], source[~green]) and torch.equal(target[green], source[green][:, [1, 2, 2]])
    write_frames(work / "gray", torch.full((5, 32, 32, 3), 0.5))
    assert main(["data", "recolour", "--source", "gray", "--output", "other", "--frames", "5"]) == 2
    assert "too little green" in capsys.readouterr().err


def test_inspect(random_models, capsys):
    assert main(["inspect", str(random_models)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dit.safetensors"]["family"] == "MiVE DiT" and report["dit.safetensors"]["layers"] == [1, -1]


def test_an_interrupt_leaves_nothing(work, random_models, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mive_core.media.encode.quantise", interrupt)
    before = listing(work)
    assert main(edit(models=str(random_models), frames="5")) == 130
    assert capsys.readouterr().err == "mive: error: interrupted\n"
    assert listing(work) == before
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert main(edit(models=str(random_models), frames="5")) == 0


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], ["edit", "--help"], ["data", "looks", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0


def test_many_tokens_are_a_warning_that_counts_the_models_own_patches(work, random_models, capsys, monkeypatch):
    monkeypatch.setattr("mive_core.data.edit_file.MANY_TOKENS", 10)
    assert main(edit(models=str(random_models))) == 0
    rows, columns = (side // 8 // patch for side, patch in zip((32, 48), PRESETS["tiny"].patch_size[1:]))
    assert f"9 frames of 48x32 are {4 * rows * columns} tokens" in capsys.readouterr().err
    assert main(edit(models=str(random_models), size="48x32")) == 0
    assert "may take long" not in capsys.readouterr().err


def test_a_very_long_instruction_is_truncated_with_a_warning(work, random_models, capsys):
    assert main(edit(models=str(random_models), frames="5", steps="1", instruction="make it red " * 8334)) == 0
    err = capsys.readouterr().err
    assert err.startswith("mive: warning: ") and err.count("\n") == 1 and "token" in err and len(err) < 400


def swapped(folder: Path) -> None:
    """Swaps the files of the DiT and the VAE."""
    (folder / "dit.safetensors").rename(folder / "x")
    (folder / "vae.safetensors").rename(folder / "dit.safetensors")
    (folder / "x").rename(folder / "vae.safetensors")


def cut(name: str):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def page(name: str):
    return lambda folder: (folder / name).write_bytes(b"<!DOCTYPE html><html>404</html>")


def gone(name: str):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage, says",
    [
        (swapped, "this looks like a Wan VAE"),
        (cut("dit.safetensors"), "dit.safetensors"),
        (cut("vae.safetensors"), "vae.safetensors"),
        (cut("vlm/model.safetensors"), "model.safetensors"),
        (page("dit.safetensors"), "dit.safetensors"),
        (page("vae.safetensors"), "vae.safetensors"),
        (page("vlm/model.safetensors"), "model.safetensors"),
        (gone("dit.safetensors"), "dit.safetensors"),
        (gone("vae.safetensors"), "vae.safetensors"),
        (gone("vlm/model.safetensors"), "model.safetensors"),
    ],
)
def test_damaged_models(work, random_models, capsys, damage, says):
    shutil.copytree(random_models, work / "models")
    damage(work / "models")
    assert says in refused(capsys, edit(models="models", frames="5"), work)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_pickles_are_never_read(work, capsys, name):
    torch.save({"weight": torch.zeros(3)}, work / name)
    assert name in refused(capsys, ["inspect", name], work)


def test_a_stage_is_measured_from_the_command_line(work, capsys):
    assert main(["bench", "vlm", "--size", "64x48", "--frames", "5", "--repeats", "1", "--json", "vlm.json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    written = json.loads((work / "vlm.json").read_text())
    assert written == figures | {"command": "mive bench vlm --size 64x48 --frames 5 --repeats 1 --json vlm.json"} and figures["seconds"] > 0
    assert main(["bench", "dit", "--size", "64x48", "--frames", "5", "--repeats", "1", "--attention", "matmul", "--dtype", "bf16"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["attention"], figures["dtype"], figures["stage"]) == ("matmul", "bfloat16", "dit")


def test_a_cards_goals_are_printed_beside_its_report(work, capsys, monkeypatch):
    from mive_core.bench import card_all

    monkeypatch.setattr(card_all, "plan", lambda scale, base: {})
    assert main(["bench", "card", "--all", "--scale", "small", "--device", "cpu", "--budget", "60", "--json", "card.json"]) == 0
    out, err = capsys.readouterr()
    written = json.loads((work / "card.json").read_text())
    assert written == json.loads(out) | {"command": "mive bench card --all --scale small --device cpu --budget 60 --json card.json"}
    assert err.count("\nmive: open: ") + err.startswith("mive: open: ") == len(written["goals"]) == 10


@pytest.mark.parametrize(
    "options, says",
    [
        (["dit", "--size", "64x64", "--tokens", "512"], "two benchmarks"),
        (["card", "--all", "--device", "cpu", "--scale", "huge"], "invalid choice: 'huge'"),
        (["card", "--all", "--device", "cpu", "--scale", "small", "--budget", "5"], "the budget is too small to measure anything; got 5 s"),
        (["card", "--all", "--device", "cpu", "--budget", "0"], "expected more than 0"),
        (["card", "--all", "--device", "cpu", "--preset", "tiny", "--frames", "5"], "takes no --preset, --frames"),
        (["card", "--device", "cpu", "--scale", "small", "--budget", "60"], "--scale and --budget need --all"),
        (["dit", "--dtype", "bf16"], "fp32 on a CPU"),
        (["vae", "--frames", "6"], "the size does not fit"),
        (["dit", "--attention", "sage"], "needs the package sageattention"),
        (["vlm", "--attention", "sdpa"], "unrecognized arguments"),
        (["edit", "--json", "figures.txt"], "unsupported file type"),
    ],
)
def test_benchmarks_that_cannot_be_are_refused(options, says, work, capsys):
    assert says in refused(capsys, ["bench", *options], work)


def test_repeated_constants_are_equal():
    """The command line repeats these lists, so that --help does not import torch."""
    from mive_core import config
    from mive_core.formats import float8, quantize, quantized
    from mive_core.media import encode
    from mive_core.parsers import options
    from mive_core.train import budget

    assert set(options.CODECS) == encode.FORMATS.keys()
    assert set(options.QUANTIZE_FORMATS) == quantized.FORMATS.keys() | quantize.ALIASES.keys()
    assert options.FLOAT8_MODES == float8.MODES and set(options.PRESET_NAMES) == config.PRESETS.keys() and set(options.CARD_NAMES) == budget.CARDS.keys()


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Returns the parser and those of all its commands."""
    commands = [command for action in parser._actions if isinstance(action, argparse._SubParsersAction) for command in action.choices.values()]
    commands += parser.nested.values()
    return [parser, *(found for command in commands for found in parsers(command))]


@pytest.mark.parametrize("parser", parsers(build_parser()), ids=lambda parser: parser.prog)
def test_every_command_and_option_is_explained(parser):
    assert parser.description and parser.format_help()
    assert all(action.help for action in parser._actions if not isinstance(action, argparse._SubParsersAction))


def test_score_has_two_names_for_its_limits():
    required = ["data", "score", "--manifest", "pairs.jsonl", "--model", "judge", "--output", "kept.jsonl"]
    for names in (("--min-score", "--max-per-kind"), ("--least", "--most")):
        arguments = build_parser().parse_args([*required, names[0], "8.5", names[1], "7"])
        assert (arguments.min_score, arguments.max_per_kind) == (8.5, 7)
