"""Kills and interrupts long writes at random moments, runs them again and compares what is there with an undisturbed run's. Writes JSON.

python tests/reliability/kills.py --json results/reliability/kills.json
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan  # noqa: F401  loaded once here, not again in every process that is started
from tqdm import tqdm

from mive_core.cli import main as mive
from mive_core.config import PRESETS
from mive_core.data.manifest import export_pairs
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.formats.checkpoint import save_dit, state_dict_shapes
from mive_core.formats.lora_file import write_lora
from mive_core.formats.quantize import MATRIX
from mive_core.formats.safetensors_file import read_headers
from mive_core.media.paths import atomic_write
from mive_core.media.video import read_clip, write_video
from mive_core.types import Clip

ASSETS = Path(__file__).resolve().parents[2] / "mive_core" / "assets"
OLD = b"what was there before"
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
PATIENCE_S = 300
MOST_TRIES = 5  # for one that is stopped before it ends


@dataclass(frozen=True)
class Write:
    """A long write: what makes files under a folder, the file or files that count, and whether they replace an old one."""

    run: Callable[[Path], int]
    results: str  # glob
    replaces: bool = True
    file_s: float = 0.0  # about as long as it writes one of several files


WRITES = ("video", "cache", "quantize", "merge", "training checkpoint")


def writes(work: Path, num_blocks: int = 1, only: Sequence[str] = WRITES) -> dict[str, Write]:
    """The long writes of the command line, those of WRITES that are named, on inputs that are made in `work`."""
    base, lora, recipe = work / "base.safetensors", work / "lora.safetensors", work / "recipe.yaml"
    config = replace(PRESETS["1.3b"], num_blocks=num_blocks)
    save_dit(base, {name: torch.randn(shape).to(torch.bfloat16) for name, shape in state_dict_shapes(config).items()}, config)
    shapes = {name.removesuffix(".weight"): shape for name, shape in state_dict_shapes(config).items() if MATRIX.fullmatch(name)}
    write_lora(lora, {layer: (torch.ones(2, shape[1]), torch.ones(shape[0], 2)) for layer, shape in shapes.items()}, 1.0, {}, {})
    pairs = export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5), 20), work / "pairs")
    options = ["--manifest", str(pairs), "--models", str(ASSETS / "tiny")]
    if "training checkpoint" in only and mive(["data", "cache", *options, "--output", str(work / "cache")]):
        raise RuntimeError("the cache to train on was not made")
    small = read_clip(ASSETS / "samples" / "bigbuckbunny_33f.mp4").frames
    clip = Clip(torch.nn.functional.interpolate(small.movedim(-1, 1), scale_factor=4).movedim(1, -1).repeat(3, 1, 1, 1), 24.0)

    def train(folder: Path) -> int:
        values = {"task": "edit", "start_from": str(ASSETS / "tiny" / "dit.safetensors"), "caches": [str(work / "cache")], "num_steps": 4}
        values |= {"output_dir": str(folder / "run"), "export": str(folder / "out.safetensors"), "learning_rate": 1e-3, "checkpoint_every_s": 0.0}
        values |= {"num_warmup_steps": 2, "num_workers": 0, "log_every": 1, "ema_decay": 0.9}
        recipe.write_text(yaml.safe_dump(values))
        return mive(["train", str(recipe)])

    found = {
        "training checkpoint": Write(train, "out.safetensors", replaces=False, file_s=0.02),
        "merge": Write(lambda folder: mive(["merge", str(base), str(lora), str(folder / "out.safetensors")]), "out.safetensors"),
        "quantize": Write(lambda folder: mive(["quantize", str(base), str(folder / "out.safetensors")]), "out.safetensors"),
        "cache": Write(lambda folder: mive(["data", "cache", *options, "--output", str(folder)]), "*", replaces=False, file_s=0.002),
        "video": Write(lambda folder: write_video(folder / "out.mp4", clip) and 0, "out.mp4"),
    }
    return {title: found[title] for title in only}


def started(write: Write, folder: Path) -> int:
    """Starts the write in a process of its own and returns its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks, and would stay locked where one is killed with it
        with open(log_of(folder), "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        code = write.run(folder)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def log_of(folder: Path) -> Path:
    """What the last process that wrote into the folder printed."""
    return folder.with_name(f"{folder.name}.log")


def ended(pid: int) -> int:
    """Waits for a process -> its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begun(pid: int, folder: Path) -> bool:
    """Waits until a process has begun to write; False if it has ended before."""
    deadline = time.monotonic() + PATIENCE_S
    while not partials(folder):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(folder)
        time.sleep(0.001)
    return True


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob(".*partial*"))


def digests(folder: Path, results: str) -> dict[str, str]:
    files = (path for path in sorted(folder.glob(results)) if path.is_file() and not path.name.startswith("."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(write: Write, folder: Path) -> Path:
    folder.mkdir()
    if write.replaces:
        (folder / write.results).write_bytes(OLD)
    return folder


def timed(write: Write, folder: Path) -> tuple[float, dict[str, str]]:
    """An undisturbed run -> seconds from the first file's begin to its end, and the results' digests."""
    pid = started(write, folder)
    seen = begun(pid, folder)
    begin = time.monotonic()
    code = ended(pid)
    assert seen and code == 0, f"{'not ' * (not seen)}seen to begin, exit code {code}: {log_of(folder).read_text(encoding='utf-8')[-2000:]}"
    return time.monotonic() - begin, digests(folder, write.results)


def torment(write: Write, work: Path, number: int, what: signal.Signals, moments: random.Random) -> dict:
    """One write, stopped so many times at random moments of its writing -> what was found. Raises AssertionError where anything is lost."""
    undisturbed = [timed(write, make(write, work / name)) for name in ("clean", "clean again")]
    assert undisturbed[0][1] == undisturbed[1][1], "two undisturbed runs differ"
    seconds, clean = min(seconds for seconds, _ in undisturbed), undisturbed[0][1]
    rows, num_stopped = [], 0
    for index in range(MOST_TRIES * number):
        if num_stopped == number:
            break
        folder = make(write, work / str(index))
        pid, after = started(write, folder), moments.uniform(0, seconds)
        if begun(pid, folder):
            time.sleep(after)
            if write.file_s and begun(pid, folder):  # of several files: in the next one
                time.sleep(moments.uniform(0, write.file_s))
            os.kill(pid, what)
        code = ended(pid)
        rows.append({"after_s": round(after, 3), "code": code, "unfinished_files": len(partials(folder)), "unfinished_bytes": size(folder)})
        check_whole(write, folder, clean)
        assert what == signal.SIGKILL or not partials(folder), f"an interrupt left {partials(folder)}"
        assert ended(started(write, folder)) == 0
        assert digests(folder, write.results) == clean, f"another result after {rows[-1]}"
        assert not partials(folder), f"left behind: {partials(folder)}"
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        num_stopped += code != 0  # the others had ended before
    stopped = [row for row in rows if row["code"] != 0]
    if len(stopped) < number:
        raise RuntimeError(f"only {len(stopped)} of {len(rows)} were stopped before they ended")
    return {
        "stopped": len(stopped),
        "stopped_in_a_file": sum(row["unfinished_files"] > 0 for row in stopped),
        "ended_before": len(rows) - len(stopped),
        "whole_after": len(rows),
        "equal_after_rerun": len(rows),
        "seconds_of_the_write": round(seconds, 3),
        "moments_s": [row["after_s"] for row in stopped],
        "unfinished_bytes": [row["unfinished_bytes"] for row in stopped],
    }


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in partials(folder) if path.is_file())


def check_whole(write: Write, folder: Path, clean: dict[str, str]) -> None:
    """What has its final name is the old file or the undisturbed run's; every checkpoint can be opened to its end."""
    old = hashlib.sha256(OLD).hexdigest()
    for name, digest in digests(folder, write.results).items():
        assert digest in (clean[name], old if write.replaces else clean[name]), f"{name} is neither the old nor the new one"
    for path in folder.rglob("step_*.safetensors"):
        read_headers(path)  # compares the tensors' offsets with the file's length


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=20, help="kills of each write; default 20")
    parser.add_argument("--interrupts", type=int, default=3, help="interrupts of each write; default 3")
    parser.add_argument("--only", nargs="*", choices=WRITES, help="names of writes")
    parser.add_argument("--blocks", type=int, default=1, help="size of the checkpoint that is merged and quantised, in blocks of the 1.3B; default 1")
    parser.add_argument("--json", type=Path, required=True, help="report to write")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # a fork cannot use its parent's pool of threads, and transformers loads weights in threads of its own
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    moments, rows = random.Random(0), []
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        found = writes(Path(name), options.blocks, options.only or WRITES)
        for title in found:
            for (kind, what), number in zip(SIGNALS.items(), (options.num, options.interrupts)):
                if not number:
                    continue
                work = Path(name) / f"{title} {kind}"
                work.mkdir()
                rows.append({"write": title, "by": kind} | torment(found[title], work, number, what, moments))
                sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()
                with atomic_write(options.json) as partial:
                    report = {"command": shlex.join(["python", "tests/reliability/kills.py", *sys.argv[1:]]), "rows": rows}
                    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
