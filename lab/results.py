"""What experiments have left behind, read back: question, setting, tables, figures and claims of each folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

import pandas as pd

from lab.core import InputError
from lab.experiment import find, names
from lab.harness import HEADER
from lab.record import FORMAT

PAPERS = Path(__file__).parents[1] / "papers"  # what each paper claims: */claims.toml
LEFT = {"summary.json", "table.csv", "rows.csv", "figure.svg", "figure.png"}  # any of them is an experiment's
STEPS = "steps.parquet"  # of a record
KNOWN = {"run": dict, "machine": dict, "requests": dict, "versions": dict, "capacity": int, "block": int}  # in a header
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, ElementTree.ParseError)

T = TypeVar("T")


class Judged(NamedTuple):
    """A claim as it was checked; `theirs` is the paper's value, and where it stands, where one is known."""

    text: str
    holds: bool | None
    seen: str
    theirs: str


class Table(NamedTuple):
    title: str
    heads: list[list[str]]  # lines of column heads, often one
    lines: list[list[str]]


class Picture(NamedTuple):
    name: str
    kind: str  # a media type
    content: bytes


@dataclass
class Result:
    """A folder. What could not be read is empty here, and a line of `problems`; `notes` say what to know besides."""

    folder: Path
    header: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    seeds: str = ""
    claims: list[Judged] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The experiment's."""
        return self.folder.resolve().name

    @property
    def pool(self) -> tuple[int, int] | None:
        """Tokens, and tokens of a block; of its first run."""
        known = self.header.get("capacity"), self.header.get("block")
        return known if all(known) else None  # type: ignore[return-value]  # both or none


def experiments_in(place: Path) -> list[Path]:
    """Every folder at or below `place` that an experiment has written into; InputError where there is none."""
    if not place.is_dir():
        raise InputError(f"{place}: no such folder: give the one that python -m lab.experiment wrote, as results/")
    found, records = [], 0
    for folder, below, files in os.walk(place):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if STEPS in files:
            records += 1
            below.clear()
        elif not LEFT.isdisjoint(files):
            found.append(Path(folder))
    if (place / STEPS).exists() or ((place / HEADER).exists() and not found):
        raise InputError(f"{place}: the record of one run: python -m lab.view plays it; give the folder of experiments")
    if not found:
        rule = f"{records} records and no experiment" if records else "nothing that an experiment has written"
        raise InputError(f"{place}: holds {rule}: run one with python -m lab.experiment NAME --out {place}")
    return found


def read(folder: Path) -> Result:
    """All that is readable in a folder."""
    result = Result(folder)

    def part(file: str, reading: Callable[[Path], T], otherwise: T) -> T:
        try:
            return reading(folder / file)
        except FileNotFoundError:
            said = "missing"
        except UNREADABLE as error:
            said = f"damaged ({' '.join(str(error).split())[:120]})"
        again = result.command or f"python -m lab.experiment {result.name}"
        result.problems.append(f"{folder / file}: {said}: run it again ({again})")
        return otherwise

    result.header = part(HEADER, _header, {})
    result.command = str(result.header.get("command", ""))
    result.claims = part("summary.json", lambda file: _claims(file, result.name), [])
    rows, result.seeds = part("rows.csv", _rows, (pd.DataFrame(), ""))
    table = part("table.csv", lambda file: parsed(file.read_text(encoding="utf-8")), None)
    if table is not None:
        rows.attrs.update(block=result.header.get("block"), capacity=result.header.get("capacity"))
        result.tables = _titled(result.name, table, rows)
    stems = sorted({file.stem for kind in ("svg", "png") for file in folder.glob(f"*.{kind}")} - {"figure"})
    pictures = (part(_drawn(folder, stem), _picture, None) for stem in ("figure", *stems))
    result.pictures = [picture for picture in pictures if picture]
    written = result.header.get("format", FORMAT)
    if written != FORMAT:
        result.notes.append(f"{folder}: of records in format {written}, this version writes {FORMAT}: shown as it was")
    return result


def question(name: str) -> tuple[str, str]:
    """What the experiment asks, and the rest of its docstring; nothing of one that is not in this version."""
    if name not in names():
        return "", ""
    first, _, rest = (find(name).__doc__ or "").strip().partition("\n")
    return first, rest.strip()


def parsed(text: str) -> tuple[list[list[str]], list[list[str]]]:
    """Heads and lines of a table that pandas wrote: each of several heads begins with an empty cell."""
    lines = list(csv.reader(io.StringIO(text)))
    if not lines or len({len(line) for line in lines}) > 1:
        raise ValueError("not a table: its lines differ in length" if lines else "an empty file")
    several = 1
    while not lines[0][0] and several < len(lines) and not lines[several][0]:
        several += 1
    heads, rest = lines[:several], lines[several:]
    if several > 1 and rest and not any(cell for cell, head in zip(rest[0], heads[0], strict=True) if head):
        heads[0] = [name or head for name, head in zip(rest.pop(0), heads[0], strict=True)]
    return heads, rest


def shown(cell: str) -> str:
    """A number with no more digits than can be read."""
    if re.fullmatch(r"-?0\.0+", cell):
        return cell.removeprefix("-")
    return f"{float(cell):.4g}" if re.fullmatch(r"-?\d+\.\d{4,}(e-\d+)?", cell) else cell


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("not a table of names and values")
    return found


def _header(file: Path) -> dict[str, Any]:
    header = _json(file)
    for name, kind in KNOWN.items():
        if not isinstance(header.get(name, kind()), kind):
            raise ValueError(f"{name} is {header[name]!r}")
    return header


def _claims(file: Path, experiment: str) -> list[Judged]:
    return [
        Judged(str(claim["text"]), _verdict(claim["holds"]), str(claim["seen"]), theirs(experiment, claim["text"]))
        for claim in _json(file)["claims"]
    ]


def _verdict(holds: Any) -> bool | None:
    if holds not in (True, False, None):
        raise ValueError(f"{holds!r} is no verdict")
    return None if holds is None else bool(holds)


def theirs(experiment: str, text: str) -> str:
    """The values that papers give for what this claim of an experiment speaks of, and where."""
    found = [
        f"{entry['theirs']}: {paper}, {entry['where']}"
        for paper, entry in _paper_claims()
        if entry.get("experiment") == experiment and entry.get("theirs", "–") != "–"
        if any(re.search(pattern, text) for pattern in _listed(entry["match"]))
    ]
    return "; ".join(dict.fromkeys(found))


@cache
def _paper_claims() -> list[tuple[str, dict[str, Any]]]:
    """With the name of the paper's folder; none where the package is installed without its papers."""
    files = sorted(PAPERS.glob("*/claims.toml"))
    listed = ((file, tomllib.loads(file.read_text(encoding="utf-8"))["claim"]) for file in files)
    return [(file.parent.name, entry) for file, entries in listed for entry in entries]


def _listed(match: str | Seq[str]) -> Seq[str]:
    return [match] if isinstance(match, str) else match


def _rows(file: Path) -> tuple[pd.DataFrame, str]:
    """With the seeds in words."""
    rows = pd.read_csv(file)
    known = sorted(set(rows["seed"].dropna().astype(int))) if "seed" in rows else []
    if len(known) > 1 and known == list(range(known[0], known[-1] + 1)):
        return rows, f"{known[0]} to {known[-1]}"
    return rows, ", ".join(map(str, known))


def _titled(name: str, kept: tuple[list[list[str]], list[list[str]]], rows: pd.DataFrame) -> list[Table]:
    """The table that was kept; with its title, and with the other tables, where today's experiment makes the same."""
    made: dict[str, pd.DataFrame] = {}
    try:
        made = find(name).tables(rows) if name in names() and len(rows) else {}
    except Exception:  # rows of another version may lack anything; what was kept is shown all the same
        made = {}
    tables = [Table(title, *parsed(table.to_csv())) for title, table in made.items()]
    same = tables and (tables[0].heads, len(tables[0].lines)) == (kept[0], len(kept[1]))
    return [Table(tables[0].title, *kept), *tables[1:]] if same else [Table("", *kept)]


def _drawn(folder: Path, stem: str) -> str:
    return next((f"{stem}.{kind}" for kind in ("svg", "png") if (folder / f"{stem}.{kind}").exists()), f"{stem}.svg")


def _picture(file: Path) -> Picture | None:
    content = file.read_bytes()
    if file.suffix == ".svg":
        if not ElementTree.fromstring(content).tag.endswith("svg"):
            raise ValueError("not a drawing")
        return Picture(file.stem, "image/svg+xml", content)
    if not content.startswith(b"\x89PNG\r\n") or b"IEND" not in content[-12:]:
        raise ValueError("not a whole PNG")
    return Picture(file.stem, "image/png", content)


def different_pools(results: Seq[Result]) -> Iterator[str]:
    """What to know of experiments that are here more than once, in pools of different size."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    for name, own in by_name.items():
        pools = dict.fromkeys(result.pool for result in own if result.pool)
        if len(pools) > 1:
            said = ", ".join(f"{tokens:,} in blocks of {block}" for tokens, block in pools)
            yield f"{name}: its {len(own)} results have pools of different size ({said} tokens): compare shares alone"
