"""What the votes say: win rates, tests, Bradley-Terry scores, agreement between raters, mean scores.

A win rate is the share of wins in the votes that chose; "no difference" is counted apart, and in Bradley-Terry scores as half a win for
either side. Votes on one clip are not independent of one another: hence the sign test over clips, where each clip counts once, for the
system that most votes on it preferred, and intervals by bootstrap over clips.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from ..evaluation.agreement import krippendorff_alpha
from .statistics import bradley_terry, holm, percentile_interval, resampled_clips, sign_test, wilson_interval
from .votes import Key, Score, Vote

NUM_SAMPLES = 2000  # of the bootstrap
PRIOR = 0.5  # wins added to both sides of each pair: Jeffreys' prior of a share


def make_report(key: Key, votes: Sequence[Vote], scores: Sequence[Score], command: str = "") -> dict:
    """Returns all figures; what is not known is None."""
    clips = sorted({key.comparisons[vote.comparison].clip for vote in votes} | {key.videos[score.video][1] for score in scores})
    wins, ties = _count(key, votes, clips)
    samples = resampled_clips(len(clips), NUM_SAMPLES) if len(clips) > 1 else None
    raters = sorted({vote.rater for vote in votes} | {score.rater for score in scores}, key=str.casefold)
    lefts = [vote.is_left for vote in votes if vote.is_left is not None]
    return {
        "command": command,
        "page": key.page,
        "num_raters": len(raters),
        "num_clips": len(clips),
        "num_clips_of_page": len(key.clips),
        "num_comparisons": len({vote.comparison for vote in votes}),
        "num_votes": len(votes),
        "num_ties": len(votes) - len(lefts),
        "chosen_on_the_left": {"share": sum(lefts) / len(lefts) if lefts else None, "interval": wilson_interval(sum(lefts), len(lefts))},
        "systems": _systems(key, wins, ties, scores, clips, samples),
        "pairs": _pairs(key, wins, ties),
        "agreement": _agreement(key, votes, scores),
        "raters": [{"rater": rater, **_rater(rater, votes)} for rater in raters],
        "num_bootstrap_samples": NUM_SAMPLES,
    }


def _count(key: Key, votes: Sequence[Vote], clips: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Wins of the row's system over the column's, and ties, (C, S, S) each."""
    wins, ties = np.zeros((2, len(clips), len(key.systems), len(key.systems)), dtype=int)
    for vote in votes:
        comparison = key.comparisons[vote.comparison]
        clip, first, second = clips.index(comparison.clip), key.systems.index(comparison.first), key.systems.index(comparison.second)
        if not vote.choice:
            ties[clip, first, second] += 1
            ties[clip, second, first] += 1
        elif vote.choice == comparison.first:
            wins[clip, first, second] += 1
        else:
            wins[clip, second, first] += 1
    return wins, ties


def _systems(key: Key, wins: np.ndarray, ties: np.ndarray, scores: Sequence[Score], clips: Sequence[str], samples: np.ndarray | None) -> list[dict]:
    by_clip = wins + ties / 2
    strengths = bradley_terry(by_clip.sum(axis=0), PRIOR)
    sampled = None if samples is None else bradley_terry(np.tensordot(samples, by_clip, axes=1), PRIOR)
    rows = []
    for index, name in enumerate(key.systems):
        won, lost = int(wins[:, index].sum()), int(wins[:, :, index].sum())
        rows.append(
            {
                "system": name,
                "wins": won,
                "losses": lost,
                "ties": int(ties[:, index].sum()),
                "win_rate": won / (won + lost) if won + lost else None,
                "win_rate_interval": wilson_interval(won, won + lost),
                "bradley_terry": float(strengths[index]),
                "bradley_terry_interval": None if sampled is None else percentile_interval(sampled[:, index]),
                **_mean_score(name, key, scores, clips, samples),
            }
        )
    return sorted(rows, key=lambda row: -row["bradley_terry"])


def _mean_score(system: str, key: Key, scores: Sequence[Score], clips: Sequence[str], samples: np.ndarray | None) -> dict:
    own = [(clips.index(key.videos[score.video][1]), score.score) for score in scores if key.videos[score.video][0] == system]
    if not own:
        return {"mean_score": None, "mean_score_interval": None, "num_scores": 0}
    where, values = (np.array(column) for column in zip(*own))
    sums, counts = np.bincount(where, values, len(clips)), np.bincount(where, minlength=len(clips))
    interval = None
    if samples is not None:
        drawn = samples @ counts
        interval = percentile_interval(np.divide(samples @ sums, drawn, out=np.full(len(samples), np.nan), where=drawn > 0))
    return {"mean_score": float(values.mean()), "mean_score_interval": interval, "num_scores": len(own)}


def _pairs(key: Key, wins: np.ndarray, ties: np.ndarray) -> list[dict]:
    rows: list[dict[str, Any]] = []
    for first, second in combinations(range(len(key.systems)), 2):
        won, lost = wins[:, first, second], wins[:, second, first]
        clips_won, clips_lost, decided = int((won > lost).sum()), int((lost > won).sum()), int(won.sum() + lost.sum())
        rows.append(
            {
                "system": key.systems[first],
                "against": key.systems[second],
                "wins": int(won.sum()),
                "losses": int(lost.sum()),
                "ties": int(ties[:, first, second].sum()),
                "win_rate": int(won.sum()) / decided if decided else None,
                "win_rate_interval": wilson_interval(int(won.sum()), decided),
                "sign_test_over_votes": sign_test(int(won.sum()), int(lost.sum())),
                "clips_won": clips_won,
                "clips_lost": clips_lost,
                "sign_test_over_clips": sign_test(clips_won, clips_lost),
            }
        )
    for name in ("sign_test_over_votes", "sign_test_over_clips"):
        for row, corrected in zip(rows, holm([row[name] for row in rows])):
            row[f"{name}_holm"] = corrected
    return rows


def _agreement(key: Key, votes: Sequence[Vote], scores: Sequence[Score]) -> dict:
    """Krippendorff's alpha. Choices are first, second or tie in the key's order, which was drawn at random: so it does not matter how often a system wins."""
    values = {"": 0.0}
    chosen = [(vote.rater, vote.comparison, values.get(vote.choice, 1.0 if vote.choice == key.comparisons[vote.comparison].first else 2.0)) for vote in votes]
    by_choice = _ratings(chosen)
    by_score = _ratings([(score.rater, score.video, float(score.score)) for score in scores])
    return {
        "choices_alpha": krippendorff_alpha(by_choice, "nominal"),
        "comparisons_with_two_raters": int(((~np.isnan(by_choice)).sum(axis=0) > 1).sum()),
        "scores_alpha": krippendorff_alpha(by_score, "ordinal"),
        "videos_with_two_raters": int(((~np.isnan(by_score)).sum(axis=0) > 1).sum()),
    }


def _ratings(rated: Sequence[tuple[str, str, float]]) -> np.ndarray:
    """(rater, item, value) -> (raters, items), NaN where a rater has not rated an item."""
    raters, items = (sorted({row[column] for row in rated}) for column in (0, 1))
    ratings = np.full((len(raters), len(items)), np.nan)
    for rater, item, value in rated:
        ratings[raters.index(rater), items.index(item)] = value
    return ratings


def _rater(rater: str, votes: Sequence[Vote]) -> dict:
    own = [vote.milliseconds for vote in votes if vote.rater == rater]
    return {"votes": len(own), "median_seconds": median(own) / 1000 if own else None}


def describe_report(report: dict) -> str:
    """The report as text."""
    left, agreement = report["chosen_on_the_left"], report["agreement"]
    lines = [
        f"{_number(report['num_votes'], 'vote')} of {_number(report['num_raters'], 'rater')} on {_number(report['num_comparisons'], 'pair')} of videos, "
        f"{_number(report['num_clips'], 'clip')} of {report['num_clips_of_page']}; no difference: {report['num_ties']}",
        "",
        *_table(
            ("system", "wins", "losses", "ties", "win rate", "Bradley-Terry", "mean score"),
            [
                (
                    row["system"],
                    str(row["wins"]),
                    str(row["losses"]),
                    str(row["ties"]),
                    _with_interval(row["win_rate"], row["win_rate_interval"], percent=True),
                    _with_interval(row["bradley_terry"], row["bradley_terry_interval"], signed=True),
                    _with_interval(row["mean_score"], row["mean_score_interval"]),
                )
                for row in report["systems"]
            ],
        ),
        "",
        *_table(
            ("pair", "wins", "losses", "ties", "win rate", "p, votes", "clips won : lost", "p, clips"),
            [
                (
                    f"{row['system']} : {row['against']}",
                    str(row["wins"]),
                    str(row["losses"]),
                    str(row["ties"]),
                    _with_interval(row["win_rate"], row["win_rate_interval"], percent=True),
                    _p(row["sign_test_over_votes_holm"]),
                    f"{row['clips_won']} : {row['clips_lost']}",
                    _p(row["sign_test_over_clips_holm"]),
                )
                for row in report["pairs"]
            ],
        ),
        "",
        f"agreement (Krippendorff's alpha): choices {_figure(agreement['choices_alpha'])} on {_number(agreement['comparisons_with_two_raters'], 'pair')} "
        f"with two raters or more, scores {_figure(agreement['scores_alpha'])} on {_number(agreement['videos_with_two_raters'], 'video')}",
        f"chosen on the left: {_with_interval(left['share'], left['interval'], percent=True)}",
        "intervals: 95 %, win rates by Wilson, the others by bootstrap over clips; p: two-sided sign test"
        + (", with Holm's correction" if len(report["pairs"]) > 1 else ""),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in (header, *rows)]


def _with_interval(value: float | None, interval: tuple[float, float] | None, percent: bool = False, signed: bool = False) -> str:
    if value is None:
        return "-"
    write = (lambda number: f"{100 * number:.0f}") if percent else (lambda number: f"{number:+.2f}" if signed else f"{number:.2f}")
    unit = " %" if percent else ""
    return f"{write(value)}{unit}" + (f" ({write(interval[0])} to {write(interval[1])})" if interval else "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
