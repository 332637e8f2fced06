"""Checks the user's paths early, and writes files and folders atomically."""

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import UserError


def check_input(path: str | os.PathLike, what: str) -> Path:
    """Returns the path if it exists and is readable. Raises UserError that names `what`."""
    where = f"{what} {os.fspath(path)!r}"
    _check_spelling(path, where)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("no such file or folder", where=where, fix=_hint(path)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be opened ({error})", where=where) from None
    if not os.access(path, os.R_OK):
        raise UserError("may not be read", where=where, fix="check its permissions")
    return Path(path)


def check_output(path: str | os.PathLike, what: str, suffixes: Collection[str]) -> Path:
    """Returns the path if a file can be written there: known suffix, existing folder. Raises UserError."""
    where = f"{what} {os.fspath(path)!r}"
    _check_spelling(path, where)
    path = Path(path)
    if os.name != "nt" and "\\" in str(path):
        raise UserError("a backslash does not separate folders on this system", where=where, fix="write it with /")
    if path.suffix.lower() not in suffixes:
        raise UserError("unsupported file type", where=where, got=repr(path.suffix), expected=" or ".join(sorted(suffixes)))
    try:
        if path.is_dir():
            raise UserError("is a folder", where=where, expected="the path of a file")
        if not path.parent.is_dir():
            raise UserError("its folder does not exist", where=where, fix=f"create {str(path.parent)!r} first")
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=where) from None
    if not os.access(path.parent, os.W_OK):
        raise UserError("its folder may not be written to", where=where, fix="check the folder's permissions")
    return path


def check_output_folder(path: str | os.PathLike, what: str) -> Path:
    """Returns the path if it is a folder or one can be created there. Raises UserError."""
    where = f"{what} {os.fspath(path)!r}"
    _check_spelling(path, where)
    path = Path(path)
    if os.name != "nt" and "\\" in str(path):
        raise UserError("a backslash does not separate folders on this system", where=where, fix="write it with /")
    try:
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=where) from None
    if not ancestor.is_dir():
        raise UserError(f"{str(ancestor)!r} is a file", where=where, expected="a folder")
    if not os.access(ancestor, os.W_OK):
        raise UserError(f"{str(ancestor)!r} may not be written to", where=where, fix="check its permissions")
    return path


def numbered_name(number: int, name: str, digits: int) -> str:
    """A file name without suffix: the number, then the ASCII letters and digits of the name, at most 80 characters."""
    return "-".join([f"{number:0{digits}d}", *re.findall(r"[A-Za-z0-9]+", name)])[:80].rstrip("-")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is renamed to `path` at the end.

    On any failure the temporary file is removed, and an existing file at `path` stays unchanged.
    Raises UserError if the system refuses the write.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"could not be written ({error.strerror or error})", where=path, fix="check space and permissions") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`; at the end each of its entries is renamed into `path`.

    Entries of the same name are replaced, others stay. The temporary folder is removed in any case.
    Raises UserError if the system refuses a write.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial_folder(path.parent, f".{path.name}.{os.getpid()}.") as temporary:
            partial, replaced = temporary / "new", temporary / "replaced"
            partial.mkdir()
            replaced.mkdir()
            yield partial
            path.mkdir(exist_ok=True)
            for entry in sorted(partial.iterdir()):
                destination = path / entry.name
                if destination.is_dir() and not destination.is_symlink():
                    os.replace(destination, replaced / entry.name)
                os.replace(entry, destination)
    except OSError as error:
        raise UserError(f"could not be written ({error.strerror or error})", where=path, fix="check space and permissions") from error


def remove_partials_of(path: Path) -> None:
    """Removes what killed processes left of `atomic_write` and `atomic_folder` to this very path."""
    file = rf"\.{re.escape(path.stem)}\.\d+\.partial{re.escape(path.suffix)}"
    folder = rf"\.{re.escape(path.name)}\.\d+\.\w+\.partial"
    _remove(path.parent, [leftover for leftover in path.parent.glob(".*.partial*") if re.fullmatch(f"{file}|{folder}", leftover.name)])


def remove_partial_files(folder: Path) -> None:
    """Removes leftovers of `atomic_write` and `atomic_folder` in killed processes."""
    _remove(folder, list(folder.glob(".*.partial*")))


def _remove(folder: Path, leftovers: list[Path]) -> None:
    if leftovers:
        with _partial_folder(folder, ".leftovers.") as temporary:
            for path in leftovers:
                with suppress(FileNotFoundError):  # another process has removed it
                    os.replace(path, temporary / path.name)


@contextmanager
def _partial_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields a temporary folder, which is removed with all that it holds."""
    with TemporaryDirectory(prefix=prefix, suffix=".partial", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, on systems that can open folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _check_spelling(path: str | os.PathLike, where: str) -> None:
    text = os.fspath(path)
    if not text:
        raise UserError("the path is empty", where=where)
    if "\0" in text:
        raise UserError("the path holds a NUL character", where=where)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError("the path holds a lone surrogate", where=where) from None


def _hint(path: str | os.PathLike) -> str:
    text = os.fspath(path)
    if os.name != "nt" and "\\" in text:
        return "this looks like a Windows path; on this system folders are separated by /"
    parent = Path(text).parent
    if not os.path.isdir(parent):
        return f"the folder {str(parent)!r} does not exist either"
    return "check the spelling"


def describe(path: Path) -> str:
    """Describes an unreadable file by its first bytes and its length, for an error message."""
    with open(path, "rb") as file:
        head = file.read(512)
    length = f"{path.stat().st_size} bytes"
    if head.lstrip()[:1] == b"<":
        return f"an HTML or XML page of {length}"
    if head[:4] == b"PK\x03\x04":
        return f"a zip archive of {length}"
    if head[4:8] == b"ftyp":
        return f"an MP4 file of {length}"
    return length
