"""A trace of lengths and arrivals from CSV (also .csv.gz) or Parquet.

Columns: `prompt_tokens`, `output_tokens`; optional `arrival_s` (in ascending order, or empty throughout), `max_tokens`
(what the client asks for, else the output) and `request_id` (not read: requests are numbered in order of arrival).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

from lab.core import InputError, unknown
from lab.workloads.files import read_text
from lab.workloads.source import Item, of_lengths

REQUIRED = ("prompt_tokens", "output_tokens")
COLUMNS = (*REQUIRED, "arrival_s", "max_tokens", "request_id")


class Trace(NamedTuple):
    items: list[Item]
    arrivals_s: list[float] | None  # one per item, not descending


class _Row(NamedTuple):
    where: str  # file and line, for messages
    cells: Mapping[str, str]


def read_trace(path: Path) -> Trace:
    """All rows of the file; InputError names file, line, column and value of the first that is wrong."""
    items = []
    times: list[float] = []
    for row in _parquet(path) if path.suffix == ".parquet" else _csv(path):
        items.append(_item(row))
        if row.cells.get("arrival_s"):
            times.append(_arrival(row, times))
        if times and len(times) < len(items):
            raise InputError(
                f"{row.where}, column arrival_s: {_cell(row, 'arrival_s')!r}: give each row a time in seconds, or none"
            )
    if not items:
        raise InputError(f"{path} has no rows: give at least one request below the header")
    return Trace(items, times or None)


def _csv(path: Path) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header)
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if len(cells) != len(header):
                if not cells:
                    continue
                raise InputError(
                    f"{where}: {','.join(cells)[:60]!r}: has {len(cells)} fields, must have the header's {len(header)}"
                )
            yield _Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}: save it as plain CSV") from None


def _parquet(path: Path) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow: install it, or save the trace as CSV") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise InputError(f"workload file {path} does not exist: check the path") from None
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"workload file {path} is no readable Parquet file ({reason}): write it again") from None
    _check_columns(path, table.column_names)
    for number, values in enumerate(table.to_pylist(), start=1):
        yield _Row(
            f"{path} row {number}", {name: "" if value is None else str(value) for name, value in values.items()}
        )


def _check_columns(path: Path, names: Seq[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            raise InputError(f"{path}: {unknown('column', name, COLUMNS)}: rename it or leave it out")
        if names.count(name) > 1:
            raise InputError(f"{path}: column {name!r} is there twice: leave one out")
    for name in REQUIRED:
        if name not in names:
            raise InputError(f"{path}: column {name!r} is missing: the first line must name {' and '.join(REQUIRED)}")


def _item(row: _Row) -> Item:
    prompt, output = (_length(row, name) for name in REQUIRED)
    if not row.cells.get("max_tokens"):
        return of_lengths(prompt, output)
    max_tokens = _length(row, "max_tokens")
    if max_tokens < output:
        raise InputError(
            f"{row.where}, column max_tokens: {max_tokens}: must be at least output_tokens, which is {output}"
        )
    return of_lengths(prompt, output, max_tokens)


def _length(row: _Row, name: str) -> int:
    text = _cell(row, name)
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise InputError(f"{row.where}, column {name}: {text!r}: must be a whole number of tokens, at least 1")
    return int(text)


def _arrival(row: _Row, earlier: list[float]) -> float:
    text = _cell(row, "arrival_s")
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise InputError(f"{row.where}, column arrival_s: {text!r}: must be a time in seconds, 0 or later")
    if earlier and time_s < earlier[-1]:
        raise InputError(
            f"{row.where}, column arrival_s: {text!r}: comes after {earlier[-1]}: sort the rows by arrival"
        )
    return time_s


def _cell(row: _Row, name: str) -> str:
    return row.cells.get(name, "").strip()
