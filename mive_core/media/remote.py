"""Files behind URLs, read through fsspec. Media are copied once to a local folder, $MIVE_CACHE or ~/.cache/mive."""

import hashlib
import os
import re
from collections.abc import Callable
from os import environ
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from ..errors import UserError
from .paths import atomic_folder, atomic_write, check_output_folder

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
LOCAL_PROTOCOLS = ("file", "local")  # they would read this machine's files
CACHE_VARIABLE = "MIVE_CACHE"


def is_url(text: str | os.PathLike) -> TypeGuard[str]:
    return isinstance(text, str) and URL.match(text) is not None


def check_url(url: str, where: object = None) -> str:
    """Returns the URL. Raises UserError if it names this machine's files or chains protocols."""
    if "::" in url or url.partition("://")[0].lower() in LOCAL_PROTOCOLS:
        raise UserError("a URL must name another place, by one protocol", where=where, got=repr(url), fix="name a local file by its path")
    return url


def read_bytes(url: str, what: str) -> bytes:
    """Reads the whole file. Raises UserError that names `what`."""
    return _call_filesystem(url, what, lambda filesystem, path: filesystem.cat_file(path))


def local_copy(location: str | Path, what: str) -> Path:
    """Returns a path unchanged; for a URL, the path of a local copy of the file, or of the folder if the name has no suffix.

    Copies are kept, and made again when the remote content changes. Raises UserError that names `what`.
    """
    if not is_url(location):
        return Path(location)
    version = _call_filesystem(location, what, lambda filesystem, path: str(filesystem.ukey(path)))
    copy = cache_folder() / (hashlib.sha256(f"{location} {version}".encode()).hexdigest()[:32] + PurePosixPath(location).suffix)
    if not copy.exists():
        copy_from = _copy_file if copy.suffix else _copy_folder
        _call_filesystem(location, what, lambda filesystem, path: copy_from(filesystem, path, copy))
    return copy


def cache_folder() -> Path:
    """The folder of the copies, created if missing. Raises UserError."""
    folder = check_output_folder(environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "mive", "the folder of copies")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _copy_file(filesystem: Any, path: str, copy: Path) -> None:
    with atomic_write(copy) as partial:
        filesystem.get_file(path, str(partial))


def _copy_folder(filesystem: Any, path: str, copy: Path) -> None:
    with atomic_folder(copy) as partial:
        for entry in filesystem.ls(path, detail=True):
            if entry["type"] == "file":
                filesystem.get_file(entry["name"], str(partial / PurePosixPath(entry["name"]).name))


def _call_filesystem(url: str, what: str, call: Callable[[Any, str], Any]) -> Any:
    """Returns call(file system, path in it). Raises UserError for any error, since each protocol's package has its own."""
    where = f"{what} {url!r}"
    try:
        import fsspec
    except ImportError as error:
        raise UserError("a URL needs the package fsspec", where=where, got=str(error), fix='pip install "mive[data]"') from None
    try:
        return call(*fsspec.core.url_to_fs(url))
    except UserError:
        raise
    except ImportError as error:
        raise UserError("this kind of URL needs one more package", where=where, fix=str(error)) from None
    except FileNotFoundError:
        raise UserError("no such file or folder", where=where, fix="check the spelling") from None
    except Exception as error:
        raise UserError(f"cannot be read ({type(error).__name__}: {error})", where=where) from None
