"""Whether the same seed gives the same bits: in one process, in another, and with another number of threads. Writes JSON.

python tests/reliability/determinism.py --json results/reliability/determinism.json
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.flow import schedule
from mive_core.media.fit import fit_clip, fit_reference
from mive_core.media.paths import atomic_write
from mive_core.media.video import read_clip
from mive_core.pipeline import Pipeline
from mive_core.train.cache import Encoders, cache
from mive_core.train.tasks import train
from mive_core.types import Clip, EditRequest

ASSETS = Path(__file__).resolve().parents[2] / "mive_core" / "assets"
THREADS = (1, 2)


@torch.inference_mode()
def edit_stages(pipeline: Pipeline, num_frames: int = 9) -> dict[str, Tensor]:
    """Each stage of an edit of real footage with the embedded models, on the inputs that the stage before gave."""
    clip = read_clip(ASSETS / "samples" / "bigbuckbunny_33f.mp4", num_frames=num_frames)
    source = fit_clip(Clip(clip.frames[:, :96, :160], clip.fps))
    height, width = source.frames.shape[1:3]
    reference = fit_reference(source.frames[0].flip(-1), (width, height))
    request = EditRequest(source, reference, "make it night")
    condition, latents = pipeline.vlm.condition(request, pipeline.config), pipeline.encode(request)
    velocity = pipeline.dit(latents.source, latents.source, latents.reference, pipeline.dit.embed_condition(condition.states), torch.ones(1))
    sampled = pipeline.denoise(latents, [condition], schedule(4, pipeline.config.shift), 1.0, seed=3)
    stages = {"VLM": condition.states, "VAE encoder": latents.source, "DiT, one forward": velocity, "DiT, four steps": sampled}
    return stages | {"VAE decoder": pipeline.vae.decode(sampled), "whole edit": pipeline.edit(request, seed=3).frames}


def trained(work: Path, name: str, num_threads: int) -> dict[str, Tensor]:
    """Weights of the embedded DiT after four steps on drawn pairs."""
    if not (work / "cache").exists():
        manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (64, 64), 5), 4), work / "pairs")
        cache(read_manifest(manifest), Encoders.load(ASSETS / "tiny"), work / "cache")
    recipe = {"task": "edit", "start_from": str(ASSETS / "tiny" / "dit.safetensors"), "caches": [str(work / "cache")], "num_steps": 4, "num_workers": 0}
    recipe |= {"output_dir": str(work / name), "export": str(work / f"{name}.safetensors"), "learning_rate": 1e-3, "num_threads": num_threads}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(work / "recipe.yaml")
    weights = load_file(work / f"{name}.safetensors")
    return {"training, four steps": torch.cat([weights[key].float().flatten() for key in sorted(weights)])}


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of each stage; 0: the same bits."""
    return {key: 0.0 if torch.equal(value, second[key]) else float((value - second[key]).abs().max()) for key, value in first.items()}


def one_process(work: Path, output: Path, num_threads: int) -> None:
    """Runs all stages with a number of threads, the edit's twice, and writes them to `output`. Raises RuntimeError if both are not the same."""
    torch.set_num_threads(num_threads)
    pipeline = Pipeline.load("tiny")
    stages, again = edit_stages(pipeline), edit_stages(pipeline)
    if any(differ(stages, again).values()):
        raise RuntimeError(f"not the same in one process: {differ(stages, again)}")
    save_file({key: value.contiguous() for key, value in (stages | trained(work, output.stem, num_threads)).items()}, output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="report to write")
    parser.add_argument("--process", nargs=3, metavar=("WORK", "OUTPUT", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        one_process(Path(options.process[0]), Path(options.process[1]), int(options.process[2]))
        return 0
    with tempfile.TemporaryDirectory() as name:
        work, found = Path(name), {}
        for threads in THREADS:
            for run in ("first", "second"):
                output = work / f"{run}_{threads}.safetensors"
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                subprocess.run([sys.executable, __file__, "--process", str(work), str(output), str(threads)], env=environment, check=True)
                found[run, threads] = load_file(output)
    rows = [
        {"stage": stage, "largest": float(value.abs().max())}
        | {f"other_process_{threads}": differ(found["first", threads], found["second", threads])[stage] for threads in THREADS}
        | {"1_and_2_threads": differ(found["first", 1], found["first", 2])[stage]}
        for stage, value in found["first", 1].items()
    ]
    report = {"command": shlex.join(["python", "tests/reliability/determinism.py", *sys.argv[1:]]), "torch": torch.__version__, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.json) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("".join(f"{row}\n" for row in rows))
    return int(any(row[f"other_process_{threads}"] for row in rows for threads in THREADS))


if __name__ == "__main__":
    sys.exit(main())
