"""The files that comfy-cli packs for the registry."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def archived() -> list[Path]:
    """Returns the tracked files that .comfyignore does not exclude, which comfy-cli packs."""
    tracked, ignored = (
        set(subprocess.run(["git", "ls-files", "-z", "--cached", *options], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"))
        for options in ([], ["--ignored", "--exclude-from=.comfyignore"])
    )
    return sorted(ROOT / name for name in tracked - ignored if name)


FILES = archived()
SOURCES = [path for path in FILES if path.suffix == ".py"]
