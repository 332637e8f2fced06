"""Tables in files: JSON lines or Parquet, local or behind a URL."""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..media.paths import atomic_write, check_input, check_output
from ..media.remote import check_url, is_url, read_bytes

PARQUET = ".parquet"
SUFFIXES = (".jsonl", PARQUET)


@dataclass(frozen=True)
class Row:
    """One row and its location."""

    values: dict
    where: str  # path:line of JSON, path:row of Parquet
    text: str = ""  # the line, for JSON

    def at(self, key: str) -> str:
        """path:line:column of a key in a JSON line; the row's location if the key is missing or the table is Parquet."""
        found = re.search(rf"{re.escape(json.dumps(key))}\s*:", self.text)
        return f"{self.where}:{found.start() + 1}" if found else self.where


def read_table(location: str | os.PathLike, what: str) -> list[Row]:
    """Reads a table. Raises UserError for an unreadable file, and with line and column for a line that is not a JSON object."""
    if is_url(location):
        where, content = check_url(location), read_bytes(location, what)
    else:
        path = check_input(location, what)
        if path.is_dir():
            raise UserError("is a folder", where=f"{what} {str(path)!r}", expected="a .jsonl or .parquet file")
        where, content = str(path), path.read_bytes()
    rows = _parquet_rows(content, where, what) if where.lower().endswith(PARQUET) else _json_rows(content, where, what)
    if not rows:
        raise UserError("holds no lines", where=f"{what} {where!r}", expected="one JSON object a line, or a row of Parquet")
    return rows


def write_table(path: str | os.PathLike, rows: Sequence[Mapping]) -> Path:
    """Writes a table atomically, in the format of the suffix. Raises UserError."""
    path = check_output(path, "output", SUFFIXES)
    with atomic_write(path) as partial:
        if path.suffix.lower() == PARQUET:
            pyarrow = _pyarrow(str(path))
            keys = dict.fromkeys(key for row in rows for key in row)  # otherwise pyarrow takes the columns from the first row
            table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in rows])
            pyarrow.parquet.write_table(table, partial)
        else:
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _json_rows(content: bytes, where: str, what: str) -> list[Row]:
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason} at byte {error.start})", where=f"{what} {where!r}") from None
    return [Row(_object(line, f"{where}:{number}"), f"{where}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _object(line: str, where: str) -> dict:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg})", where=f"{where}:{error.colno}") from None
    except RecursionError:
        raise UserError("not JSON (nested too deep)", where=where) from None
    if not isinstance(values, dict):
        raise UserError("not a JSON object", where=where, got=type(values).__name__)
    return values


def _parquet_rows(content: bytes, where: str, what: str) -> list[Row]:
    pyarrow = _pyarrow(where)
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("is not a Parquet file that can be read", where=f"{what} {where!r}", got=f"{len(content)} bytes, {error}") from None
    return [Row(values, f"{where}:{number}") for number, values in enumerate(table.to_pylist(), 1)]


def _pyarrow(where: str):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs the package pyarrow", where=where, got=str(error), fix='pip install "mive[data]"') from None
    return pyarrow
