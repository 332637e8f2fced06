"""Tables in files: JSON lines, a JSON array, CSV or Parquet, local or behind a URL."""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..media.paths import atomic_write, check_input, check_output
from ..media.remote import check_url, is_url, read_bytes

PARQUET, JSON_ARRAY, CSV = ".parquet", ".json", (".csv", ".tsv")
SUFFIXES = (".jsonl", PARQUET)  # of tables that are written
READ_SUFFIXES = (*SUFFIXES, JSON_ARRAY, *CSV)
CSV_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Row:
    """One row and its location."""

    values: dict
    where: str  # path:line of JSON lines and CSV, path:row of Parquet and of a JSON array
    text: str = ""  # the line, for JSON lines
    problem: str = ""  # why the row holds no values

    def at(self, key: str) -> str:
        """path:line:column of a key in a JSON line; the row's location if the key is missing or in other tables."""
        found = re.search(rf"{re.escape(json.dumps(key))}\s*:", self.text)
        return f"{self.where}:{found.start() + 1}" if found else self.where


def read_table(location: str | os.PathLike, what: str) -> list[Row]:
    """Reads a table. A row that cannot be read says so in `problem`. Raises UserError for an unreadable file."""
    if is_url(location):
        where, content = check_url(location), read_bytes(location, what)
    else:
        path = check_input(location, what)
        if path.is_dir():
            raise UserError("is a folder", where=f"{what} {str(path)!r}", expected="a .jsonl, .json, .csv or .parquet file")
        where, content = str(path), path.read_bytes()
    suffix = os.path.splitext(where.lower().partition("?")[0])[1] if is_url(location) else os.path.splitext(where.lower())[1]
    if suffix == PARQUET:
        rows = _parquet_rows(content, where, what)
    else:
        text = _text(content, where, what)
        if suffix in CSV:
            rows = _csv_rows(text, where)
        elif suffix == JSON_ARRAY and text.lstrip().startswith("["):
            rows = _array_rows(text, where)
        else:
            rows = [_line(line, f"{where}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise UserError("holds no lines", where=f"{what} {where!r}", expected="one JSON object a line, or a row of a JSON array, of CSV or of Parquet")
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


def _text(content: bytes, where: str, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason} at byte {error.start})", where=f"{what} {where!r}") from None


def _line(line: str, where: str) -> Row:
    """A line of JSON -> its row."""
    try:
        return _object(json.loads(line), where, line)
    except json.JSONDecodeError as error:
        return Row({}, where, problem=str(UserError(f"not JSON ({error.msg})", where=f"{where}:{error.colno}")))
    except RecursionError:
        return Row({}, where, problem=str(UserError("not JSON (nested too deep)", where=where)))


def _array_rows(text: str, where: str) -> list[Row]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error.msg})", where=f"{where}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise UserError("not JSON (nested too deep)", where=where) from None
    return [_object(item, f"{where}:{number}") for number, item in enumerate(items, 1)]


def _object(values: Any, where: str, text: str = "") -> Row:
    if isinstance(values, dict):
        return Row(values, where, text)
    return Row({}, where, problem=str(UserError("not a JSON object", where=where, got=type(values).__name__)))


def _csv_rows(text: str, where: str) -> list[Row]:
    """The first line names the columns; its most frequent delimiter is the table's. All values are text."""
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(CSV_DELIMITERS, key=header.count))
    columns = [name.strip() for name in next(reader, [])]
    rows, line = [], reader.line_num + 1
    try:
        for values in reader:
            at, line = f"{where}:{line}", reader.line_num + 1
            if len(values) == len(columns):
                rows.append(Row(dict(zip(columns, values)), at))
            elif values:
                rows.append(Row({}, at, problem=str(UserError("another number of columns", where=at, got=len(values), expected=len(columns)))))
    except csv.Error as error:
        raise UserError(f"not CSV ({error})", where=f"{where}:{line}") from None
    return rows


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
