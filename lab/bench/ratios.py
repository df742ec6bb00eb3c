"""Did something get slower? Times beside a fixed calibration, against a baseline of the same with its spread.

A run is a JSON file by pytest-benchmark, of `tests/benchmarks`: with each benchmark it has a ratio, the benchmark's
time over that of the calibration that ran between its rounds. The baseline has their medians over several runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.core import InputError

MARGIN = 0.25  # slower than the baseline by more is a regression, however little the baseline spreads
SAFETY = 2.0  # times the spread of the baseline, if that is more
MOST_RUNS = 0.8  # share of the baseline's runs that deviate by no more than the spread: a disturbed one does not count
PLANTED = 0.5  # what any benchmark should notice


@dataclass(frozen=True)
class Timing:
    """One benchmark of one run."""

    name: str  # its node id
    ratio: float
    seconds: float  # of one of its `unit`
    unit: str
    where: str  # machine and Python
    best_s: float = 0.0  # in the quickest round
    bar_s: float | None = None  # that one of them may take


@dataclass(frozen=True)
class Taken:
    """One run, and of what."""

    commit: str
    commit_time: str
    timings: dict[str, Timing]


@dataclass(frozen=True)
class Known:
    """One benchmark of the baseline: a median over runs. No run but a few deviates by more than the spread, a share."""

    ratio: float
    spread: float
    runs: int
    where: str
    commit: str

    @property
    def allowed(self) -> float:
        """By how much a run may exceed the ratio, as a share."""
        return max(MARGIN, SAFETY * self.spread)


Baseline = Mapping[str, Known]


@dataclass(frozen=True)
class Verdict:
    timing: Timing
    known: Known | None

    @property
    def change(self) -> float:
        """Of the ratio, as a share of the baseline's: 0.5 takes half as long again."""
        return self.timing.ratio / self.known.ratio - 1 if self.known else 0.0

    @property
    def word(self) -> str:
        if self.known is None:
            return "new"
        allowed = self.known.allowed
        return "SLOWER" if self.change > allowed else "faster" if self.change < -allowed / (1 + allowed) else ""


def read_run(path: Path) -> Taken:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        machine, commit = run["machine_info"], run["commit_info"]
        timings = {}
        for one in run["benchmarks"]:
            extra = one["extra_info"]
            device = extra.get("device") or machine["cpu"].get("brand_raw", machine["machine"])
            timings[one["fullname"]] = Timing(
                name=one["fullname"],
                ratio=float(extra["ratio"]),
                seconds=float(extra["seconds"]),
                unit=extra["unit"],
                where=f"{device}, Python {machine['python_version']}",
                best_s=float(extra["best_s"]),
                bar_s=extra["bar_s"],
            )
        taken = Taken(commit["id"][:7] + ("+" if commit["dirty"] else ""), commit["time"], timings)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a JSON file of a run, or none") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"is not what pytest-benchmark writes of tests/benchmarks ({type(error).__name__}: {error})"
        raise InputError(f"{path}: {rule}; measure again") from None
    if not taken.timings:
        raise InputError(f"{path}: holds no benchmark; measure again")
    return taken


def read_baseline(path: Path) -> Baseline:
    """`Known` by the names of benchmarks."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return {name: Known(**one) for name, one in held.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no baseline ({error}); make one with python -m lab.bench baseline") from None


def baseline_of(runs: Seq[Taken], old: Baseline) -> Baseline:
    """Medians and spreads of at least three runs; benchmarks of other devices, which these lack, stay as they were."""
    if len(runs) < 3:
        raise InputError(f"{len(runs)} runs: a spread needs at least 3, better 10: measure more")
    found = dict(old)
    for name, one in runs[0].timings.items():
        if len(here := {(run.commit, run.timings[name].where) for run in runs if name in run.timings}) > 1:
            raise InputError(f"{len(runs)} runs of {len(here)} machines or commits: take runs of one")
        ratios = [run.timings[name].ratio for run in runs if name in run.timings]
        middle = statistics.median(ratios)
        deviations = sorted(abs(ratio / middle - 1) for ratio in ratios)
        spread = deviations[math.ceil(MOST_RUNS * len(ratios)) - 1]
        found[name] = Known(round(middle, 5), round(spread, 4), len(ratios), one.where, runs[0].commit)
    return found


def write_baseline(baseline: Baseline, path: Path) -> None:
    known = {name: asdict(one) for name, one in sorted(baseline.items())}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def judge(timings: Iterable[Timing], baseline: Baseline) -> list[Verdict]:
    return [Verdict(timing, baseline.get(timing.name)) for timing in timings]


def middle(several: Iterable[Timing]) -> Timing:
    """The median, of an even number the lower one: slower than a limit if more than half are."""
    ordered = sorted(several, key=lambda one: one.ratio)
    return ordered[(len(ordered) - 1) // 2]
