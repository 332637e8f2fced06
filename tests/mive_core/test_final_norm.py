"""The contract of layer -1: the last decoder layer's output after the VLM's final norm, whatever the installed transformers hands out.

The norm is computed by hand in a process of its own, with the installed transformers and, where $MIVE_PYTHON_TRANSFORMERS_457 names a Python that has
it, with 4.57, the oldest that is supported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mive_core

ROOT = Path(mive_core.__file__).parents[1]
OLD = "MIVE_PYTHON_TRANSFORMERS_457"
CODE = """
import sys, torch, transformers
from mive_core.config import PRESETS
from mive_core.prompt import build_image_inputs
from mive_core.vlm import VLM

vlm, seen = VLM.load(sys.argv[1]), []
text = vlm.model.language_model
image = torch.rand(96, 96, 3, generator=torch.Generator().manual_seed(0))
inputs = build_image_inputs(image, "make the red circle blue", vlm.processor, PRESETS["tiny"])
text.layers[-1].register_forward_hook(lambda _, args, out: seen.append(out))
last = vlm.encode(inputs, (vlm.num_layers,)).states[0, 0]
raw = seen[0][0]
normed = raw / (raw.square().mean(dim=-1, keepdim=True) + text.norm.variance_epsilon).sqrt() * text.norm.weight
torch.testing.assert_close(last, normed, atol=1e-5, rtol=1e-5)
assert (last - raw).abs().mean() > 0.1, "the norm changes nothing here, so the test proves nothing"
print(transformers.__version__)
"""


def version_that_passes(python: str, folder: Path) -> str:
    """Runs the check with an interpreter and returns the version of its transformers."""
    done = subprocess.run([python, "-c", CODE, folder], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_last_state_is_after_the_final_norm(vlm_folder):
    import transformers

    assert version_that_passes(sys.executable, vlm_folder) == transformers.__version__


def test_so_it_is_on_4_57(vlm_folder):
    if OLD not in os.environ:
        pytest.skip(f"NO TRANSFORMERS 4.57: set {OLD} to a Python that has it")
    assert version_that_passes(os.environ[OLD], vlm_folder).startswith("4.57.")
