"""python -m lab.bench compare: what got slower beyond the noise? python -m lab.bench baseline: what is the noise?"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from lab.bench.ratios import (
    PLANTED,
    Baseline,
    Taken,
    Timing,
    Verdict,
    baseline_of,
    judge,
    middle,
    read_baseline,
    read_run,
    write_baseline,
)
from lab.command import Parser
from lab.core import InputError
from lab.plot.history import history
from lab.plot.style import save

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"
BASELINE = BENCHMARKS / "baseline.json"
STORE = ROOT / ".benchmarks"  # where pytest-benchmark keeps runs
AGAIN = 3  # times that what seems slower is measured again: blamed if it is slower in three of the four
DESCRIPTION = """What got slower beyond the noise, and by how much? Exit status 1 if anything did.

    python -m lab.bench compare               measure now; what seems slower is measured again before it is blamed
    python -m lab.bench compare RUN.json      judge a run of `python -m pytest -m benchmark --benchmark-json RUN.json`
    python -m lab.bench baseline              measure ten times, and write medians and spreads to the baseline
    python -m lab.bench baseline RUN.json...  the same of runs that there are

tests/benchmarks/README.md says what this notices and what it does not."""


def main(arguments: list[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m lab.bench", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument("what", choices=["compare", "baseline"])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN.json", help="instead of measuring now")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE", help="default: the repository's")
    parser.add_argument("--store", type=Path, default=STORE, metavar="DIR", help="of runs and their history's figure")
    parser.add_argument("--only", default="", metavar="WORDS", help="benchmarks to measure, as pytest's -k has it")
    args = parser.parse_args(arguments)
    if args.what == "baseline":
        old = read_baseline(args.baseline) if args.baseline.is_file() else {}
        runs = [read_run(path) for path in args.runs] or [measure(args.only, args.store) for _ in range(10)]
        made = baseline_of(runs, old)
        write_baseline(made, args.baseline)
        print(spreads(made))
        return 0
    if len(args.runs) > 1:
        raise InputError(f"{len(args.runs)} runs: one at a time is compared with the baseline; give one or none")
    baseline = read_baseline(args.baseline)
    run = read_run(args.runs[0]) if args.runs else measure(args.only, args.store)
    timings = dict(run.timings)
    suspects = [one.timing.name for one in judge(timings.values(), baseline) if one.word == "SLOWER"]
    if suspects and not args.runs:
        print(f"measuring again: {', '.join(short(name) for name in suspects)}", flush=True)
        again = [run, *(measure_these(suspects) for _ in range(AGAIN))]
        timings |= {name: middle(one.timings[name] for one in again) for name in suspects}
    status = report(timings.values(), baseline)
    draw(args.store, run, baseline)
    return status


def measure(only: str, store: Path) -> Taken:
    """A run of all benchmarks, in a process of its own, kept in the store."""
    files = map(str, sorted(BENCHMARKS.glob("bench_*.py")))
    keep = [f"--benchmark-storage={store.resolve()}", "--benchmark-autosave"]
    return _measure([*files, *(["-k", only] if only else keep)])


def measure_these(names: Iterable[str]) -> Taken:
    return _measure(list(names))


def _measure(arguments: list[str]) -> Taken:
    if not BENCHMARKS.is_dir():
        raise InputError(f"{BENCHMARKS}: is not there: run this in a checkout of the repository")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        command = [sys.executable, "-m", "pytest", "-m", "benchmark", "-p", "no:cacheprovider", *arguments]
        command.append(f"--benchmark-json={file}")
        command += ["-n0"] if find_spec("xdist") else []  # among others, pytest-benchmark would measure nothing
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
        alone["OMP_NUM_THREADS"] = "1"  # as the baseline was measured
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
        if done.returncode:
            lines = [*(done.stderr + done.stdout).strip().splitlines(), f"exit status {done.returncode}"]
            why = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-2])
            raise InputError(f"the benchmarks failed ({why}): see python -m pytest -m benchmark")
        return read_run(file)


def report(timings: Iterable[Timing], baseline: Baseline) -> int:
    verdicts = judge(timings, baseline)
    if not any(one.known for one in verdicts):
        raise InputError("no benchmark of this run is in the baseline: make one with python -m lab.bench baseline")
    print(f"{'benchmark':52} {'time':>22} {'ratio':>9} {'baseline':>9} {'change':>7} {'allowed':>7}")
    for one in verdicts:
        print(line(one))
    for one in verdicts:
        if bar_s := one.timing.bar_s:
            met = "under" if one.timing.best_s < bar_s else "over"
            print(f"{short(one.timing.name)}: {1e3 * one.timing.best_s:.2f} ms at best, {met} its {1e3 * bar_s:g} ms")
    slower = [one for one in verdicts if one.word == "SLOWER"]
    print("\nratio: time over that of a fixed calibration in the same rounds")
    for mine, theirs in sorted({(one.timing.where, one.known.where) for one in verdicts if one.known}):
        if mine != theirs:
            print(f"the baseline is of {theirs}, this of {mine}: they may differ by more than the noise")
    for one in slower:
        print(f"{short(one.timing.name)} takes {1 + one.change:.2f} times as long as it did")
    print(f"{len(slower)} of {len(verdicts)} benchmarks got slower")
    return 1 if slower else 0


def line(one: Verdict) -> str:
    start = f"{short(one.timing.name):52} {said(one.timing):>22} {one.timing.ratio:9.3f}"
    if one.known is None:
        return f"{start} {'':9} {'':7} {'':7} {one.word}"
    return f"{start} {one.known.ratio:9.3f} {one.change:+7.0%} {one.known.allowed:7.0%} {one.word}".rstrip()


def spreads(baseline: Baseline) -> str:
    lines = [f"{'benchmark':52} {'ratio':>9} {'spread':>7} {'allowed':>7}"]
    for name, known in baseline.items():
        blind = f"  does not notice {PLANTED:.0%}" if known.allowed >= PLANTED else ""
        lines.append(f"{short(name):52} {known.ratio:9.3f} {known.spread:7.1%} {known.allowed:7.0%}{blind}")
    return "\n".join(lines)


def short(name: str) -> str:
    """A node id without its folder."""
    file, _, test = name.partition("::")
    return f"{Path(file).stem.removeprefix('bench_')} {test.removeprefix('test_')}"


def said(timing: Timing) -> str:
    return f"{1e6 * timing.seconds:,.1f} us a {timing.unit.removesuffix('s')}"


def draw(store: Path, run: Taken, baseline: Baseline) -> None:
    """Every run in the store, and this one, in order of their commits: ratios over those of the baseline."""
    runs = []
    for path in sorted(store.glob("*/*.json")):
        try:
            runs.append(read_run(path))
        except InputError as error:
            print(f"left out of the history: {error}")
    runs += [run] if run not in runs else []
    ratios: dict[str, dict[str, list[tuple[str, float]]]] = {}
    commits = list(dict.fromkeys(one.commit for one in sorted(runs, key=lambda one: one.commit_time)))
    for one in runs:
        for name, timing in one.timings.items():
            if name in baseline:
                test, _, case = short(name).partition("[")
                points = ratios.setdefault(test, {}).setdefault(case.removesuffix("]"), [])
                points.append((one.commit, timing.ratio / baseline[name].ratio))
    paths = save(history(ratios, commits), store / "history")
    print(f"history of {len(runs)} runs of {len(commits)} commits: {paths[1]}")
