"""Bad files of every kind that users give: refused with a message or read, within seconds. `make fuzz` tries a hundred thousand."""

import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from mive_core.errors import UserError

sys.path.append(str(Path(__file__).parent))
from parsers import PARSERS, mutants

EACH = 150


@pytest.mark.parametrize("name", PARSERS)
def test_bad_files_are_refused_in_our_words(name, tmp_path):
    parser, path = PARSERS[name], PARSERS[name].prepare(tmp_path)

    @settings(max_examples=EACH, derandomize=True, database=None, deadline=timedelta(seconds=5), suppress_health_check=list(HealthCheck))
    @given(data=mutants(parser.seeds()))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                parser.read(path)
            except UserError as error:
                assert str(error)

    run()


@pytest.mark.parametrize("name", PARSERS)
def test_the_good_files_are_read(name, tmp_path):
    """Else their mutants would try nothing but the first check."""
    parser, path, num_read = PARSERS[name], PARSERS[name].prepare(tmp_path), 0
    for seed in parser.seeds():
        path.write_bytes(seed)
        try:
            parser.read(path)
            num_read += 1
        except UserError as error:
            assert name in ("safetensors", "gguf", "index", "recipe"), error  # whose shards, keys and layout are not all there
    assert num_read or name in ("safetensors", "gguf", "index")
