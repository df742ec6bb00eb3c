"""What rate a system sustains, read off rows of runs (`rate`, `seed`, `normalised_s`) or off one record, and drawn.

A rate is sustained at a threshold where the mean over seeds of the mean normalised latency crosses it: between the last
rate below and the next, with the logarithm of the latency linear in the rate. Its spread is the standard deviation of
what each seed alone gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lab.check import check
from lab.core import InputError
from lab.harness import writing
from lab.plot.style import GREY, style
from lab.record import Record
from lab.run import Run, carry_out
from lab.systems import label

Curve = tuple[list[float], list[float]]  # rates, rising; seconds per token


class Knee(NamedTuple):
    rate: float  # requests per second; NaN where no rate brackets it
    spread: float  # over seeds; NaN for one
    text: str  # for a table


def sustained(rates: Seq[float], latencies_s: Seq[float], threshold_s: float) -> float | None:
    """Requests per second at which latency (s/token) crosses the threshold for good; None beyond the rates given."""
    if not threshold_s > 0:
        raise InputError(f"threshold {threshold_s}: must be above zero seconds per token; the paper's axis ends at 1")
    if not all(before < rate for before, rate in itertools.pairwise([0.0, *rates])):
        raise InputError(f"rates {', '.join(f'{rate:g}' for rate in rates)}: must be above zero and rise; sort them")
    below = [i for i, seconds in enumerate(latencies_s) if seconds <= threshold_s]
    if not below or below[-1] + 1 == len(rates):
        return None
    i = below[-1]
    low, high = math.log(latencies_s[i]), math.log(latencies_s[i + 1])
    return float(rates[i] + (rates[i + 1] - rates[i]) * (math.log(threshold_s) - low) / (high - low))


def knee(own: pd.DataFrame, threshold_s: float) -> Knee:
    """`own`: the rows of one system and workload."""
    (rates, seconds), each = _read(own)
    rate = sustained(rates, seconds, threshold_s)
    if rate is not None:
        spread = _each(each, threshold_s).std()
        return Knee(rate, spread, spread_of(rate, spread))
    if not rates:
        return Knee(math.nan, math.nan, "none ended")
    beyond = f"> {rates[-1]:g}" if seconds[-1] <= threshold_s else f"< {rates[0]:g}"
    return Knee(math.nan, math.nan, beyond)


def ratios(first: pd.DataFrame, other: pd.DataFrame, thresholds_s: Seq[float]) -> pd.DataFrame:
    """Of the sustained rates, mean and std over seeds, by threshold; NaN where either is beyond its rates."""
    (above, above_each), (below, below_each) = _read(first), _read(other)
    rows = []
    for t in thresholds_s:
        rates = [sustained(*curve, t) or math.nan for curve in (above, below)]
        rows.append((rates[0] / rates[1], (_each(above_each, t) / _each(below_each, t)).std()))
    return pd.DataFrame(rows, index=list(thresholds_s), columns=["mean", "std"], dtype=float)


def ratio(first: pd.DataFrame, other: pd.DataFrame, threshold_s: float) -> tuple[float, float]:
    mean, spread = ratios(first, other, [threshold_s]).iloc[0]
    return float(mean), float(spread)


def at_least(first: pd.DataFrame, other: pd.DataFrame, threshold_s: float) -> float:
    """The ratio is above this where the first sustains all rates it was asked at; else NaN."""
    (rates, seconds), _ = _read(first)
    beyond = bool(rates) and seconds[-1] <= threshold_s
    return rates[-1] / (sustained(*_read(other)[0], threshold_s) or math.nan) if beyond else math.nan


def ratio_text(first: pd.DataFrame, other: pd.DataFrame, threshold_s: float) -> str:
    """For a table: with its spread, or what it is above."""
    least = at_least(first, other, threshold_s)
    return spread_of(*ratio(first, other, threshold_s)) if math.isnan(least) else f"> {least:.2f}"


def drain(record: Record) -> tuple[float, float]:
    """Requests ended per second while the queue is never empty, and how long it was not: the longest such time.

    Its first sixth is left out, in which the batch fills and only short requests end.
    """
    steps = record.steps
    waits = (steps["waiting"] > 0).to_numpy()
    if not waits.any():
        return math.nan, 0.0
    spans = steps[waits].groupby(np.cumsum(~waits)[waits]).agg({"start_s": "first", "end_s": "last"})
    start_s, end_s = spans.loc[(spans["end_s"] - spans["start_s"]).idxmax()]
    events = record.events[record.events["kind"] == "ended"]
    last_s = events.groupby("request")["time_s"].max()  # of its outputs
    from_s = start_s + (end_s - start_s) / 6
    return float(((last_s > from_s) & (last_s <= end_s)).sum() / (end_s - from_s)), float(end_s - start_s)


def rates_of_drain(run: Run, shares: Seq[float], count: int, records: Path) -> list[float]:
    """Multiples of the drain, found by `count` of the run's requests that come at once; its record is kept."""
    probe = replace(run, arrivals="all", rate=None, duration_s=None, count=count)
    check(probe)
    place = records / probe.key()
    if not place.exists():
        print(f"first {count} requests of {run.workload} at once: what does {label(run)} drain?", flush=True)
        with writing(records):
            carry_out(probe, place)
    record = Record.load(place)
    per_s = drain(record)[0]
    if math.isnan(per_s):  # all found room at once
        per_s = count / float(record.steps["end_s"].iloc[-1])
    return [float(f"{share * per_s:.3g}") for share in shares]


def spread_of(mean: float, spread: float) -> str:
    """As "2.49 ±0.10"; empty where there is no mean."""
    if math.isnan(mean):
        return ""
    digits = 1 if mean >= 20 else 2 if mean >= 0.995 else 3
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ±{spread:.{digits}f}")


def table_of(cells: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> pd.DataFrame:
    """By workload, system and, where it is part of the key, rate."""
    index = pd.MultiIndex.from_tuples(list(cells), names=["workload", "system", "req/s"][: len(next(iter(cells)))])
    return pd.DataFrame(list(cells.values())).round(2).set_axis(index)


def draw_latency(axes: Axes, rows: pd.DataFrame, at_s: float, paper: Mapping[str, float]) -> None:
    """Normalised latency over rate, a curve per system; hollow marks where the paper's curves cross `at_s`."""
    for system, own in rows.groupby("system", sort=False):
        points = own.groupby("rate")["normalised_s"].agg(["mean", "std"]).dropna(subset="mean")
        look: Any = {**style(str(system)), "markersize": 4.5, "linewidth": 1.4}
        axes.plot(points.index, points["mean"], label=str(system), **look)
        _band(axes, points["mean"], points["std"], look["color"])
        if system in paper:
            hollow: Any = {"markeredgecolor": look["color"], "markerfacecolor": "white", "linestyle": "none"}
            axes.plot(paper[str(system)], at_s, marker=look["marker"], markersize=7, zorder=3, **hollow)
    axes.axhline(at_s, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    seen = rows[rows["normalised_s"] <= 1.2]["rate"]
    axes.set_xlim(0, 1.05 * float((seen if len(seen) else rows["rate"]).max()))
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)


def draw_ratio(axes: Axes, rows: pd.DataFrame, first: str, thresholds: Seq[float]) -> None:
    """Sustained rate of the system `first` over that of each other, over thresholds (s/token); dashed: at least."""
    best, highest = rows[rows["system"] == first], 2.0
    for system, own in rows[rows["system"] != first].groupby("system", sort=False):
        table = ratios(best, own, thresholds).dropna(subset="mean")
        highest = max([highest, *table["mean"]])
        color = style(str(system))["color"]
        axes.plot(table.index, table["mean"], color=color, linewidth=1.4)
        _band(axes, table["mean"], table["std"], color)
        least = pd.Series({t: at_least(best, own, t) for t in thresholds}).dropna()
        if len(least):
            highest = max(highest, *least)
            axes.plot(least.index, least, color=color, linewidth=1.4, linestyle="--")
            axes.annotate("at least", (least.index[0], least.iloc[0]), (0, 4), textcoords="offset points", color=color)
    axes.set_xscale("log")
    axes.set_xlim(0.045, 1.12)
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.8, 1.3 * highest)
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0])
    axes.minorticks_off()
    for along in (axes.xaxis, axes.yaxis):
        along.set_major_formatter(lambda value, _: f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)


def draw_ranges(axes: Axes, ranges: Mapping[str, tuple[float, float]], up_to: float) -> None:
    """What the paper's text says of the ratios: a band for a range, a line for "up to"."""
    at: Any = {"xycoords": ("axes fraction", "data"), "ha": "right", "fontsize": 7.5}
    for system, (low, high) in ranges.items():
        color = style(system)["color"]
        axes.axhspan(low, high, color=color, alpha=0.09, linewidth=0, zorder=0)
        clear = 0.88 * low if low < 2 else 0.87 * high  # of the curves
        axes.annotate(f"paper: {low:g} to {high:g}", (0.99, clear), color=color, **at)
    axes.set_ylim(0.8, max(axes.get_ylim()[1], 1.5 * up_to))
    axes.axhline(up_to, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    axes.annotate(f"paper: up to {up_to:g}", (0.99, up_to * 1.04), color=GREY, **at)


def _band(axes: Axes, mean: pd.Series, spread: pd.Series, color: str) -> None:
    low, high = (mean + sign * spread.fillna(0) for sign in (-1, 1))
    axes.fill_between(mean.index, low, high, color=color, alpha=0.18, linewidth=0)


def _read(own: pd.DataFrame) -> tuple[Curve, dict[int, Curve]]:
    """The mean over seeds, and each seed's."""
    known = own.dropna(subset="normalised_s").sort_values("rate")
    mean = known.groupby("rate")["normalised_s"].mean()
    each = {int(seed): (list(one["rate"]), list(one["normalised_s"])) for seed, one in known.groupby("seed")}
    return (list(mean.index), list(mean)), each


def _each(curves: Mapping[int, Curve], threshold_s: float) -> pd.Series:
    """What each seed alone sustains; the index is the seed."""
    return pd.Series({seed: sustained(*curve, threshold_s) for seed, curve in curves.items()}, dtype=float)
