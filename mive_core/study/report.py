"""The report of the study from-wan: figures of every run as JSON, curves, and strips of what the trained models draw."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.manifest import read_manifest
from ..evaluation.contact_sheet import NUM_COLUMNS, Band, write_sheet
from ..evaluation.evaluate import write_json
from ..evaluation.loss_curve import FAINT, INK, PAPER, RULE, axis_ticks, read_losses, running_mean
from ..media.paths import atomic_write, check_output_folder
from ..media.video import read_clip, read_image
from ..train.log import FILES
from .from_wan import ARMS, Study, run_name, runs_of

FIGURES = ("psnr_edited", "psnr_kept", "success_rate", "object_match")
CEILINGS = ("psnr_edited", "psnr_kept")
COLOURS = ((200, 60, 40), (40, 90, 180), (150, 150, 156), (40, 140, 80), (180, 110, 20), (130, 60, 160), (20, 140, 150), (110, 80, 60))
PANEL, LEFT, TOP, BOTTOM, RIGHT = (620, 430), 70, 46, 56, 24
STRIP_CLIPS = 4  # clips on strips.png
STRIP_LABELS = {"all": "all weights", "lora": "LoRA + new", "lora_alone": "LoRA alone", "scratch": "from scratch"}  # as short as the sheet's margin
WINDOW = 10  # logged values of a running mean


def write_report(study: Study, output: Path, command: str) -> dict:
    """Writes from_wan.json, from_wan.png and strips.png for the runs that are finished so far, and returns the figures."""
    output = check_output_folder(output, "output")
    output.mkdir(parents=True, exist_ok=True)
    runs = {name: figures for name, figures in ((made, read_run(study, *run)) for made, run in all_runs().items()) if figures}
    report = {"command": command, "plan": plan_of(study), "arms": {name: arm.title for name, arm in ARMS.items()}, "runs": runs}
    report |= {"steps_from_scratch": steps_from_scratch(runs), "small_wan": read_losses_of(study.wan.parent), "commands": commands_of(study)}
    write_json(output / "from_wan.json", report)
    if runs:
        draw_curves(output / "from_wan.png", runs)
    write_strips(study, output / "strips.png")
    return report


def all_runs() -> dict[str, tuple[str, int, bool]]:
    """Names of the runs' files -> arm, seed, whether it is the longer training."""
    return {run_name(name, seed) + ("_longer" if longer else ""): (name, seed, longer) for name, seed, longer in runs_of(())}


def plan_of(study: Study) -> dict:
    """The study's sizes as JSON values."""
    return json.loads(json.dumps(vars(study.plan)))


def commands_of(study: Study) -> list[str]:
    """The commands that made the study's files, relative to its work folder."""
    path = study.work / "commands.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = {str(study.wan): "small_wan/transformer", f"{study.work}/": ""}
    commands = [shlex.join(["mive", *json.loads(line)]) for line in lines]
    for long, short in names.items():
        commands = [command.replace(long, short) for command in commands]
    return commands


def read_run(study: Study, arm: str, seed: int, longer: bool) -> dict | None:
    """Figures of a run: by `mive eval` of the finished file, and by step from the training's log and validations; None if it has not begun.

    The longer training goes on in the same folder, so both list all steps that there are.
    """
    folder, made = study.work / "runs" / run_name(arm, seed), run_name(arm, seed) + ("_longer" if longer else "")
    limit = ARMS[arm].num_steps(study.plan, longer)
    log = folder / FILES["train"]
    losses = {step + 1: loss for step, loss in read_losses(log).items() if step < limit} if log.is_file() else {}
    if not losses or (longer and max(losses) <= study.plan.num_steps):
        return None
    figures: dict = {"arm": arm, "seed": seed, "steps": limit, "seconds_per_step": seconds_per_step(log), "losses": losses, "validations": []}
    if (validated := folder / FILES["validation"]).is_file():
        steps = [json.loads(line) for line in validated.read_text(encoding="utf-8").splitlines()]
        figures["validations"] = [{"steps": values.pop("step") + 1, **values} for values in steps if values["step"] < limit]
    if figures["validations"]:
        figures["validation"] = pick(folder / "validation" / f"step_{figures['validations'][-1]['steps'] - 1:08d}" / "report.json")
    evaluated = study.work / "eval" / made / "report.json"
    figures |= {"eval": pick(evaluated)} if evaluated.is_file() else {}
    return figures | {"finished": "eval" in figures or (ARMS[arm].is_choice and bool(figures["validations"]))}


def pick(path: Path) -> dict:
    """The study's figures out of a report of `mive eval` or of a validation."""
    report = json.loads(path.read_text(encoding="utf-8"))
    ceilings = {f"{name}_ceiling": report["vae_ceiling"][name] for name in CEILINGS} | {
        f"{name}_ceiling": report[f"{name}_ceiling"] for name in ("success_rate", "object_match")
    }
    baselines = {f"{name}_{short}": report[long][name] for short, long in (("copy", "copy_source"), ("repeat", "repeat_reference")) for name in CEILINGS}
    return {"clips": report["clips"], **{name: report[name] for name in FIGURES}, **ceilings, **baselines}


def seconds_per_step(log: Path) -> float | None:
    """Median of the logged seconds of a step."""
    values = [json.loads(line).get("seconds") for line in log.read_text(encoding="utf-8").splitlines()]
    values = [value for value in values if value is not None]
    return float(np.median(values)) if values else None


def read_losses_of(folder: Path) -> dict[int, float]:
    """Losses of the small Wan's training by step; {} without its log."""
    log = folder / FILES["train"]
    return read_losses(log) if log.is_file() else {}


def steps_from_scratch(runs: dict[str, dict]) -> dict[str, dict]:
    """For each validation of the training of all weights from Wan (seed 0): at which step the training from scratch is as good; None: nowhere."""
    wan, scratch = runs.get("all_0"), runs.get("scratch_0_longer") or runs.get("scratch_0")
    if not wan or not scratch or not wan["validations"]:
        return {}
    found = {}
    for name in ("psnr_edited", "psnr_kept"):
        found[name] = {
            values["steps"]: next((other["steps"] for other in scratch["validations"] if other[name] >= values[name]), None) for values in wan["validations"]
        }
    last = min(values["loss"] for values in wan["validations"])
    return found | {"loss": {"wan": last, "scratch": next((other["steps"] for other in scratch["validations"] if other["loss"] <= last), None)}}


def draw_curves(path: Path, runs: dict[str, dict]) -> None:
    """Draws training loss and the validations' PSNR inside and outside the edit by step, one colour an arm."""
    panels = []
    for title, name in (("training loss", None), ("PSNR inside the edit, dB", "psnr_edited"), ("PSNR outside the edit, dB", "psnr_kept")):
        lines = [(run["arm"], points_of(run, name)) for made, run in runs.items() if made != "scratch_0" or "scratch_0_longer" not in runs]
        ceilings = [run[kind][f"{name}_ceiling"] for run in runs.values() for kind in ("eval", "validation") if name and kind in run]
        if any(points for _, points in lines):
            panels.append(draw_panel(title, lines, ceilings[0] if ceilings else None, max(run["steps"] for run in runs.values())))
    picture = Image.new("RGB", (PANEL[0] * len(panels), PANEL[1] + 20 * -(-len(ARMS) // 4) + 8), PAPER)
    for number, panel in enumerate(panels):
        picture.paste(panel, (number * PANEL[0], 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for number, arm in enumerate(ARMS.values()):
        x, y = LEFT + (number % 4) * 420, PANEL[1] + 10 + 20 * (number // 4)
        draw.line((x, y, x + 26, y), COLOURS[number], 3)
        draw.text((x + 34, y), arm.title, INK, font, anchor="lm")
    with atomic_write(path) as partial:
        picture.save(partial, "PNG", optimize=True)


def points_of(run: dict, name: str | None) -> list[tuple[int, float]]:
    """A run's curve: the figure of that name by validations and `mive eval`, or the running mean of the training loss."""
    if name is not None:
        finished = {run["steps"]: run["eval"][name]} if "eval" in run else {}
        return sorted(({values["steps"]: values[name] for values in run["validations"]} | finished).items())
    return list(zip(run["losses"], running_mean(np.array(list(run["losses"].values())), WINDOW)))


def draw_panel(title: str, lines: Sequence[tuple[str, list[tuple[int, float]]]], level: float | None, longest: int) -> Image.Image:
    """Draws the lines of arms over steps, 0 to `longest`, and a level, the VAE's ceiling."""
    picture = Image.new("RGB", PANEL, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    values = [value for _, points in lines for _, value in points] + ([] if level is None else [level])
    ticks = axis_ticks(values)
    right, bottom = PANEL[0] - RIGHT, PANEL[1] - BOTTOM

    def to_pixel(step: float, value: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * step / longest, bottom - (bottom - TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    draw.text((LEFT, 14), title, INK, ImageFont.load_default(16))
    for tick in ticks:
        y = to_pixel(0, tick)[1]
        draw.line((LEFT, y, right, y), RULE)
        draw.text((LEFT - 8, y), f"{tick:.4g}", INK, font, anchor="rm")
    for share in (0, 0.25, 0.5, 0.75, 1):
        draw.text((to_pixel(share * longest, ticks[0])[0], bottom + 8), f"{share * longest:.0f}", INK, font, anchor="mt")
    draw.text((right, bottom + 28), "steps", INK, font, anchor="rt")
    if level is not None:
        y = to_pixel(0, level)[1]
        draw.line((LEFT, y, right, y), FAINT, 2)
        draw.text((right, y - 3), "the VAE's ceiling", INK, font, anchor="rs")
    names = list(ARMS)
    for arm, points in lines:
        colour = COLOURS[names.index(arm)]
        pixels = [to_pixel(*point) for point in points]
        if len(pixels) > 1:
            draw.line(pixels, colour, 2)
        for x, y in pixels if len(pixels) < 2 * WINDOW else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    return picture


def write_strips(study: Study, path: Path) -> None:
    """Draws a few held-out clips: source, reference, each finished arm of seed 0, and the truth. Nothing if no arm is evaluated."""
    edited = {name: study.work / "eval" / run_name(name, 0) / "edited" for name, arm in ARMS.items() if not arm.is_choice}
    edited = {name: folder for name, folder in edited.items() if folder.is_dir()}
    if not edited:
        return
    bands = []
    for index, entry in enumerate(read_manifest(study.work / "heldout" / "pairs.jsonl")[:STRIP_CLIPS]):
        assert entry.target is not None and entry.reference is not None  # drawn pairs have both
        source, target = read_clip(entry.source, fps=entry.fps), read_clip(entry.target, fps=entry.fps)
        columns = np.linspace(0, len(source.frames) - 1, NUM_COLUMNS).round().astype(int)
        clips = {"source": source.frames} | {STRIP_LABELS[name]: read_clip(folder / f"{index:03d}.mp4").frames for name, folder in edited.items()}
        rows = tuple((label, to_bytes(frames[columns])) for label, frames in (clips | {"truth": target.frames}).items())
        times = tuple(float(column) / entry.fps for column in columns)
        bands.append(Band(entry.instruction, (), times, to_bytes(read_image(entry.reference)), rows))
    write_sheet(path, bands, across=2)


def to_bytes(frames) -> np.ndarray:
    """(..., 3) in 0..1 -> uint8."""
    return (frames * 255).round().clamp(0, 255).byte().numpy()
