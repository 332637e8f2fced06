"""The commands that make and prepare pairs."""

from ..commands.data import (
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
from .options import add_device, add_drawn, add_encoding, add_executor, add_fit
from .parser import add_command, add_group, finite_float, integer, positive_int, size, text


def add_data(commands) -> None:
    data = add_group(commands, "data", "make, rate and encode pairs of clips (before and after an edit) for training and evaluation", "commands")
    add_published(data)
    add_score(data)
    add_compose(data)
    add_cache(data)
    add_synth(data)
    samples = add_command(
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
        footage = add_command(data, name, run, summary, details)
        footage.add_argument("--source", required=True, type=text, metavar="VIDEO|DIR", help="the video: a video file or a folder of frames")
        footage.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
        if name == "looks":
            footage.add_argument(
                "--unseen",
                action="store_true",
                help="apply eight looks that the models were not trained on; the instruction only refers to the reference image",
            )
        add_fit(footage)
    objects = add_command(
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
    add_challenge(data)


def add_published(data) -> None:
    published = add_command(
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


def add_score(data) -> None:
    score = add_command(
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
    add_device(score)
    add_executor(score)


def add_compose(data) -> None:
    compose = add_command(
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
    add_fit(compose)
    add_executor(compose)


def add_cache(data) -> None:
    cache = add_command(
        data,
        "cache",
        run_data_cache,
        "encode pairs into VAE latents and VLM hidden states for `mive train`",
        "Of the DiT only its config is read. An interrupted run resumes; pairs that are in the cache are not encoded again.",
    )
    add_encoding(cache)
    cache.add_argument("--output", required=True, type=text, metavar="DIR", help="cache folder to write to")
    cache.add_argument("--negative", action="store_true", help="also store the states of an empty instruction, which the recipe key condition_dropout needs")


def add_synth(data) -> None:
    synth = add_command(
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
    add_drawn(
        synth,
        '"seen in reference", "enters late", "two alike", "instruction only", "no instruction", or, drawn from the heldout split only where named: '
        '"loose words", "vague words", "wrong words", "nothing asked"',
        "recolour, replace, remove, add, background or look",
    )


def add_challenge(data) -> None:
    challenge = add_command(
        data,
        "challenge",
        run_data_challenge,
        "make evaluation pairs that are unlike the training's in shapes, colours, motion and words",
        "Objects turn, grow and cross, over noise or a real video. The reference image decides; some instructions are vague, wrong or ask for nothing.",
    )
    challenge.add_argument("--output", required=True, type=text, metavar="DIR", help="folder to write to: clips and their manifest pairs.jsonl")
    challenge.add_argument("--source", type=text, metavar="VIDEO|DIR", help="video behind the objects: a video file or a folder of frames; default: noise")
    challenge.add_argument("--num", type=positive_int, default=32, metavar="N", help="number of pairs; default 32, in which every kind and edit occurs")
    add_drawn(
        challenge,
        '"seen in reference", "enters late", "two alike", "words alone", "vague words", "wrong words", "nothing asked" or "look strengths"',
        "recolour, replace, remove, background, look, keep or absent",
    )
