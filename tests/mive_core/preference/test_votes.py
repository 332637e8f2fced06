import json

import pytest
from preference_study import SYSTEMS, votes_file

from mive_core.cli import main
from mive_core.errors import UserError
from mive_core.preference.report import make_report
from mive_core.preference.votes import checksum, read_key, read_votes

FIRST, SECOND = SYSTEMS


@pytest.fixture
def key_path(page):
    return page.with_name("page.key.json")


@pytest.fixture
def write(tmp_path):
    def write(values: dict, name: str = "votes.json"):
        (tmp_path / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
        return tmp_path / name

    return write


def test_votes_are_attributed(key, key_path, write):
    votes, scores = read_votes([write(votes_file(key, "Zoë 宇", SECOND, scores={FIRST: 2, SECOND: 5}))], read_key(key_path))
    assert [vote.choice for vote in votes] == [SECOND] * 3 and {vote.rater for vote in votes} == {"Zoë 宇"}
    assert all(vote.is_left == (key["videos"][key["comparisons"][vote.comparison]["first"]]["system"] == SECOND) for vote in votes)
    assert sorted(score.score for score in scores) == [2, 2, 2, 5, 5, 5]


def test_a_rater_counts_once(key, key_path, write):
    """Votes saved twice say nothing new; a vote that was changed later counts alone, with a warning."""
    early, late = votes_file(key, "Ann", FIRST), votes_file(key, "ann ", SECOND)
    for vote in late["votes"]:
        vote["time"] = "2026-01-03T00:00:00.000Z"
    late["checksum"] = checksum({name: value for name, value in late.items() if name != "checksum"})
    votes, _ = read_votes([write(early), write(early, "again.json")], read_key(key_path))
    assert len(votes) == 3
    with pytest.warns(UserWarning) as warned:
        votes, _ = read_votes([write(late, "late.json"), write(early)], read_key(key_path))
    assert [(vote.rater, vote.choice) for vote in votes] == [("ann", SECOND)] * 3
    assert [str(warning.message).split(":")[0] for warning in warned] == [
        "3 votes of the same rater on the same pair",
        "these raters began more than once and count as one person each",
    ]


def test_a_rater_whose_votes_lie_in_two_files(key, key_path, write):
    """Half of the votes under each spelling: one person."""
    whole = votes_file(key, "Ann", FIRST)["votes"]
    paths = [write(votes_file(key, name, FIRST, votes=part), f"{name}.json") for name, part in (("Ann", whole[:1]), ("ANN", whole[1:]))]
    with pytest.warns(UserWarning, match="count as one person each: Ann"):
        votes, scores = read_votes(paths, read_key(key_path))
    assert len(votes) == 3 and make_report(read_key(key_path), votes, scores)["num_raters"] == 1


def test_an_edited_file(key, key_path, write):
    values = votes_file(key, "Ann", FIRST)
    values["votes"][0]["choice"] = "tie"
    with pytest.raises(UserError, match="was changed after it was written"):
        read_votes([write(values)], read_key(key_path))


def test_a_file_that_is_cut_short(key, key_path, tmp_path):
    text = json.dumps(votes_file(key, "Ann", FIRST))
    for length in (0, 1, len(text) // 2, len(text) - 1):
        (tmp_path / "votes.json").write_text(text[:length], encoding="utf-8")
        with pytest.raises(UserError, match="is no whole JSON file"):
            read_votes([tmp_path / "votes.json"], read_key(key_path))


def test_votes_of_another_page(key, key_path, write):
    with pytest.raises(UserError, match="these votes are of another page; got '0123456789ab'"):
        read_votes([write(votes_file(key, "Ann", FIRST, page="0123456789ab"))], read_key(key_path))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda votes: votes["votes"][0].update(comparison="0"),
        lambda votes: votes["votes"][0].update(left=votes["votes"][0]["right"]),
        lambda votes: votes["votes"][0].update(left=votes["votes"][1]["left"]),
        lambda votes: votes["votes"][0].update(choice="both"),
        lambda votes: votes["votes"][0].update(milliseconds="soon"),
        lambda votes: votes["scores"][0].update(score=6),
        lambda votes: votes["scores"][0].update(score="5"),
        lambda votes: votes["scores"][0].update(video="0"),
        lambda votes: votes.update(votes={"a": 1}),
        lambda votes: votes.update(rater=" "),
        lambda votes: votes.update(rater=7),
        lambda votes: votes.pop("scores"),
        lambda votes: votes.pop("session"),
    ],
)
def test_votes_that_do_not_fit_the_page(key, key_path, write, spoil):
    """Even with a checksum that was computed anew."""
    values = votes_file(key, "Ann", FIRST, scores={FIRST: 2, SECOND: 5})
    del values["checksum"]
    spoil(values)
    with pytest.raises(UserError, match="the votes do not fit the page"):
        read_votes([write(values | {"checksum": checksum(values)})], read_key(key_path))


def test_a_key_for_votes_and_the_reverse(key, key_path, write):
    with pytest.raises(UserError, match="is no file of votes"):
        read_votes([key_path], read_key(key_path))
    with pytest.raises(UserError, match="is no file of key"):
        read_key(write(votes_file(key, "Ann", FIRST)))
    with pytest.raises(UserError, match="is no file of votes; got format 'list'"):
        read_votes([write([1])], read_key(key_path))


def test_no_vote_at_all(key, key_path, write):
    with pytest.raises(UserError, match="there are no votes"):
        read_votes([write(votes_file(key, "Ann", FIRST, votes=[]))], read_key(key_path))


def test_the_checksum_is_that_of_javascript():
    """JSON.stringify({rater: "Zoë \\u2028 \\"宇\\" \\t", votes: [1]}) and CRC-32, as the page computes them."""
    assert checksum({"rater": 'Zoë \u2028 "宇" \t', "votes": [1]}) == "e125219b"


def test_the_command_line(study, page, key, write, capsys, tmp_path):
    folders = [str(study / name) for name in SYSTEMS]
    made = ["preference", "make", folders[0], f"other={folders[1]}", "--manifest", str(study / "pairs.jsonl"), "--output", str(tmp_path / "new.html")]
    assert main(made) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'new.html'}\n{tmp_path / 'new.key.json'}\n" and "a page of" in err
    assert main(made) == 2
    new_key = json.loads((tmp_path / "new.key.json").read_text(encoding="utf-8"))
    assert new_key["systems"] == [FIRST, "other"] and new_key["command"].startswith("mive preference make")
    capsys.readouterr()
    good, report = str(write(votes_file(new_key, "Ann", FIRST))), tmp_path / "report.json"
    arguments = ["preference", "report", good, "--key", str(tmp_path / "new.key.json"), "--json", str(report)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("3 votes of 1 rater on 3 pairs of videos, 3 clips of 3; no difference: 0\n")
    before = report.read_bytes()
    assert json.loads(before)["command"].startswith("mive preference report")
    foreign = str(write(votes_file(key, "Ben", FIRST), "foreign.json"))
    assert main([*arguments[:3], foreign, *arguments[3:]]) == 2
    assert "foreign.json" in capsys.readouterr().err and report.read_bytes() == before
