"""`mive judge`: what its rubrics ask and allow, two readings of each edit, and where the edits lie. A small random Qwen3-VL gives the numbers."""

import json
import shutil

import pytest
import torch

from mive_core.cli import main
from mive_core.data.judge import Judge, shuffle_patches
from mive_core.data.judge_edits import describe, with_edits
from mive_core.data.manifest import export_pairs, load_entry, read_manifest
from mive_core.data.rating_grammar import ONE_TO_FIVE, TENTHS, RatingGrammar
from mive_core.data.rubrics import PROMPTS, RUBRICS, SCORE
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.media.video import read_clip, write_video
from mive_core.types import Clip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return export_pairs(drawn_pairs(PairedEdits(5, "train", (48, 32), 9, kinds=("seen in reference",)), 3), tmp_path_factory.mktemp("pairs") / "set")


@pytest.fixture(scope="module")
def folder(manifest):
    """The manifest's targets as edits NAME.mp4."""
    edits = manifest.parent.parent / "edits"
    edits.mkdir()
    for entry in read_manifest(manifest):
        write_video(edits / f"{entry.name}.mp4", read_clip(entry.target))
    return edits


def grammar_of(rubric, tokenizer):
    return RatingGrammar.from_tokenizer(tokenizer, rubric.numbers, len(rubric.axes), rubric.capped)


def test_prompts_show_the_videos_and_ask_for_as_many_numbers_as_there_are_axes():
    assert {path.stem for path in PROMPTS.glob("*.txt")} == {rubric.name for rubric in (*RUBRICS.values(), SCORE)}
    for rubric in (*RUBRICS.values(), SCORE):
        parts = ("{source}", "{target}", "{instruction}") + ("{reference}",) * rubric.shows_reference
        assert all(rubric.prompt.count(part) == 1 for part in parts) and rubric.prompt.count("{") == len(parts)
        example = rubric.prompt.strip().rpartition("such as ")[2].split(", ")
        assert len(example) == len(rubric.axes) and set(example) <= set(rubric.numbers)


def test_numbers_that_can_be_spelt(vlm_folder):
    tokenizer = Judge.load(vlm_folder).processor.tokenizer
    grammar = grammar_of(RUBRICS["openve"], tokenizer)
    ids = {character: token for token, character in grammar.characters.items()}
    comma, after = list(grammar.separator), lambda answer: "".join(sorted(grammar.characters.get(token, "#") for token in grammar.allowed_tokens(answer)))
    assert after([]) == "12345" and grammar.allowed_tokens([ids["3"]]) == comma[:1]
    assert after([ids["3"], *comma]) == after([ids["3"], *comma, ids["1"], *comma]) == "123"  # neither exceeds the first
    whole = [ids["3"], *comma, ids["1"], *comma, ids["3"]]
    assert grammar.allowed_tokens(whole) == [grammar.eos_token_id] and grammar.parse([*whole, grammar.eos_token_id]) == grammar.parse(whole) == (3, 1, 3)
    assert len(whole) + 1 == grammar.max_tokens and len(TENTHS) == 101 and len(ONE_TO_FIVE) == 5


@pytest.mark.parametrize("spoilt", ["", "3", "3,", "9,1,3", "3,4,3", "3,1,3,1", "3,1,?"])
def test_an_answer_that_is_no_number_is_an_error(vlm_folder, spoilt):
    grammar = grammar_of(RUBRICS["openve"], Judge.load(vlm_folder).processor.tokenizer)
    ids = {character: [token] for token, character in grammar.characters.items()} | {",": list(grammar.separator), "?": [grammar.eos_token_id + 1]}
    with pytest.raises(UserError, match="the judge's answer is no number"):
        grammar.parse([token for character in spoilt for token in ids[character]])


def test_a_model_that_answers_in_words_leaves_the_clip_out(vlm_folder, manifest, monkeypatch, tmp_path, capsys):
    """A later version of generate could drop the constraint; a score must never be made up."""
    load = Judge.load
    words = lambda folder, **options: _Talking.over(load(folder, **options))
    monkeypatch.setattr(Judge, "load", words)
    assert main(["judge", "--manifest", str(manifest), "--model", str(vlm_folder), "--output", str(tmp_path / "scores.json")]) == 2
    assert "none of the edits can be used; got 3, the first of which says: the judge's answer is no number" in capsys.readouterr().err
    assert not (tmp_path / "scores.json").exists()


class _Talking(torch.nn.Module):
    """Generates the tokens of a word."""

    @classmethod
    def over(cls, judge):
        talking = cls()
        talking.model = judge.model
        talking.words = judge.processor.tokenizer("make", add_special_tokens=False)["input_ids"]
        return Judge(talking, judge.processor, judge.rubric)

    def __getattr__(self, name):
        return getattr(super().__getattr__("model"), name) if name in ("dtype", "device") else super().__getattr__(name)

    def forward(self, *args, mm_token_type_ids=None, **kwargs):
        raise AssertionError("only generates")

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([self.words])], dim=1)


def test_the_second_reading_keeps_patches_and_times(vlm_folder, manifest):
    assert shuffle_patches([0, 1, 2, 3, 4, 5], 2, 1) != [0, 1, 2, 3, 4, 5] and shuffle_patches([0, 1], 2, 1) == [0, 1]
    shuffled = shuffle_patches(list(range(20)), 2, 1)
    assert sorted(shuffled) == list(range(20)) and all(shuffled[i] + 1 == shuffled[i + 1] and shuffled[i] % 2 == 0 for i in range(0, 20, 2))
    judge, pair = Judge.load(vlm_folder, rubric=RUBRICS["mive"]), load_entry(read_manifest(manifest)[0])
    first, second = judge.inputs(pair), judge.inputs(pair, 1)
    half = len(first["pixel_values_videos"]) // 4  # two patches of each of two videos
    for start in (0, 2 * half):
        assert torch.equal(first["pixel_values_videos"][start : start + half], second["pixel_values_videos"][start + half : start + 2 * half])
    times = [judge.processor.tokenizer.decode(inputs["input_ids"][0]).count("seconds>") for inputs in (first, second)]
    assert times == [4, 4] and not torch.equal(first["input_ids"], second["input_ids"])


def test_the_reference_is_seen(vlm_folder, manifest):
    judge, pair = Judge.load(vlm_folder, rubric=RUBRICS["refvie"]), load_entry(read_manifest(manifest)[0])
    inputs = judge.inputs(pair)
    assert (inputs["input_ids"] == judge.processor.image_token_id).sum() == inputs["image_grid_thw"][0].prod() / 4
    assert len(judge.rate(pair)) == 3 and max(judge.rate(pair)) == judge.rate(pair)[0]


@pytest.mark.parametrize("rubric", RUBRICS)
def test_the_command(rubric, manifest, folder, vlm_folder, tmp_path, capsys):
    output = tmp_path / "scores.json"
    arguments = ["judge", "--manifest", str(manifest), "--edited", str(folder), "--rubric", rubric, "--model", str(vlm_folder), "--output", str(output)]
    assert main(arguments) == 0
    report, out = json.loads(output.read_text()), capsys.readouterr().out
    assert out == f"{describe(report)}{output}: 3 judged, 0 left out\n" and out.count("\n") == len(report["axes"]) + 3
    low, high = report["scale"]
    for row in report["per_clip"]:
        assert all(low <= number <= high for reading in row["readings"] for number in reading.values()) and len(row["readings"]) == 2
        assert row["scores"] == {axis: sum(reading[axis] for reading in row["readings"]) / 2 for axis in report["axes"]}
        if RUBRICS[rubric].capped:
            assert max(row["scores"].values()) == row["scores"][report["axes"][0]]
    axis = report["axes"][0]
    assert report["mean"][axis] == pytest.approx(sum(row["scores"][axis] for row in report["per_clip"]) / 3)
    assert set(report["alpha"]) == {*report["axes"], "all"} and set(report["by_kind"]) == {"seen in reference"} and not report["meaningless"]
    assert report["alpha_level"] == ("interval" if rubric == "mive" else "ordinal")


def test_it_resumes(manifest, folder, vlm_folder, tmp_path, monkeypatch):
    output, journal = tmp_path / "scores.json", tmp_path / "scores.readings.jsonl"
    arguments = ["judge", "--manifest", str(manifest), "--edited", str(folder), "--model", str(vlm_folder), "--output", str(output)]
    assert main(arguments) == 0
    report, lines = output.read_text(), journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    output.unlink()
    rated, rate = [], Judge.rate
    monkeypatch.setattr(Judge, "rate", lambda judge, pair, *seed: rated.append(pair.name) or rate(judge, pair, *seed))
    assert main(arguments) == 0 and len(rated) == 2 and len(set(rated)) == 1 and output.read_text() == report
    assert main([*arguments[:-1], str(tmp_path / "others.json"), "--rubric", "openve"]) == 0 and len(rated) == 2 + 6


def test_edits_of_eval_and_edit_are_found(manifest, tmp_path, random_models):
    entries = read_manifest(manifest)
    common = ["--manifest", str(manifest), "--models", str(random_models), "--steps", "1"]
    assert main(["eval", *common, "--raw-only", "--output", str(tmp_path / "eval")]) == 0
    assert main(["edit", *common, "--output", str(tmp_path / "edit")]) == 0
    for kind, name in (("eval", "edited/001.mp4"), ("edit", next((tmp_path / "edit").glob("000001-*.mp4")).name)):
        edits = with_edits(entries, tmp_path / kind)
        assert edits[1].target == tmp_path / kind / name and load_entry(edits[1]).target.shape == (9, 32, 48, 3)
        backwards = with_edits(entries[::-1], tmp_path / kind)  # by their names, where numbers are others
        assert [entry.target for entry in backwards] == [entry.target for entry in with_edits(entries, tmp_path / kind)][::-1]


def test_missing_edits_are_named_and_counted(manifest, folder, vlm_folder, tmp_path, capsys):
    names, some = [entry.name for entry in read_manifest(manifest)], tmp_path / "some"
    shutil.copytree(folder, some)
    (some / f"{names[1]}.mp4").unlink()
    arguments = ["judge", "--manifest", str(manifest), "--edited", str(some), "--model", str(vlm_folder), "--output", str(tmp_path / "scores.json")]
    assert main(arguments) == 2
    assert f"edits are missing; got 1 of 3: {names[1]}" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["some"]


def test_an_edit_of_the_first_frames_alone_is_compared_with_these(manifest, folder, vlm_folder, tmp_path):
    names, some = [entry.name for entry in read_manifest(manifest)], tmp_path / "some"
    shutil.copytree(folder, some)
    clip = read_clip(some / f"{names[0]}.mp4")
    write_video(some / f"{names[0]}.mp4", Clip(clip.frames[:5], clip.fps))
    output = tmp_path / "scores.json"
    assert main(["judge", "--manifest", str(manifest), "--edited", str(some), "--model", str(vlm_folder), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["clips"] == 3


@pytest.mark.slow
def test_the_embedded_vlm_shows_the_flow_and_says_that_it_means_nothing(manifest, tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert main(["judge", "--manifest", str(manifest), "--model", "tiny", "--output", str(output)]) == 0
    assert "its numbers mean nothing" in capsys.readouterr().err and json.loads(output.read_text())["meaningless"] is True
