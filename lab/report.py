"""One page of results: `python -m lab.report results/` shows each experiment's question, tables, figures and claims.

The page is `report.html` with the experiments in it (`lab.results` reads them); it needs no network, and no script.
"""

from __future__ import annotations

import base64
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from lab.command import Parser, status, write
from lab.results import Judged, Picture, Result, Table, different_pools, experiments_in, question, read, shown

PAGE = Path(__file__).with_name("report.html")
VERDICTS = {True: ("holds", "holds"), False: ("fails", "fails"), None: ("not judged", "unjudged")}  # words, class
NUMBER = re.compile(r"[-+±]?\d[\d,.]*(e[-+]?\d+)?%?|nan|")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "no report was written")


def _main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m lab.report", description="Write one page that shows the results of experiments.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="where experiments are, as results/")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="(default: report.html)")
    args = parser.parse_args(arguments)
    folders = list(dict.fromkeys(folder for place in args.results for folder in experiments_in(place)))
    results = [read(folder) for folder in folders]
    notes = [*(note for result in results for note in result.notes), *different_pools(results)]
    size = write(args.out, [page(results, notes)])
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    problems = [problem for result in results for problem in result.problems]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"{_many(len(results), 'experiment')}; {_counted([c for result in results for c in result.claims])}")
    print(f"report   {args.out} ({size / 1e6:.1f} MB): open it in a browser; it needs no network")
    return int(bool(problems))


def page(results: Seq[Result], notes: Iterable[str] = ()) -> str:
    """The template with the experiments in it."""
    claims = [claim for result in results for claim in result.claims]
    summary = [f"<p>{_many(len(results), 'experiment')}; {_counted(claims)}.</p>"]
    summary += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if damaged := [result for result in results if result.problems]:
        said = ", ".join(f'<a href="#{_anchor(r)}">{escape(_path(r))}</a>' for r in damaged)
        summary.append(f'<p class="trouble">Not all could be read of {said}.</p>')
    filled = {
        "summary": "\n".join(summary),
        "contents": _contents(results),
        "sections": "\n".join(map(_section, results)),
    }
    marks = re.compile(r"<!-- (summary|contents|sections) -->")
    return marks.sub(lambda mark: filled[mark[1]], PAGE.read_text(encoding="utf-8"))


def _contents(results: Seq[Result]) -> str:
    lines = [
        f'<tr><td><a href="#{_anchor(r)}">{escape(_path(r))}</a></td><td>{escape(question(r.name)[0])}</td>'
        f"<td>{escape(_clock(r.header))}</td><td>{escape(_counted(r.claims))}</td></tr>"
        for r in results
    ]
    heads = "".join(f"<th>{head}</th>" for head in ("experiment", "question", "clock", "claims"))
    return f'<nav class="wide"><table><tr>{heads}</tr>\n{"".join(lines)}</table></nav>'


def _section(result: Result) -> str:
    asked, rest = question(result.name)
    clock, _, _ = _clock(result.header).partition(" ")
    parts = [
        f'<section id="{_anchor(result)}">',
        f'<h2>{escape(_path(result))}<span class="clock">{escape(clock.strip(","))}</span></h2>',
        f'<p class="ask">{escape(asked or "No experiment of this name is in this version.")}</p>',
        *(f'<p class="muted">{_marked(text)}</p>' for text in rest.split("\n\n") if text),
        *(f'<p class="trouble">{escape(problem)}</p>' for problem in result.problems),
        *(f'<p class="note">{escape(note)}</p>' for note in result.notes),
        *map(_figure, result.pictures),
        _judged(result.claims),
        *map(_table, result.tables),
        _setting(result),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _marked(text: str) -> str:
    """A docstring's paragraph, whose stars and backticks mean what they mean in Markdown."""
    return re.sub(r"`+(.+?)`+", r"<code>\1</code>", re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text), flags=re.S))


def _figure(picture: Picture) -> str:
    """As an image, in which no script runs and no name can clash with another figure's."""
    content = base64.b64encode(picture.content).decode()
    return f'<figure><img alt="{escape(picture.name)}" src="data:{picture.kind};base64,{content}"></figure>'


def _judged(claims: Seq[Judged]) -> str:
    if not claims:
        return ""
    heads = "".join(f"<th>{head}</th>" for head in ("claim", "the paper's value", "ours", "verdict"))
    lines = []
    for claim in claims:
        words, kind = VERDICTS[claim.holds]
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (claim.text, claim.theirs or "–", claim.seen))
        lines.append(f'<tr>{cells}<td class="verdict {kind}">{words}</td></tr>')
    return f'<h3>Claims</h3>\n<div class="wide"><table><tr>{heads}</tr>\n{"".join(lines)}</table></div>'


def _table(table: Table) -> str:
    lines = [[shown(cell) for cell in line] for line in table.lines]
    numeric = [all(NUMBER.fullmatch(line[i]) for line in lines) for i in range(len(table.heads[0]))]
    kinds = [' class="number"' if of_numbers else "" for of_numbers in numeric]
    drawn = []
    for heads in table.heads[:-1]:  # equal ones beside each other are one head over several columns
        spans = [(head, len(list(same))) for head, same in groupby(heads)]
        drawn.append("".join(f'<th class="over" colspan="{span}">{escape(head)}</th>' for head, span in spans))
    last = zip(table.heads[-1], kinds, strict=True)
    drawn.append("".join(f"<th{kind}>{escape(head)}</th>" for head, kind in last))
    drawn += ["".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(line, kinds, strict=True)) for line in lines]
    rows = "\n".join(f"<tr>{cells}</tr>" for cells in drawn)
    return f'<h3>{escape(_capital(table.title or "table"))}</h3>\n<div class="wide"><table>{rows}</table></div>'


def _setting(result: Result) -> str:
    """Where the numbers come from; of an experiment with many settings, that of its first run."""
    header, told = result.header, {}
    run, machine = header.get("run") or {}, header.get("machine") or {}
    told["command"] = f"<code>{escape(result.command)}</code>" if result.command else ""
    told["clock"] = escape(_clock(header))
    told["seeds"] = escape(result.seeds)
    told["model"] = escape(str(header.get("model", "")))
    told["requests"] = escape(_requests(header, run))
    told["pool"] = f"{result.pool[0]:,} tokens in blocks of {result.pool[1]}" if result.pool else ""
    told["run on"] = escape(", ".join(filter(None, (machine.get("gpu"), machine.get("cpu"), machine.get("platform")))))
    told["revision"] = escape(_revision(header))
    told["versions"] = escape(", ".join(f"{name} {is_}" for name, is_ in (header.get("versions") or {}).items()))
    lines = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in told.items() if text)
    title = "Setting (of its first run)" if run else "Setting"
    return f"<h3>{title}</h3>\n<dl>{lines}</dl>" if lines else ""


def _clock(header: Mapping[str, Any]) -> str:
    hardware = Path(str(header.get("hardware", "unknown hardware"))).stem  # a name, or a file of fitted step times
    if "simulated" not in header:
        return "unknown"
    return f"simulated, at the pace of {hardware}" if header["simulated"] else f"measured on {hardware}"


def _requests(header: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    workload = str(header.get("workload", ""))
    count = (header.get("requests") or {}).get("requests")
    rate = f", {run['rate']} per s" if run.get("rate") else ""
    return f"{count} of {workload}{rate}" if count else workload


def _revision(header: Mapping[str, Any]) -> str:
    changed = ", and changes not committed" if header.get("dirty") else ""
    return f"{str(header['revision'])[:12]}{changed}" if header.get("revision") else ""


def _counted(claims: Seq[Judged]) -> str:
    """How many claims hold, fail, were not judged."""
    if not claims:
        return "no claims"
    counts = Counter(claim.holds for claim in claims)
    said = []
    for holds, words in ((True, "hold"), (False, "fail"), (None, "not judged")):
        if counts[holds]:
            said.append(f"{counts[holds]} {words}{'s' * (counts[holds] == 1 and holds is not None)}")
    return f"{_many(len(claims), 'claim')}: {', '.join(said)}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _path(result: Result) -> str:
    """The experiment, after the folder that tells it from others of its name."""
    folder = result.folder.resolve()
    return f"{folder.parent.name}/{folder.name}"


def _anchor(result: Result) -> str:
    return re.sub(r"\W+", "-", result.folder.as_posix()).strip("-")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    sys.exit(main())
