"""Where models are found: ComfyUI's folders and the embedded ones.

An entry of a dropdown is a path relative to one of its roots, so that a workflow holds no machine's paths.
"""

import logging
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...mive_core.errors import UserError
from ...mive_core.sample import EMBEDDED
from ...mive_core.tensors import VLM_FAMILY, read_header

ASSETS = EMBEDDED["tiny"].parent  # embedded entries read `tiny/...`
SAMPLE, SAMPLE_INPUT = ASSETS / "samples" / "bigbuckbunny_33f.mp4", "mive_sample.mp4"
LLM = "LLM"


def register() -> None:
    """Adds the embedded VAE to the stock VAE loader's list, models/LLM to the known folders, the sample clip to the inputs."""
    folder_paths.add_model_folder_path("vae", str(ASSETS))
    folder_paths.add_model_folder_path(LLM, os.path.join(folder_paths.models_dir, LLM))
    sample = Path(folder_paths.get_input_directory()) / SAMPLE_INPUT
    try:
        if not sample.exists():
            shutil.copyfile(SAMPLE, sample)
    except OSError as error:
        logging.warning("MiVE: the quickstart's sample clip could not be put into the input folder: %s", error)


def list_dits() -> dict[str, Path]:
    """Entry -> file, of .safetensors in models/diffusion_models and the embedded DiT, which comes last."""
    names = [name for name in folder_paths.get_filename_list("diffusion_models") if name.endswith(".safetensors")]
    found = {name: folder_paths.get_full_path("diffusion_models", name) for name in names}
    embedded = {f"{path.parent.name}/{path.name}": path for path in ASSETS.glob("*/dit.safetensors")}
    return {name: Path(path) for name, path in {**found, **embedded}.items() if path is not None}


def list_vlms() -> dict[str, Path]:
    """Entry -> a folder with a config.json, or one file that holds a Qwen3-VL.

    They are looked for in models/text_encoders, models/LLM and among the embedded models, which come last.
    """
    roots = [Path(root) for root in (*folder_paths.get_folder_paths("text_encoders"), *folder_paths.get_folder_paths(LLM), ASSETS)]
    found = {}
    for root in roots:
        folders = [path.parent for path in sorted({*root.glob("*/config.json"), *root.glob("*/*/config.json")})]
        files = [path for path in sorted({*root.glob("*.safetensors"), *root.glob("*/*.safetensors")})
                 if path.parent not in folders and path.is_file() and _is_vlm(path, path.stat().st_mtime)]
        found |= {path.relative_to(root).as_posix(): path for path in (*folders, *files)}
    return found


@lru_cache(maxsize=None)
def _is_vlm(path: Path, modified: float) -> bool:
    """Whether a file holds a Qwen3-VL; only its header is read, once for each time it was `modified`."""
    try:
        return read_header(path).family == VLM_FAMILY
    except (UserError, OSError):
        return False


def find(entries: Callable[[], dict[str, Path]], name: str, expected: str) -> Path:
    """The entry's path. Raises UserError that says where such models are expected, where there is none."""
    found = entries()
    if name not in found:
        raise UserError("no such model", got=repr(name), expected=expected, fix=f"found there: {', '.join(list(found)[:8]) or 'nothing'}")
    return found[name]
