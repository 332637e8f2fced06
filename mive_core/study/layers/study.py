"""The layer study: the VLM, the clips, the arms and their samples, each made once in a work folder; a killed study goes on with what is missing."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...embedded.vae_network import read_whole_clip_vae
from ...errors import UserError
from ...evaluation.evaluate import write_json
from ...formats.safetensors_file import read_tensors, write_tensors
from ...pipeline import EMBEDDED
from .arms import ARMS
from .outcomes import FIELDS, FRAMES, Classifier, Truth, decoded, expected, train_classifier, truths_of
from .sampling import write_samples
from .states import ClipSet, read_clips, write_clips
from .vlm_report import vlm_report
from .workers import one_thread_pool

TRAIN_SEED, HELDOUT_SEED = 280, 281
CLASSIFIER_CLIPS = 1024  # as many of the training clips teach the classifier after the VAE, the others as drawn: decoding takes longer than learning


@dataclass(frozen=True)
class Plan:
    """Sizes of the study."""

    num_train: int = 4096
    num_heldout: int = 192
    num_steps: int = 1500  # of every run
    classifier_steps: int = 1500
    hours: float = 8.0  # after so many no further run begins
    vlm: dict = field(default_factory=dict)  # changes to configs/study_vlm.yaml's values
    recipe: dict = field(default_factory=dict)  # changes to every run's recipe


# as configs/study_vlm.yaml
STUDY_VLM: dict[str, Any] = {
    "task": "study_vlm",
    "num_steps": 4000,
    "seed": 28,
    "batch_size": 16,
    "num_new_clips": 8,
    "replay_steps": 400,
    "num_still_steps": 1500,
    "num_turns": 8,
    "learning_rate": 1.2e-3,
    "muon_learning_rate": 5.0e-3,
    "bf16": True,
    "ema_decay": 0.99,
    "log_every": 10,
}


@dataclass(frozen=True)
class LayerStudy:
    """The files of the study in its work folder. `vlm` is a folder of the study's VLM; None: it is trained first."""

    work: Path
    plan: Plan
    vlm: Path | None = None
    num_processes: int = 1

    @property
    def vlm_folder(self) -> Path:
        return self.vlm or self.work / "vlm" / "model"

    @property
    def train_clips(self) -> ClipSet:
        return ClipSet("train", self.plan.num_train, TRAIN_SEED)

    @property
    def heldout_clips(self) -> ClipSet:
        return ClipSet("heldout", self.plan.num_heldout, HELDOUT_SEED)

    def paths(self, clips: ClipSet) -> list[Path]:
        """The shards of clips, which are encoded first where that is not done."""
        return write_clips(clips, self.vlm_folder, self.work / "clips", self.num_processes)

    def samples(self, name: str, seed: int) -> Path:
        """The latents that a run makes of the held-out clips."""
        return self.work / "runs" / run_name(name, seed) / "samples.safetensors"

    def log(self, name: str, seed: int) -> Path:
        return self.work / "runs" / run_name(name, seed) / "log.jsonl"

    @property
    def times(self) -> Path:
        """Lines of JSON: what was made in how many seconds."""
        return self.work / "seconds.jsonl"

    @property
    def hours(self) -> float:
        """Hours that all parts took so far, each counted for itself."""
        lines = self.times.read_text(encoding="utf-8").splitlines() if self.times.is_file() else []
        return sum(json.loads(line)["seconds"] for line in lines) / 3600

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Notes how long the part took."""
        start = time.monotonic()
        yield
        with open(self.times, "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": what, "seconds": round(time.monotonic() - start, 1)}) + "\n")

    def prepare(self, train: Callable[[dict[str, Any]], None]) -> None:
        """Trains the VLM and encodes the clips. `train` trains a recipe's values."""
        self.work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)  # small tensors: a second thread costs more than it gives
        if not self.vlm_folder.exists():
            folder = self.work / "vlm"
            with self.timed("vlm"):
                train({**STUDY_VLM, "output_dir": str(folder), "export": str(folder / "model"), **self.plan.vlm})
        with self.timed("clips"):
            self.paths(self.heldout_clips)
            self.paths(self.train_clips)

    def vlm_report(self) -> dict[str, Any]:
        """What the VLM tells of the held-out clips, measured first where that is not done."""
        path = self.work / "vlm.json"
        if not path.exists():
            with self.timed("vlm's report"):
                write_json(path, vlm_report(self.vlm_folder, list(self.heldout_clips.edits())))
        return json.loads(path.read_text(encoding="utf-8"))

    def train_classifier(self, path: Path) -> None:
        """Trains the classifier of WHAT on the true edits of the training clips: some after the VAE, the others as drawn."""
        vae = read_whole_clip_vae(EMBEDDED["tiny"] / "vae.safetensors")
        encoded = read_clips(self.paths(self.train_clips), ("source", "target"))[:CLASSIFIER_CLIPS]
        found: dict[str, list[torch.Tensor]] = {"source": [], "target": [], "labels": []}
        for index, edit in enumerate(tqdm(self.train_clips.edits(), total=self.plan.num_train, desc="true edits", unit="clip", mininterval=5.0)):
            pixels = {"source": edit.pair.request.source.frames, "target": edit.pair.target}
            if index < len(encoded):
                pixels = {name: decoded(vae, encoded[index][name][None])[0] for name in pixels}
            for name, clip in pixels.items():
                found[name].append((clip[list(FRAMES)] * 255).round().byte())
            found["labels"].append(torch.tensor(list(expected(edit.labels).values())))
        source, target, labels = (torch.stack(values) for values in found.values())
        model = train_classifier(source, target, labels, len(encoded), self.plan.classifier_steps)
        write_tensors(path, {name: value.contiguous() for name, value in model.state_dict().items()}, {"fields": ", ".join(FIELDS)})

    def classifier(self) -> Classifier:
        """The classifier of WHAT, trained first where that is not done."""
        path = self.work / "classifier.safetensors"
        if not path.exists():
            with self.timed("classifier"):
                self.train_classifier(path)
        model = Classifier()
        model.load_state_dict(read_tensors(path))
        return model.eval().requires_grad_(False)

    def truths(self) -> list[Truth]:
        """The held-out clips."""
        found = read_clips(self.paths(self.heldout_clips), ("source", "target"))
        source, target = (torch.stack([clip[name] for clip in found]) for name in ("source", "target"))
        return truths_of(list(self.heldout_clips.edits()), source, target, read_whole_clip_vae(EMBEDDED["tiny"] / "vae.safetensors"))

    def recipe(self, name: str, seed: int) -> dict[str, Any]:
        """The values of a run's recipe."""
        folder = self.work / "runs" / run_name(name, seed)
        return {
            "task": "study_layers",
            "arm": name,
            "clips": [str(path) for path in self.paths(self.train_clips)],
            "output_dir": str(folder),
            "export": str(folder / "dit.safetensors"),
            "num_steps": self.plan.num_steps,
            "seed": seed,
            "num_checkpoints": 1,
            **self.plan.recipe,
        }

    def run(self, name: str, seed: int, train: Callable[[dict[str, Any]], None]) -> None:
        """Trains a run and edits the held-out clips with it, unless that is done."""
        if self.samples(name, seed).exists():
            return
        recipe = self.recipe(name, seed)
        with self.timed(run_name(name, seed)):
            if not Path(recipe["export"]).exists():
                train(recipe)
            write_samples(name, Path(recipe["export"]), self.paths(self.heldout_clips), self.samples(name, seed))

    def run_all(self, runs: Sequence[tuple[str, int]], train: Callable[[dict[str, Any]], None]) -> None:
        """Makes the runs in turn, several at once, each on one thread, until the plan's hours are over."""
        missing = [run for run in runs if not self.samples(*run).exists()]
        with one_thread_pool(self.num_processes) as pool:
            waiting: set = set()
            while missing or waiting:
                while missing and len(waiting) < self.num_processes and self.hours < self.plan.hours:
                    waiting.add(pool.submit(self.run, *missing.pop(0), train))
                if not waiting:
                    break
                done = next(as_completed(waiting))
                waiting.remove(done)
                done.result()


def train_recipe(values: dict[str, Any]) -> None:
    """Trains a recipe's values to the end."""
    from ...train.loop import run
    from ..tasks import TASKS

    run(TASKS[values["task"]](values, None))


def run_name(arm: str, seed: int) -> str:
    """The name of a run in files."""
    return f"{arm}_{seed}"


def runs_of(names: Sequence[str]) -> list[tuple[str, int]]:
    """The runs of some arms, or of all: the arms of several seeds first, seed by seed, then the others. Raises UserError for an unknown arm."""
    if unknown := sorted(set(names) - set(ARMS)):
        raise UserError("unknown arm", got=", ".join(unknown), expected=", ".join(ARMS))
    runs = [(name, seed) for name, arm in ARMS.items() for seed in arm.seeds if not names or name in names]
    return sorted(runs, key=lambda run: (len(ARMS[run[0]].seeds) == 1, run[1]))


def keep_vlm(study: LayerStudy, output: Path) -> None:
    """Copies the study's VLM beside its report, unless it was read from there."""
    if study.vlm_folder.resolve() != (output / "vlm").resolve():
        shutil.copytree(study.vlm_folder, output / "vlm", dirs_exist_ok=True)
