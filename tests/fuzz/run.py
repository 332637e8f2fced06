"""`make fuzz`: many bad files of every kind; writes what came of them as JSON, and exits with 1 if anything but a UserError came out."""

import argparse
import json
import resource
import shlex
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from mive_core.errors import UserError
from mive_core.media.paths import atomic_write

sys.path.append(str(Path(__file__).parent))
from parsers import PARSERS, Parser, mutants

SLOW_S = 5.0  # a file that takes longer counts as hanging


def fuzz(parser: Parser, num_files: int) -> dict:
    """Tries bad files on one parser until one of them trips it -> how many were read and refused, the slowest's seconds, and the first failure."""
    counts, slowest = Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = parser.prepare(Path(folder))

        @settings(max_examples=num_files, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(data=mutants(parser.seeds()))
        def run(data: bytes) -> None:
            nonlocal slowest
            path.write_bytes(data)
            start = time.perf_counter()
            try:
                parser.read(path)
                counts["read"] += 1
            except UserError:
                counts["refused"] += 1
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            assert seconds < SLOW_S, f"{seconds:.1f} s"

        failure = None
        try:
            run()
        except Exception as error:
            failure = repr(error)[:500]
    return {"read": counts["read"], "refused": counts["refused"], "slowest_s": round(slowest, 3), "failure": failure}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--num", type=int, default=100_000, help="number of files in all; default 100,000")
    options.add_argument("--json", type=Path, required=True, help="report to write")
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    rows = {}
    for name, parser in PARSERS.items():
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows[name] = fuzz(parser, -(-arguments.num // len(PARSERS)))
        rows[name]["peak_growth_bytes"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
        sys.stdout.write(f"{name}: {rows[name]}\n")
    report = {"command": shlex.join(["python", "tests/fuzz/run.py", *sys.argv[1:]]), "parsers": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.json) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any(row["failure"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
