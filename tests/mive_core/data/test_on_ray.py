"""Each command of many items on a cluster of this machine with two workers gives what it gives in one process."""

import json
from pathlib import Path

import pytest

from mive_core.cli import main
from mive_core.data.manifest import export_pairs
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.media.video import read_clip

pytestmark = pytest.mark.slow

RAY = ["--ray", "local", "--workers", "2"]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests here: what finds it running leaves it running."""
    ray = pytest.importorskip("ray", reason="ray is not installed: what runs on it is NOT tested")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with five pairs, the fourth of which has a video that is none."""
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (48, 32), 5, kinds=("seen in reference",)), 5), tmp_path_factory.mktemp("pairs") / "set")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    (manifest.parent / "broken.mp4").write_text("<html>")
    lines[3] |= {"source": "broken.mp4", "name": "the broken one"}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest.parent


def both(capsys, arguments: list[str], work: Path, pattern: str) -> None:
    """Runs the command in one process and on Ray: the same words, and the same files of that pattern."""
    said, files = [], []
    for name, more in (("alone", []), ("ray", RAY)):
        (work / name).mkdir(exist_ok=True)
        assert main([*(argument.replace("OUT", str(work / name)) for argument in arguments), *more]) == 0
        out, err = capsys.readouterr()
        assert "the broken one" in err and "left out" in err
        said.append(out.replace(str(work / name), ""))
        files.append({path.relative_to(work / name): path.read_bytes() for path in sorted((work / name).rglob(pattern))})
    assert said[0] == said[1] and files[0] == files[1] and files[0]


def test_caching(work, random_models, capsys, monkeypatch):
    monkeypatch.setattr("mive_core.train.cache.NUM_PER_SHARD", 2)
    both(capsys, ["data", "cache", "--manifest", str(work / "pairs.jsonl"), "--models", str(random_models), "--output", "OUT/cache"], work, "cache/*")


def test_scoring(work, vlm_folder, capsys):
    """Kept beside the pairs, whose folder the manifest must be in; the journal's order is that of the work."""
    kept = []
    for more in ([], RAY):
        assert (
            main(
                [
                    "data",
                    "score",
                    "--manifest",
                    str(work / "pairs.jsonl"),
                    "--model",
                    str(vlm_folder),
                    "--output",
                    str(work / "kept.jsonl"),
                    "--least",
                    "0",
                    *more,
                ]
            )
            == 0
        )
        assert "the broken one is left out" in capsys.readouterr().err
        scores = work / "kept.scores.jsonl"
        kept.append(((work / "kept.jsonl").read_bytes(), sorted(line for line in scores.read_text().splitlines())))
        scores.unlink()
    assert kept[0] == kept[1] and len(kept[0][1]) == 5


def test_composing(work, capsys):
    people = [
        {"source": f"{line['source']}", "mask": line["mask"], "name": line["name"]} for line in map(json.loads, (work / "pairs.jsonl").read_text().splitlines())
    ]
    (work / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in people))
    (work / "places.jsonl").write_text(json.dumps({"source": people[0]["source"]}) + "\n" + json.dumps({"source": people[1]["source"]}) + "\n")
    both(
        capsys,
        ["data", "compose", "--people", str(work / "people.jsonl"), "--backgrounds", str(work / "places.jsonl"), "--store", "frames", "--output", "OUT/set"],
        work,
        "set/*/*/*.png",
    )
    assert (work / "alone/set/pairs.jsonl").read_text() == (work / "ray/set/pairs.jsonl").read_text()


def test_editing(work, random_models, capsys):
    """Names, and pictures within what x264 leaves to chance when the machine is busy."""
    for name, more in (("alone", []), ("ray", RAY)):
        assert (
            main(
                ["edit", "--manifest", str(work / "pairs.jsonl"), "--models", str(random_models), "--steps", "1", "--output", str(work / name / "edits"), *more]
            )
            == 0
        )
        assert "the broken one is left out" in capsys.readouterr().err
    alone, ray = (sorted((work / name / "edits").glob("*.mp4")) for name in ("alone", "ray"))
    assert [path.name for path in alone] == [path.name for path in ray] and len(alone) == 4
    for one, other in zip(alone, ray):
        assert (read_clip(one).frames - read_clip(other).frames).abs().mean() < 0.01
