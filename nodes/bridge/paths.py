"""Finds models in ComfyUI's folders and among the embedded ones.

A dropdown entry is a path relative to one of these folders, so that workflows contain no absolute paths.
"""

import filecmp
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePath

import folder_paths

from ...mive_core.data.tables import READ_SUFFIXES
from ...mive_core.errors import UserError
from ...mive_core.formats.safetensors_file import VAE_FAMILY, VLM_FAMILY, read_header
from ...mive_core.pipeline import EMBEDDED

ASSETS = EMBEDDED["tiny"].parent  # entries of embedded models start with tiny/
EMBEDDED_VAE = "tiny/vae.safetensors"
# samples that the workflows use -> their names in ComfyUI's input folder
SAMPLES = {
    "bigbuckbunny_33f.mp4": "mive_sample.mp4",
    "bigbuckbunny_grass.mp4": "mive_sample_grass.mp4",
    "grass_purple.png": "mive_sample_grass_purple.png",
    "neon.png": "mive_sample_neon.png",
    "pairs": "mive_sample_pairs",
}
LLM = "LLM"
SUFFIX = ".safetensors"


def register() -> None:
    """Adds the embedded VAE to the stock VAE loader's list and models/LLM to the known folders, and copies the samples to the input folder.

    ComfyUI lists every model file below a registered folder, and a model's folder holds more than its VAE. So the VAE is copied
    into a folder of its own in ComfyUI's user folder, and again where an update of the pack brings another.
    """
    vaes = Path(folder_paths.get_system_user_directory("mive")) / "vae"
    folder_paths.add_model_folder_path("vae", str(vaes))
    folder_paths.add_model_folder_path(LLM, os.path.join(folder_paths.models_dir, LLM))
    _copy(ASSETS / EMBEDDED_VAE, vaes / EMBEDDED_VAE, update=True)
    for name, input_name in SAMPLES.items():
        _copy(ASSETS / "samples" / name, Path(folder_paths.get_input_directory()) / input_name)


def _copy(source: Path, target: Path, update: bool = False) -> None:
    """Copies a file or a folder unless it is there; with `update` also over another file. Logs a warning if it cannot be written."""
    try:
        if target.exists() and (not update or filecmp.cmp(source, target, shallow=False)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            part = target.with_name(f"{target.name}.{os.getpid()}.part")  # so that no program reads half a file
            shutil.copyfile(source, part)
            part.replace(target)
    except OSError as error:
        logging.warning("MiVE: %s could not be written: %s", target, error)


def list_dits() -> dict[str, Path]:
    """Returns dropdown entry -> path for the .safetensors files in models/diffusion_models and, last, the embedded DiT."""
    names = [name for name in folder_paths.get_filename_list("diffusion_models") if name.endswith(SUFFIX)]
    found = {name: folder_paths.get_full_path("diffusion_models", name) for name in names}
    embedded = {f"{path.parent.name}/{path.name}": path for path in ASSETS.glob("*/dit.safetensors")}
    return {name: Path(path) for name, path in {**found, **embedded}.items() if path is not None}


def list_vlms() -> dict[str, Path]:
    """Returns dropdown entry -> path of a folder with a config.json, or of a single file with a Qwen3-VL.

    Searches models/text_encoders, models/LLM and, last, the embedded models.
    """
    roots = [Path(root) for root in (*folder_paths.get_folder_paths("text_encoders"), *folder_paths.get_folder_paths(LLM), ASSETS)]
    found: dict[str, Path] = {}
    for root in roots:
        folders = [path.parent for path in sorted({*root.glob("*/config.json"), *root.glob("*/*/config.json")})]
        files = [
            path
            for path in sorted({*root.glob("*.safetensors"), *root.glob("*/*.safetensors")})
            if path.parent not in folders and path.is_file() and _is_family(path, VLM_FAMILY, path.stat().st_mtime)
        ]
        found |= {path.relative_to(root).as_posix(): path for path in (*folders, *files)}
    return found


def list_vaes() -> dict[str, Path]:
    """Returns dropdown entry -> path for the Wan VAEs in models/vae and among the embedded models."""
    names = [name for name in folder_paths.get_filename_list("vae") if name.endswith(SUFFIX)]
    found = {name: Path(path) for name in names if (path := folder_paths.get_full_path("vae", name)) is not None}
    return {name: path for name, path in found.items() if _is_family(path, VAE_FAMILY, path.stat().st_mtime)}


@cache
def _is_family(path: Path, family: str, modified: float) -> bool:
    """Whether a file holds a model of the family. Reads only the header; `modified` makes the cached result expire when the file changes."""
    try:
        return read_header(path).family == family
    except (UserError, OSError):
        return False


def list_pairs() -> dict[str, Path]:
    """Returns dropdown entry -> path of a folder with source/ and target/, or of a manifest, in ComfyUI's input folder or its subfolders."""
    root = Path(folder_paths.get_input_directory())
    folders = [path.parent for path in sorted({*root.glob("*/source"), *root.glob("*/*/source")}) if (path.parent / "target").is_dir()]
    manifests = sorted(path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}*") if path.suffix.lower() in READ_SUFFIXES and path.is_file())
    return {path.relative_to(root).as_posix(): path for path in (*folders, *manifests)}


def output_path(folder: str, name: str, where: str) -> Path:
    """Returns the path of a new file in ComfyUI's model folder, such as "loras". Raises UserError unless name is a plain .safetensors name."""
    if not name.endswith(SUFFIX) or name == SUFFIX or PurePath(name).name != name or "\\" in name or not name.isprintable():
        raise UserError("this is no plain name of a file", where=where, got=repr(name), expected=f"a name that ends in {SUFFIX}, without folders")
    folders = [Path(path) for path in folder_paths.get_folder_paths(folder)]  # models/unet, the old name of diffusion_models, comes first
    return next((path for path in folders if path.name == folder), folders[0]) / name


def find(entries: Callable[[], dict[str, Path]], name: str, expected: str) -> Path:
    """Returns the path of a dropdown entry. Raises UserError, naming the `expected` folder, if there is no such entry."""
    found = entries()
    if name not in found:
        raise UserError("no such model", got=repr(name), expected=expected, fix=f"found there: {', '.join(list(found)[:8]) or 'nothing'}")
    return found[name]
