"""How much is due to the scheduler, how much to the allocator?

Comparisons of serving systems (Yu et al., OSDI'22; Kwon et al., SOSP'23, figure 12) change scheduler, allocator and
kernels at once. Here every scheduler meets every allocator and all else is equal: kernels, model, pool, requests. We
know of no such table. The nearest thing is a replay made for this project, on the authors' lengths: the rate sustained
at 0.5 s per token goes from 0.22 requests/s (static, Max) to 0.61 (continuous, Max) and 2.05 (continuous, paged).

Closed, the default: 256 requests of ShareGPT lengths come at once, all are served. Throughput is output tokens over the
time until the last has ended, stragglers included; beside it, while requests queue. Latency is the mean of seconds per
output token, waste what is not token states (1 - stored) while requests queue. With --rate requests come by and by,
and latency is compared: below saturation throughput is the rate.

What is fair to a static scheduler? With `batch` at 8, the default of a run, no allocator has anything to do: the
setting limits the batch, not memory. So here it takes as many as find room; the cap is a level of its own, which shows
what it does, outside the main decomposition. (An explicit --batch holds for all.) `dynamic` differs from `static` only
while requests are still to come: it is left out where all come at once, and is static's form with --rate, where a
batch starts as soon as something waits, as in the paper's FasterTransformer.

Effects multiply, so the decomposition is of logarithms (waste: of the share): a two-way analysis of variance with the
seeds, which draw the lengths, as blocks. Its parts sum to the total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import fragmentation
from lab import latency, metrics, plot
from lab.core import InputError, Limits
from lab.harness import Claim
from lab.options import Options
from lab.record import Record
from lab.run import Run
from lab.schedulers import SCHEDULERS
from lab.schedulers.static import Static
from lab.systems import label

FILLED = Limits().seqs  # requests in a batch: more than memory ever holds
CAP = Run().batch
REPLAY = {  # ratios of the rates that the replay sustained
    "continuous / static, under contiguous-max": 0.61 / 0.22,
    "paged / contiguous-max, under continuous": 2.05 / 0.61,
    "continuous, paged / static, contiguous-max": 2.05 / 0.22,
}
QUEUED = 50.0  # per cent of the requests that had to wait: with less, nobody wants for memory
WAIT_S = 1.0  # more than the step that any request may have to wait for
SAME = 0.03  # of throughputs that must be equal; on a virtual clock they are, to the last digit
SHOWN = {
    "output_tokens_per_s": "tok/s",
    "pressed_tokens_per_s": "queueing",
    "normalised_s": "s/token",
    "waste": "waste %",
    "ended": "ended %",
    "batch": "running",
    "dead": "padding %",
    "again": "again %",
    "preemptions": "preemptions",
}
MAPS = {
    "output_tokens_per_s": "throughput (output tokens/s)",
    "normalised_s": "latency (s per output token)",
    "waste": "waste (% of the pool)",
}


def runs(options: Options) -> list[Run]:
    if options.systems:
        rule = "a factorial crosses allocators with schedulers; leave --system out, take --allocator and --scheduler"
        raise InputError(f"system {options.systems[0]!r}: {rule}")
    if "steps" in options.changes:
        raise InputError(f"steps {options.changes['steps']}: every request is served here; take --count instead")
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    machine = replace(options, allocators=["paged"], schedulers=["continuous"], seeds=seeds)
    bases = [_base(run, options) for run in fragmentation.runs(machine)]
    levels, allocators = _levels(bases[0], options), options.allocators or list(fragmentation.SYSTEMS)
    if len(levels) * len(allocators) == 1:
        raise InputError(f"allocator {allocators[0]!r} under one scheduler: nothing to compare; name another of either")
    return [replace(base, allocator=name, **level) for level in levels for name in allocators for base in bases]


def row(run: Run, record: Record) -> dict[str, Any]:
    pressed, pressure = fragmentation.row(run, record), metrics.pressure(record)
    computed = max(1, int(record.steps["tokens"].sum()))
    queued = 100 * (latency.latencies(record)["queue_s"] > WAIT_S).mean()
    capped = _waits(run.scheduler) and run.batch < FILLED
    return {
        "system": label(run),
        **pressed,
        "level": f"{run.scheduler}, {run.batch} at most" if capped else run.scheduler,
        "capped": capped,
        "closed": run.arrivals == "all",
        "output_tokens_per_s": latency.throughput(record).output_tokens_per_s,
        "pressed_tokens_per_s": pressed["output_tokens_per_s"] if queued >= QUEUED else np.nan,
        "waste": 100 - pressed["stored"],
        "queued": queued,
        "dead": 100 * pressure.dead / (computed + pressure.dead),
        "again": 100 * pressure.recomputed / computed,
        "preemptions": pressure.preemptions,
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    grouped = rows.groupby(["level", "allocator"], sort=False)[list(SHOWN)]
    mean, spread = grouped.mean(), grouped.std().fillna(0)
    words = {SHOWN[name]: [_pm(*pair) for pair in zip(mean[name], spread[name], strict=True)] for name in SHOWN}
    of = "1 / latency: ours, +- over seeds"
    if rows["closed"].all():
        of = "throughput: replay (of sustained rates), ours, +- over seeds; ours while requests queue"
    explained = "queueing: tok/s while requests queue; padding, again: of the tokens computed; ended: of the pool"
    return {
        f"factors of {of}": _factors(rows),
        "% of the sum of squares that is due to each": _due(rows),
        f"each pair, mean ± standard deviation over seeds ({explained})": pd.DataFrame(words, mean.index),
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    kinds = {"mean": rows.groupby(["allocator", "level"])[list(MAPS)].mean()}
    if rows["seed"].nunique() > 1:
        kinds["std"] = rows.groupby(["allocator", "level"])[list(MAPS)].std()
    down, across = (list(dict.fromkeys(rows[name])) for name in ("allocator", "level"))
    maps = {
        kind: {title: table[name].unstack().loc[down, across] for name, title in MAPS.items()}
        for kind, table in kinds.items()
    }
    title = "Scheduler and allocator, all else equal"
    return plot.heat(maps["mean"], header, title, spread=maps.get("std"), seeds=sorted(set(rows["seed"])))


def claims(rows: pd.DataFrame) -> list[Claim]:
    judged = bool((rows["queued"] >= QUEUED).all())
    logs, found = _logs(rows[~_doubled(rows)]), []
    others = [level for level in logs.columns.unique("level") if level != "continuous"]
    if "continuous" in logs and others:
        gains = pd.concat([logs["continuous"] - logs[level] for level in others])
        text = f"continuous batching beats {' and '.join(others)} under every allocator, with every seed"
        found.append(_claim(text, gains > 0, judged, gains))
    if "continuous" in logs and {"paged"} < set(logs["continuous"]):
        gains = -logs["continuous"].drop(columns="paged").sub(logs["continuous", "paged"], axis=0)
        text = "paging on demand beats every other allocator under continuous batching, with every seed"
        found.append(_claim(text, gains > 0, judged, gains))
    for level in others:
        found += _under(logs, level, judged)
    return found + _cap(rows, judged)


def decompose(values: np.ndarray) -> dict[str, float]:
    """Sums of squares about the mean, of `values` (schedulers, allocators, seeds); the parts sum to `total`."""
    mean, by_seed, by_pair = values.mean(), values.mean(axis=(0, 1), keepdims=True), values.mean(axis=2, keepdims=True)
    by_scheduler, by_allocator = by_pair.mean(axis=1, keepdims=True), by_pair.mean(axis=0, keepdims=True)
    parts = {
        "scheduler": by_scheduler - mean,
        "allocator": by_allocator - mean,
        "interaction": by_pair - by_scheduler - by_allocator + mean,
        "seed": by_seed - mean,
        "rest": values - by_pair - by_seed + mean,
        "total": values - mean,
    }
    return {name: float((np.broadcast_to(part, values.shape) ** 2).sum()) for name, part in parts.items()}


def _under(logs: pd.DataFrame, level: str, judged: bool) -> list[Claim]:
    """What a request-level scheduler makes of paging, and of holes: a batch formed in an empty pool leaves none."""
    here, found = logs[level], []
    if "continuous" in logs and {"paged", "contiguous-max"} <= set(here):
        more, less = (some["paged"] - some["contiguous-max"] for some in (logs["continuous"], here))
        text, apart = "the effects interact: paged / contiguous-max differs", more - less
        text = f"{text} under {level} by over 2 standard deviations"
        holds = bool(abs(apart.mean()) > 2 * apart.std()) if judged and len(apart) > 1 else None
        seen = f"x{np.exp(less.mean()):.2f} there, x{np.exp(more.mean()):.2f} under continuous"
        found.append(Claim(text, holds, seen))
    if {"contiguous-oracle-firstfit", "paged-oracle"} <= set(here):
        apart = here["paged-oracle"] - here["contiguous-oracle-firstfit"]
        text = f"under {level} first fit has no holes: as fast as pages with the same reservation, +-{100 * SAME:g} %"
        found.append(_claim(text, apart.abs() < np.log1p(SAME), judged, apart))
    return found


def _cap(rows: pd.DataFrame, judged: bool) -> list[Claim]:
    """How far the allocators are apart where the setting limits the batch, and where memory does."""
    found = []
    for (scheduler, capped), own in rows[_doubled(rows)].groupby(["scheduler", "level"], sort=False):
        filled = rows[(rows["scheduler"] == scheduler) & ~rows["capped"]]
        apart = [float(np.ptp(_logs(some).mean())) for some in (own, filled)]
        seen = "x{:.2f}, without the cap x{:.2f}".format(*np.exp(apart))
        holds = apart[0] < apart[1] / 2 if judged and own["allocator"].nunique() > 1 else None
        found.append(Claim(f"{capped}: the cap hides what allocators do (best / worst)", holds, seen))
    return found


def _factors(rows: pd.DataFrame) -> pd.DataFrame:
    """Geometric means of ratios, and how the ratios spread over seeds."""
    main = rows[~_doubled(rows)]
    ratios = _ratios(_logs(main))
    table = pd.DataFrame({"ours": np.exp(ratios.mean()), "+-": np.exp(ratios).std()})
    if rows["closed"].all():
        table["queueing"] = np.exp(_ratios(_logs(main, "pressed_tokens_per_s")).mean())
        table.insert(0, "replay", pd.Series(REPLAY if rows["paper_model"].all() else {}, dtype=float))
    return table.round(2)


def _ratios(logs: pd.DataFrame) -> pd.DataFrame:
    """Logarithms of ratios to the first scheduler and to the first allocator: a row per seed."""
    levels, allocators = logs.columns.unique("level"), logs.columns.unique("allocator")
    found: dict[str, pd.Series] = {}
    for level in levels[1:]:
        name, gains = f"{level} / {levels[0]}", logs[level] - logs[levels[0]]
        found[f"{name}: main effect"] = gains.mean(axis=1)
        found |= {f"{name}, under {allocator}": gains[allocator] for allocator in allocators}
    for allocator in allocators[1:]:
        name = f"{allocator} / {allocators[0]}"
        gains = logs.xs(allocator, axis=1, level=1) - logs.xs(allocators[0], axis=1, level=1)
        found[f"{name}: main effect"] = gains.mean(axis=1)
        found |= {f"{name}, under {level}": gains[level] for level in levels}
    first, last = (levels[0], allocators[0]), (levels[-1], allocators[-1])
    found[f"{', '.join(last)} / {', '.join(first)}"] = logs[last] - logs[first]
    return pd.DataFrame(found)


def _due(rows: pd.DataFrame) -> pd.DataFrame:
    """Per cent of the sum of squares; once more with the capped schedulers in place of the uncapped."""
    sets, capped = {"memory limits the batch": rows[~_doubled(rows)]}, rows[_doubled(rows)]
    if len(capped):
        instead = rows[rows["capped"] | ~rows["scheduler"].isin(capped["scheduler"])]
        sets[f"with {' and '.join(capped['level'].unique())}"] = instead
    columns = {}
    for name, some in sets.items():
        responses = {"log throughput": some["output_tokens_per_s"], "log latency": some["normalised_s"]}
        responses = {title: np.log(values) for title, values in responses.items()} | {"waste": some["waste"]}
        for title, values in responses.items():
            wide = _wide(some, values)
            parts = decompose(wide.to_numpy().T.reshape(len(set(some["level"])), -1, len(wide)))
            columns[name, title] = {part: 100 * value / (parts["total"] or np.nan) for part, value in parts.items()}
    return pd.DataFrame(columns).round(1)


def _doubled(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of a capped scheduler that ran without the cap, too."""
    return rows["capped"] & rows["scheduler"].isin(rows["scheduler"][~rows["capped"]])


def _logs(rows: pd.DataFrame, rate: str = "output_tokens_per_s") -> pd.DataFrame:
    """Logarithm of what is compared: throughput where all requests came at once, else the reciprocal of latency."""
    return _wide(rows, np.log(rows[rate].where(rows["closed"], 1 / rows["normalised_s"])))


def _wide(rows: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """A row per seed, a column per (level, allocator), in the order of `rows`."""
    keys = ["level", "allocator"]
    order = list(dict.fromkeys(zip(*(rows[key] for key in keys), strict=True)))
    return rows.assign(value=values).pivot(index="seed", columns=keys, values="value")[order]


def _claim(text: str, true: pd.DataFrame | pd.Series, judged: bool, logs: pd.DataFrame | pd.Series) -> Claim:
    low, high = np.exp([np.min(logs), np.max(logs)])
    return Claim(text, bool(np.all(true)) if judged else None, f"x{low:.2f} to x{high:.2f}")


def _pm(mean: float, spread: float) -> str:
    return f"{mean:,.4g}" + (f" ±{spread:.2g}" if spread > 0 else "") if pd.notna(mean) else ""


def _base(run: Run, options: Options) -> Run:
    """The fragmentation experiment's setting for this device (model, pool, requests), but all at once and drained."""
    count: int | None = 64 if options.quick else 256
    if "duration_s" in options.changes:
        count = None
    elif not run.simulated and run.device == "cpu":
        count = run.count
    closed = replace(run, arrivals="all", rate=None, duration_s=None, count=count, steps=None, drain=True)
    asked = {name: value for name, value in options.changes.items() if name != "workload"}  # the run has it
    return replace(options, changes=asked).apply(closed)


def _levels(base: Run, options: Options) -> list[dict[str, Any]]:
    """What a run under each scheduler has, request-level ones first."""
    closed = base.arrivals == "all"
    known = [name for name in SCHEDULERS.names() if name != ("dynamic" if closed else "static")]
    schedulers = options.schedulers or sorted(known, key=lambda name: not _waits(name))
    if not closed and "static" in schedulers and "batch" not in options.changes:
        rule = "while requests come by and by it would wait for a full batch"
        raise InputError(f"scheduler 'static': {rule}; take dynamic, or give --batch")
    waits: list[dict[str, Any]] = [{} if "timeout_s" in options.changes else {"timeout_s": 0.0}]
    if "batch" not in options.changes:
        waits = [{**waits[0], "batch": batch} for batch in (CAP, FILLED)]
    return [{"scheduler": name, **more} for name in schedulers for more in (waits if _waits(name) else [{}])]


def _waits(scheduler: str) -> bool:
    policy: Any = SCHEDULERS.get(scheduler)
    return isinstance(policy, type) and issubclass(policy, Static)
