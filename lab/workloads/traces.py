"""A trace of lengths and arrivals from CSV (also .csv.gz) or Parquet, read row by row, however long it is.

Columns: `prompt_tokens`, `output_tokens`; optional `arrival_s` (in ascending order, or empty throughout), `max_tokens`
(what the client asks for, else the output) and `request_id` (not read: requests are numbered in order of arrival).

`hash_ids_16` (any block size may stand for 16) says which prompts begin alike: an id, a whole number, for each full
block of the prompt, with spaces between; a last id may stand for the rest. Equal ids mean the same block after the same
blocks. Such a prompt has token ids that follow from its blocks' ids, and an end of its own where no id covers it; in
other prompts only the length counts. `output_hash_ids_16` is not read: what an engine generates here is not the text
that was traced, so a prompt that quotes an earlier answer does not find it in a cache (a later one finds that copy).
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

from lab.core import InputError, unknown
from lab.workloads.files import read_lines
from lab.workloads.pieces import OWN, SHARED, Piece, Pieces
from lab.workloads.source import Item

REQUIRED = ("prompt_tokens", "output_tokens")
COLUMNS = (*REQUIRED, "arrival_s", "max_tokens", "request_id", "hash_ids_16", "output_hash_ids_16")
IDS = re.compile("(output_)?hash_ids_([1-9][0-9]{0,5})")
MOST_CHARACTERS = 1 << 24  # of a cell: a million tokens have some 60,000 ids of blocks
BATCH = 512  # rows of Parquet at a time


class _Row(NamedTuple):
    path: Path
    unit: str  # what its number counts: lines or rows
    number: int
    cells: Mapping[str, str]

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path} {self.unit} {self.number}"


def read_trace(path: Path) -> Iterator[Item]:
    """Its rows as items with times, one by one; InputError names file, line, column and value of one that is wrong."""
    earlier_s: float | None = None
    ids = ""
    for i, row in enumerate(_rows(path)):
        time_s = _arrival(row, earlier_s) if row.cells.get("arrival_s") else None
        if i and (time_s is None) != (earlier_s is None):
            raise InputError(
                f"{row.where}, column arrival_s: {_cell(row, 'arrival_s')!r}: give each row a time in seconds, or none"
            )
        if i == 0:
            ids = next((name for name in row.cells if IDS.fullmatch(name) and name.startswith("hash")), "")
        yield _item(row, time_s, ids)
        earlier_s = time_s


def timed(path: Path) -> bool:
    """Does the trace have arrival times? Its first row tells, for all or none have."""
    first = next(_rows(path), None)
    return first is not None and bool(first.cells.get("arrival_s", "").strip())


def _rows(path: Path) -> Iterator[_Row]:
    """At least one."""
    rows = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} has no rows: give at least one request below the header")
    yield first
    yield from rows


def _csv(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(max(csv.field_size_limit(), MOST_CHARACTERS))
    reader = csv.reader(read_lines(path))
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header)
        for cells in reader:
            row = _Row(path, "line", reader.line_num, dict(zip(header, cells, strict=False)))
            if len(cells) == len(header):
                yield row
            elif cells:
                text = ",".join(cells)[:60]
                raise InputError(
                    f"{row.where}: {text!r}: has {len(cells)} fields, must have the header's {len(header)}"
                )
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: {error}: save it as plain CSV") from None


def _parquet(path: Path) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow: install it, or save the trace as CSV") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            for batch in file.iter_batches(BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield _Row(path, "row", number, {name: _text(value) for name, value in values.items()})
    except FileNotFoundError:
        raise InputError(f"workload file {path} does not exist: check the path") from None
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"workload file {path} is no readable Parquet file ({reason}): write it again") from None


def _text(value: object) -> str:
    """Of a value in Parquet what would stand in a CSV; of a list, its numbers with spaces between."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _check_columns(path: Path, names: Seq[str]) -> None:
    for name in names:
        if name not in COLUMNS and not IDS.fullmatch(name):
            raise InputError(f"{path}: {unknown('column', name, COLUMNS)}: rename it or leave it out")
        if names.count(name) > 1:
            raise InputError(f"{path}: column {name!r} is there twice: leave one out")
    for name in REQUIRED:
        if name not in names:
            raise InputError(f"{path}: column {name!r} is missing: the first line must name {' and '.join(REQUIRED)}")
    ids = [name for name in names if name.startswith("hash_ids_")]
    if len(ids) > 1:
        raise InputError(f"{path}: columns {' and '.join(ids)}: one size of blocks is enough; leave the other out")


def _item(row: _Row, time_s: float | None, ids: str) -> Item:
    """The item of a row; `ids` names the column of the prompt's block ids, if there is one."""
    length, output = (_length(row, name) for name in REQUIRED)
    prompt = _prompt(row, ids, length) if ids else range(length)
    if not row.cells.get("max_tokens"):
        return Item(prompt, output, output, arrival_s=time_s)
    max_tokens = _length(row, "max_tokens")
    if max_tokens < output:
        raise InputError(
            f"{row.where}, column max_tokens: {max_tokens}: must be at least output_tokens, which is {output}"
        )
    return Item(prompt, output, max_tokens, arrival_s=time_s)


def _prompt(row: _Row, column: str, length: int) -> Pieces:
    """Blocks by their ids, and what is left at the end: the last block's beginning, or the request's own."""
    block = int(column.rpartition("_")[2])
    ids = _cell(row, column).split()
    full, rest = divmod(length, block)
    for text in ids:
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise InputError(f"{row.where}, column {column}: {text[:60]!r}: an id must be a whole number, 0 to 10^19-1")
    if len(ids) != full and not (rest and len(ids) == full + 1):
        raise InputError(
            f"{row.where}, column {column}: has {len(ids)} ids, must have one for each of the {full} full blocks of "
            f"{block} in {length} tokens"
        )
    pieces = [Piece(SHARED + int(text), block) for text in ids[:full]]
    last = SHARED + int(ids[full]) if len(ids) > full else OWN
    return Pieces((*pieces, Piece(last, rest)))


def _length(row: _Row, name: str) -> int:
    text = _cell(row, name)
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise InputError(f"{row.where}, column {name}: {text!r}: must be a whole number of tokens, at least 1")
    return int(text)


def _arrival(row: _Row, earlier_s: float | None) -> float:
    text = _cell(row, "arrival_s")
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise InputError(f"{row.where}, column arrival_s: {text!r}: must be a time in seconds, 0 or later")
    if earlier_s is not None and time_s < earlier_s:
        raise InputError(f"{row.where}, column arrival_s: {text!r}: comes after {earlier_s}: sort the rows by arrival")
    return time_s


def _cell(row: _Row, name: str) -> str:
    return row.cells.get(name, "").strip()
