"""Tests against a real ComfyUI, found at $COMFYUI_PATH or in comfy-cli's default workspace."""

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI's folder, importable, on the CPU. Skips loudly where there is none."""
    root = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (root / "comfy" / "ldm").is_dir():
        pytest.skip(f"NO COMFYUI: nothing at {root}; set COMFYUI_PATH to run the tests against it")
    sys.path.insert(0, str(root))
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy.model_management  # noqa: F401
    except ImportError as error:
        pytest.skip(f"COMFYUI CANNOT BE IMPORTED from {root}: {error}; install its requirements.txt here")
    finally:
        sys.argv = argv
    return root
