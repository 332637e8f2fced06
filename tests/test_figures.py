"""What README, the pages and the card state as measured is what the files in results/ hold."""

import json
import math
import re
from pathlib import Path

import pytest

from mive_core.bench.card_goals import GOALS, attention_share, operations
from mive_core.train.throughput import PEAK_TFLOPS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "README.md"
CARD = ROOT / "mive_core" / "assets" / "tiny" / "README.md"


def report(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def tables(page: Path) -> list[list[list[str]]]:
    """The Markdown tables of a page: rows of cells, the header first, the line of dashes left out."""
    found: list[list[list[str]]] = [[]]
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                found[-1].append(cells)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def table(page: Path, *header: str) -> list[list[str]]:
    """The rows of the page's only table whose header begins with these cells."""
    (rows,) = [rows for rows in tables(page) if tuple(rows[0][: len(header)]) == header]
    return rows[1:]


def decibels(*values: float | None) -> str:
    """As the pages write them: 25.4 / 29.3; a value that is missing, or that was capped because nothing differs, is a dash."""
    return " / ".join("-" if value is None or value >= 99.95 else f"{value:.1f}" for value in values)


def edited_and_kept(figures: dict) -> str:
    return decibels(figures["psnr_edited"], figures["psnr_kept"])


def percent(value: float | None, ceiling: float | None) -> str:
    return f"{rounded(100 * value)} ({rounded(100 * ceiling)})"


def rounded(value: float) -> int:
    """Halves go up, as people round."""
    return math.floor(round(value, 6) + 0.5)  # 100 * 0.575 is 57.49999999999999


def test_the_cards_main_table_is_its_reports():
    path, rows = "", table(CARD, "set", "ours")
    for name, ours, source, reference, ceiling, match, success, where in rows:
        path = path if where == "the same" else where.strip("`")
        figures = report(path if path.endswith(".json") else f"{path}/report.json")
        if name.startswith("of these, "):
            kind, number = re.fullmatch(r"of these, (.+) \((\d+)\)", name).groups()
            figures = (figures["by_kind"] | figures["by_edit"])[kind]
            assert figures["clips"] == int(number), name
        else:
            assert figures["clips"] == int(re.match(r"\d+", name)[0]) if name[0].isdigit() else True, name
        expected = [edited_and_kept(part) for part in (figures, figures["copy_source"], figures["repeat_reference"], figures["vae_ceiling"])]
        assert [ours, source, reference, ceiling] == expected, name
        assert success == percent(figures["success_rate"], figures["success_rate_ceiling"]), name
        assert match in ("-", percent(figures["object_match"], figures["object_match_ceiling"])), name
    assert len(rows) > 15


def test_the_cards_studies_of_steps_and_guidance():
    (row,) = table(CARD, "2 steps", "4 steps")
    files = ["steps_2", None, "steps_8", "cfg_2", "cfg_3"]
    for cell, name in zip(row, files):
        if name is not None:
            assert cell == edited_and_kept(report(f"results/embedded/studies/{name}.json"))
    assert row[1] == edited_and_kept(mean_of_first(report("results/embedded/synthetic/report.json"), 24))


def mean_of_first(figures: dict, number: int) -> dict:
    """Means over the first clips of a report."""
    rows = figures["per_clip"][:number]
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in ("psnr_edited", "psnr_kept")}
    return {key: sum(listed) / len(listed) for key, listed in values.items()}


def test_the_second_generators_clips():
    rows = {row[0]: row[1:] for row in table(CARD, "set", "before", "after")}
    for name, stem in (("32 over noise", "noise"), ("32 over footage", "footage")):
        before, after = (report(f"results/embedded/challenge/{stem}{suffix}.json") for suffix in ("_2026-11-26c", ""))
        gaps = [f"{100 * figures['first_frame_gap']['within_1_db']:.0f}" for figures in (before, after)]
        rates = [f"{100 * figures['success_rate']:.0f}" for figures in (before, after)]
        expected = [edited_and_kept(before), edited_and_kept(after), edited_and_kept(after["vae_ceiling"]), " -> ".join(rates), " -> ".join(gaps)]
        assert rows[name] == expected
        if stem == "noise":
            parts = [{**figures["by_kind"], **figures["by_edit"]} for figures in (before, after)]
            for part, cells in ((part, cells) for part, cells in rows.items() if part.startswith("of these")):
                kind, number = re.fullmatch(r"of these, (.+) \((\d+)\)", part).groups()
                assert parts[1][kind]["clips"] == int(number), part
                assert cells[:3] == [edited_and_kept(figures) for figures in (parts[0][kind], parts[1][kind], parts[1][kind]["vae_ceiling"])], part


CLIPS = {
    "grass recoloured, footage, 97 frames": "recolour",
    "object recoloured over footage, 97 frames": "objects",
    "drawn, 97 frames": "drawn",
    "drawn, 161 frames": "drawn161",
}


def test_long_clips():
    rows = table(ROOT / "docs" / "models.md", "clip", "stretches", "stretches of latents", "context windows")
    assert [row[0] for row in rows] == list(CLIPS)
    for name, *cells in rows:
        ways = {row["way"]: row["delivered"]["psnr"] for row in report(f"results/embedded/long_clips/{CLIPS[name]}.json")["means"]}
        for cell, way in zip(cells, ("stretches", "latents", "windows")):
            parts = ", ".join(f"{ways[way][part]['psnr_edited']:.1f}" for part in ("first", "middle", "last"))
            assert cell == f"{parts} / {ways[way]['whole']['psnr_kept']:.1f}", (name, way)


def test_training_on_paper():
    rows = {int(row[0]): row[1:] for row in table(ROOT / "docs" / "training.md", "cards")}
    found = {(row["cards"], row["size"][0], row["offload"]): row for row in report("results/training/scale_14b.json")["rows"]}
    for cards, cells in rows.items():
        for first, width in ((0, 832), (2, 1280)):
            plain, moved = (found[cards, width, offload]["memory_bytes"] / 1e9 for offload in (False, True))
            numbers = [int(number) for number in re.findall(r"\d+", cells[first])]
            assert numbers == [round(plain), round(moved)], (cards, width)
            assert int(cells[first + 1]) == round(found[cards, width, False]["seconds_a_step"]), (cards, width)


def test_several_cards_on_paper():
    figures = report("results/speed/parallel_14b.json")["rows"]
    rows = table(ROOT / "docs" / "performance.md", "cards", "first card")
    assert len(rows) == len(figures) == 4
    for row, cells in zip(figures, rows):
        shared = [f"{row['memory_bytes']['others'] / 1e9:.1f} GB", f"{row['seconds']['exchanging']:.2f} s"] if row["cards"] > 1 else ["-", "-"]
        expected = [str(row["cards"]), f"{row['memory_bytes']['first'] / 1e9:.1f} GB", *shared]
        assert cells == [*expected, f"{row['seconds_a_forward']:.1f} s", f"{row['seconds_of_28']:.0f} s"], row["cards"]


def test_from_wan():
    figures = report("results/from_wan/from_wan.json")
    runs, arms = figures["runs"].values(), {title: arm for arm, title in figures["arms"].items()}
    *rows, repeated, ceiling = table(RESULTS, "arm", "steps")
    assert len(rows) == sum("eval" in run for run in runs)
    for title, steps, seed, psnr, right, match in rows:
        (found,) = (run["eval"] for run in runs if (run["arm"], run["steps"], run["seed"]) == (arms[title], int(steps), int(seed)))
        assert [psnr, right, match] == [edited_and_kept(found), *(str(rounded(100 * found[name])) for name in ("success_rate", "object_match"))], title
        for row, suffix in ((repeated, "_repeat"), (ceiling, "_ceiling")):
            assert row[3] == decibels(found[f"psnr_edited{suffix}"], found[f"psnr_kept{suffix}"])
    plain, *choices = table(RESULTS, "choice", "edited / kept, dB")
    at_choices = [values for values in figures["runs"]["all_0"]["validations"] if values["steps"] == 200]
    for (title, *cells), values in [(plain, at_choices[0])] + [(row, figures["runs"][f"{arms[row[0]]}_0"]["validations"][-1]) for row in choices]:
        assert values["steps"] == 200 and cells == [edited_and_kept(values), f"{values['loss']:.3f}"], title


def test_what_the_layers_see():
    figures = report("results/inspect/layers.json")
    rows = table(ROOT / "docs" / "models.md", "layer", "attention mask ratio")
    assert rows == [[str(row["layer"]), f"{row['ratio']:.3f}", f"{row['linear_ratio']:.3f}"] for row in figures["layers"]]
    assert f"{figures['mask_share']:.3f} of the image" in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_what_the_dit_attends_to():
    figures = report("results/inspect/attention.json")
    total = sum(figures["tokens"].values())
    for part, share, *cells in table(ROOT / "docs" / "models.md", "part", "share of the tokens"):
        layer = part.removeprefix("of it, layer ")
        for measure, cell in zip(("mass", "weighted"), cells, strict=True):
            values = [row[measure]["condition_by_layer"][layer] if layer != part else row[measure][part] for row in figures["blocks"]]
            assert cell == f"{sum(values) / len(values):.3f}", (part, measure)
        assert share == ("" if layer != part else f"{figures['tokens'][part] / total:.3f}")


@pytest.mark.parametrize("page", [ROOT / "README.md", CARD, *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"], ids=lambda page: page.stem)
def test_every_file_of_results_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"results/[\w./-]+", text):
        assert (ROOT / name.rstrip("./")).exists(), f"{page.name} names {name}"


def test_every_report_holds_its_command():
    """Logs of losses and pages of pictures hold none; the table in results/README.md does. A model's folder holds no reports."""
    reports = [path for path in sorted((ROOT / "results").rglob("*.json")) if not list(path.parent.glob("*.safetensors"))]
    assert len(reports) > 50
    for path in reports:
        assert report(str(path.relative_to(ROOT))).get("command"), path


def test_the_formats_of_quantised_files():
    figures = report("results/formats/tiny.json")
    plain, *rows = table(ROOT / "docs" / "models.md", "stored in", "inputs", "blocks kept at either end")
    assert plain[6] == edited_and_kept(figures["plain"])
    for (name, inputs, kept, size, share, error, psnr, lost), variant in zip(rows, figures["variants"], strict=True):
        assert [name, inputs == "rounded", int(kept)] == [variant["format_name"], variant["rounded_inputs"], variant["keep_blocks"]]
        assert [size, share] == [f"{variant['bytes'] / 1e6:.1f} MB", f"{100 * variant['share']:.0f} %"]
        assert error == f"{100 * variant['forward_error']:.1f} %" and psnr == edited_and_kept(variant)
        assert lost == f"{variant['lost_psnr_edited']:.2f} / {variant['lost_psnr_kept']:.2f}"


STUDY_ARMS = {
    "[1, -1], the paper's": "first_last",
    "[-1, -1], the control": "last_twice",
    "[-1]": "last",
    "[1]": "first",
    "[1, -1], the words' tokens alone": "text",
    "[4, -1]": "middle_last",
    "mean of all, each layer-normalised": "mean",
    "none": "none",
}


def test_the_layer_study():
    figures = report("results/layer_study/study.json")
    rows = {name: cells for name, *cells in table(ROOT / "README.md", "the DiT is given")}
    known = {name: figures["arms"][arm]["all"] for name, arm in STUDY_ARMS.items()}
    for name, key in (("*the true edit*", "ceiling"), ("*nothing edited*", "unedited")):
        known[name] = {outcome: {"mean": value} for outcome, value in figures[key]["all"].items()}
    assert list(rows) == list(known)
    for name, (iou, centroid, colour, shape, psnr) in rows.items():
        means = {outcome: values["mean"] for outcome, values in known[name].items()}
        assert [iou, centroid, psnr] == [f"{means['mask_iou']:.2f}", f"{means['centroid_error']:.1f}", f"{means['psnr_edited']:.1f}"]
        assert [colour, shape] == [f"{100 * means['colour_right']:.0f} %", f"{100 * means['shape_right']:.0f} %"]
    assert all(len(figures["arms"][arm]["seeds"]) == 3 for arm in STUDY_ARMS.values())
    text, question = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()), figures["question"]["all"]
    where, what = (f"{loss['mean']:.2f} ({loss['low']:.2f} to {loss['high']:.2f})" for loss in (question["where"], question["what"]))
    assert f"**The answer is {question['answer']}.**" in text and f"WHERE is {where} standard deviations worse" in text and f"WHAT {what}." in text
    assert f"names colours in {100 * figures['vlm']['topics']['colour']['right']:.0f} % of the cases" in text


def test_an_edit_by_the_length_of_its_clip():
    figures = report("results/growth/length_tiny.json")
    rows = table(ROOT / "docs" / "performance.md", "frames", "seconds", "peak memory")
    assert rows == [[str(row["frames"]), f"{row['seconds']:.0f}", f"{row['peak_bytes'] / 1e6:.0f} MB"] for row in figures["lengths"]]
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"grows by {figures['bytes_per_frame'] / 1e6:.2f} MB a frame, of which {figures['source_bytes_per_frame'] / 1e6:.2f}" in text


def test_a_cards_figures_are_counted_and_measured():
    """The last column is the first report's in results/card/, or says that there is none."""
    reports = sorted((ROOT / "results" / "card").glob("*.json"))
    measured = [entry.get("text", "not measured") for entry in json.loads(reports[0].read_text())["goals"]] if reports else ["not yet"] * len(GOALS)
    rows = table(ROOT / "docs" / "performance.md", "what", "counted from shapes", "goal", "measured")
    assert rows == [[goal.what, goal.counted(), goal.limit_text, cell] for goal, cell in zip(GOALS, measured, strict=True)]
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    peak_seconds = 28 * operations() / (1e12 * PEAK_TFLOPS["H100"])
    assert f"240 s need {rounded(100 * peak_seconds / 240)} % of that peak" in text and f"attention is {rounded(100 * attention_share())} % of" in text
    assert rounded(2 / (1 - attention_share())) == 9  # "fp8 matrices alone save a ninth"


# Figures in running text: page, the words around them, their file, and what of it they are
IN_TEXT = [
    (
        "docs/performance.md",
        r"exponent (1\.\d+), against (1\.\d+) for whole clips",
        "growth/growth_tiny.json",
        lambda figures: [figures["growth_exponent"][way] for way in ("by_frames_in_windows", "by_frames")],
    ),
    ("docs/performance.md", r"memory grows by (1\.\d+) times the file's size", "speed/load_1.3b.json", lambda figures: [figures["growth_over_file"]]),
    (
        "docs/performance.md",
        r"differs by at most (1e-06) of the range",
        "reliability/determinism.json",
        lambda figures: [1e-6 for row in figures["rows"] if row["stage"] == "whole edit" and 1e-7 < row["1_and_2_threads"] <= 1e-6],
    ),
    ("docs/training.md", r"computing takes (\d+\.\d) % of a step", "training/loading_tiny.json", lambda figures: [100 * figures["computing_share"]]),
]


@pytest.mark.parametrize("page, words, name, values", IN_TEXT, ids=[name for _, _, name, _ in IN_TEXT])
def test_figures_in_running_text(page, words, name, values):
    (found,) = re.findall(words, " ".join((ROOT / page).read_text(encoding="utf-8").split()))
    cells = [found] if isinstance(found, str) else found
    measured = values(report(f"results/{name}"))
    assert [float(cell) for cell in cells] == [value if "e" in cell else round(value, len(cell.partition(".")[2])) for cell, value in zip(cells, measured)]


FIGURE = re.compile(r"(?<![\w`/.])\d+(?:[.,]\d+)*(?: ?%| (?:dB|of 255|KB|MB|GB|TFLOP|seconds|hours|ms)\b)")
SOURCE = re.compile(r"results/[\w./*-]+|`(?:mive|python|make|torchrun) [^`]+`|`(?:tests|mive_core)/[^`]+`|computed|no file holds|neither code nor report")


@pytest.mark.parametrize("page", [ROOT / "README.md", CARD, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_every_section_with_figures_says_where_they_are_from(page):
    """By a file, a command or the code that computes them; the page's first section may say it for all."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    first, *sections = re.split(r"(?m)^(?=##+ )", text)
    if re.search(r"figures (below|of this page) ", first) and SOURCE.search(first):
        return
    for section in (first, *sections):
        prose = "\n".join(line for line in section.splitlines() if not line.startswith(("|", "    ", "#")))
        assert not FIGURE.search(prose) or SOURCE.search(section), f"{section.splitlines()[0]}: {FIGURE.search(prose)[0]}"


def test_the_table_of_edit_sizes():
    found = report("results/sizes/tiny.json")
    assert found["clips"] == 12 and found["command"].split("--")[0] in RESULTS.read_text(encoding="utf-8")
    rows = table(ROOT / "docs" / "performance.md", "edit's side, of the delivered")
    assert [row[0] for row in rows] == [f"1/{factor}" for factor in found["measured"]]
    for row in rows:
        measured, counted = (found[kind][row[0][2:]] for kind in ("measured", "counted"))
        both = [f"{measured[what]['psnr_edited']:.1f} / {measured[what]['psnr_kept']:.1f}" for what in ("enlarged", "delivered")]
        shares = [f"{100 * counted[name]:.0f} %" for name in ("share", "share_of_attention")]
        assert row[1:] == [*shares, f"{measured['seconds']:.1f} + {measured['delivery_seconds']:.1f}", *both]


def test_the_table_of_distillation():
    header, *_ = (rows[0] for rows in tables(ROOT / "docs" / "training.md") if rows[0][0] == "sampling steps")
    rows = table(ROOT / "docs" / "training.md", "sampling steps")
    assert header[1:] == ["20", "8", "4", "2"] and len(rows) == 2
    for kind, row in zip(("before", "after"), rows):
        assert row[1:] == [edited_and_kept(report(f"results/distill/{kind}_{steps}.json")) for steps in header[1:]]
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"{edited_and_kept(report(f'results/distill/teacher_{kind}_2.json'))}" in text for kind in ("before", "after"))
