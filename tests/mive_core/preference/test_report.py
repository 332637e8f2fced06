import json

import numpy as np
import pytest
from preference_study import SYSTEMS, votes_file

from mive_core.preference.report import describe_report, make_report
from mive_core.preference.votes import Comparison, Key, Score, Vote, read_key, read_votes

FIRST, SECOND = SYSTEMS


def key_of(num_clips: int, *systems: str) -> Key:
    """Each pair of systems on each clip."""
    clips = [f"clip {index}" for index in range(num_clips)]
    pairs = [(a, b) for index, a in enumerate(systems) for b in systems[index + 1 :]]
    comparisons = {f"{clip} {a}{b}": Comparison(clip, *((a, b) if number % 2 else (b, a))) for number, clip in enumerate(clips) for a, b in pairs}
    videos = {f"{clip} {system}": (system, clip) for clip in clips for system in systems}
    return Key("page", systems, dict(zip(clips, clips)), videos, comparisons)


def vote(rater: str, clip: int, pair: str, choice: str) -> Vote:
    return Vote(rater, f"clip {clip} {pair}", choice, None if not choice else True, 1000, "")


def test_a_small_study_by_hand():
    """Four clips, two raters: A wins 5 votes and loses 1, two ties; clips 3 to 0, one undecided."""
    key = key_of(4, "A", "B")
    choices = {"Ann": ["A", "A", "A", "B"], "Ben": ["A", "", "", "A"]}
    votes = [vote(rater, clip, "AB", choice) for rater, chosen in choices.items() for clip, choice in enumerate(chosen)]
    report = make_report(key, votes, [], "mive preference report")
    assert {name: report[name] for name in ("num_raters", "num_clips", "num_votes", "num_ties")} == {
        "num_raters": 2,
        "num_clips": 4,
        "num_votes": 8,
        "num_ties": 2,
    }
    (pair,) = report["pairs"]
    assert (pair["wins"], pair["losses"], pair["ties"], pair["clips_won"], pair["clips_lost"]) == (5, 1, 2, 3, 0)
    assert pair["sign_test_over_votes"] == pytest.approx(14 / 64) and pair["sign_test_over_clips"] == pytest.approx(2 / 8)
    assert pair["win_rate"] == pytest.approx(5 / 6) and pair["win_rate_interval"] == pytest.approx((0.4365, 0.9699), abs=5e-5)
    best, other = report["systems"]
    assert (
        best["system"] == "A"
        and best["bradley_terry"] == pytest.approx(np.log(6.5 / 2.5) / 2)
        and other["bradley_terry"] == pytest.approx(-best["bradley_terry"])
    )
    low, high = best["bradley_terry_interval"]
    assert 0 <= low < best["bradley_terry"] < high
    # Ann and Ben: A A, A tie, A tie, B A; in the key's order 2 2, 1 0, 2 0, 2 1
    assert report["agreement"]["comparisons_with_two_raters"] == 4
    assert report["agreement"]["choices_alpha"] == pytest.approx(1 - 7 * 6 / (64 - 16 - 4 - 4))
    assert report["raters"] == [{"rater": "Ann", "votes": 4, "median_seconds": 1.0}, {"rater": "Ben", "votes": 4, "median_seconds": 1.0}]


def test_three_systems_in_order():
    key = key_of(6, "A", "B", "C")
    votes = [vote("Ann", clip, pair, pair[0] if clip else pair[1]) for clip in range(6) for pair in ("AB", "BC", "AC")]
    report = make_report(key, votes, [])
    assert [row["system"] for row in report["systems"]] == ["A", "B", "C"]
    assert [(row["system"], row["against"], row["wins"], row["losses"]) for row in report["pairs"]] == [("A", "B", 5, 1), ("A", "C", 5, 1), ("B", "C", 5, 1)]
    assert [row["sign_test_over_clips_holm"] for row in report["pairs"]] == pytest.approx([3 * 14 / 64] * 3)
    assert report["agreement"]["choices_alpha"] is None
    text = describe_report(report)
    assert "A : B" in text and "with Holm's correction" in text and "agreement (Krippendorff's alpha): choices - on 0 pairs" in text


def test_agreement_does_not_depend_on_how_often_a_system_wins():
    """Two raters who prefer A everywhere agree; counted as wins of A, all ratings would be equal and alpha undefined."""
    key = key_of(8, "A", "B")
    votes = [vote(rater, clip, "AB", "A") for rater in ("Ann", "Ben") for clip in range(8)]
    assert make_report(key, votes, [])["agreement"]["choices_alpha"] == 1


def test_scores(page, key, tmp_path):
    paths = []
    for rater, scores in (("Ann", {FIRST: 5, SECOND: 2}), ("Ben", {FIRST: 4, SECOND: 2})):
        paths.append(tmp_path / f"{rater}.json")
        paths[-1].write_text(json.dumps(votes_file(key, rater, FIRST, scores=scores)), encoding="utf-8")
    known = read_key(page.with_name("page.key.json"))
    report = make_report(known, *read_votes(paths, known))
    rows = {row["system"]: row for row in report["systems"]}
    assert (rows[FIRST]["mean_score"], rows[FIRST]["mean_score_interval"], rows[FIRST]["num_scores"]) == (4.5, (4.5, 4.5), 6)
    assert rows[SECOND]["mean_score"] == 2 and report["agreement"]["videos_with_two_raters"] == 6
    assert 0.5 < report["agreement"]["scores_alpha"] < 1
    json.dumps(report, allow_nan=False)


def test_the_interval_of_a_mean_score_is_over_clips():
    """Ten raters who score alike tell no more of other clips than one does."""
    key = key_of(4, "A", "B")
    values = [1, 2, 4, 5]
    once = [Score("r0", f"clip {clip} A", value, "") for clip, value in enumerate(values)]
    often = [Score(f"r{rater}", score.video, score.score, "") for rater in range(10) for score in once]
    one, ten = (make_report(key, [], scores)["systems"] for scores in (once, often))
    (a, b), (c, d) = one, ten
    assert (
        next(row for row in (a, b) if row["system"] == "A")["mean_score_interval"] == next(row for row in (c, d) if row["system"] == "A")["mean_score_interval"]
    )


def test_one_clip_has_no_bootstrap():
    report = make_report(key_of(1, "A", "B"), [vote("Ann", 0, "AB", "A")], [])
    assert report["systems"][0]["bradley_terry_interval"] is None
    assert "+0.55" in describe_report(report)
