"""Films of memory: `python -m lab.view RESULT [RESULT]` writes one HTML file that plays a record, or two side by side.

The page is `film.html` with the films in it (`lab.film`); it needs no network.
"""

from __future__ import annotations

import base64
import gzip
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lab.command import Parser, status, write
from lab.core import InputError
from lab.film import FRAMES, Film, film
from lab.record import Record

PAGE = Path(__file__).with_name("film.html")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "no film was written")


def _main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    if len(args.results) > 2:
        raise InputError(f"{len(args.results)} records: a page shows one, or two side by side")
    if args.frames < 1:
        raise InputError(f"--frames {args.frames}: must be at least 1")
    films = [film(load(result), args.frames) for result in args.results]
    size = write(args.out, [page(films)])
    for f in films:
        print(f"{f.about['name']}: {f.about['steps']:,} steps in {f.about['frames']:,} frames")
    print(different_pools([f.about for f in films]), end="")
    print(f"film     {args.out} ({size / 1e6:.1f} MB): open it in a browser; it needs no network")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m lab.view", description="Write a page that plays what happened in a run's memory.")
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULT", help="the folder of a run, as results/runs/KEY; two at most")
    add("--out", type=Path, default=Path("film.html"), metavar="FILE", help="the page (default: film.html)")
    add("--frames", type=int, default=FRAMES, metavar="N", help=f"more steps are thinned (default: {FRAMES:,})")
    return parser


def load(path: Path) -> Record:
    """The record of one run; InputError says what else was given."""
    if (path / "summary.json").is_file():
        raise InputError(f"{path}: an experiment, which has many runs: give the folder of one, as results/runs/KEY")
    if path.is_dir() and not (path / "header.json").is_file():
        records = sorted(file.parent for place in ("*", "runs/*") for file in path.glob(f"{place}/steps.parquet"))
        if records:
            raise InputError(f"{path}: holds {len(records)} runs: give the folder of one, as {records[0]}")
    record = Record.load(path)
    if not len(record.steps) or not record.header.get("capacity"):
        raise InputError(f"{path}: nothing happened in this run: there is no step to show")
    return record


def different_pools(abouts: Iterable[Mapping[str, Any]]) -> str:
    """A line where records that are shown beside each other have pools of different size."""
    pools = dict.fromkeys((about["blocks"], about["block"]) for about in abouts)
    said = ", ".join(f"{blocks:,} blocks of {block}" for blocks, block in pools)
    return f"the pools differ ({said} tokens): compare shares of memory, not tokens\n" if len(pools) > 1 else ""


def page(films: Iterable[Film]) -> str:
    """The template with the films in it: JSON that says what they are, and compressed columns in base64."""
    packed = "\n".join(
        f'<script type="application/json" class="about">{_json(film.about)}</script>\n'
        f'<script type="application/octet-stream" class="columns">{encode(film)}</script>'
        for film in films
    )
    return PAGE.read_text(encoding="utf-8").replace("<!-- films -->", packed)


def live_page(about: Mapping[str, Any]) -> str:
    """The template for a server: instead of films, where what happens is told, as `about["changes"]`."""
    live = f'<script type="application/json" class="live">{_json(about)}</script>'
    text = PAGE.read_text(encoding="utf-8").replace("default-src 'none';", "default-src 'none'; connect-src 'self';")
    return text.replace("<!-- films -->", live)


def encode(film: Film) -> str:
    """Differences of each column as 32-bit numbers, one column after the other, gzip, base64."""
    steps = [np.diff(column, prepend=0).astype("<i4").tobytes() for column in film.columns.values()]
    return base64.b64encode(gzip.compress(b"".join(steps), 6, mtime=0)).decode()


def _json(about: Mapping[str, Any]) -> str:
    """Inside a script element, where nothing may look like its end."""
    return json.dumps(about).replace("<", "\\u003c")


if __name__ == "__main__":
    sys.exit(main())
