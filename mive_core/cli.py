"""The command-line interface. Bad input is reported as one line on stderr, with exit code 2."""

import argparse
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from . import __version__
from .commands.bench import (
    run_bench_cache,
    run_bench_card,
    run_bench_convert,
    run_bench_dit,
    run_bench_growth,
    run_bench_load,
    run_bench_long,
    run_bench_scale,
    run_bench_stage,
    run_bench_train,
)
from .commands.data import (
    run_data_cache,
    run_data_challenge,
    run_data_compose,
    run_data_import,
    run_data_looks,
    run_data_objects,
    run_data_recolour,
    run_data_samples,
    run_data_score,
    run_data_strengths,
    run_data_synth,
)
from .commands.models import run_demo, run_edit, run_eval, run_init_from_wan, run_inspect, run_merge, run_quantize, run_train
from .commands.study import run_study_from_wan
from .config import VLM_SIZES
from .errors import UserError

DEFAULT_MODELS = "tiny"
DTYPES, PRESET_NAMES = ("bf16", "fp16", "fp32"), ("tiny", "1.3b", "14b")
# The next three repeat train/budget.py, formats/float8.py and media/encode.py, whose import would load torch.
CARD_NAMES = ("H100", "A100", "RTX 4090", "RTX 3090", "RTX 4080")
FLOAT8_MODES = ("scaled_back", "kept", "multiplied")
CODECS = ("h264", "ffv1", "prores", "prores4444", "vp9", "av1", "gif")
DESCRIPTION = """\
MiVE edits a video from an instruction and one edited frame: you edit the video's first frame,
and MiVE carries that edit through all frames, while the motion and everything else stay the same."""
EXAMPLES = """\
first steps:
  mive demo    edits two sample clips with the embedded models, on any machine, without a download
  mive edit --source clip.mp4 --reference first_frame_edited.png --instruction "make it night" --output edited.mp4

`mive COMMAND --help` explains each command."""
LAYERS_HELP = "VLM layers to read: first+last, 1,-1, last or 0:36:6"
BLOCKS_HELP = "use fewer blocks than the preset has"
FOLDER_HELP = "folder for the test files, which are deleted afterwards; default: the system's temporary folder"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for bad input, 130 for an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _print_message("warning", message)
        try:
            with closed_streams():
                arguments = build_parser().parse_args(argv)
                arguments.command_line = shlex.join(["mive", *argv])
                arguments.run(arguments)
        except UserError as error:
            _print_message("error", error)
            return 2
        except KeyboardInterrupt:
            _print_message("error", "interrupted")
            return 130
    return 0


@contextmanager
def closed_streams() -> Iterator[None]:
    """Lets a command end quietly where nobody reads its output: stdout or stderr closed from the start, or a pipe whose reader has gone."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end


def quiet_libraries() -> None:
    """Sets defaults for model libraries that are imported later: no network, no output on stderr. The user's environment takes precedence."""
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TRANSFORMERS_VERBOSITY", "error"), ("DIFFUSERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for bad arguments."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(message, fix=f"`{self.prog} --help` lists what it takes")


class StoreOnce(argparse.Action):
    """Stores an option's value; an error if the option is given twice."""

    def __call__(self, parser, namespace, value, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: given more than once")
        setattr(namespace, self.dest, value)


def build_parser() -> Parser:
    """Builds the parser of all commands. Imports neither torch nor numpy, so that --help is fast."""
    parser = Parser(prog="mive", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"mive {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND", parser_class=Parser)
    _add_edit(commands)
    _add_demo(commands)
    _add_eval(commands)
    _add_train(commands)
    inspect = _command(commands, "inspect", run_inspect, "show what a checkpoint file, or each one in a folder, contains", "Prints JSON.")
    inspect.add_argument("path", metavar="FILE|DIR", type=text, help=".safetensors or .gguf file, or a folder of them")
    _add_conversions(commands)
    _add_merge(commands)
    _add_data(commands)
    _add_bench(commands)
    _add_study(commands)
    return parser


def _add_edit(commands) -> None:
    edit = _command(
        commands,
        "edit",
        run_edit,
        "edit a video, given an instruction and the edited first frame",
        "Takes either --source, --reference and --instruction for one video, or --manifest for many.",
    )
    edit.add_argument("--source", action=StoreOnce, type=text, metavar="VIDEO|DIR", help="the video to edit: a video file or a folder of frames")
    edit.add_argument("--reference", action=StoreOnce, type=text, metavar="IMAGE", help="the video's first frame, already edited")
    edit.add_argument(
        "--register", action="store_true", help="move reference and keyframes over their frames of the source, where an image editor has shifted or zoomed them"
    )
    edit.add_argument(
        "--keyframe",
        action="append",
        type=keyframe,
        default=[],
        metavar="N:IMAGE",
        help="a further frame, already edited: its number, counted from 0, and the image; can be repeated",
    )
    edit.add_argument("--instruction", action=StoreOnce, type=text, metavar="TEXT", help='the edit in words, such as "make it night"')
    edit.add_argument(
        "--manifest",
        action=StoreOnce,
        type=text,
        metavar="PAIRS.jsonl",
        help="edit many videos: each line of this file is a JSON object with source, reference and instruction; an interrupted run resumes",
    )
    edit.add_argument(
        "--output",
        required=True,
        action=StoreOnce,
        type=text,
        metavar="OUT.mp4|DIR",
        help="the video to write: .mp4, .mov, .mkv, .webm or .gif; without a suffix a folder of PNG; with --manifest a folder of videos",
    )
    edit.add_argument(
        "--codec",
        default="",
        choices=CODECS,
        help="h264 (default of .mp4, .mov, .mkv), ffv1 (lossless, .mkv), prores, prores4444 (.mov), vp9 (default of .webm), av1 (.webm, .mkv, .mp4), gif",
    )
    edit.add_argument("--crf", type=integer, metavar="N", help="constant rate factor, smaller: better and larger; default 12 for h264, 18 for vp9, 20 for av1")
    edit.add_argument(
        "--mask", action=StoreOnce, type=text, metavar="IMAGE|VIDEO", help="white where the edit may act; elsewhere the source comes back exactly"
    )
    edit.add_argument(
        "--detail",
        default="auto",
        choices=("auto", "off"),
        help="auto: deliver at the source's size, with its own detail (default); off: the model's own pixels at the size of the edit",
    )
    edit.add_argument(
        "--anchor",
        default="auto",
        choices=("auto", "on", "off"),
        help="correct the colours of every frame by what the reference shows of the first; auto: if it shows an edit (default)",
    )
    edit.add_argument("--fps", type=positive_float, metavar="R", help="frame rate if --source is a folder of frames; default 24")
    edit.add_argument("--layers", type=text, metavar="SPEC", help=f"{LAYERS_HELP}; default: the layers the model was trained with")
    _add_fit(edit)
    _add_sampling(edit)
    _add_machine(edit)
    _add_float8(edit)
    _add_loras(edit)
    _add_executor(edit)


def _add_demo(commands) -> None:
    demo = _command(
        commands, "demo", run_demo, "edit two sample clips with the embedded models", "Writes the edited videos, a contact sheet and a report. Needs no GPU."
    )
    demo.add_argument("--output", default="out/demo", type=text, metavar="DIR", help="folder to write to; default out/demo")
    _add_sampling(demo)


def _add_eval(commands) -> None:
    evaluate = _command(
        commands,
        "eval",
        run_eval,
        "measure the quality of edits whose correct result is known",
        "Edits every clip of a manifest and writes report.json (PSNR inside and outside the edit, success rates, baselines) and sheet.png.",
    )
    evaluate.add_argument(
        "--manifest",
        required=True,
        type=text,
        metavar="PAIRS.jsonl|DIR",
        help="each line is a JSON object with source, reference, instruction, target (the correct result) and, optionally, mask; or a folder of pairs",
    )
    evaluate.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to")
    evaluate.add_argument("--layers", type=text, metavar="SPEC", help=f"{LAYERS_HELP}; default: the layers the model was trained with")
    evaluate.add_argument(
        "--reference-mode",
        default="given",
        choices=("given", "source_frame"),
        help="ablation: given uses the edited reference (default), source_frame the unedited first frame instead",
    )
    evaluate.add_argument(
        "--instruction-mode",
        default="given",
        choices=("given", "wrong", "empty"),
        help="ablation: given uses the clip's instruction (default), wrong another clip's, empty none",
    )
    evaluate.add_argument(
        "--raw-only",
        action="store_true",
        help="measure the model's own pixels alone, without delivery at the source's size and the baselines that belong to it",
    )
    evaluate.add_argument("--before", type=text, metavar="DIR", help="compare with an earlier evaluation of the same manifest: its --output folder")
    _add_fit(evaluate)
    _add_sampling(evaluate)
    _add_machine(evaluate)
    _add_float8(evaluate)
    _add_loras(evaluate)


def _add_train(commands) -> None:
    train = _command(
        commands, "train", run_train, "train a model with the settings of a recipe file", "An interrupted training resumes from its last checkpoint."
    )
    train.add_argument("config", metavar="CONFIG.yaml", type=text, help="recipe file; the repository's folder configs/ has examples")
    plan = train.add_argument_group("plan", "What the recipe will take, computed from shapes. The options below need --plan.")
    plan.add_argument("--plan", action="store_true", help="print trained weights, memory, hours and disk, and train nothing")
    plan.add_argument("--preset", choices=PRESET_NAMES, help="plan for a Wan of this size, in place of the checkpoint start_from, which need not exist")
    plan.add_argument("--vlm", choices=tuple(VLM_SIZES), help="size of the Qwen3-VL with --preset; default 8b")
    plan.add_argument(
        "--bucket",
        action="append",
        type=bucket,
        metavar="WxHxF",
        help="width, height and frames of the clips; can be repeated; default: those of the caches, or the checkpoint's edit size",
    )
    plan.add_argument("--states", choices=("bf16", "fp8"), help="data type of cached VLM states; default: the caches', or bf16")
    plan.add_argument("--pairs", type=positive_int, metavar="N", help="number of cached pairs; default: the caches', or 1000")
    plan.add_argument("--card", choices=CARD_NAMES, help="graphics card; default: the smallest of these that the recipe fits")
    plan.add_argument("--cards", type=positive_int, metavar="N", help="number of cards; default: 1, or 8 for a sharded recipe")
    plan.add_argument("--share", type=positive_float, metavar="X", help="assumed fraction of the card's peak speed that is reached; default 0.45")
    plan.add_argument("--json", "--output", dest="output", type=text, metavar="FILE.json", help="also write the figures to this file")


def _add_conversions(commands) -> None:
    init = _command(
        commands,
        "init-from-wan",
        run_init_from_wan,
        "convert a Wan T2V or Fun-Control checkpoint into a MiVE checkpoint to train from",
        "Shared layers are copied, new ones are initialised. The result cannot edit before it is trained.",
    )
    init.add_argument(
        "source",
        metavar="SRC",
        type=text,
        help="Wan2.1-T2V, Wan2.2-T2V-A14B or Wan-Fun-Control checkpoint: a file, the index of a sharded one, or a diffusers folder",
    )
    init.add_argument("destination", metavar="DST.safetensors", type=text, help="MiVE checkpoint to write")
    init.add_argument("--layers", type=text, default="first+last", metavar="SPEC", help=f"{LAYERS_HELP}; default first+last")
    vlm_help = f"the Qwen3-VL that the model will read: {', '.join(VLM_SIZES)}, tiny (the embedded one) or a folder with its config.json; default 8b"
    init.add_argument("--vlm", type=text, default="8b", metavar="SIZE|DIR", help=vlm_help)
    init.add_argument("--dtype", choices=DTYPES, help="data type of the new file; default: the source's, and bf16 if the source is fp8")
    quantize = _command(
        commands, "quantize", run_quantize, "store a MiVE checkpoint's large matrices in 8 bits", "Halves the size of a 16-bit file. Prints a report as JSON."
    )
    quantize.add_argument("source", metavar="SRC", type=text, help="MiVE checkpoint: a file, a folder, or the index of a sharded one")
    quantize.add_argument("destination", metavar="DST.safetensors", type=text, help="8-bit checkpoint to write")
    quantize.add_argument(
        "--format", default="fp8_scaled", choices=("fp8_scaled",), help="fp8_scaled: float8 with one scale per matrix, which ComfyUI reads natively; default"
    )


def _add_merge(commands) -> None:
    merge = _command(
        commands,
        "merge",
        run_merge,
        "add LoRAs to a MiVE checkpoint's weights, and write the sum as one file",
        "Reads LoRAs of MiVE and of Wan in the usual key formats. Prints a report as JSON.",
    )
    merge.add_argument("base", metavar="BASE", type=text, help="MiVE checkpoint: a file, a folder, or the index of a sharded one")
    merge.add_argument("loras", metavar="LORA[:STRENGTH]", nargs="+", type=lora, help="LoRA file and its strength, such as edit.safetensors:0.8; default 1")
    merge.add_argument("destination", metavar="OUT.safetensors", type=text, help="checkpoint to write")
    merge.add_argument(
        "--dtype",
        choices=(*DTYPES, "fp8"),
        help="data type of the new file; fp8: the blocks' matrices in scaled float8, as `mive quantize` stores them; default: the base's own",
    )


def _add_bench(commands) -> None:
    summary = "measure speed and memory"
    bench = commands.add_parser("bench", help=summary, description=_sentence(summary, "Each benchmark prints JSON.")).add_subparsers(
        required=True, title="benchmarks", metavar="WHAT", parser_class=Parser
    )
    dit = _command(
        bench,
        "dit",
        run_bench_dit,
        "time the DiT against diffusers' WanTransformer3DModel, or with --size alone",
        "The comparison runs in fp32 on a CPU, at the number of tokens given by --tokens.",
    )
    dit.add_argument("--tokens", type=positive_int, metavar="N", help="number of tokens in the comparison with diffusers; default 2048")
    _add_stage(dit)
    for name, summary in (
        ("vlm", "time Qwen3-VL on the clip and instruction of an edit"),
        ("vae", "time the VAE: encoding, decoding whole and in tiles"),
        ("edit", "time a whole edit and each of its stages"),
    ):
        _add_stage(_command(bench, name, run_bench_stage, summary))
    convert = _command(bench, "convert", run_bench_convert, "time init-from-wan against a plain copy of the same file, and measure its memory")
    convert.add_argument("--preset", default="1.3b", choices=("1.3b", "14b"), help="size of the model in the random test file; default 1.3b")
    convert.add_argument("--folder", type=text, metavar="DIR", help=FOLDER_HELP)
    convert.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="number of measurements; default 3")
    load = _command(bench, "load", run_bench_load, "measure time and peak memory of loading a model", "Loads a file of random weights in a separate process.")
    load.add_argument("--model", default="1.3b", choices=(*PRESET_NAMES, *VLM_SIZES), help="size of a DiT (tiny, 1.3b, 14b) or of a Qwen3-VL; default 1.3b")
    load.add_argument("--blocks", type=positive_int, metavar="N", help="use fewer blocks or layers than the model has")
    load.add_argument("--shards", type=positive_int, default=1, metavar="N", help="number of files that the weights are split into; default 1")
    load.add_argument("--fp8", action="store_true", help="store the Qwen3-VL's matrices in 8 bits")
    load.add_argument("--folder", type=text, metavar="DIR", help=FOLDER_HELP)
    growth = _command(
        bench,
        "growth",
        run_bench_growth,
        "measure how time and memory grow with the number of frames and the size",
        "Measures one forward of the DiT, whole and in context windows, on a CPU.",
    )
    growth.add_argument("--preset", default="tiny", choices=PRESET_NAMES, help="size of the DiT; default tiny")
    growth.add_argument("--size", type=size, default=(320, 192), metavar="WxH", help="size in pixels, multiples of 16; default 320x192")
    growth.add_argument("--blocks", type=positive_int, metavar="N", help=BLOCKS_HELP)
    growth.add_argument(
        "--window", type=positive_int, default=33, metavar="N", help="frames of a context window, 4n+1; windows overlap by a quarter; default 33"
    )
    growth.add_argument("--repeats", type=positive_int, default=1, metavar="N", help="number of measurements; default 1")
    growth.add_argument("--plot", type=text, metavar="FILE.png", help="also write a plot")
    long = _command(
        bench,
        "long",
        run_bench_long,
        "compare ways to edit clips longer than the model knows",
        "Edits every clip of a manifest in each way and measures quality over time, seams, time and memory.",
    )
    long.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="pairs with a target, of more frames than the model knows")
    long.add_argument("--way", action="append", default=[], type=text, help="only this way: stretches (as in `mive edit`), windows or latents; can be repeated")
    _add_fit(long)
    _add_sampling(long)
    _add_machine(long)
    _add_float8(long)
    card = _command(
        bench,
        "card",
        run_bench_card,
        "measure every stage of an edit at full size on a graphics card",
        "Uses random weights and compares each stage with the card's own measured peak speed.",
    )
    card.add_argument("--preset", default="14b", choices=PRESET_NAMES, help="size of the models; default 14b")
    card.add_argument("--size", type=size, default=(1280, 720), metavar="WxH", help="size in pixels, multiples of 16; default 1280x720")
    card.add_argument("--frames", type=positive_int, default=81, metavar="N", help="number of frames, 4n+1; default 81")
    card.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="device to measure; default cuda")
    card.add_argument("--dtype", default="bf16", choices=DTYPES, help="data type of weights and arithmetic; default bf16")
    card.add_argument("--blocks", type=positive_int, metavar="N", help=BLOCKS_HELP)
    card.add_argument(
        "--parts",
        type=text,
        default="",
        metavar="A,B",
        help="measure only these of speed, attention, dit, dit_fp8, vlm, training_block, vae, dit_1.3b, compiled; default: all",
    )
    card.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="number of measurements; default 3")
    cache = _command(
        bench,
        "cache",
        run_bench_cache,
        "time `mive data cache` on video files against its encoders alone",
        "Shows how much time reading, scaling and writing add to the models. Uses random weights.",
    )
    cache.add_argument("--preset", default="tiny", choices=PRESET_NAMES, help="size of the encoders; default tiny")
    cache.add_argument("--size", type=size, default=(96, 96), metavar="WxH", help="size of the encoded clips in pixels, multiples of 16; default 96x96")
    cache.add_argument("--stored-size", type=size, metavar="WxH", help="size of the video files, which are scaled to --size; default: the same")
    cache.add_argument("--frames", type=positive_int, default=17, metavar="N", help="number of frames of a clip, 4n+1; default 17")
    cache.add_argument("--pairs", type=positive_int, default=48, metavar="N", help="number of pairs of clips; default 48")
    cache.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="number of measurements; default 3")
    cache.add_argument("--folder", type=text, metavar="DIR", help=FOLDER_HELP)
    _add_machine(cache, attention=False)
    training = _command(
        bench,
        "train",
        run_bench_train,
        "measure the speed of training steps, and the share of time spent on loading data",
        "Runs steps of a recipe in a temporary folder, without checkpoints.",
    )
    training.add_argument("config", metavar="CONFIG.yaml", type=text, help="recipe file, as for `mive train`")
    training.add_argument("--steps", type=positive_int, default=30, metavar="N", help="steps to measure, after three warm-up steps; default 30")
    scaling = _command(
        bench,
        "scale",
        run_bench_scale,
        "estimate memory and time of full training on 8, 32 and 128 cards",
        "Computed from shapes, not measured. Also estimates the longest sequence that fits one card.",
    )
    scaling.add_argument("--preset", default="14b", choices=PRESET_NAMES, help="size of the DiT; default 14b")
    scaling.add_argument("--card", default="H100", choices=CARD_NAMES, help="graphics card; default H100")
    scaling.add_argument(
        "--share", type=positive_float, default=0.45, metavar="X", help="assumed fraction of the card's peak speed that is reached; default 0.45"
    )
    scaling.add_argument("--frames", type=positive_int, default=81, metavar="N", help="number of frames, 4n+1; default 81")
    for command in bench.choices.values():
        command.add_argument("--json", "--output", dest="output", type=text, metavar="FILE.json", help="also write the results to this file")


def _add_stage(parser: Parser) -> None:
    stage = parser.prog.split()[-1]
    parser.set_defaults(stage=stage)
    parser.add_argument("--preset", default="tiny", choices=PRESET_NAMES, help="size of the models, which have random weights; default tiny")
    default = "without it the DiT is compared with diffusers" if stage == "dit" else "default 96x96"
    parser.add_argument("--size", type=size, metavar="WxH", help=f"size in pixels, multiples of 16; {default}")
    parser.add_argument("--frames", type=positive_int, default=17, metavar="N", help="number of frames, 4n+1; default 17")
    parser.add_argument("--blocks", type=positive_int, metavar="N", help=BLOCKS_HELP)
    parser.add_argument("--repeats", type=positive_int, default=7, metavar="N", help="number of measurements; default 7")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="number of CPU threads; default: torch's choice")
    if stage == "edit":
        parser.add_argument("--steps", type=positive_int, metavar="N", help="number of sampling steps; default: the preset's")
    _add_machine(parser, attention=stage in ("dit", "edit"))


def _add_data(commands) -> None:
    summary = "make, rate and encode pairs of clips (before and after an edit) for training and evaluation"
    data = commands.add_parser("data", help=summary, description=_sentence(summary)).add_subparsers(
        required=True, title="commands", metavar="WHAT", parser_class=Parser
    )
    _add_published(data)
    _add_score(data)
    _add_compose(data)
    _add_cache(data)
    _add_synth(data)
    samples = _command(
        data,
        "samples",
        run_data_samples,
        "write a few pairs of an edit that the embedded models do not know, for a first training",
        "Four pairs to train on and two held-out ones: crops of the sample clip before and after a look with raster lines.",
    )
    samples.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: pairs/ and heldout/, both folders of pairs")
    for name, run, summary, details in (
        ("looks", run_data_looks, "make evaluation pairs from a real video with colour looks", "Applies eight looks that the embedded models were trained on."),
        (
            "strengths",
            run_data_strengths,
            "make evaluation pairs from a real video with colour looks of four strengths",
            "Applies the looks of `mive data looks --unseen` by 25, 50, 75 and 100 per cent; only the reference image shows by how much.",
        ),
        ("recolour", run_data_recolour, "make evaluation pairs from a real video with its green parts recoloured", "Green becomes red, blue and purple."),
    ):
        footage = _command(data, name, run, summary, details)
        footage.add_argument("--source", required=True, type=text, metavar="VIDEO|DIR", help="the video: a video file or a folder of frames")
        footage.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
        if name == "looks":
            footage.add_argument(
                "--unseen",
                action="store_true",
                help="apply eight looks that the models were not trained on; the instruction only refers to the reference image",
            )
        _add_fit(footage)
    objects = _command(
        data,
        "objects",
        run_data_objects,
        "make evaluation pairs of drawn objects that move over a real video",
        "An object is recoloured, removed or replaced, as the reference image shows. No such clip is trained on.",
    )
    objects.add_argument("--source", required=True, type=text, metavar="VIDEO|DIR", help="the video: a video file or a folder of frames")
    objects.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
    objects.add_argument("--num", type=positive_int, default=24, metavar="N", help="number of pairs; default 24")
    objects.add_argument("--seed", type=integer, default=0, metavar="N", help="random seed of the objects; default 0")
    objects.add_argument("--size", type=size, default=(160, 96), metavar="WxH", help="size in pixels, multiples of 16; default 160x96")
    objects.add_argument(
        "--frames", type=positive_int, default=17, metavar="N", help="number of frames, 4n+1; default 17; each pair takes another part of a longer video"
    )
    _add_challenge(data)


def _add_published(data) -> None:
    published = _command(
        data,
        "import",
        run_data_import,
        "write the manifest of a published dataset",
        "The dataset must be downloaded and unpacked. Rows without usable clips are listed in NAME.left_out.jsonl.",
    )
    published.add_argument("layout", choices=("openve", "senorita"), help="the dataset: OpenVE-3M or Senorita-2M")
    published.add_argument("--folder", required=True, type=text, metavar="DIR", help="the unpacked dataset, with its tables and videos")
    published.add_argument("--output", required=True, type=text, metavar="DIR/PAIRS.jsonl", help="manifest to write, .jsonl or .parquet, inside that folder")
    published.add_argument("--edit", action="append", default=[], type=text, help="import only this kind of edit, such as local_add; can be repeated")


def _add_score(data) -> None:
    score = _command(
        data,
        "score",
        run_data_score,
        "rate pairs with Qwen3-VL and keep the best",
        "The model rates each edit from 0 to 10, for following the instruction and for keeping the rest; the lower number counts. "
        "An interrupted run resumes; ratings are stored, so other limits cost nothing.",
    )
    score.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="manifest or folder of the pairs to rate")
    score.add_argument("--model", required=True, type=text, metavar="DIR", help="Hugging Face folder of a Qwen3-VL with its language head")
    score.add_argument(
        "--output", required=True, type=text, metavar="KEPT.jsonl", help="manifest of the kept pairs, .jsonl or .parquet, in a folder that contains the clips"
    )
    score.add_argument("--min-score", "--least", type=finite_float, default=9.3, metavar="X", help="lowest score to keep, of 10; default 9.3")
    score.add_argument("--max-per-kind", "--most", type=positive_int, default=4000, metavar="N", help="keep at most N pairs of each kind of edit; default 4000")
    _add_device(score)
    _add_executor(score)


def _add_compose(data) -> None:
    compose = _command(
        data,
        "compose",
        run_data_compose,
        "make training pairs by compositing people over other backgrounds",
        "Each person gives three pairs: remove the person, add the person, replace the background. An interrupted run resumes.",
    )
    compose.add_argument(
        "--people",
        required=True,
        type=text,
        metavar="PEOPLE.jsonl|DIR",
        help='clips of people: a file with a JSON object {"source", "mask"} per line, or a folder of videos (needs --segmenter)',
    )
    compose.add_argument(
        "--backgrounds",
        required=True,
        type=text,
        metavar="B.jsonl|DIR",
        help='backgrounds: a file with a JSON object {"source"} per line, optionally with an "instruction" that describes the scene, or a folder of videos',
    )
    compose.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
    compose.add_argument(
        "--segmenter", type=text, metavar="DIR", help="Hugging Face folder of a semantic segmentation model, which finds people in clips without a mask"
    )
    compose.add_argument("--store", default="video", choices=("video", "frames"), help="video: H.264 files (default); frames: lossless PNG files")
    compose.add_argument("--seed", type=integer, default=0, metavar="N", help="random seed for the choice of backgrounds and instructions; default 0")
    compose.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of the segmentation model; default cpu")
    _add_fit(compose)
    _add_executor(compose)


def _add_cache(data) -> None:
    cache = _command(
        data,
        "cache",
        run_data_cache,
        "encode pairs into VAE latents and VLM hidden states for `mive train`",
        "An interrupted run resumes; pairs that are in the cache are not encoded again.",
    )
    cache.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="manifest or folder of the pairs to encode")
    cache.add_argument(
        "--models",
        required=True,
        type=text,
        metavar="tiny|DIR",
        help="the embedded models, or a folder with dit.safetensors (only its config is read), vae.safetensors and vlm/",
    )
    cache.add_argument("--output", required=True, type=text, metavar="DIR", help="cache folder to write to")
    cache.add_argument(
        "--bucket",
        action="append",
        type=bucket,
        default=[],
        metavar="WxHxF",
        help="width, height and frames that clips are fitted to; can be repeated: each clip takes the bucket of the nearest aspect ratio "
        "that is not longer than the clip; default: the clip's own size and length",
    )
    cache.add_argument("--states", default="bf16", choices=("bf16", "fp8"), help="data type of stored VLM states; fp8 takes half the disk; default bf16")
    cache.add_argument("--negative", action="store_true", help="also store the states of an empty instruction, which the recipe key condition_dropout needs")
    _add_device(cache)
    _add_executor(cache)


def _add_synth(data) -> None:
    synth = _command(
        data,
        "synth",
        run_data_synth,
        "make pairs of drawn clips with moving shapes",
        "The embedded models are trained on such clips and evaluated on the heldout split.",
    )
    synth.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
    synth.add_argument("--num", type=positive_int, default=64, metavar="N", help="number of pairs; default 64")
    synth.add_argument(
        "--split", default="heldout", choices=("train", "heldout"), help="train: what models train on; heldout: never trained on; default heldout"
    )
    _add_drawn(
        synth,
        '"seen in reference", "enters late", "two alike", "instruction only", "no instruction", or, drawn from the heldout split only where named: '
        '"loose words", "vague words", "wrong words", "nothing asked"',
        "recolour, replace, remove, add, background or look",
    )


def _add_challenge(data) -> None:
    challenge = _command(
        data,
        "challenge",
        run_data_challenge,
        "make evaluation pairs that are unlike the training's in shapes, colours, motion and words",
        "Objects turn, grow and cross, over noise or a real video. The reference image decides; some instructions are vague, wrong or ask for nothing.",
    )
    challenge.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
    challenge.add_argument("--source", type=text, metavar="VIDEO|DIR", help="video behind the objects: a video file or a folder of frames; default: noise")
    challenge.add_argument("--num", type=positive_int, default=32, metavar="N", help="number of pairs; default 32, in which every kind and edit occurs")
    _add_drawn(
        challenge,
        '"seen in reference", "enters late", "two alike", "words alone", "vague words", "wrong words", "nothing asked" or "look strengths"',
        "recolour, replace, remove, background, look, keep or absent",
    )


def _add_drawn(parser: Parser, kinds: str, edits: str) -> None:
    """Adds the options of generators of clips; kinds and edits are listed in the help."""
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="random seed of the clips; default 0")
    parser.add_argument("--size", type=size, default=(96, 96), metavar="WxH", help="size in pixels, multiples of 16; default 96x96")
    parser.add_argument("--frames", type=positive_int, default=17, metavar="N", help="number of frames, 4n+1; default 17")
    parser.add_argument("--kind", action="append", default=[], type=text, help=f"only this kind of clip: {kinds}; can be repeated")
    parser.add_argument("--edit", action="append", default=[], type=text, help=f"only this edit: {edits}; can be repeated")


def _add_fit(parser: Parser) -> None:
    parser.add_argument("--size", type=size, metavar="WxH", help="output size in pixels, multiples of 16; default: the source's, to the nearest multiples")
    parser.add_argument(
        "--frames", type=positive_int, metavar="N", help="number of frames, 4n+1 such as 17 or 81; default: all, minus up to 3 at the end to reach 4n+1"
    )


def _add_sampling(parser: Parser) -> None:
    parser.add_argument(
        "--models",
        default=DEFAULT_MODELS,
        type=text,
        metavar="tiny|DIR",
        help="the embedded models, or a folder with dit.safetensors, vae.safetensors and vlm/; default tiny",
    )
    parser.add_argument("--steps", type=positive_int, metavar="N", help="number of sampling steps; default: the checkpoint's")
    parser.add_argument("--cfg", type=finite_float, metavar="X", help="classifier-free guidance scale, 1: no guidance; default: the checkpoint's")
    parser.add_argument("--shift", type=positive_float, metavar="X", help="timestep shift, above 1: more steps at high noise; default: the checkpoint's")
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="random seed of the noise; default 0")


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device to compute on; default cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="data type of weights and arithmetic; default fp32")


def _add_machine(parser: Parser, attention: bool = True) -> None:
    _add_device(parser)
    if not attention:
        return
    parser.add_argument(
        "--attention",
        default="auto",
        type=text,
        metavar="NAME",
        help="attention kernel: auto or sdpa (torch's fastest), sage (the package sageattention, tested at first use) or matmul (two products); default auto",
    )
    parser.add_argument("--compile", action="store_true", help="compile the DiT's blocks with torch.compile")


def _add_loras(parser: Parser) -> None:
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        type=lora,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="apply a LoRA to the DiT, such as edit.safetensors:0.8; default strength 1; can be repeated",
    )


def _add_float8(parser: Parser) -> None:
    parser.add_argument(
        "--fp8",
        default="scaled_back",
        choices=FLOAT8_MODES,
        help="matrices stored in 8 bits: scaled_back to --dtype when loaded (default), kept in 8 bits and scaled back at each use, or multiplied in 8 bits",
    )


def _add_executor(parser: Parser) -> None:
    parser.add_argument(
        "--ray", type=text, metavar="local|ADDRESS", help="distribute the work with Ray, on this machine or on the cluster at ADDRESS; default: one process"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=2,
        metavar="N",
        help="number of Ray workers; each loads the models and, with --device cuda, takes a GPU; default 2",
    )


def _add_study(commands) -> None:
    summary = "run a whole experiment"
    study = commands.add_parser("study", help=summary, description=_sentence(summary)).add_subparsers(
        required=True, title="studies", metavar="WHAT", parser_class=Parser
    )
    from_wan = _command(
        study,
        "from-wan",
        run_study_from_wan,
        "compare ways from a text-to-video Wan to an editor, at a small size",
        "Trains a small Wan, converts it and trains it in several ways, by the other commands. Takes hours on a CPU; an interrupted study resumes.",
    )
    from_wan.set_defaults(main=main)
    from_wan.add_argument("--output", required=True, type=text, metavar="DIR", help="folder for the report: JSON, curves and strips")
    from_wan.add_argument("--work", required=True, type=text, metavar="DIR", help="folder for everything else; what is there is not made again")
    from_wan.add_argument("--wan", type=text, metavar="DIR", help="diffusers folder of a small Wan; default: it is trained first")
    from_wan.add_argument("--arm", action="append", default=[], type=text, metavar="NAME", help="only this arm, such as lora; can be repeated")
    from_wan.add_argument("--seed", action="append", type=int, metavar="N", help="only this seed; can be repeated")
    from_wan.add_argument("--steps", type=positive_int, metavar="N", help="number of training steps of every arm; default 400")


def _command(commands, name: str, run, summary: str, details: str = "") -> Parser:
    """Adds a command that calls run(arguments). Its --help shows summary and details, the list of commands only the summary."""
    parser = commands.add_parser(name, help=summary, description=_sentence(summary, details))
    parser.set_defaults(run=run)
    return parser


def _sentence(summary: str, details: str = "") -> str:
    return f"{summary[0].upper()}{summary[1:]}. {details}".strip()


def _print_message(kind: str, message: object) -> None:
    """Writes "mive: KIND: message" to stderr, as one line."""
    sys.stderr.write(f"mive: {kind}: {' '.join(str(message).split())}\n")


def text(value: str) -> str:
    """Argument type: text that can be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"not valid Unicode: a lone surrogate at character {error.start}") from None
    return value


def positive_int(value: str) -> int:
    """Argument type: a whole number of 1 or more."""
    number = integer(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {value}; expected 1 or more")
    return number


def integer(value: str) -> int:
    """Argument type: a whole number of at most 18 digits."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected a whole number")
    return int(value)


def finite_float(value: str) -> float:
    """Argument type: a number, but not NaN or infinity."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected a finite number")
    return number


def positive_float(value: str) -> float:
    """Argument type: a finite number above 0."""
    number = finite_float(value)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"got {value}; expected more than 0")
    return number


def lora(value: str) -> tuple[str, float]:
    """Argument type: FILE or FILE:STRENGTH -> (path, strength)."""
    match = re.fullmatch(r"(.+):([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)", value)
    return (text(match[1]), finite_float(match[2])) if match else (text(value), 1.0)


def keyframe(value: str) -> tuple[int, str]:
    """Argument type: NUMBER:IMAGE -> (number, path)."""
    match = re.fullmatch(r"([0-9]{1,9}):(.+)", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:80]!r}; expected the frame's number and an image, such as 40:frame40.png")
    return int(match[1]), text(match[2])


def size(value: str) -> tuple[int, int]:
    """Argument type: WIDTHxHEIGHT -> (width, height)."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected WIDTHxHEIGHT, such as 192x112")
    return int(match[1]), int(match[2])


def bucket(value: str) -> tuple[int, int, int]:
    """Argument type: WIDTHxHEIGHTxFRAMES with sides that are multiples of 16 and 4n+1 frames -> (width, height, frames)."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})[xX]([0-9]{1,6})", value)
    if not match:
        raise argparse.ArgumentTypeError(f"got {value[:40]!r}; expected WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    width, height, frames = (int(part) for part in match.groups())
    if width % 16 or height % 16 or frames % 4 != 1 or not width or not height:
        raise argparse.ArgumentTypeError(f"got {value}; expected sides that are multiples of 16 and 4n+1 frames")
    return width, height, frames
