"""Bad files of every kind that users give: refused with a message or read, within seconds. `make fuzz` tries a hundred thousand."""

import struct
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from mive_core.errors import UserError

sys.path.append(str(Path(__file__).parent))
from parsers import PARSERS, image, mutants

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


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "name, data",
    [
        ("safetensors", header('{"a": {"shape": [1], "data_offsets": [0, 4]}}') + bytes(4)),
        ("safetensors", header('{"a": {"dtype": "F32", "shape": [1], "data": [0, 4]}}') + bytes(4)),
        ("safetensors", header('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [4, 0]}}') + bytes(4)),
        ("safetensors", header('{"__metadata__": [], "a": null}')),
        ("safetensors", header('{"a":' + "[" * 100_000)),
        ("config", b"[]"),
        ("config", b'{"patch_size": null}'),
        ("config", b'{"layers": {"a": 1}}'),
        ("config", b'{"width": 1e999, "num_heads": 0}'),
        ("config", b'{"num_heads": 0}'),
        ("config", b"[" * 100_000),
        ("recipe", b"task: edit\nnum_steps: !!int ''\n"),
        ("recipe", b"task: edit\nsharded: !!bool maybe\n"),
        ("recipe", b"task: edit\n1: 2\n"),
        ("image", image("TIFF").replace(struct.pack("<HHII", 256, 4, 1, 32), struct.pack("<HHII", 255, 4, 1, 32))),  # no width
    ],
)
def test_what_a_hundred_thousand_found(name, data, tmp_path):
    """KeyError, TypeError, AttributeError, IndexError."""
    path = PARSERS[name].prepare(tmp_path)
    path.write_bytes(data)
    with pytest.raises(UserError):
        PARSERS[name].read(path)
