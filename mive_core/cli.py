"""The command line: what may be said, and how it is read. Bad input is one line on stderr and exit code 2."""

import argparse
import math
import os
import re
import shlex
import sys
import warnings

from . import __version__
from .commands.bench import (
    run_bench_cache,
    run_bench_card,
    run_bench_convert,
    run_bench_dit,
    run_bench_growth,
    run_bench_load,
    run_bench_scale,
    run_bench_stage,
    run_bench_train,
)
from .commands.data import run_data_cache, run_data_compose, run_data_import, run_data_looks, run_data_recolour, run_data_score, run_data_synth
from .commands.models import run_demo, run_edit, run_eval, run_init_from_wan, run_inspect, run_quantize, run_train
from .config import VLM_SIZES
from .errors import UserError

DEFAULT_MODELS = "tiny"
DTYPES, PRESET_NAMES = ("bf16", "fp16", "fp32"), ("tiny", "1.3b", "14b")
CARD_NAMES = ("H100", "A100", "RTX 4090", "RTX 3090")  # train/budget.py's
FLOAT8_MODES = ("scaled_back", "kept", "multiplied")  # float8.py's, which would bring torch along


def main(argv: list[str] | None = None) -> int:
    """Runs one command -> the exit code: 0, 2 for bad input, 130 for an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _say("warning", message)
        try:
            arguments = build_parser().parse_args(argv)
            arguments.command_line = shlex.join(["mive", *argv])
            arguments.run(arguments)
        except UserError as error:
            _say("error", error)
            return 2
        except KeyboardInterrupt:
            _say("error", "interrupted")
            return 130
    return 0


def quiet_libraries() -> None:
    """Model libraries, not yet imported: no network, and stderr left to us unless the user's environment says otherwise."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)


class Parser(argparse.ArgumentParser):
    """Its complaints are user errors too: one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message, fix=f"`{self.prog} --help` lists what it takes")


class Once(argparse.Action):
    """An option that may be given one time only."""

    def __call__(self, parser, namespace, value, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: given more than once")
        setattr(namespace, self.dest, value)


def build_parser() -> Parser:
    parser = Parser(prog="mive", description="Reference-guided video editing.")
    parser.add_argument("--version", action="version", version=f"mive {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_edit(commands)
    _add_eval(commands)
    train = _command(commands, "train", run_train, "train a model from a recipe; resumes where it stopped")
    train.add_argument("config", metavar="CONFIG.yaml", type=text)
    inspect = _command(commands, "inspect", run_inspect, "say what a checkpoint, or a folder of them, is")
    inspect.add_argument("path", metavar="FILE|DIR", type=text)
    init = _command(commands, "init-from-wan", run_init_from_wan, "turn a Wan2.1-T2V checkpoint into a MiVE one, to train from")
    init.add_argument("source", metavar="SRC", type=text, help="a file, a sharded index or a diffusers folder")
    init.add_argument("destination", metavar="DST.safetensors", type=text)
    init.add_argument("--layers", type=text, default="first+last", metavar="SPEC", help="VLM layers it will read, default first+last")
    init.add_argument("--vlm", default="8b", choices=tuple(VLM_SIZES), help="the Qwen3-VL it will read, default 8b")
    init.add_argument("--dtype", choices=DTYPES, help="default: the source's; fp8 becomes bf16")
    quantize = _command(commands, "quantize", run_quantize, "store a MiVE checkpoint's large matrices in 8 bits")
    quantize.add_argument("source", metavar="SRC", type=text, help="a file, a folder or a sharded index")
    quantize.add_argument("destination", metavar="DST.safetensors", type=text)
    quantize.add_argument("--format", default="fp8_scaled", choices=("fp8_scaled",), help="default fp8_scaled, as ComfyUI reads it natively")
    _add_bench(commands)
    _add_data(commands)
    demo = _command(commands, "demo", run_demo, "edit two clips with the embedded models")
    demo.add_argument("--output", default="out/demo", type=text, metavar="DIR", help="default out/demo")
    _add_sampling(demo)
    return parser


def _add_edit(commands) -> None:
    edit = _command(commands, "edit", run_edit, "edit a video after an instruction and an edited first frame")
    edit.add_argument("--source", action=Once, type=text, metavar="V", help="a video file or a folder of frames")
    edit.add_argument("--reference", action=Once, type=text, metavar="I", help="the first frame, already edited")
    edit.add_argument("--instruction", action=Once, type=text, metavar="T")
    edit.add_argument("--manifest", action=Once, type=text, metavar="PAIRS.jsonl", help="instead of these three: many clips; goes on where it stopped")
    edit.add_argument("--output", required=True, action=Once, type=text, metavar="OUT.mp4|DIR", help=".mp4, .mov or .mkv; with --manifest a folder")
    edit.add_argument("--fps", type=positive, metavar="R", help="frame rate of a folder of frames, default 24")
    edit.add_argument("--layers", type=text, metavar="SPEC", help="VLM layers to read: first+last, 1,-1, last, 0:36:6")
    _add_fit(edit)
    _add_sampling(edit)
    _add_machine(edit)
    _add_executor(edit)
    edit.add_argument("--fp8", default="scaled_back", choices=FLOAT8_MODES, help="8-bit matrices: scaled back when read, kept in memory, or multiplied as such")


def _add_eval(commands) -> None:
    evaluate = _command(commands, "eval", run_eval, "measure edits whose outcome is known")
    evaluate.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl")
    evaluate.add_argument("--output", required=True, type=text, metavar="DIR")
    evaluate.add_argument("--layers", type=text, metavar="SPEC", help="VLM layers to read")
    evaluate.add_argument(
        "--reference-mode", default="given", choices=("given", "source_frame"), help="source_frame: the unedited first frame stands in for the reference"
    )
    evaluate.add_argument("--instruction-mode", default="given", choices=("given", "wrong", "empty"), help="wrong: another clip's instruction")
    _add_fit(evaluate)
    _add_sampling(evaluate)
    _add_machine(evaluate)
    evaluate.add_argument(
        "--fp8", default="scaled_back", choices=FLOAT8_MODES, help="8-bit matrices: scaled back when read, kept in memory, or multiplied as such"
    )


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure speed and memory").add_subparsers(required=True, metavar="WHAT", parser_class=Parser)
    dit = _command(bench, "dit", run_bench_dit, "our DiT beside diffusers' WanTransformer3DModel, or with --size one forward of it alone")
    dit.add_argument("--tokens", type=count, help="beside diffusers at that many, default 2048")
    _add_stage(dit)
    for name, summary in (
        ("vlm", "Qwen3-VL over the edit's clip"),
        ("vae", "encoding, and decoding whole and in tiles"),
        ("edit", "a whole edit and its stages"),
    ):
        _add_stage(_command(bench, name, run_bench_stage, summary))
    convert = _command(bench, "convert", run_bench_convert, "init-from-wan beside a copy of the same file, and its memory")
    convert.add_argument("--preset", default="1.3b", choices=("1.3b", "14b"), help="whose shapes the random file has, default 1.3b")
    convert.add_argument("--folder", type=text, metavar="DIR", help="where the files are written, and deleted afterwards")
    convert.add_argument("--repeats", type=count, default=3)
    load = _command(bench, "load", run_bench_load, "memory and time of loading a random file of real shapes, in a process of its own")
    load.add_argument("--model", default="1.3b", choices=(*PRESET_NAMES, *VLM_SIZES), help="a DiT, or 2b to 32b for a Qwen3-VL in one file; default 1.3b")
    load.add_argument("--blocks", type=count, help="fewer blocks or layers than the model has")
    load.add_argument("--shards", type=count, default=1)
    load.add_argument("--fp8", action="store_true", help="the VLM's matrices in 8 bits")
    load.add_argument("--folder", type=text, metavar="DIR", help="where the file is written, and deleted afterwards")
    growth = _command(bench, "growth", run_bench_growth, "time and memory of a forward by frames and size, whole and in windows")
    growth.add_argument("--preset", default="tiny", choices=PRESET_NAMES)
    growth.add_argument("--size", type=size, default=(320, 192), metavar="WxH", help="default 320x192")
    growth.add_argument("--blocks", type=count, help="fewer blocks than the preset has")
    growth.add_argument("--window", type=count, default=33, metavar="N", help="frames of a window, 4n+1, default 33; a quarter of it is shared")
    growth.add_argument("--repeats", type=count, default=1)
    growth.add_argument("--plot", type=text, metavar="FILE.png")
    card = _command(bench, "card", run_bench_card, "every stage of an edit at real sizes, on random weights, against the card's own speed")
    card.add_argument("--preset", default="14b", choices=PRESET_NAMES, help="default 14b")
    card.add_argument("--size", type=size, default=(1280, 720), metavar="WxH", help="default 1280x720")
    card.add_argument("--frames", type=count, default=81, metavar="N", help="4n+1, default 81")
    card.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    card.add_argument("--dtype", default="bf16", choices=DTYPES)
    card.add_argument("--blocks", type=count, help="fewer blocks than the preset has")
    card.add_argument(
        "--parts", type=text, default="", metavar="A,B", help="of speed, attention, dit, dit_fp8, vlm, training_block, vae, dit_1.3b, compiled; default all"
    )
    card.add_argument("--repeats", type=count, default=3)
    cache = _command(bench, "cache", run_bench_cache, "`mive data cache` on video files beside its encoders alone")
    cache.add_argument("--preset", default="tiny", choices=PRESET_NAMES, help="whose encoders' shapes the random weights have, default tiny")
    cache.add_argument("--size", type=size, default=(96, 96), metavar="WxH", help="default 96x96")
    cache.add_argument("--stored-size", type=size, metavar="WxH", help="of the video files, which are fitted to the size; default: the same")
    cache.add_argument("--frames", type=count, default=17, metavar="N", help="4n+1, default 17")
    cache.add_argument("--pairs", type=count, default=48, metavar="N")
    cache.add_argument("--repeats", type=count, default=3)
    cache.add_argument("--folder", type=text, metavar="DIR", help="where the files are written, and deleted afterwards")
    _add_machine(cache, attention=False)
    training = _command(bench, "train", run_bench_train, "steps of a recipe, without checkpoints: speed, and the share of time that goes on loading")
    training.add_argument("config", metavar="CONFIG.yaml", type=text)
    training.add_argument("--steps", type=count, default=30, metavar="N", help="that are measured, after three, default 30")
    scaling = _command(
        bench, "scale", run_bench_scale, "on paper: memory and time of full training over 8, 32 and 128 cards, and where one sequence needs several"
    )
    scaling.add_argument("--preset", default="14b", choices=PRESET_NAMES, help="default 14b")
    scaling.add_argument("--card", default="H100", choices=CARD_NAMES, help="default H100")
    scaling.add_argument("--share", type=positive, default=0.45, metavar="X", help="of the card's peak that is reached, an assumption, default 0.45")
    scaling.add_argument("--frames", type=count, default=81, metavar="N", help="4n+1, default 81")
    for command in bench.choices.values():
        command.add_argument("--json", "--output", dest="output", type=text, metavar="FILE.json", help="also write the figures there")


def _add_stage(parser: Parser) -> None:
    stage = parser.prog.split()[-1]
    parser.set_defaults(stage=stage)
    parser.add_argument("--preset", default="tiny", choices=PRESET_NAMES, help="whose shapes the random weights have, default tiny")
    parser.add_argument("--size", type=size, metavar="WxH", help="multiples of 16" + ("" if stage == "dit" else ", default 96x96"))
    parser.add_argument("--frames", type=count, default=17, metavar="N", help="4n+1, default 17")
    parser.add_argument("--blocks", type=count, help="fewer blocks than the preset has")
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--threads", type=count)
    if stage == "edit":
        parser.add_argument("--steps", type=count, metavar="N", help="default: the preset's")
    _add_machine(parser, attention=stage in ("dit", "edit"))


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="make pairs to measure on, and features to train on").add_subparsers(
        required=True, metavar="WHAT", parser_class=Parser
    )
    synth = _command(data, "synth", run_data_synth, "drawn clips with their manifest")
    synth.add_argument("--output", required=True, type=text, metavar="DIR")
    synth.add_argument("--num", type=count, default=64)
    synth.add_argument("--split", default="heldout", choices=("train", "heldout"))
    synth.add_argument("--seed", type=integer, default=0)
    synth.add_argument("--size", type=size, default=(96, 96), metavar="WxH")
    synth.add_argument("--frames", type=count, default=17, metavar="N")
    synth.add_argument("--kind", action="append", default=[], type=text, help='only of that kind, such as "two alike"; may be given again')
    synth.add_argument("--edit", action="append", default=[], type=text, help="only that edit; may be given again")
    published = _command(data, "import", run_data_import, "the manifest of a published set that lies unpacked in a folder")
    published.add_argument("layout", choices=("openve", "senorita"), help="OpenVE-3M or Senorita-2M")
    published.add_argument("--folder", required=True, type=text, metavar="DIR", help="with its tables and its videos")
    published.add_argument("--output", required=True, type=text, metavar="DIR/PAIRS.jsonl", help=".jsonl or .parquet, in that folder")
    published.add_argument("--edit", action="append", default=[], type=text, help="only that kind, such as local_add; may be given again")
    score = _command(data, "score", run_data_score, "the pairs that Qwen3-VL rates highly; goes on where it stopped")
    score.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl")
    score.add_argument("--model", required=True, type=text, metavar="DIR", help="a Hugging Face folder of Qwen3-VL, with its language head")
    score.add_argument("--output", required=True, type=text, metavar="KEPT.jsonl", help=".jsonl or .parquet, in a folder that the media are under")
    score.add_argument("--least", type=finite, default=9.3, metavar="X", help="of 10, for the lower of its two numbers; default 9.3")
    score.add_argument("--most", type=count, default=4000, metavar="N", help="of each kind of edit, the best; default 4000")
    score.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    score.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the model's arithmetic, default fp32")
    _add_executor(score)
    compose = _command(
        data, "compose", run_data_compose, "people over other backgrounds: pairs that remove, add, replace the background; goes on where it stopped"
    )
    compose.add_argument("--people", required=True, type=text, metavar="PEOPLE.jsonl|DIR", help='lines of {"source", "mask"}, or a folder of videos')
    compose.add_argument(
        "--backgrounds",
        required=True,
        type=text,
        metavar="B.jsonl|DIR",
        help='lines of {"source"}, with an "instruction" that says what is seen, or a folder of videos',
    )
    compose.add_argument("--output", required=True, type=text, metavar="DIR")
    compose.add_argument("--segmenter", type=text, metavar="DIR", help="a Hugging Face folder of a semantic segmentation model, for lines without a mask")
    compose.add_argument("--store", default="video", choices=("video", "frames"), help="H.264, or PNG frames without any loss; default video")
    compose.add_argument("--seed", type=integer, default=0, help="of which background and which words")
    compose.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the segmenter, default cpu")
    _add_fit(compose)
    _add_executor(compose)
    cache = _command(data, "cache", run_data_cache, "latents and VLM states of a manifest's pairs, for `mive train`; goes on where it stopped")
    cache.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl")
    cache.add_argument("--models", required=True, type=text, metavar="DIR", help="dit.safetensors (its config is read), vae.safetensors and vlm/")
    cache.add_argument("--output", required=True, type=text, metavar="DIR")
    cache.add_argument(
        "--bucket",
        action="append",
        type=bucket,
        default=[],
        metavar="WxHxF",
        help="a size and length to fit clips to, may be given again; a clip goes to the nearest shape that is no longer than it; default: as it is",
    )
    cache.add_argument("--states", default="bf16", choices=("bf16", "fp8"), help="how VLM states are stored; fp8: half the bytes, a scale for each token")
    cache.add_argument("--negative", action="store_true", help="also of an empty instruction, for condition_dropout")
    cache.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    cache.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the models' arithmetic, default fp32")
    _add_executor(cache)
    for name, run, summary in (
        ("looks", run_data_looks, "real footage under eight known looks, with its manifest"),
        ("recolour", run_data_recolour, "real footage whose green parts take other colours, with its manifest"),
    ):
        footage = _command(data, name, run, summary)
        footage.add_argument("--source", required=True, type=text, metavar="V")
        footage.add_argument("--output", required=True, type=text, metavar="DIR")
        if name == "looks":
            footage.add_argument(
                "--unseen", action="store_true", help="eight others, of which training shows nothing alike; the words only point at the reference"
            )
        _add_fit(footage)


def _add_fit(parser: Parser) -> None:
    parser.add_argument("--size", type=size, metavar="WxH", help="multiples of 16; default: the source's, to the nearest that fits")
    parser.add_argument("--frames", type=count, metavar="N", help="4n+1; default: all, less 0 to 3 at the end")


def _add_sampling(parser: Parser) -> None:
    parser.add_argument("--models", default=DEFAULT_MODELS, type=text, metavar="tiny|DIR")
    parser.add_argument("--steps", type=count, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--cfg", type=finite, metavar="X", help="guidance; 1 is none")
    parser.add_argument("--shift", type=positive, metavar="X", help="of the timesteps")
    parser.add_argument("--seed", type=integer, default=0, metavar="N")


def _add_machine(parser: Parser, attention: bool = True) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of weights and arithmetic, default fp32")
    if not attention:
        return
    parser.add_argument(
        "--attention",
        default="auto",
        type=text,
        metavar="NAME",
        help="auto and sdpa: torch's own with its best kernel; sage: the package sageattention, checked at first use; matmul",
    )
    parser.add_argument("--compile", action="store_true", help="the DiT's blocks by torch.compile")


def _add_executor(parser: Parser) -> None:
    parser.add_argument(
        "--ray", type=text, metavar="local|ADDRESS", help="work on Ray: a cluster of this machine, or the address of one; default: in this process"
    )
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="on Ray, each with the models and, with --device cuda, a GPU; default 2")


def _command(commands, name: str, run, summary: str) -> Parser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def _say(kind: str, message: object) -> None:
    sys.stderr.write(f"mive: {kind}: {' '.join(str(message).split())}\n")


def text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"not valid Unicode: a lone surrogate at character {error.start}") from None
    return value


def count(value: str) -> int:
    number = integer(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}; expected 1 or more")
    return number


def integer(value: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected a whole number")
    return int(value)


def finite(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected a finite number")
    return number


def positive(value: str) -> float:
    number = finite(value)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"got {value}; expected more than 0")
    return number


def size(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected WIDTHxHEIGHT, such as 192x112")
    return int(match[1]), int(match[2])


def bucket(value: str) -> tuple[int, int, int]:
    """WIDTHxHEIGHTxFRAMES, which the models must be able to take."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})[xX]([0-9]{1,6})", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    width, height, frames = (int(part) for part in match.groups())
    if width % 16 or height % 16 or frames % 4 != 1 or not width or not height:
        raise argparse.ArgumentTypeError(f"got {value}; expected sides that are multiples of 16 and 4n+1 frames")
    return width, height, frames
