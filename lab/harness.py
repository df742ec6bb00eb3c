"""What every experiment has in common: carry out the runs whose record is not there yet, draw, print, judge."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Array
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from lab import plot
from lab.core import InputError
from lab.record import Record
from lab.run import Progress, Run, carry_out

RECORD_BYTES = 64 << 20  # room to be had for each record before any work
POLL_S = 0.2


class Claim(NamedTuple):
    """A sentence that a machine checks against the rows; `holds` is None in a setting that it does not speak of."""

    text: str
    holds: bool | None
    seen: str


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None leaves a setting to the experiment."""

    changes: Mapping[str, Any]  # fields of Run
    allocators: list[str] | None
    schedulers: list[str] | None
    seeds: list[int]
    quick: bool
    out: Path

    def apply(self, run: Run) -> Run:
        return Run(**{**asdict(run), **self.changes})


class Experiment(Protocol):
    """What a file in `experiments/` defines; its docstring begins with the question."""

    def runs(self, options: Options) -> list[Run]:
        """Every point, each allocator and scheduler with each seed."""
        ...

    def row(self, run: Run, record: Record) -> dict[str, Any]:
        """What is read off one record: plain numbers and names."""
        ...

    def tables(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """What is printed, by title; the first, the paper's value beside ours, is kept as table.csv."""
        ...

    def figure(self, rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure: ...

    def claims(self, rows: pd.DataFrame) -> list[Claim]: ...


def perform(experiment: Experiment, runs: list[Run], name: str, results: Path, fresh: bool, command: str) -> int:
    """Records go to `results`/runs, shared by all experiments; table, summary and figure to `results`/`name`.

    Returns the exit status: 1 where a claim fails.
    """
    places = {run: results / "runs" / run.key() for run in runs}
    out = results / name
    make_room(out, places, fresh)
    missing = {run: place for run, place in places.items() if not place.exists()}
    if len(places) > len(missing):
        print(f"{len(places) - len(missing)} of {len(places)} runs are there already (--fresh runs them again)")
    carry_out_all(missing)
    return report(experiment, places, out, command)


def make_room(out: Path, places: Mapping[Run, Path], fresh: bool) -> None:
    """Raise InputError before any work where the results would find no room."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
    need = RECORD_BYTES * sum(not place.exists() for place in places.values())
    free = shutil.disk_usage(out).free
    if free < need:
        raise InputError(
            f"{out}: {free >> 20} MiB free, records may take {need >> 20}: make room or choose another --out"
        )


def carry_out_all(places: Mapping[Run, Path]) -> None:
    """Simulated runs in as many processes as there are cores, real ones one after the other in this process."""
    simulated = {run: place for run, place in places.items() if run.simulated}
    real = {run: place for run, place in places.items() if not run.simulated}
    if not places:
        return
    layout = "{desc} {percentage:3.0f}% |{bar}| {n:.1f} of {total} runs [{elapsed}<{remaining}]"
    with tqdm(total=len(places), bar_format=layout, mininterval=POLL_S) as bar:
        for i, (run, place) in enumerate(real.items()):
            bar.set_description_str(run.allocator)
            carry_out(run, place, partial(_show, bar, i))
        if simulated:
            bar.set_description_str("virtual clock")
            _in_processes(simulated, partial(_show, bar, len(real)))


def report(experiment: Experiment, places: Mapping[Run, Path], out: Path, command: str) -> int:
    rows = pd.DataFrame([experiment.row(run, Record.load(place)) for run, place in places.items()])
    header = dict(Record.load(next(iter(places.values()))).header) | {"command": command}
    rows.attrs.update(block=header["block"], capacity=header["capacity"])
    tables = experiment.tables(rows)
    claims = experiment.claims(rows)
    rows.to_csv(out / "rows.csv", index=False)
    next(iter(tables.values())).to_csv(out / "table.csv")
    plot.save(experiment.figure(rows, header), out / "figure")
    summary = {"command": command, "claims": [claim._asdict() for claim in claims], "rows": rows.to_dict("records")}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "header.json").write_text(json.dumps(header, indent=1) + "\n")
    print(f"\n{_setting(header)}")
    for title, table in tables.items():
        print(f"\n{title}\n\n{table.to_string(na_rep='')}")
    print()
    for claim in claims:
        print({True: "holds     ", False: "FAILS     ", None: "not judged"}[claim.holds], f"{claim.text}: {claim.seen}")
    records = next(iter(places.values())).parent
    print(f"\nfigure   {out / 'figure.png'}\ntable    {out / 'table.csv'}\nrecords  {records}")
    return int(any(claim.holds is False for claim in claims))


def _setting(header: Mapping[str, Any]) -> str:
    run = header["run"]
    clock = "SIMULATED, on a virtual clock at the pace of" if header["simulated"] else "measured on"
    pool = f"pool of {header['capacity']} tokens in blocks of {run['block']}"
    if header["pool"]["left_over"]:
        pool += f" ({header['pool']['left_over']} bytes fill no block)"
    rate = f"{run['rate']:g} requests/s" if run["arrivals"] != "all" else "all requests at once"
    return f"{run['model']}, {pool}; {run['workload']}, {rate}; {clock} {header['hardware']}"


def _show(bar: Any, done: float, more: float) -> None:
    bar.update(done + more - bar.n)


def _in_processes(places: Mapping[Run, Path], tell: Progress) -> None:
    shares = Array("d", len(places), lock=False)
    workers = ProcessPoolExecutor(min(os.cpu_count() or 1, len(places)), initializer=_share, initargs=(shares,))
    try:
        todo = {workers.submit(_one, i, run, place) for i, (run, place) in enumerate(places.items())}
        while todo:
            done, todo = wait(todo, POLL_S, FIRST_COMPLETED)
            for future in done:
                future.result()
            tell(sum(shares))
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def _share(shares: Any) -> None:
    global _shares
    _shares = shares
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _one(i: int, run: Run, place: Path) -> None:
    def tell(share: float) -> None:
        _shares[i] = share

    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the midst of a run: it cleans up after itself
    carry_out(run, place, tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shares[i] = 1.0


_shares: Any = None  # of a worker process: progress of each run, seen by the parent
