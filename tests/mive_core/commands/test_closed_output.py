"""A command whose output nobody reads ends quietly."""

import subprocess
import sys

import pytest

from mive_core.pipeline import EMBEDDED

INSPECT = f"{sys.executable} -m mive_core inspect {EMBEDDED['tiny']}"


@pytest.mark.parametrize(
    "command",
    [f"{INSPECT} | true", f"{INSPECT} >&-", f"{INSPECT} 2>&- >&-", f"{sys.executable} -m mive_core --help | true"],
    ids=["reader gone", "stdout closed", "both closed", "help"],
)
def test_it_ends_quietly(command):
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_read_comes_whole():
    done = subprocess.run(["bash", "-c", f"{INSPECT} | head -c 2"], capture_output=True, text=True)
    assert done.stdout == "{\n" and done.stderr == ""
