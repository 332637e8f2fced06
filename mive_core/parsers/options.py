"""Options that several commands share."""

from .parser import Parser, bucket, finite_float, integer, lora, positive_float, positive_int, size, text

DEFAULT_MODELS = "tiny"
DTYPES, PRESET_NAMES = ("bf16", "fp16", "fp32"), ("tiny", "1.3b", "14b")
# The next four repeat train/budget.py, formats/float8.py, formats/quantize.py and media/encode.py, whose import would load torch.
CARD_NAMES = ("H100", "A100", "RTX 4090", "RTX 3090", "RTX 4080")
FLOAT8_MODES = ("scaled_back", "kept", "multiplied")
QUANTIZE_FORMATS = ("fp8", "mxfp8", "nvfp4", "int8", "int8_unrotated", "fp8_scaled")  # the last is an earlier name of the first
CODECS = ("h264", "ffv1", "prores", "prores4444", "vp9", "av1", "gif")
LAYERS_HELP = "VLM layers to read: first+last, 1,-1, last or 0:36:6"
BLOCKS_HELP = "use fewer blocks than the preset has"
BENCHMARKS = ("openve", "refvie", "editverse", "five")  # repeats data/benchmarks.py
RUBRICS = ("mive", "openve", "refvie")  # repeats data/rubrics.py
FOLDER_HELP = "folder for the test files, which are deleted afterwards; default: the system's temporary folder"


def add_drawn(parser: Parser, kinds: str, edits: str) -> None:
    """Adds the options of generators of clips; kinds and edits are listed in the help."""
    parser.add_argument("--seed", type=integer, default=0, metavar="N", help="random seed of the clips; default 0")
    parser.add_argument("--size", type=size, default=(96, 96), metavar="WxH", help="size in pixels, multiples of 16; default 96x96")
    parser.add_argument("--frames", type=positive_int, default=17, metavar="N", help="number of frames, 4n+1; default 17")
    parser.add_argument("--kind", action="append", default=[], type=text, help=f"only this kind of clip: {kinds}; can be repeated")
    parser.add_argument("--edit", action="append", default=[], type=text, help=f"only this edit: {edits}; can be repeated")


def add_fit(parser: Parser) -> None:
    parser.add_argument("--size", type=size, metavar="WxH", help="output size in pixels, multiples of 16; default: the source's, to the nearest multiples")
    parser.add_argument(
        "--frames", type=positive_int, metavar="N", help="number of frames, 4n+1 such as 17 or 81; default: all, minus up to 3 at the end to reach 4n+1"
    )


def add_benchmark(parser: Parser, references: bool = True) -> None:
    """Adds the options that name a published benchmark in place of a manifest."""
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="OpenVE-Bench, RefVIE-Bench, EditVerseBench or FiVE-Bench, in place of a manifest")
    parser.add_argument("--folder", type=text, metavar="DIR", help="the unpacked benchmark")
    if not references:
        return
    parser.add_argument(
        "--references", type=text, metavar="DIR", help="edited first frames of the benchmark's clips, NAME.png each; without one the unedited frame is taken"
    )


def add_sampling(parser: Parser) -> None:
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


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device to compute on; default cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="data type of weights and arithmetic; default fp32")


def add_machine(parser: Parser, attention: bool = True) -> None:
    add_device(parser)
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


def add_encoding(parser: Parser) -> None:
    """Adds the options of encoding pairs into a cache: which, with which models, how and on which machine."""
    parser.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl", help="manifest or folder of the pairs")
    parser.add_argument(
        "--models", required=True, type=text, metavar="tiny|DIR", help="the embedded models, or a folder with dit.safetensors, vae.safetensors and vlm/"
    )
    parser.add_argument(
        "--bucket",
        action="append",
        type=bucket,
        default=[],
        metavar="WxHxF",
        help="width, height and frames that clips are fitted to; can be repeated: each clip takes the bucket of the nearest aspect ratio "
        "that is not longer than the clip; default: the clip's own size and length",
    )
    parser.add_argument("--states", default="bf16", choices=("bf16", "fp8"), help="data type of stored VLM states; fp8 takes half the disk; default bf16")
    add_device(parser)
    add_executor(parser)


def add_loras(parser: Parser) -> None:
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        type=lora,
        default=[],
        metavar="FILE[:STRENGTH]",
        help="apply a LoRA to the DiT, such as edit.safetensors:0.8; default strength 1; can be repeated",
    )


def add_float8(parser: Parser) -> None:
    parser.add_argument(
        "--fp8",
        default="scaled_back",
        choices=FLOAT8_MODES,
        help="matrices stored in 8 bits: scaled_back to --dtype when loaded (default), kept in 8 bits and scaled back at each use, or multiplied in 8 bits",
    )


def add_executor(parser: Parser) -> None:
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
