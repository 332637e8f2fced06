"""The commands that measure, and the studies."""

from collections.abc import Callable

from ..commands.bench import (
    CARD_DEFAULTS,
    run_bench_cache,
    run_bench_card,
    run_bench_convert,
    run_bench_dit,
    run_bench_growth,
    run_bench_length,
    run_bench_load,
    run_bench_long,
    run_bench_parallel,
    run_bench_scale,
    run_bench_stage,
    run_bench_train,
)
from ..commands.study import run_study_formats, run_study_from_wan, run_study_layers, run_study_sizes
from ..config import VLM_SIZES
from .options import BLOCKS_HELP, CARD_NAMES, DTYPES, FOLDER_HELP, PRESET_NAMES, add_fit, add_float8, add_machine, add_sampling
from .parser import Parser, add_command, add_group, positive_float, positive_int, size, text


def add_bench(commands) -> None:
    bench = add_group(commands, "bench", "measure speed and memory", "benchmarks", "Each benchmark prints JSON.")
    dit = add_command(
        bench,
        "dit",
        run_bench_dit,
        "time the DiT against diffusers' WanTransformer3DModel, or with --size alone",
        "The comparison runs in fp32 on a CPU, at the number of tokens given by --tokens.",
    )
    dit.add_argument("--tokens", type=positive_int, metavar="N", help="number of tokens in the comparison with diffusers; default 2048")
    add_stage(dit)
    for name, summary in (
        ("vlm", "time Qwen3-VL on the clip and instruction of an edit"),
        ("vae", "time the VAE: encoding, decoding whole, in pieces and in tiles, and delivery"),
        ("edit", "time a whole edit and each of its stages"),
    ):
        add_stage(add_command(bench, name, run_bench_stage, summary))
    convert = add_command(bench, "convert", run_bench_convert, "time init-from-wan against a plain copy of the same file, and measure its memory")
    convert.add_argument("--preset", default="1.3b", choices=("1.3b", "14b"), help="size of the model in the random test file; default 1.3b")
    convert.add_argument("--folder", type=text, metavar="DIR", help=FOLDER_HELP)
    convert.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="number of measurements; default 3")
    load = add_command(bench, "load", run_bench_load, "measure time and peak memory of loading a model", "Loads random weights in a separate process.")
    load.add_argument("--model", default="1.3b", choices=(*PRESET_NAMES, *VLM_SIZES), help="size of a DiT (tiny, 1.3b, 14b) or of a Qwen3-VL; default 1.3b")
    load.add_argument("--blocks", type=positive_int, metavar="N", help="use fewer blocks or layers than the model has")
    load.add_argument("--shards", type=positive_int, default=1, metavar="N", help="number of files that the weights are split into; default 1")
    load.add_argument("--fp8", action="store_true", help="store the Qwen3-VL's matrices in 8 bits")
    load.add_argument("--folder", type=text, metavar="DIR", help=FOLDER_HELP)
    growth = add_command(
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
    long = add_command(
        bench,
        "long",
        run_bench_long,
        "compare ways to edit clips longer than the model knows",
        "Edits every clip of a manifest in each way and measures quality over time, seams, time and memory.",
    )
    long.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="pairs with a target, of more frames than the model knows")
    long.add_argument("--way", action="append", default=[], type=text, help="only this way: stretches (as in `mive edit`), windows or latents; can be repeated")
    add_fit(long)
    add_sampling(long)
    add_machine(long)
    add_float8(long)
    length = add_command(
        bench,
        "length",
        run_bench_length,
        "measure how time and memory of an edit from file to file grow with the length of the clip",
        "Edits a clip of the samples, played to and fro, with the embedded models on a CPU. Each length is measured in a process of its own.",
    )
    length.add_argument("--size", type=size, default=(640, 360), metavar="WxH", help="size of the clip in pixels; default 640x360")
    length.add_argument("--edit-size", type=size, default=(160, 96), metavar="WxH", help="size of the edit, multiples of 16; default 160x96")
    length.add_argument("--frames", action="append", type=positive_int, metavar="N", help="a length, 4n+1; can be repeated; default 33, 81, 161 and 321")
    length.add_argument("--steps", type=positive_int, metavar="N", help="number of sampling steps; default: the model's")
    card = add_command(
        bench,
        "card",
        run_bench_card,
        "measure every stage of an edit at full size on a graphics card",
        "Uses random weights and compares each stage with the card's own measured peak speed.",
    )
    default = CARD_DEFAULTS
    card.add_argument("--all", action="store_true", help="measure all models, sizes and formats, a training step and an edit, beside the goals for them")
    card.add_argument("--scale", choices=("real", "small"), help="with --all: real shapes, or small ones that a CPU measures in a minute; default real")
    card.add_argument("--budget", type=positive_float, metavar="S", help="with --all: seconds; what no longer fits is left out; default 460")
    card.add_argument("--preset", default=default["preset"], choices=PRESET_NAMES, help="size of the models; default 14b")
    card.add_argument("--size", type=size, default=default["size"], metavar="WxH", help="size in pixels, multiples of 16; default 1280x720")
    card.add_argument("--frames", type=positive_int, default=default["frames"], metavar="N", help="number of frames, 4n+1; default 81")
    card.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="device to measure; default cuda")
    card.add_argument("--dtype", default=default["dtype"], choices=DTYPES, help="data type of weights and arithmetic; default bf16")
    card.add_argument("--blocks", type=positive_int, metavar="N", help=BLOCKS_HELP)
    card.add_argument(
        "--parts",
        type=text,
        default=default["parts"],
        metavar="A,B",
        help="measure only these of speed, attention, dit, dit_fp8, vlm, training_block, vae, dit_1.3b, compiled; default: all",
    )
    card.add_argument("--repeats", type=positive_int, default=default["repeats"], metavar="N", help="number of measurements; default 3")
    cache = add_command(
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
    add_machine(cache, attention=False)
    training = add_command(
        bench,
        "train",
        run_bench_train,
        "measure the speed of training steps, and the share of time spent on loading data",
        "Runs steps of a recipe in a temporary folder, without checkpoints.",
    )
    training.add_argument("config", metavar="CONFIG.yaml", type=text, help="recipe file, as for `mive train`")
    training.add_argument("--steps", type=positive_int, default=30, metavar="N", help="steps to measure, after three warm-up steps; default 30")
    scaling = add_command(
        bench,
        "scale",
        run_bench_scale,
        "estimate memory and time of full training on 8, 32 and 128 cards",
        "Computed from shapes, not measured. Also estimates the longest sequence that fits one card.",
    )
    add_on_paper(scaling)
    parallel = add_command(
        bench,
        "parallel",
        run_bench_parallel,
        "estimate memory and time of `mive edit --sequence-parallel` on 1, 2, 4 and 8 cards",
        "Computed from shapes, not measured. In bf16, the DiT alone.",
    )
    parallel.add_argument("--size", type=size, default=(1280, 720), metavar="WxH", help="size in pixels, multiples of 16; default 1280x720")
    add_on_paper(parallel)
    for command in bench.choices.values():
        command.add_argument("--json", "--output", dest="output", type=text, metavar="FILE.json", help="also write the results to this file")


def add_stage(parser: Parser) -> None:
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
    add_machine(parser, attention=stage in ("dit", "edit"))


def add_on_paper(parser: Parser) -> None:
    """Adds what an estimate from shapes is made for."""
    parser.add_argument("--preset", default="14b", choices=PRESET_NAMES, help="size of the DiT; default 14b")
    parser.add_argument("--card", default="H100", choices=CARD_NAMES, help="graphics card; default H100")
    parser.add_argument(
        "--share", type=positive_float, default=0.45, metavar="X", help="assumed fraction of the card's peak speed that is reached; default 0.45"
    )
    parser.add_argument("--frames", type=positive_int, default=81, metavar="N", help="number of frames, 4n+1; default 81")


def add_study(commands, main: Callable[[list[str]], int]) -> None:
    study = add_group(commands, "study", "run a whole experiment", "studies")
    from_wan = add_command(
        study,
        "from-wan",
        run_study_from_wan,
        "compare ways from a text-to-video Wan to an editor, at a small size",
        "Trains a small Wan, converts it and trains it in several ways, by the other commands. Takes hours on a CPU; an interrupted study resumes.",
    )
    from_wan.set_defaults(main=main)
    from_wan.add_argument("--output", required=True, type=text, metavar="DIR", help="folder for the report: JSON, curves and strips")
    add_runs(from_wan, "lora")
    from_wan.add_argument("--wan", type=text, metavar="DIR", help="diffusers folder of a small Wan; default: it is trained first")
    from_wan.add_argument("--steps", type=positive_int, metavar="N", help="number of training steps of every arm; default 400")
    layers = add_command(
        study,
        "layers",
        run_study_layers,
        "measure what each layer of a VLM gives a DiT that edits, at a small size",
        "Trains a VLM by next-token prediction alone, then a small DiT on the states of each arm's layers. Takes hours on a CPU; an interrupted study resumes.",
    )
    layers.add_argument("--output", required=True, type=text, metavar="DIR", help="folder for the report: JSON, table, figure, strips and the VLM")
    add_runs(layers, "first_last")
    layers.add_argument("--vlm", type=text, metavar="DIR", help="folder of the study's VLM; default: it is trained first")
    layers.add_argument("--hours", type=positive_float, metavar="H", help="after so many hours, each process's counted, no further run begins; default 8")
    layers.add_argument("--processes", type=positive_int, default=1, metavar="N", help="number of runs at once, each on one CPU thread; default 1")
    layers.add_argument("--steps", type=positive_int, metavar="N", help="number of training steps of every run; default 1500")
    layers.add_argument("--clips", type=positive_int, metavar="N", help="number of training clips; default 4096")
    layers.add_argument("--heldout", type=positive_int, metavar="N", help="number of held-out clips; default 192")
    formats = add_command(
        study,
        "formats",
        run_study_formats,
        "compare the formats of `mive quantize` with the embedded models: size, error of a forward, quality of edits",
        "Also measures the error that single layers make when only they are quantised. Takes minutes on a CPU.",
    )
    formats.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="pairs with a target")
    formats.add_argument("--num", type=positive_int, default=8, metavar="N", help="number of pairs, the first of the manifest; default 8")
    formats.add_argument("--json", "--output", dest="output", required=True, type=text, metavar="FILE.json", help="report to write")
    sizes = add_command(
        study,
        "sizes",
        run_study_sizes,
        "compare edits at 1/1, 1/2, 1/3 and 1/4 of the delivered side: quality and time",
        "Also counts what each size takes of a forward of the 14B at 720p. Takes minutes on a CPU with the embedded models.",
    )
    sizes.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="pairs with a target")
    sizes.add_argument("--models", default="tiny", type=text, metavar="tiny|DIR", help="the embedded models, or a folder of models; default tiny")
    sizes.add_argument("--num", type=positive_int, default=8, metavar="N", help="number of pairs, the first of the manifest; default 8")
    sizes.add_argument("--json", "--output", dest="output", required=True, type=text, metavar="FILE.json", help="report to write")


def add_runs(study: Parser, example: str) -> None:
    """Adds the work folder of a study that trains, and the choice of its runs."""
    study.add_argument("--work", required=True, type=text, metavar="DIR", help="folder for everything else; what is there is not made again")
    study.add_argument("--arm", action="append", default=[], type=text, metavar="NAME", help=f"only this arm, such as {example}; can be repeated")
    study.add_argument("--seed", action="append", type=int, metavar="N", help="only this seed; can be repeated")
