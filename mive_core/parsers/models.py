"""The commands that edit, evaluate, train, inspect and convert."""

from ..commands.inspect import run_inspect_attention, run_inspect_layers
from ..commands.judge import run_judge
from ..commands.models import run_demo, run_distill, run_edit, run_eval, run_init_from_wan, run_inspect, run_merge, run_quantize, run_train
from ..config import VLM_SIZES
from .options import (
    CARD_NAMES,
    CODECS,
    DEFAULT_MODELS,
    DTYPES,
    LAYERS_HELP,
    PRESET_NAMES,
    QUANTIZE_FORMATS,
    RUBRICS,
    add_benchmark,
    add_device,
    add_encoding,
    add_executor,
    add_fit,
    add_float8,
    add_loras,
    add_machine,
    add_sampling,
)
from .parser import Parser, StoreOnce, add_command, bucket, integer, keyframe, lora, positive_float, positive_int, text


def add_inspect(commands) -> None:
    inspect = add_command(commands, "inspect", run_inspect, "show what a checkpoint file, or each one in a folder, contains", "Prints JSON.")
    inspect.add_argument("path", metavar="FILE|DIR", type=text, help=".safetensors or .gguf file, or a folder of them")
    add_inspect_layers(inspect)
    add_inspect_attention(inspect)


def add_inspect_layers(inspect: Parser) -> None:
    layers = inspect.add_nested(
        "layers",
        run_inspect_layers,
        "where each layer of a VLM sees what an instruction names in an image",
        "Writes layers.json, plot.png and a heat map for each layer. With a mask: how much of the affinity of the instruction's and the image's tokens "
        "falls inside it (the attention mask ratio of MiVE, arXiv 2605.14664). Each layer's weights are read when it runs, so memory never holds two.",
    )
    layers.add_argument(
        "--models",
        default=DEFAULT_MODELS,
        type=text,
        metavar="tiny|DIR",
        help="the embedded VLM, a folder of models with vlm/, or the Hugging Face folder of a Qwen3-VL; default tiny",
    )
    layers.add_argument("--image", required=True, action=StoreOnce, type=text, metavar="IMAGE", help="the image")
    layers.add_argument("--instruction", required=True, action=StoreOnce, type=text, metavar="TEXT", help='what to look for, such as "make the grass purple"')
    layers.add_argument("--mask", action=StoreOnce, type=text, metavar="IMAGE", help="white where the thing is that the instruction names; of the image's size")
    layers.add_argument(
        "--layers", default="1:", type=text, metavar="SPEC", help="layers, such as 1,-1 or 0:36:6; 0 is the input embedding; default: 1 to the last"
    )
    layers.add_argument("--output", required=True, action=StoreOnce, type=text, metavar="DIR", help="folder to write to")
    add_device(layers)


def add_inspect_attention(inspect: Parser) -> None:
    attention = inspect.add_nested(
        "attention",
        run_inspect_attention,
        "what the DiT's target tokens attend to in an edit: condition, reference or target, by block and step",
        "Edits the first stretch of a clip, and writes attention.json and attention.png instead of a video. The attention to the condition tokens is "
        "divided among the VLM's layers by the norms of their parts of each token.",
    )
    attention.add_argument(
        "--models",
        default=DEFAULT_MODELS,
        type=text,
        metavar="tiny|DIR",
        help="the embedded models, or a folder with dit.safetensors, vae.safetensors and vlm/",
    )
    attention.add_argument("--source", required=True, action=StoreOnce, type=text, metavar="VIDEO|DIR", help="the video to edit")
    attention.add_argument("--reference", required=True, action=StoreOnce, type=text, metavar="IMAGE", help="the video's first frame, already edited")
    attention.add_argument("--instruction", required=True, action=StoreOnce, type=text, metavar="TEXT", help="the edit in words")
    attention.add_argument("--output", required=True, action=StoreOnce, type=text, metavar="DIR", help="folder to write to")
    attention.add_argument("--rows", type=positive_int, default=64, metavar="N", help="number of target tokens that are looked at; default 64")
    attention.add_argument("--steps", type=positive_int, metavar="N", help="number of sampling steps; default: the checkpoint's")
    attention.add_argument("--seed", type=integer, default=0, metavar="N", help="random seed of the noise and of the tokens; default 0")
    attention.add_argument("--layers", type=text, metavar="SPEC", help=f"{LAYERS_HELP}; default: the layers the model was trained with")
    add_fit(attention)
    add_device(attention)
    add_float8(attention)
    attention.set_defaults(attention="auto", compile=False)


def add_edit(commands) -> None:
    edit = add_command(
        commands,
        "edit",
        run_edit,
        "edit a video, given an instruction and the edited first frame",
        "Takes either --source, --reference and --instruction for one video, or --manifest or --benchmark for many.",
    )
    edit.set_defaults(alone="add --sequence-parallel, or start one process")
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
    add_benchmark(edit)
    edit.add_argument(
        "--output",
        required=True,
        action=StoreOnce,
        type=text,
        metavar="OUT.mp4|DIR",
        help="the video to write: .mp4, .mov, .mkv, .webm or .gif; without a suffix a folder of PNG; with --manifest or --benchmark a folder of videos",
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
    add_fit(edit)
    add_sampling(edit)
    add_machine(edit)
    add_float8(edit)
    add_loras(edit)
    add_executor(edit)
    edit.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="share the tokens of each edit among the processes of `torchrun --nproc-per-node N -m mive_core edit ...`, one GPU each with --device cuda",
    )


def add_demo(commands) -> None:
    demo = add_command(
        commands, "demo", run_demo, "edit two sample clips with the embedded models", "Writes the edited videos, a contact sheet and a report. Needs no GPU."
    )
    demo.add_argument("--output", default="out/demo", type=text, metavar="DIR", help="folder to write to; default out/demo")
    add_sampling(demo)


def add_eval(commands) -> None:
    evaluate = add_command(
        commands,
        "eval",
        run_eval,
        "edit the clips of a manifest or of a benchmark and measure the quality of the edits",
        "Writes report.json and sheet.png. Where the correct result is known: PSNR, success rates, baselines; else what needs none of it.",
    )
    evaluate.add_argument(
        "--manifest",
        type=text,
        metavar="PAIRS.jsonl|DIR",
        help="each line is a JSON object with source, reference, instruction, target (the correct result) and, optionally, mask; or a folder of pairs",
    )
    add_benchmark(evaluate)
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
    add_fit(evaluate)
    add_sampling(evaluate)
    add_machine(evaluate)
    add_float8(evaluate)
    add_loras(evaluate)


def add_judge(commands) -> None:
    judge = add_command(
        commands,
        "judge",
        run_judge,
        "let a local Qwen3-VL give scores to edits",
        "Reads every edit twice, the second time with its frames in another order, and reports mean scores and the agreement of the two readings. "
        "An interrupted run resumes.",
    )
    judge.add_argument("--manifest", type=text, metavar="PAIRS.jsonl|DIR", help="manifest or folder of the pairs; without --edited their targets are judged")
    add_benchmark(judge, references=False)
    judge.add_argument("--edited", type=text, metavar="DIR", help="the edits: the --output folder of `mive eval` or `mive edit`, or videos NAME.mp4")
    judge.add_argument(
        "--rubric",
        default="mive",
        choices=RUBRICS,
        help="mive: six scores from 0 to 10 (default); openve: three from 1 to 5; refvie: three from 1 to 5, with the reference image",
    )
    judge.add_argument(
        "--model", required=True, type=text, metavar="DIR|tiny", help="Hugging Face folder of a Qwen3-VL; tiny: the embedded one, which only shows the flow"
    )
    judge.add_argument("--output", required=True, type=text, metavar="SCORES.json", help="report to write; each reading is kept in NAME.readings.jsonl")
    add_device(judge)
    add_executor(judge)


def add_train(commands) -> None:
    train = add_command(
        commands, "train", run_train, "train a model with the settings of a recipe file", "An interrupted training resumes from its last checkpoint."
    )
    train.set_defaults(alone=None)
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


def add_distill(commands) -> None:
    distill = add_command(
        commands,
        "distill",
        run_distill,
        "train a LoRA with which a MiVE takes few steps without guidance",
        "Encodes the pairs, writes a recipe and trains with it, in the folder WORK. An interrupted run resumes with the same command.",
    )
    train = "`mive train configs/distill.yaml` in several processes"
    distill.set_defaults(alone=f"encode the pairs with `mive data cache --negative`, then start {train}")
    add_encoding(distill)
    distill.add_argument("--output", required=True, type=text, metavar="LORA.safetensors", help="LoRA to write; `mive edit --lora` samples as it was made for")
    distill.add_argument("--work", type=text, metavar="DIR", help="folder of cache, recipe and checkpoints; default: the output's name without .safetensors")
    distill.add_argument("--steps", dest="student_steps", type=positive_int, default=4, metavar="N", help="sampling steps that the LoRA is for; default 4")
    distill.add_argument("--teacher-steps", type=positive_int, default=8, metavar="N", help="steps of the editor itself in place of each of these; default 8")
    distill.add_argument("--teacher-cfg", type=positive_float, metavar="X", help="guidance scale of the editor itself; default: the checkpoint's")
    distill.add_argument("--num-steps", type=positive_int, default=2000, metavar="N", help="optimizer steps; default 2000")
    distill.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="pairs per optimizer step; default 1")
    distill.add_argument("--rank", dest="lora_rank", type=positive_int, default=32, metavar="N", help="rank of the LoRA; default 32")
    distill.add_argument("--learning-rate", type=positive_float, default=1e-4, metavar="X", help="peak learning rate; default 1e-4")


def add_conversions(commands) -> None:
    init = add_command(
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
    quantize = add_command(
        commands,
        "quantize",
        run_quantize,
        "store a MiVE checkpoint's large matrices in 8 or 4 bits",
        "Halves the size of a 16-bit file, or more. ComfyUI reads all formats natively. Prints a report as JSON.",
    )
    quantize.add_argument("source", metavar="SRC", type=text, help="MiVE checkpoint: a file, a folder, or the index of a sharded one")
    quantize.add_argument("destination", metavar="DST.safetensors", type=text, help="checkpoint to write")
    quantize.add_argument(
        "--format",
        default="fp8",
        choices=QUANTIZE_FORMATS,
        help="fp8: float8 with one scale per matrix; int8: rotated rows with a scale each, from Turing cards on; mxfp8 and nvfp4: scales per block, for "
        "Blackwell cards, by the package comfy-kitchen; int8_unrotated; default fp8",
    )
    quantize.add_argument("--keep-blocks", type=integer, metavar="N", help="leave the first N and the last N blocks as they are; default 1 for nvfp4, else 0")


def add_merge(commands) -> None:
    merge = add_command(
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
