"""Runs the tests of each fault and writes which of them ran and passed as JSON; exits with 1 unless all did.

COMFYUI_PATH=~/comfy/ComfyUI python tests/reliability/faults.py --json results/reliability/faults.json
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from mive_core.media.paths import atomic_write

ROOT = Path(__file__).resolve().parents[2]
OURS, TRAINING, SERVED, SERVER = (
    "tests/reliability/test_faults.py",
    "tests/mive_core/train/test_faults.py",
    "tests/comfyui/test_faults.py",
    "tests/comfyui/test_server.py",
)
FAULTS = {
    "kill -9": {
        OURS: ["test_killed_or_interrupted_it_leaves_the_old_file_and_runs_again"],
        TRAINING: ["test_killed_it_ends_bit_equal"],
        "tests/mive_core/formats/test_merge.py": ["test_a_killed_merge_leaves_the_old_file_and_the_next_run_its_place"],
        "tests/mive_core/data/test_compose.py": ["test_a_kill_in_the_middle_loses_nothing"],
    },
    "disk full": {
        OURS: ["test_a_full_disk_leaves_the_old_file_and_is_said"],
        TRAINING: ["test_a_full_disk_leaves_the_last_checkpoint_whole"],
        "tests/mive_core/media/test_video.py": ["test_a_full_disk_leaves_nothing"],
    },
    "out of memory": {
        OURS: ["test_out_of_memory_is_one_line_and_the_rerun_is_clean"],
        SERVED: ["test_out_of_memory_reaches_comfyui_and_the_rerun_is_clean", "test_the_vae_goes_on_in_tiles_where_memory_is_short"],
    },
    "interrupt": {
        OURS: ["test_killed_or_interrupted_it_leaves_the_old_file_and_runs_again"],
        SERVED: ["test_cancel_is_heard_in_the_middle_and_the_rerun_is_clean"],
        SERVER: ["test_interrupt_ends_at_once_and_leaves_nothing_behind"],
    },
    "no network": {OURS: ["test_without_a_network_nothing_asks_for_one"], SERVED: ["test_without_a_network_a_server_runs_the_whole_graph"]},
    "numbers that are none": {
        SERVED: ["test_numbers_that_are_none_never_become_a_black_video"],
        "tests/mive_core/media/test_video.py": ["test_not_finite_pixels_never_become_a_black_video"],
    },
}


def outcomes(tests: dict[str, list[str]]) -> dict[str, dict]:
    """Runs tests, file -> names of functions; returns passed, failed and skipped of each function over its parameters, and its seconds."""
    found: dict[str, dict] = {}
    for path, names in tests.items():
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *(f"{path}::{name}" for name in names)]
            subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
            cases = list(ElementTree.parse(report).iter("testcase"))
        for name in names:
            row = found[f"{path}::{name}"] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
            for case in cases:
                if case.get("name", "").split("[")[0] == name:
                    bad = {child.tag for child in case} & {"failure", "error", "skipped"}
                    row["skipped" if bad == {"skipped"} else "failed" if bad else "passed"] += 1
                    row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 1)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="report to write")
    options = parser.parse_args()
    rows = {}
    for fault, tests in FAULTS.items():
        rows[fault] = outcomes(tests)
        sys.stdout.write(f"{fault}: {rows[fault]}\n")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.json) as partial:
        partial.write_text(json.dumps({"command": shlex.join(["python", "tests/reliability/faults.py", *sys.argv[1:]]), "faults": rows}, indent=1) + "\n")
    return int(any(row["failed"] or row["skipped"] or not row["passed"] for tests in rows.values() for row in tests.values()))


if __name__ == "__main__":
    sys.exit(main())
