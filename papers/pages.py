"""Fills in what the pages of papers/ take from results, so that no number in them can drift: `python papers/pages.py`.

Between a mark and the next `<!-- end -->` stands what this script has written there:

    <!-- claims -->                              every claim in claims.toml beside the page: theirs, ours, verdict
    <!-- claims: FOLDER -->                      what one experiment judged, from its summary.json
    <!-- table: FOLDER/table.csv -->             the table that an experiment keeps, and in what setting it was made
    <!-- table: FOLDER | PART OF A TITLE -->     that one of its tables, made again from rows.csv
    <!-- figure: FOLDER/STEM | WORDS -->         STEM.svg, or STEM.png where there is no such file
    <!-- printed: FILE -->                       what a command has printed, as it stands

A FOLDER is results/KIND/EXPERIMENT, seen from the page. What has no results there is said to be not run yet.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where lab and experiments are, installed or not

from lab.results import parsed, shown  # noqa: E402

MARK = re.compile(r"(<!-- (claims|table|figure|printed)(?:: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {  # folder: head of a column
    "simulated": "simulated",
    "hour": "simulated, an hour of arrivals",
    "cpu": "measured on a CPU",
    "gpu": "measured on a GPU",
}
WHERE = {"hour": " --duration 3600", "cpu": " --device cpu", "gpu": " --device cuda"}
USUAL = ["simulated", "gpu"]
LONGEST = 40  # characters before a colon that name what a claim is of
NOT_RUN, NOT_ASKED = "not run yet", "–"


class Stale(Exception):
    """A page, its list of claims and the results do not fit together."""


class Judged(NamedTuple):
    text: str
    holds: bool | None
    seen: str


@dataclass(frozen=True)
class Row:
    """A claim of a paper: of an experiment, proven by a test, or untested for the reason given."""

    claim: str
    where: str
    theirs: str = ""
    experiment: str = ""
    match: Seq[str] = ()  # regular expressions on the texts of the experiment's claims
    kinds: Seq[str] = field(default_factory=lambda: USUAL)  # the first must have what `match` looks for
    test: str = ""
    untested: str = ""
    note: str = ""

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Row:
        try:
            row = cls(**{**entry, "match": [found] if isinstance(found := entry.get("match", []), str) else found})
        except TypeError as error:
            raise Stale(f"claim {entry.get('claim')!r}: {error}") from None
        if sum(map(bool, (row.experiment, row.test, row.untested))) != 1 or bool(row.match) != bool(row.experiment):
            raise Stale(f"claim {row.claim!r}: give one of experiment (with match), test and untested")
        if unknown := set(row.kinds) - set(KINDS):
            raise Stale(f"claim {row.claim!r}: kind {unknown.pop()!r} is unknown; give some of {', '.join(KINDS)}")
        return row


@dataclass(frozen=True)
class Results:
    """What was kept of the experiments under one folder: KIND/EXPERIMENT/{summary,header}.json, rows.csv."""

    folder: Path

    def there(self, kind: str, experiment: str) -> bool:
        return (self.folder / kind / experiment / "summary.json").exists()

    def judged(self, row: Row, kind: str) -> list[Judged]:
        """The claims of the experiment that the row is about."""
        claims = json.loads((self.folder / kind / row.experiment / "summary.json").read_text())["claims"]
        found = []
        for pattern in row.match:
            own = [Judged(c["text"], c["holds"], c["seen"]) for c in claims if re.search(pattern, c["text"])]
            if not own and kind == row.kinds[0]:
                raise Stale(f"claim {row.claim!r}: no claim of {kind}/{row.experiment} matches {pattern!r}")
            found += own
        return found


def main(pages: Seq[Path] | None = None) -> int:
    try:
        texts = {page: filled(page) for page in pages or sorted((ROOT / "papers").rglob("*.md"))}
    except Stale as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    return 0


def filled(page: Path) -> str:
    """The text of the page as it must be."""

    def block(found: re.Match[str]) -> str:
        start, what, about, end = found.groups()
        place, _, more = (about or "").partition(" | ")
        if what == "claims":
            inside = judged_by(page, place) if place else claims_of(page)
        else:
            inside = {"table": table, "figure": figure, "printed": printed}[what](page, place, more)
        return f"{start}\n{inside}\n\n{end}"

    return MARK.sub(block, page.read_text(encoding="utf-8"))


def claims_of(page: Path) -> str:
    """A table with a line for each claim of the paper."""
    listed = tomllib.loads((page.parent / "claims.toml").read_text(encoding="utf-8"))
    results = Results(page.parent / listed["results"])
    rows = [Row.read(entry) for entry in listed["claim"]]
    kinds = [kind for kind in KINDS if any(kind in row.kinds for row in rows if row.experiment)]
    heads = ["claim", "where", "our experiment", "theirs", *(_head(kind, rows, results) for kind in kinds), "verdict"]
    lines = [[row.claim, row.where, _ours(row, page), row.theirs, *_cells(row, kinds, results)] for row in rows]
    return markdown([heads], lines)


def judged_by(page: Path, place: str) -> str:
    """A table of what one experiment claims, in its own words."""
    folder = page.parent / place
    if not (folder / "summary.json").exists():
        return _not_run(folder)
    claims = json.loads((folder / "summary.json").read_text())["claims"]
    lines = [[claim["text"], claim["seen"], verdict([claim["holds"]])] for claim in claims]
    return f"{markdown([['claim', 'seen', 'verdict']], lines)}\n\n{_setting(folder)}"


def table(page: Path, place: str, title: str) -> str:
    """A table of an experiment, and in what setting it was made."""
    path = page.parent / place
    folder = path if title else path.parent
    if not (folder / "rows.csv").exists():
        return _not_run(folder)
    text = _made_again(folder, title) if title else path.read_text(encoding="utf-8")
    heads, lines = parsed(text)
    return f"{markdown(heads, [list(map(shown, line)) for line in lines])}\n\n{_setting(folder)}"


def figure(page: Path, place: str, words: str) -> str:
    stem = page.parent / place
    for suffix in (".svg", ".png"):
        if stem.with_suffix(suffix).exists():
            return f"![{words}]({place}{suffix})"
    return _not_run(stem.parent)


def printed(page: Path, place: str, _: str) -> str:
    path = page.parent / place
    return f"```\n{path.read_text(encoding='utf-8').strip()}\n```" if path.exists() else f"*{NOT_RUN.capitalize()}*"


def verdict(holds: Seq[bool | None]) -> str:
    judged = [one for one in holds if one is not None]
    if not judged:
        return "not judged"
    text = "holds" if all(judged) else "holds in part" if any(judged) else "does not hold"
    return text if len(judged) == len(holds) else f"{text}, where judged"


def markdown(heads: Seq[Seq[str]], lines: Seq[Seq[str]]) -> str:
    """Several heads become one: what stands above each other, joined."""
    joined = [": ".join(dict.fromkeys(filter(None, column))) for column in zip(*heads, strict=True)]
    drawn = [joined, ["---"] * len(joined), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in drawn)


def _made_again(folder: Path, title: str) -> str:
    """That table of the experiment whose title has these words, as CSV."""
    header = json.loads((folder / "header.json").read_text())
    rows = pd.read_csv(folder / "rows.csv")
    rows.attrs.update(block=header.get("block"), capacity=header.get("capacity"))
    experiment: Any = importlib.import_module(f"experiments.{folder.name}")
    tables: dict[str, pd.DataFrame] = experiment.tables(rows)
    found = [tables[title]] if title in tables else [one for name, one in tables.items() if title in name]
    if len(found) != 1:
        raise Stale(f"table {title!r}: {len(found)} of {folder.name} are called so; it has {'; '.join(tables)}")
    columns = [": ".join(dict.fromkeys(map(str, c))) if isinstance(c, tuple) else c for c in found[0].columns]
    return str(found[0].set_axis(columns, axis="columns").to_csv())


def _head(kind: str, rows: Seq[Row], results: Results) -> str:
    """What a column is: of which clock, at the pace of which machine, over which seeds."""
    names = dict.fromkeys(row.experiment for row in rows if row.experiment and kind in row.kinds)
    there = [name for name in names if results.there(kind, name)]
    if not there:
        return f"ours, {KINDS[kind]}"
    folders = {name: results.folder / kind / name for name in there}
    machines = {name: _machine(json.loads((own / "header.json").read_text())) for name, own in folders.items()}
    seeds = {name: _seeds(own) for name, own in folders.items()}
    return f"ours, **{KINDS[kind]}** ({_most(machines)}; {_most(seeds)})"


def _most(known: Mapping[str, str]) -> str:
    """What holds of most experiments; of which others something else."""
    by: dict[str, list[str]] = {}
    for name, what in known.items():
        by.setdefault(what, []).append(name)
    most, *others = sorted(by, key=lambda what: -len(by[what]))
    return most + "".join(f"; {', '.join(by[what])}: {what}" for what in others)


def _ours(row: Row, page: Path) -> str:
    """A link to the experiment or test."""
    if row.untested:
        return NOT_ASKED
    path = f"experiments/{row.experiment}.py" if row.experiment else row.test.partition("::")[0]
    name = row.experiment or row.test.partition("::")[2] or Path(path).stem
    return f"[`{name}`]({Path(os.path.relpath(ROOT / path, page.parent)).as_posix()})"


def _cells(row: Row, kinds: Seq[str], results: Results) -> list[str]:
    """A cell for each kind of run, and the verdict."""
    asked = [kind for kind in kinds if row.experiment and kind in row.kinds]
    found = {kind: results.judged(row, kind) for kind in asked if results.there(kind, row.experiment)}
    holds = [one.holds for own in found.values() for one in own]
    cells = [_seen(found[kind], holds) if kind in found else NOT_RUN if kind in asked else NOT_ASKED for kind in kinds]
    if row.untested:
        said = f"not tested: {row.untested}"
    elif row.test:
        said = "holds: a test of ours"
    elif not found:
        said = NOT_RUN
    else:
        clocks = {kind for kind, own in found.items() if any(one.holds is not None for one in own)}
        said = verdict(holds) + (", simulated" if clocks == {"simulated"} else "")
    return [*cells, said + (f". {row.note}" if row.note else "")]


def _seen(own: Seq[Judged], holds: Seq[bool | None]) -> str:
    """What was seen; of several claims also of what, and where not all of the row hold alike, which does not."""
    names = [one.text.partition(": ")[0] for one in own]
    named = len(set(names)) > 1 and all(
        ": " in one.text and len(name) <= LONGEST for one, name in zip(own, names, strict=True)
    )
    marks = {True: "", False: " (fails)", None: " (not judged)"} if len(set(holds)) > 1 else {}
    parts = [
        (f"{name}: " if named else "") + one.seen + marks.get(one.holds, "")
        for one, name in zip(own, names, strict=True)
    ]
    return "; ".join(dict.fromkeys(parts)) or "no such point"


def _not_run(folder: Path) -> str:
    return f"*{NOT_RUN.capitalize()}: `python -m lab.experiment {folder.name}{WHERE.get(folder.parent.name, '')}`*"


def _setting(folder: Path) -> str:
    """A line under a table: where its numbers come from."""
    header = json.loads((folder / "header.json").read_text())
    clock = "**Simulated** on a virtual clock" if header.get("simulated") else "**Measured**"
    return f"{clock} ({_machine(header)}), {_seeds(folder)}: `{header['command']}`"


def _machine(header: Mapping[str, Any]) -> str:
    return str(header["hardware"]).replace("(R)", "").strip()


def _seeds(folder: Path) -> str:
    rows = pd.read_csv(folder / "rows.csv")
    known = sorted(set(rows["seed"])) if "seed" in rows else []
    if not known:
        return "no seeds"
    whole = len(known) > 1 and known == list(range(known[0], known[-1] + 1))
    return f"seeds {known[0]} to {known[-1]}" if whole else f"seed{'s' * (len(known) > 1)} {', '.join(map(str, known))}"


if __name__ == "__main__":
    sys.exit(main())
