"""What every experiment has in common: carry out the runs whose record is not there yet, draw, print, judge."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from lab import plot
from lab.core import InputError
from lab.measured import Once, Row, Stopped, machine_here, machine_of, plain
from lab.options import Options
from lab.processes import POLL_S, in_processes, warm_up
from lab.record import Record
from lab.run import Run, blame, carry_out, real
from lab.systems import label

MEASURED = "measured.jsonl"
HEADER = "header.json"  # beside every result, as in every record
STOPPED = 3  # exit status
RECORD_BYTES = 16 << 20  # room to be had for each record before any work


class Claim(NamedTuple):
    """A sentence that a machine checks against the rows; `holds` is None in a setting that it does not speak of."""

    text: str
    holds: bool | None
    seen: str


class Experiment(Protocol):
    """What a file in `experiments/` defines; its docstring begins with the question.

    One that times something other than a run (a kernel, a transfer), or whose rows follow from several runs together,
    also defines `measure(options, places, once)`: more rows, made now and in this process, and a header that says on
    what. What takes long goes point by point through `once`, which keeps it.
    """

    def runs(self, options: Options) -> list[Run]:
        """Every point, each policy with each seed (none where all is measured); InputError before any work."""
        ...

    def row(self, run: Run, record: Record) -> dict[str, Any]:
        """What is read off one record: plain numbers and names."""
        ...

    def tables(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """What is printed, by title; the first, the paper's value beside ours, is kept as table.csv."""
        ...

    def figure(self, rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure | dict[str, Figure]:
        """One, or several by name, of which the first is the one to look at."""
        ...

    def claims(self, rows: pd.DataFrame) -> list[Claim]: ...


def perform(experiment: Experiment, runs: list[Run], name: str, options: Options, fresh: bool, command: str) -> int:
    """Records go to `options.out`/runs, shared by all experiments; table, summary and figure to `options.out`/`name`.

    Returns the exit status: 1 where a claim fails, 3 where something is left. In a quick run no claim is judged.
    """
    results = options.out
    places = {run: results / "runs" / run.key() for run in runs}
    wanted: dict[Path, Run] = {}
    for run, place in places.items():
        wanted.setdefault(place, run)  # some differ only in what says nothing in them
    missing = {run: place for place, run in wanted.items() if fresh or not place.exists()}
    make_room(results, len(missing))
    if len(wanted) > len(missing):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there already (--fresh runs them again)")
    stop_s = time.monotonic() + options.stop_after_s
    refuse_mixture({run: place for place, run in wanted.items() if run not in missing}, missing)
    carry_out_all(missing, stop_s)
    left = sum(not place.exists() for place in wanted)
    if left:
        return _stopped(options, f"{len(wanted) - left} of {len(wanted)} runs are there")
    once = Once(results / name / MEASURED, experiment, stop_s, fresh)
    try:
        return report(experiment, places, once, results / name, options, command)
    except Stopped:
        return _stopped(options, f"{once.done} points are measured")


def _stopped(options: Options, there: str) -> int:
    print(f"stopped after {options.stop_after_s:g} s: {there}, and the same command goes on with the others")
    return STOPPED


def refuse_mixture(
    places: Mapping[Run, Path], missing: Iterable[Run], measured_on: Mapping[str, Any] | None = None
) -> None:
    """InputError where what is in `places` was measured on several machines, or on another than the rest will be.

    Simulated runs are of no machine: whose pace they keep is a setting.
    """
    found: dict[str, str] = {}
    for run, place in places.items():
        if not run.simulated:
            with _unless_damaged(place):
                found.setdefault(machine_of(Record.load(place).header), f"{place} was measured")
    for device in {run.device for run in missing if not run.simulated}:
        found.setdefault(machine_here(device), "the rest would be measured")
    if measured_on and not measured_on["simulated"]:
        found.setdefault(machine_of(measured_on), "the rest was measured")
    if len(found) > 1:
        (one, this), (other, that) = list(found.items())[:2]
        rule = f"{this} on {one}, {that} on {other}"
        raise InputError(f"{rule}: no table of two machines; measure all again with --fresh, or choose another --out")


def make_room(results: Path, records: int = 0) -> None:
    """Raise InputError where results cannot be written, or so many more records find no room."""
    with writing(results):
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
        free = shutil.disk_usage(results).free
    need = RECORD_BYTES * records
    if free < need:
        rule = f"{free >> 20} MiB free, {records} records may take {need >> 20}"
        raise InputError(f"{results}: {rule}: make room or choose another --out")


def carry_out_all(places: Mapping[Run, Path], stop_s: float = math.inf) -> None:
    """Simulated runs in as many processes as there are cores; real ones one after the other, here or on each GPU.

    None is begun after `stop_s` (of time.monotonic).
    """
    simulated = {run: place for run, place in places.items() if run.simulated}
    spread = {run: place for run, place in places.items() if not run.simulated and run.device == "cuda"}
    gpus = real().gpus() if spread else []
    if len(gpus) > 1 and len(spread) > 1:
        real().release()  # what the checks have loaded
    else:
        spread = {}
    one_by_one = {run: place for run, place in places.items() if not run.simulated and run not in spread}
    if not places:
        return
    for place in places.values():
        if not (place / HEADER).is_file():
            shutil.rmtree(place, ignore_errors=True)  # no record, and in the way of one
    layout = "{desc} {percentage:3.0f}% |{bar}| {n:.1f} of {total} runs [{elapsed}<{remaining}]"
    try:
        with tqdm(total=len(places), bar_format=layout, mininterval=POLL_S, disable=None) as bar:
            for i, (run, place) in enumerate(one_by_one.items()):
                if time.monotonic() > stop_s:
                    return
                bar.set_description_str(run.allocator)
                warm_up(run)
                carry_out(run, place, partial(_show, bar, i))
                _announce(bar, run)
            if spread:
                bar.set_description_str(f"{len(gpus)} GPUs")
                in_processes(spread, partial(_show, bar, len(one_by_one)), partial(_announce, bar), stop_s, gpus)
            if simulated:
                bar.set_description_str("virtual clock")
                before = len(one_by_one) + len(spread)
                in_processes(simulated, partial(_show, bar, before), partial(_announce, bar), stop_s)
    except BaseException:
        for place in places.values():
            for half_written in place.parent.glob(f".{place.name}.*"):
                shutil.rmtree(half_written, ignore_errors=True)
        raise


def report(
    experiment: Experiment, places: Mapping[Run, Path], once: Once, out: Path, options: Options, command: str
) -> int:
    rows, header = gather(experiment, places, once, options)
    header["command"] = command
    rows.attrs.update(block=header.get("block"), capacity=header.get("capacity"), thresholds=options.thresholds)
    tables = experiment.tables(rows)
    claims = experiment.claims(rows)
    if options.quick:
        claims = [claim._replace(holds=None) for claim in claims]
    known = rows.astype(object).where(rows.notna(), None).to_dict("records")
    summary = {"command": command, "claims": [claim._asdict() for claim in claims], "rows": known}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        rows.to_csv(out / "rows.csv", index=False)
        next(iter(tables.values())).to_csv(out / "table.csv")
        drawn = experiment.figure(rows, header)
        figures = drawn if isinstance(drawn, dict) else {"figure": drawn}
        pictures = [plot.save(figure, out / stem)[0] for stem, figure in figures.items()]
        (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False, default=plain) + "\n")
        (out / HEADER).write_text(json.dumps(header, indent=1) + "\n")
    print(f"\n{_setting(header)}")
    for title, table in tables.items():
        print(f"\n{title}\n\n{table.to_string(na_rep='')}")
    print()
    for claim in claims:
        print({True: "holds     ", False: "FAILS     ", None: "not judged"}[claim.holds], f"{claim.text}: {claim.seen}")
    print("\nfigure   " + "\n         ".join(map(str, pictures)) + f"\ntable    {out / 'table.csv'}")
    if places:
        print(f"records  {next(iter(places.values())).parent}\nfilm     {_film(places)}")
    return int(any(claim.holds is False for claim in claims))


def _film(places: Mapping[Run, Path]) -> str:
    """The command that plays the first record of each of two allocators, or of two schedulers where all share one."""
    for kind, apart in (("allocator", ("contiguous-max", "paged")), ("scheduler", ("static", "continuous"))):
        first: dict[str, Path] = {}
        for run, place in places.items():
            first.setdefault(getattr(run, kind), place)
        told_apart = [first[name] for name in apart if name in first]
        shown = told_apart if len(told_apart) == 2 else list(first.values())[:2]
        if len(shown) == 2:
            break
    return shlex.join(["python", "-m", "lab.view", *map(str, shown)])


def gather(
    experiment: Experiment, places: Mapping[Run, Path], once: Once, options: Options
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A row per run, and what the experiment measures itself; the header of the first run, or of what was measured.

    Raises InputError where not all of it was measured on one machine.
    """
    refuse_mixture(places, [])
    rows = [_row(experiment, run, place) for run, place in places.items()]
    header = dict(Record.load(next(iter(places.values()))).header) if places else {}
    measure: Callable[[Options, Mapping[Run, Path], Once], tuple[list[Row], dict[str, Any]]] | None
    measure = getattr(experiment, "measure", None)
    if measure is not None:
        measured, measured_on = measure(options, places, once)
        if once.found:
            print(f"{once.found} points were measured before (--fresh measures them again)")
        refuse_mixture(places, [], measured_on)
        rows += measured
        header = header or measured_on
    return pd.DataFrame(rows), header


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Results into `folder`; InputError where the system will not have them."""
    try:
        yield
    except OSError as error:
        rule = f"results cannot be written there ({error.strerror or error})"
        raise InputError(f"{folder}: {rule}; make room or choose another --out, finished runs are kept") from None


def _row(experiment: Experiment, run: Run, place: Path) -> dict[str, Any]:
    with _unless_damaged(place), blame(run, lambda: "reading its record"):
        return experiment.row(run, Record.load(place))


@contextmanager
def _unless_damaged(place: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        if str(place) not in str(error):
            raise
        raise InputError(f"{error} (--fresh does, or remove {place})") from None


def _setting(header: Mapping[str, Any]) -> str:
    if "run" not in header:
        return f"measured on {header['hardware']}"
    run = header["run"]
    clock = "SIMULATED, on a virtual clock at the pace of" if header["simulated"] else "measured on"
    pool = f"pool of {header['capacity']} tokens in blocks of {run['block']}"
    if header["pool"]["left_over"]:
        pool += f" (rounded down: {header['pool']['left_over'] / 1e6:.3g} MB fill no block)"
    rate = f"{run['rate']:g} requests/s" if run["rate"] else "at its own times"
    arrivals = "all at once" if run["arrivals"] == "all" else rate
    workload = f"{header['requests']['requests']} requests of {run['workload']}, {arrivals}"
    if header["requests"]["dropped"]:
        workload += f" ({header['requests']['dropped']} rows left out: they reach {run['length']} tokens)"
    memory = {use: size for use, size in header.get("device_memory", {}).items() if size}
    split = ", ".join(f"{use} {size / 1e9:.1f} GB" for use, size in memory.items())
    return f"{run['model']}, {pool}; {workload}; {clock} {header['hardware']}" + (f" ({split})" if split else "")


def _show(bar: Any, done: float, more: float) -> None:
    bar.update(done + more - bar.n)


def _announce(bar: Any, run: Run) -> None:
    """A line per run where there is no terminal to draw a bar on."""
    if bar.disable:
        rate = f", {run.rate:g} requests/s" if run.rate else ""
        print(f"done: {label(run)}, {run.workload}{rate}, seed {run.seed}", file=sys.stderr, flush=True)
