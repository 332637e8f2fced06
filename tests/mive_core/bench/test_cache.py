"""The cache beside its encoders: figures that fit together, from the command line."""

import json

import pytest

from mive_core.cli import main


def test_the_share_is_of_the_encoders_speed(tmp_path, capsys):
    assert (
        main(
            [
                "bench",
                "cache",
                "--size",
                "48x32",
                "--stored-size",
                "64x64",
                "--frames",
                "5",
                "--pairs",
                "3",
                "--repeats",
                "1",
                "--folder",
                str(tmp_path),
                "--json",
                str(tmp_path / "cache.json"),
            ]
        )
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["share"] == pytest.approx(figures["cache_pairs_per_second"] / figures["encoders_pairs_per_second"])
    assert (
        (figures["size"], figures["stored_size"], figures["pairs"]) == ([48, 32], [64, 64], 3)
        and 0 < figures["share"] < 3
        and 0 < figures["share_of_processor_time"] < 2
    )
    assert json.loads((tmp_path / "cache.json").read_text())["command"].startswith("mive bench cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_a_size_that_does_not_fit(capsys):
    assert main(["bench", "cache", "--size", "50x32"]) == 2 and "multiples of 16" in capsys.readouterr().err
