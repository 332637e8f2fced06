"""Faults that are really done to the command line: killed, interrupted, a full disk, no memory, no network."""

import ast
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPTS = Path(__file__).parent
ASSETS = SCRIPTS.parents[1] / "mive_core" / "assets"

OUT_OF_MEMORY = """
import contextlib, io, resource, sys
from pathlib import Path
from mive_core.cli import main
from mive_core.media.video import read_clip
arguments, output = sys.argv[1:], Path(sys.argv[-1])
assert main(arguments) == 0
clean, frames = output.read_bytes(), read_clip(output).frames
resource.setrlimit(resource.RLIMIT_AS, (4096 * int(open("/proc/self/statm").read().split()[0]) + 2**20, resource.RLIM_INFINITY))
said = io.StringIO()
with contextlib.redirect_stderr(said):
    code = main(arguments)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
(line,) = [line for line in said.getvalue().splitlines() if not line.startswith("mive: warning: ")]
assert code == 2 and line.startswith("mive: error: out of memory (") and "take fewer frames" in line, said.getvalue()
assert output.read_bytes() == clean and [path.name for path in output.parent.iterdir()] == [output.name]
assert main(arguments) == 0
assert read_clip(output).frames.equal(frames)
"""
NO_NETWORK = """
import sys
from mive_core.cli import main
asked = []
sys.addaudithook(lambda event, arguments: asked.append((event, arguments)) if event in ("socket.connect", "socket.getaddrinfo") else None)
assert main(sys.argv[1:]) == 0
assert not asked, asked
"""


def edit(folder: Path) -> list[str]:
    reference = folder.parent / "reference.png"
    Image.new("RGB", (192, 112), (20, 40, 90)).save(reference)
    options = ["--instruction", "make it night", "--frames", "9", "--size", "96x64", "--steps", "1"]
    return ["edit", "--source", str(ASSETS / "samples" / "bigbuckbunny_33f.mp4"), "--reference", str(reference), *options, "--output", str(folder / "a.mp4")]


@pytest.mark.slow
@pytest.mark.parametrize("write", ["quantize", "video", "cache"])
def test_killed_or_interrupted_it_leaves_the_old_file_and_runs_again(tmp_path, write):
    """Once each; results/reliability/kills.json has twenty moments of all writes."""
    options = ["--only", write, "--num", "1", "--interrupts", "1", "--json", str(tmp_path / "kills.json")]
    run = subprocess.run([sys.executable, str(SCRIPTS / "kills.py"), *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    sys.path.append(str(SCRIPTS))
    from kills import writes

    return writes(tmp_path_factory.mktemp("inputs"), only=("merge", "quantize", "cache"))


@pytest.mark.parametrize("write, limit", [("merge", 2**20), ("quantize", 2**20), ("cache", 2**13)])
def test_a_full_disk_leaves_the_old_file_and_is_said(inputs, tmp_path, capsys, write, limit):
    from kills import OLD

    if inputs[write].replaces:
        (tmp_path / inputs[write].results).write_bytes(OLD)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert inputs[write].run(tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "check space and permissions" in capsys.readouterr().err
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == ({inputs[write].results: OLD} if inputs[write].replaces else {})
    assert inputs[write].run(tmp_path) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux counts it")
def test_out_of_memory_is_one_line_and_the_rerun_is_clean(tmp_path):
    (tmp_path / "out").mkdir()
    command, *options, output = edit(tmp_path / "out")
    lossless = [command, "--codec", "ffv1", *options, str(Path(output).with_suffix(".mkv"))]  # of the same frames, H.264 can differ on a busy machine
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, *lossless], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_without_a_network_nothing_asks_for_one(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("the system lets nobody take the network away")
    (tmp_path / "out").mkdir()
    run = subprocess.run(["unshare", "-rn", sys.executable, "-c", NO_NETWORK, *edit(tmp_path / "out")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_fault_has_its_tests():
    sys.path.append(str(SCRIPTS))
    from faults import FAULTS, ROOT

    assert len(FAULTS) == 6
    for path, names in (item for tests in FAULTS.values() for item in tests.items()):
        defined = {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert not set(names) - defined, path
