"""Places named by a URL: read through fsspec; media are copied once into a local folder, $MIVE_CACHE or ~/.cache/mive."""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .paths import atomic_folder, atomic_write, check_output_folder

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
OURSELVES = ("file", "local")  # protocols that would read this machine's files
CACHE_VARIABLE = "MIVE_CACHE"


def is_url(text: str | os.PathLike) -> bool:
    return isinstance(text, str) and URL.match(text) is not None


def check_url(url: str, where: object = None) -> str:
    """Raises UserError for a URL that leads back to this machine's files, or through one protocol to another."""
    if "::" in url or url.partition("://")[0].lower() in OURSELVES:
        raise UserError("a URL must name another place, by one protocol", where=where, got=repr(url), fix="name a local file by its path")
    return url


def read_bytes(url: str, what: str) -> bytes:
    """Raises UserError, under the name `what`."""
    return _told(url, what, lambda files, path: files.cat_file(path))


def local_copy(place: str | Path, what: str) -> Path:
    """A path as it stands; of a URL's file, or of its folder where the name has no suffix, the path of a local copy.

    A copy is kept, and made again where the place says that its content is another. Raises UserError, under the name `what`.
    """
    if not is_url(place):
        return Path(place)
    version = _told(place, what, lambda files, path: str(files.ukey(path)))
    copy = cache_folder() / (hashlib.sha256(f"{place} {version}".encode()).hexdigest()[:32] + PurePosixPath(place).suffix)
    if not copy.exists():
        _told(place, what, lambda files, path: _copy_file(files, path, copy) if copy.suffix else _copy_folder(files, path, copy))
    return copy


def cache_folder() -> Path:
    """Where copies are kept; made if it is not there. Raises UserError."""
    folder = check_output_folder(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "mive", "the folder of copies")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _copy_file(files, path: str, copy: Path) -> None:
    with atomic_write(copy) as partial:
        files.get_file(path, str(partial))


def _copy_folder(files, path: str, copy: Path) -> None:
    with atomic_folder(copy) as partial:
        for entry in files.ls(path, detail=True):
            if entry["type"] == "file":
                files.get_file(entry["name"], str(partial / PurePosixPath(entry["name"]).name))


def _told(url: str, what: str, call):
    """call(file system, path in it). Raises UserError for whatever goes wrong: each protocol's package has errors of its own."""
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
