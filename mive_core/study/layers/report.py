"""The report of the layer study: study.json, one table, one figure and strips of what the arms draw. Raw edits only."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...embedded.vae_network import read_whole_clip_vae
from ...errors import UserError
from ...evaluation.attention_share import mean_by_block
from ...evaluation.contact_sheet import NUM_COLUMNS, Band, write_sheet
from ...evaluation.evaluate import write_json
from ...evaluation.loss_curve import read_losses, running_mean
from ...formats.safetensors_file import read_tensors
from ...media.paths import atomic_write
from ...pipeline import EMBEDDED
from ...preference.statistics import holm
from ..report import to_bytes
from .arms import ARMS, PAPER, Arm
from .outcomes import WHAT, WHERE, Classifier, Truth, decoded, measure
from .sampling import AS_GIVEN, REPLACED
from .statistics import Difference, answer, interval, paired_bootstrap, standardised_loss
from .study import LayerStudy, run_name, runs_of
from .vlm_task import KINDS
from .workers import one_thread_pool

OUTCOMES = (*WHERE, *WHAT, "psnr_edited", "psnr_kept")
HIGHER_IS_BETTER = {name: name not in ("centroid_error", "edge_error") for name in OUTCOMES}
PAPER_ARM, CONTROL, LEVEL_ARM = "first_last", "last_twice", "last"
TESTED = ("mask_iou", "edge_error", "colour_right", "shape_right", "psnr_edited")  # outcomes of which other arms are compared with the paper's
WINDOW = 20  # logged values in the running mean of the loss
STRIPS = ("none", "text", "last", "first", "first_last", "middle_last", "mean")
STRIP_CLIPS = 4


class Results:
    """The outcomes of all finished runs, measured once each and kept in the work folder."""

    def __init__(self, study: LayerStudy):
        self.study, self.known = study, dict[Path, list[dict[str, Any]]]()
        self.finished = [run for run in runs_of(()) if study.samples(*run).exists()]

    @cached_property
    def truths(self) -> list[Truth]:
        return self.study.truths()

    @cached_property
    def vae(self):
        return read_whole_clip_vae(EMBEDDED["tiny"] / "vae.safetensors")

    @cached_property
    def classifier(self) -> Classifier:
        return self.study.classifier()

    def measured(self, path: Path, edited: Callable[[], Sequence[Tensor]]) -> list[dict[str, Any]]:
        """The outcomes of each held-out clip, from the file; if it is not there, of the clips that `edited` returns, which then go into it."""
        if path not in self.known:
            if not path.exists():
                write_json(path, {"clips": measure(edited(), self.truths, self.classifier)})
            self.known[path] = json.loads(path.read_text(encoding="utf-8"))["clips"]
        return self.known[path]

    def rows(self, name: str, seed: int, condition: str = AS_GIVEN) -> list[dict[str, Any]]:
        """The outcomes of one run."""
        samples = self.study.samples(name, seed)
        path = samples.with_name(f"outcomes_{condition.replace(' ', '_').replace(chr(39), '')}.json")
        return self.measured(path, lambda: decoded(self.vae, read_tensors(samples)[condition]))

    def ceiling(self) -> list[dict[str, Any]]:
        """The outcomes of the true edits after the VAE."""
        return self.measured(self.study.work / "ceiling.json", lambda: [truth.ceiling for truth in self.truths])

    def unedited(self) -> list[dict[str, Any]]:
        """The outcomes of the source after the VAE, as if nothing were edited."""
        return self.measured(self.study.work / "unedited.json", lambda: [truth.source for truth in self.truths])

    def arm(self, name: str, outcome: str, kind: str | None = None, condition: str = AS_GIVEN) -> np.ndarray:
        """An outcome of an arm's finished runs, (seeds, clips of the kind)."""
        return np.array([column(self.rows(arm, seed, condition), outcome, kind) for arm, seed in self.finished if arm == name])


def measure_runs(study: LayerStudy, runs: Sequence[tuple[str, int]]) -> None:
    """Measures the edits of finished runs, as given and with states replaced, where that is not done."""
    results = Results(study)
    for name, seed in runs:
        for condition in (AS_GIVEN, *(REPLACED if name == PAPER_ARM else ())):
            results.rows(name, seed, condition)


def measure_all(study: LayerStudy) -> None:
    """Measures all finished runs, in several processes."""
    study.classifier()
    runs = Results(study).finished
    parts = [runs[k :: study.num_processes] for k in range(min(study.num_processes, len(runs)))]
    with one_thread_pool(max(1, len(parts))) as pool:
        list(pool.map(partial(measure_runs, study), parts))


def column(rows: Sequence[Mapping[str, Any]], outcome: str, kind: str | None) -> list[float]:
    """An outcome of the clips of one kind, or of all."""
    return [row[outcome] for row in rows if kind in (None, row["kind"])]


def means(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean and interval of outcomes (seeds, clips)."""
    return {name: {"mean": float(array.mean()), "interval": interval(array)} for name, array in values.items()}


def by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of every outcome over all clips and over those of each kind."""
    return {kind or "all": {name: float(np.mean(column(rows, name, kind))) for name in OUTCOMES} for kind in (None, *KINDS)}


def write_report(study: LayerStudy, output: Path, command: str) -> dict[str, Any]:
    """Writes study.json, table.md, layers.png and strips.png for the runs that are finished so far, and returns the figures."""
    output.mkdir(parents=True, exist_ok=True)
    measure_all(study)
    results = Results(study)
    arms = [name for name in ARMS if any(name == arm for arm, _ in results.finished)]
    report: dict[str, Any] = {
        "command": command,
        "plan": json.loads(json.dumps(vars(study.plan))),
        "hours": round(study.hours, 2),
        "parts": [json.loads(line) for line in study.times.read_text(encoding="utf-8").splitlines()],
        "vlm": study.vlm_report(),
        "ceiling": by_kind(results.ceiling()),
        "unedited": by_kind(results.unedited()),
        "arms": {name: arm_figures(results, name) for name in arms},
        "steps_to_loss": steps_to_loss(study, results),
        "attention": attention_shares(study, results),
    }
    if PAPER_ARM in arms:
        report["replaced"] = {
            condition: {kind or "all": means({name: results.arm(PAPER_ARM, name, kind, condition) for name in OUTCOMES}) for kind in (None, *KINDS)}
            for condition in REPLACED
        }
        report["compared"] = compared(results, [name for name in arms if name != PAPER_ARM])
    if {PAPER_ARM, CONTROL} <= set(arms):
        report["question"] = question(results)
    write_json(output / "study.json", report)
    (output / "table.md").write_text(table(report), encoding="utf-8")
    draw_figure(output / "layers.png", report)
    write_strips(results, output / "strips.png")
    return report


def arm_figures(results: Results, name: str) -> dict[str, Any]:
    """Title, seeds and outcomes of an arm, over all clips and by kind."""
    figures = {kind or "all": means({outcome: results.arm(name, outcome, kind) for outcome in OUTCOMES}) for kind in (None, *KINDS)}
    return {"title": ARMS[name].title, "seeds": [seed for arm, seed in results.finished if arm == name], **figures}


def compared(results: Results, names: Sequence[str]) -> dict[str, Any]:
    """Each arm minus the paper's: differences with intervals and p-values, and these corrected by Holm over all arms and outcomes."""
    found = {(name, outcome): paired_bootstrap(results.arm(name, outcome), results.arm(PAPER_ARM, outcome)) for name in names for outcome in TESTED}
    corrected = dict(zip(found, holm([difference.p for difference in found.values()])))
    return {name: {outcome: vars(found[name, outcome]) | {"p_holm": corrected[name, outcome]} for outcome in TESTED} for name in names}


def question(results: Results) -> dict[str, Any]:
    """The study's question, over all clips and by kind: the loss in WHERE and in WHAT without the early layer, in standard deviations over clips."""
    return {kind or "all": damage(results, kind) for kind in (None, *KINDS)}


def damage(results: Results, kind: str | None) -> dict[str, Any]:
    """The standardised losses of the control against the paper's arm."""
    losses: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part, names in (("where", WHERE), ("what", WHAT)):
        damaged, whole = ([results.arm(arm, name, kind) for name in names] for arm in (CONTROL, PAPER_ARM))
        losses[part] = standardised_loss(damaged, whole, [HIGHER_IS_BETTER[name] for name in names])
    found: dict[str, Difference] = {part: paired_bootstrap(*pair) for part, pair in losses.items()}
    found["difference"] = paired_bootstrap(losses["where"][0] - losses["what"][0], losses["where"][1] - losses["what"][1])
    return {part: vars(difference) for part, difference in found.items()} | {"answer": answer(found["where"], found["difference"])}


def attention_shares(study: LayerStudy, results: Results) -> dict[str, Any]:
    """Each run's attention of target tokens to the condition tokens, weighted by the values' norms: mean over blocks and steps, by block, and by stack."""
    found = {}
    for run in results.finished:
        path = study.samples(*run).with_name("attention.json")
        if path.exists():
            recorded = json.loads(path.read_text(encoding="utf-8"))
            blocks = mean_by_block(recorded["blocks"], "weighted")
            found[run_name(*run)] = {
                "condition": float(np.mean([block["condition"] for block in blocks])),
                "by_block": blocks,
                "by_stack": [float(np.mean([block["condition_by_layer"][str(k)] for block in blocks])) for k in range(len(ARMS[run[0]].stacks))],
                "by_time": by_time(recorded["blocks"]),
            }
    return found


def by_time(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """t -> the condition's weighted share, mean over blocks."""
    times = sorted({row["t"] for row in rows}, reverse=True)
    return {f"{t:.2f}": float(np.mean([row["weighted"]["condition"] for row in rows if row["t"] == t])) for t in times}


def steps_to_loss(study: LayerStudy, results: Results) -> dict[str, Any]:
    """The step at which each run's running mean of the loss reaches what LEVEL_ARM ends with; None: never."""
    curves = {run: smoothed(study.log(*run)) for run in results.finished}
    ends = [list(curve.values())[-1] for (name, _), curve in curves.items() if name == LEVEL_ARM]
    if not ends:
        return {}
    level = float(np.mean(ends))
    return {"loss": level, "steps": {run_name(*run): next((step for step, loss in curve.items() if loss <= level), None) for run, curve in curves.items()}}


def smoothed(log: Path) -> dict[int, float]:
    """Step -> running mean of the training loss."""
    losses = read_losses(log)
    return dict(zip((step + 1 for step in losses), running_mean(np.array(list(losses.values())), WINDOW).tolist()))


def table(report: Mapping[str, Any]) -> str:
    """The main table in Markdown: means over clips and seeds."""
    head = ("arm", "seeds", "mask IoU", "centroid, px", "edge error", "edit right", "colour right", "shape right", "PSNR edited", "PSNR kept")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    rows = [(figures["title"], str(len(figures["seeds"])), figures["all"]) for figures in report["arms"].values()]
    rows += [
        (title, "", {name: {"mean": value} for name, value in report[key]["all"].items()})
        for key, title in (("unedited", "nothing edited"), ("ceiling", "the true edit"))
    ]
    for title, seeds, figures in rows:
        lines.append("| " + " | ".join([title, seeds, *(shown(name, figures[name]["mean"]) for name in OUTCOMES)]) + " |")
    return "\n".join(lines) + "\n"


def shown(outcome: str, value: float) -> str:
    """A figure as the table has it."""
    if outcome in WHAT:
        return f"{100 * value:.0f} %"
    return f"{value:.1f}" if outcome.startswith("psnr") or outcome == "centroid_error" else f"{value:.3f}"


def draw_figure(path: Path, report: Mapping[str, Any]) -> None:
    """Draws mask IoU and the share of right colours and shapes by kind of clip, with intervals. Raises UserError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise UserError("the study's figure needs matplotlib", got=str(error), fix='pip install "mive[study]"') from error
    names = [name for name, figures in report["arms"].items() if len(figures["seeds"]) > 1] or list(report["arms"])
    panels = (("mask_iou", "WHERE: mask IoU"), ("colour_right", "WHAT: colour right"), ("shape_right", "WHAT: shape right"))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 8.2), sharex=True, constrained_layout=True)
    colours = [f"C{number}" for number in range(10)]
    width = 0.8 / len(names)
    for axis, (outcome, title) in zip(axes, panels):
        for number, name in enumerate(names):
            figures = [report["arms"][name][kind][outcome] for kind in KINDS]
            heights = [one["mean"] for one in figures]
            errors = [[max(0.0, one["mean"] - one["interval"][0]) for one in figures], [max(0.0, one["interval"][1] - one["mean"]) for one in figures]]
            places = np.arange(len(KINDS)) - 0.4 + (number + 0.5) * width
            style = {"edgecolor": "black", "linewidth": 1.2} if ARMS[name].stacks == PAPER and ARMS[name].tokens == "all" else {}
            axis.bar(places, heights, width, color=colours[number % 10], yerr=errors, error_kw={"lw": 0.9}, label=report["arms"][name]["title"], **style)
        for number, kind in enumerate(KINDS):
            axis.hlines(report["ceiling"][kind][outcome], number - 0.42, number + 0.42, color="gray", linestyle=":", linewidth=1)
        axis.set_ylabel(title)
        axis.set_ylim(0, 1.05)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xticks(range(len(KINDS)), KINDS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)


def write_strips(results: Results, path: Path) -> None:
    """Draws a few held-out clips of each kind: source, each finished arm's first seed, and the truth."""
    names = [name for name in STRIPS if (name, 0) in results.finished]
    if not names:
        return
    made = {name: read_tensors(results.study.samples(name, 0))[AS_GIVEN] for name in names}
    edits = list(results.study.heldout_clips.edits())
    bands = []
    for index in range(min(STRIP_CLIPS, len(edits))):
        truth, request = results.truths[index], edits[index].pair.request
        columns = np.linspace(0, len(truth.target) - 1, NUM_COLUMNS).round().astype(int)
        clips = {"source": request.source.frames}
        clips |= {short(ARMS[name]): decoded(results.vae, latents[index : index + 1])[0] for name, latents in made.items()} | {"truth": truth.target}
        rows = tuple((label, to_bytes(frames[columns])) for label, frames in clips.items())
        times = tuple(float(number) / request.source.fps for number in columns)
        bands.append(Band(f"{truth.kind}: {request.instruction}", (), times, to_bytes(request.reference), rows))
    write_sheet(path, bands, across=2)


def short(arm: Arm) -> str:
    """An arm's title as short as a strip's margin."""
    return {"no VLM tokens": "no tokens", "[1, -1], text tokens only": "text only", "mean of all, layer-normalised": "mean"}.get(arm.title, arm.title)
