"""The study from-wan: the way from a text-to-video Wan's weights to an editor, walked by the product's own commands at a small size.

Every arm starts from one small Wan (or a random one) and trains on the same pairs with the same number of steps. Finished parts are kept,
so that an interrupted study resumes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..formats.checkpoint import read_config, save_dit
from ..formats.safetensors_file import read_tensors
from ..formats.untrained import PATCH_KEY, untrained_metadata
from ..pipeline import EMBEDDED
from .small_wan import new_wan

Mive = Callable[[list[str]], int]  # runs a command of the command line, given its arguments, and returns the exit code

KIND = "seen in reference"
CHOICE_SHARE = 0.5  # of the steps, for arms that test a choice; all_0 is validated there too
COPY_SCALE = 0.5  # of the noisy half, in the source half of the start "copied"
TRACE = 1e-12  # one weight of the source half of the start "unmarked", which the product would otherwise refuse to train a LoRA alone on
FULL: dict[str, Any] = {"time_learning_rate": 5.0e-4, "muon_learning_rate": 5.0e-3, "muon_min_norm": 5.0}
LORA: dict[str, Any] = {"lora_rank": 32, "new_parts": "trained"}


@dataclass(frozen=True)
class Plan:
    """Sizes of the study."""

    num_pairs: int = 256
    num_heldout: int = 32
    size: tuple[int, int] = (96, 96)
    num_frames: int = 17
    num_steps: int = 400  # of every arm
    longer: int = 3  # factor on the steps of the longer training from scratch
    num_validations: int = 2  # in num_steps
    sampling_steps: int = 12
    num_fade_steps: int = 100  # of the cross-attention
    small_wan: dict = field(default_factory=dict)  # changes to configs/small_wan.yaml's values
    recipe: dict = field(default_factory=dict)  # changes to every arm's recipe


@dataclass(frozen=True)
class Arm:
    """One training of the study, but for its seed."""

    title: str
    start: str = "wan"  # one of STARTS
    recipe: Mapping = field(default_factory=lambda: FULL)
    seeds: tuple[int, ...] = (0,)
    is_choice: bool = False  # whether it tests a choice of the conversion: trained for CHOICE_SHARE of the steps, and judged by its validation

    def num_steps(self, plan: Plan, longer: bool = False) -> int:
        """The steps of a run."""
        return round(plan.num_steps * (CHOICE_SHARE if self.is_choice else plan.longer if longer else 1))


STARTS = ("wan", "random", "copied", "unmarked")
ARMS = {
    "all": Arm("all weights", seeds=(0, 1)),
    "lora": Arm("LoRA and new parts", recipe=LORA, seeds=(0, 1)),
    "lora_alone": Arm("LoRA alone", "unmarked", {**LORA, "new_parts": "frozen"}, (0, 1)),
    "scratch": Arm("from scratch", "random", seeds=(0, 1)),
    "source_copied": Arm("source half copied", "copied", is_choice=True),
    "reference_at_zero": Arm("reference at t = 0", recipe={**FULL, "variant": "reference_at_zero"}, is_choice=True),
    "condition_positions": Arm("condition with positions", recipe={**FULL, "variant": "condition_positions"}, is_choice=True),
    "cross_attention": Arm("cross-attention faded out", recipe={**FULL, "variant": "cross_attention"}, is_choice=True),
}
VALIDATED = ("all_0", "scratch_0")  # runs whose figures by step are wanted; the others' finished files are evaluated
COMMON: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 2.0e-3,
    "num_warmup_steps": 20,
    "time_shift": 3.0,
    "ema_decay": 0.98,
    "bf16": True,
    "num_workers": 0,
    "checkpoint_every_s": 120.0,
    "num_checkpoints": 1,
    "log_every": 5,
}


class Study:
    """The files of a study in its work folder, and the commands that made them."""

    def __init__(self, work: Path, plan: Plan, mive: Mive, wan: Path | None = None):
        """`wan` is diffusers' folder of a small Wan; None: it is trained first."""
        self.work, self.plan, self.mive = work, plan, mive
        self.wan = wan or work / "small_wan" / "transformer"
        self.trains_wan = wan is None
        work.mkdir(parents=True, exist_ok=True)

    def command(self, arguments: Sequence[object], makes: Path) -> None:
        """Runs a command unless what it makes is there, and notes it. Raises UserError if it fails."""
        words = [str(word) for word in arguments]
        if makes.exists():
            return
        if code := self.mive(words):
            raise UserError("a command of the study failed", where=f"mive {' '.join(words)}", got=f"exit code {code}")
        with open(self.work / "commands.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(words) + "\n")

    def recipe(self, name: str, values: dict) -> Path:
        """Writes a recipe, whose YAML is JSON, and returns its path."""
        path = self.work / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return path

    def models(self, name: str) -> Path:
        """Returns a folder with the embedded VAE and VLM, for a DiT of that name."""
        folder = self.work / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("vae.safetensors", "vlm"):
            if not (folder / part).exists():
                (folder / part).symlink_to(EMBEDDED["tiny"] / part)
        return folder

    def dit(self, name: str) -> Path:
        """The DiT in a folder of models."""
        return self.models(name) / "dit.safetensors"

    def prepare(self) -> None:
        """Trains the small Wan, converts it, makes the pairs and encodes them, and makes the other starts."""
        plan = self.plan
        if self.trains_wan:
            folder = self.work / "small_wan"
            values: dict[str, Any] = {"task": "small_wan", "output_dir": str(folder), "export": str(self.wan), "clips_file": str(folder / "clips.safetensors")}
            values |= {"vae": str(EMBEDDED["tiny"] / "vae.safetensors"), "vlm": str(EMBEDDED["tiny"] / "vlm"), **SMALL_WAN, **plan.small_wan}
            self.command(["train", self.recipe("small_wan", values)], self.wan)
        self.command(["init-from-wan", self.wan, self.dit("wan"), "--vlm", "tiny", "--dtype", "fp32"], self.dit("wan"))
        width, height = plan.size
        for name, split, seed, num in (("heldout", "heldout", 28, plan.num_heldout), ("pairs", "train", 27, plan.num_pairs)):
            pairs, cache = self.work / name, self.work / f"{name}_cache"
            options = ["--num", num, "--seed", seed, "--split", split, "--kind", KIND, "--size", f"{width}x{height}", "--frames", plan.num_frames]
            self.command(["data", "synth", *options, "--output", pairs], pairs / "pairs.jsonl")
            self.command(["data", "cache", "--manifest", pairs / "pairs.jsonl", "--models", self.models("wan"), "--output", cache], cache / "index.json")
        self.make_starts()

    def make_starts(self) -> None:
        """Makes the starts that no command makes: a random Wan, a source half that is a copy, and a file that does not say that it is untrained."""
        config = read_config(self.dit("wan"))
        random = self.work / "random_wan"
        if not random.exists():
            torch.manual_seed(0)
            new_wan(config.num_heads, config.num_blocks, config.ffn_width).save_pretrained(random)
        self.command(["init-from-wan", random, self.dit("random"), "--vlm", "tiny", "--dtype", "fp32"], self.dit("random"))
        weights = read_tensors(self.dit("wan"))
        noisy = weights[PATCH_KEY][:, : config.latent_channels]
        if not self.dit("copied").exists():
            save_dit(self.dit("copied"), weights | {PATCH_KEY: torch.cat([noisy, COPY_SCALE * noisy], dim=1)}, config, metadata=untrained_metadata())
        if not self.dit("unmarked").exists():
            source = torch.zeros_like(noisy)
            source.view(-1)[0] = TRACE
            save_dit(self.dit("unmarked"), weights | {PATCH_KEY: torch.cat([noisy, source], dim=1)}, config)

    def train(self, name: str, seed: int, longer: bool = False) -> None:
        """Trains an arm, or trains it on, merges what is a LoRA, and evaluates what the product can run."""
        arm, plan, run = ARMS[name], self.plan, run_name(name, seed)
        made, folder = run + ("_longer" if longer else ""), self.work / "runs" / run
        is_lora = "lora_rank" in arm.recipe
        export = folder / f"{made}_lora.safetensors" if is_lora else self.dit(made)
        every = arm.num_steps(plan) if arm.is_choice else plan.num_steps // plan.num_validations if run in VALIDATED else 0
        values: dict[str, Any] = {
            "task": "edit_variant" if "variant" in arm.recipe else "edit",
            "start_from": str(self.dit(arm.start)),
            "caches": [str(self.work / "pairs_cache")],
            "output_dir": str(folder),
            "export": str(export),
            "num_steps": arm.num_steps(plan, longer),
            "seed": seed,
            "validate_every": every,
            "validation_manifest": str(self.work / "heldout" / "pairs.jsonl"),
            "validation_cache": str(self.work / "heldout_cache"),
            "validation_vae": "tiny",
            "validation_pairs": plan.num_heldout,
            "validation_steps": plan.sampling_steps,
            **COMMON,
            **arm.recipe,
            **({"wan": str(self.wan), "num_fade_steps": plan.num_fade_steps} if "variant" in arm.recipe else {}),
            **plan.recipe,
        }
        self.command(["train", self.recipe(made, values)], export)
        if is_lora:
            self.command(["merge", self.dit(arm.start), export, self.dit(made)], self.dit(made))
        if not arm.is_choice:
            evaluation = self.work / "eval" / made
            options = ["--manifest", self.work / "heldout" / "pairs.jsonl", "--models", self.models(made), "--steps", plan.sampling_steps, "--raw-only"]
            self.command(["eval", *options, "--output", evaluation], evaluation / "report.json")


# as configs/small_wan.yaml
SMALL_WAN: dict[str, Any] = {"num_steps": 2000, "batch_size": 16, "seed": 27, "ema_decay": 0.99, "bf16": True, "num_workers": 0, "log_every": 10}


def run_name(arm: str, seed: int) -> str:
    """The name of an arm's run in files."""
    return f"{arm}_{seed}"


def runs_of(names: Sequence[str]) -> list[tuple[str, int, bool]]:
    """The runs of some arms, or of all, in order: seed 0 of all first, then the longer training from scratch, then the other seeds.

    Each is an arm's name, a seed, and whether it is the longer training. Raises UserError for an unknown arm.
    """
    if unknown := sorted(set(names) - set(ARMS)):
        raise UserError("unknown arm", got=", ".join(unknown), expected=", ".join(ARMS))
    runs = [(name, seed, False) for name, arm in ARMS.items() for seed in arm.seeds if not names or name in names]
    if not names or "scratch" in names:
        runs.append(("scratch", 0, True))
    return sorted(runs, key=lambda run: (run[1], run[2]))
