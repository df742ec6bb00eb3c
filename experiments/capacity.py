"""What request rate does each system sustain? Normalised latency over rate, the knee, full batches, the drain.

Kwon et al., SOSP'23, figure 12 (a) and (d): on ShareGPT lengths vLLM sustains 1.7 to 2.7 times the rate of Orca
(Oracle), 2.7 to 8 times that of Orca (Max), up to 22 times that of FasterTransformer, at similar latencies; figure 13:
mean requests batched at 2 requests/s (ShareGPT) and 30 (Alpaca). Set-up: OPT-13B, A100 40 GB, a pool of 15,728 tokens,
Poisson arrivals, all are served. The paper's traces last an hour, its artifact's and ours 600 s (`--duration 3600`):
a longer trace grows a longer queue, so a knee is stated with its trace and compared at equal length.

Ours: the paper names no threshold, so rates are stated at four and their ratio is a curve. A rate is sustained at a
threshold where the mean over seeds of the mean normalised latency crosses it, interpolated between the last rate below
and the next with the logarithm of the latency linear in the rate (`_knees.py`). Beside it the drain, which needs no
threshold: requests that end per second while the queue is never empty. Where no rates are declared (another machine,
model, workload or policy), a short run with all requests at once finds the drain, and the rates are multiples of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments import _knees
from experiments._knees import knee, ratio, ratio_text, spread_of
from experiments.fragmentation import window
from lab import latency, metrics
from lab.core import InputError
from lab.harness import Claim
from lab.options import Options
from lab.plot.style import FONT, GREY, entitle, seeds_of
from lab.record import Record
from lab.run import Run, real
from lab.systems import SYSTEMS as KNOWN
from lab.systems import label

Curve = tuple[str, str]  # workload, system

SYSTEMS = ("vllm", "orca-oracle", "orca-pow2", "orca-max", "fastertransformer")
WORKLOADS = ("sharegpt", "alpaca")
THRESHOLDS = (0.1, 0.2, 0.5, 1.0)  # s per token
AT = 0.5  # the middle of the paper's axis
DRAWN = tuple(np.geomspace(0.05, 1.0, 27))  # thresholds of the curve of ratios

PAPER: dict[Curve, tuple[str, float]] = {  # figure 12 (a), (d), read by eye; or the last rate of a curve
    ("sharegpt", "vllm"): ("about", 1.9),
    ("sharegpt", "orca-oracle"): ("about", 1.1),
    ("sharegpt", "orca-pow2"): ("about", 0.75),
    ("sharegpt", "orca-max"): ("about", 0.5),
    ("sharegpt", "fastertransformer"): ("about", 0.3),
    ("alpaca", "vllm"): ("about", 28),
    ("alpaca", "orca-oracle"): ("about", 20),
    ("alpaca", "orca-pow2"): ("about", 13),
    ("alpaca", "orca-max"): ("at most", 5),
    ("alpaca", "fastertransformer"): ("at most", 3),
}
RANGES = {"orca-oracle": (1.7, 2.7), "orca-max": (2.7, 8.0)}  # section 6.2, ShareGPT
UP_TO = 22  # times FasterTransformer's rate
ALPACA_BATCH = 14  # that the artifact gives FasterTransformer there; of our extents for the longest, 7 fit
BATCH_AT = {"sharegpt": 2.0, "alpaca": 30.0}  # requests per second of figure 13
BATCH: dict[Curve, tuple[float, float | None]] = {  # printed there; our tolerance, None where there is no target
    ("sharegpt", "vllm"): (30.42, 0.10),
    ("sharegpt", "orca-oracle"): (13.62, 0.05),
    ("sharegpt", "orca-pow2"): (9.81, 0.03),
    ("sharegpt", "orca-max"): (7.00, 0.0),
    ("alpaca", "vllm"): (132.44, None),
    ("alpaca", "orca-oracle"): (72.75, None),
    ("alpaca", "orca-pow2"): (43.24, None),
    ("alpaca", "orca-max"): (7.00, 0.0),
}
RATES: dict[Curve, tuple[float, ...]] = {  # around the knees on the virtual A100
    ("sharegpt", "vllm"): (1.5, 1.8, 2.0, 2.15, 2.3, 2.5, 2.7, 3.0),
    ("sharegpt", "orca-oracle"): (0.7, 0.85, 1.0, 1.1, 1.2, 1.3, 1.45, 1.6),
    ("sharegpt", "orca-pow2"): (0.5, 0.65, 0.75, 0.85, 0.95, 1.05, 1.2),
    ("sharegpt", "orca-max"): (0.35, 0.45, 0.55, 0.62, 0.7, 0.78, 0.9),
    ("sharegpt", "fastertransformer"): (0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.28, 0.35),
    ("alpaca", "vllm"): (40, 46, 49, 50.5, 52, 53.5, 56),
    ("alpaca", "orca-oracle"): (20, 27, 32, 34, 35, 36, 37.5, 40),
    ("alpaca", "orca-pow2"): (12, 16, 19, 20.5, 21.5, 22.5, 23.5, 26),
    ("alpaca", "orca-max"): (2, 2.75, 3.4, 3.7, 4, 4.3, 4.8),
    ("alpaca", "fastertransformer"): (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.35, 1.5, 1.8),
}
OF_DRAIN: tuple[float, ...] = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0, 1.1, 1.25, 1.45, 1.8)  # where no rates are declared
# Requests/s of ShareGPT at which GPUs are asked for 300 s, five to seven minutes each: 0.6, 0.9 and 1.1 of the knees at
# AT that the virtual clock predicts there (--hardware h100-80gb or h200, --duration 300, seeds 0 to 2).
ON_GPUS = {
    "H100": {"vllm": (4.64, 6.97, 8.51), "orca-oracle": (2.32, 3.48, 4.26), "orca-max": (1.27, 1.9, 2.32)},
    "H200": {"vllm": (5.94, 8.91, 10.9), "orca-oracle": (2.95, 4.42, 5.4), "orca-max": (1.64, 2.47, 3.01)},
}
OF_DRAIN_REAL: tuple[float, ...] = (0.7, 1.0, 1.25)  # about 0.6, 0.9 and 1.1 of the knee: each takes minutes
FREE = {"allocator", "scheduler", "batch", "timeout_s", "watermark", "executor", "hardware", "device", "dtype"}
QUEUED = 1 / 3  # of the trace: a queue that lasts for less says little about the drain

VIRTUAL = Run(duration_s=600.0, drain=True)
GPU = replace(VIRTUAL, executor="torch", device="cuda", model="random:opt-13b", pool="15728", duration_s=300.0)
LAPTOP = Run(executor="torch", model="smollm2", dtype="float32", pool="1200", length=256, duration_s=60.0, drain=True)


def runs(options: Options) -> list[Run]:
    base, changes = _base(options), options.changes
    if options.quick:
        base = replace(base, duration_s=20.0) if base.simulated else replace(base, count=4)
    seeds = options.seeds or ([0, 1, 2] if base.simulated and not options.quick else [0])
    workloads = [changes["workload"]] if "workload" in changes else WORKLOADS if base.simulated else WORKLOADS[:1]
    found = []
    for workload in workloads:
        for variant in options.variants(replace(base, workload=workload), SYSTEMS):
            if workload == "alpaca" and label(variant) == "fastertransformer":
                variant = replace(variant, batch=ALPACA_BATCH)
            rates = [variant.rate] if "rate" in changes else options.rates or _rates(variant, options)
            found += [replace(variant, rate=rate, seed=seed) for rate in rates for seed in seeds]
    return list(dict.fromkeys(found))


def row(run: Run, record: Record) -> dict[str, Any]:
    drain_per_s, queued_s = _knees.drain(record)
    trace_s = float(run.duration_s or record.requests["arrival_s"].max())
    return {
        "system": _name(run),
        "workload": run.workload,
        "rate": run.rate,
        "seed": run.seed,
        "trace_s": trace_s,
        "normalised_s": latency.latencies(record)["normalised_s"].mean(),
        "batch": metrics.batch_size(record, window(run, record)).requests,
        "drain_per_s": drain_per_s if queued_s >= QUEUED * trace_s else math.nan,
        "queued_s": queued_s,
        "paper_setting": _paper_setting(run) and run.count is None and trace_s >= 300,
        "paper_clock": run.simulated and run.hardware == VIRTUAL.hardware and trace_s >= 600,
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    trace = f"{', '.join(f'{s:g}' for s in rows['trace_s'].unique())} s of arrivals"
    thresholds = rows.attrs.get("thresholds") or THRESHOLDS
    paper, several, ratios, batches, drains = {}, {}, {}, {}, {}
    for key, own in _curves(rows):
        best = rows[(rows["workload"] == key[0]) & (rows["system"] == "vllm")]
        paper[key] = _beside(key, own, best)
        several[key] = {f"{t:g} s/token": knee(own, t).text for t in thresholds}
        if len(best):
            ratios[key] = {f"{t:g} s/token": ratio_text(best, own, t) for t in thresholds}
        batches[key] = _batches(key, own)
        drains[key] = _drains(own, best)
    found = {
        f"requests/s sustained at {AT:g} s/token, {trace} (figure 12: 3600 s, by eye); <, >: beyond the grid": paper,
        f"requests/s sustained at each threshold, {trace}; <, >: beyond the grid": several,
        f"rate of vllm over that of the system at each threshold, {trace}": ratios,
        "requests batched, means over iterations: at the rate of figure 13, and at our highest": batches,
        "drain at our highest rate: requests ended per second while the queue is never empty": drains,
    }
    if rows.groupby(["workload", "system"])["rate"].nunique().max() == 1:
        found[f"mean normalised latency, {trace}"] = _latencies(rows)
    return {title: _knees.table_of(cells) for title, cells in found.items() if cells}


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    """Above, figure 12 of the paper; below, what its choice of a threshold would have changed."""
    workloads = list(dict.fromkeys(rows["workload"]))
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(max(8.4, 1.2 + 4.0 * len(workloads)), 7.6), layout="constrained")
        grid = figure.subplots(2, len(workloads), squeeze=False)
        for (above, below), workload in zip(grid.T, workloads, strict=True):
            here = rows[rows["workload"] == workload]
            paper = {s: rate for (w, s), (_, rate) in PAPER.items() if w == workload and rows["paper_setting"].all()}
            _knees.draw_latency(above, here, AT, paper)
            _knees.draw_ratio(below, here, "vllm", DRAWN)
            above.set_xlabel(f"request rate (requests/s), {workload}")
            below.set_xlabel(f"threshold of normalised latency (s/token), {workload}")
            if workload == "sharegpt" and paper:
                _knees.draw_ranges(below, RANGES, UP_TO)
        grid[0][0].set_ylabel("normalised latency (s/token)")
        grid[1][0].set_ylabel("sustained rate: vllm / system")
        handles, _ = grid[0][0].get_legend_handles_labels()
        if rows["paper_setting"].all():
            text = f"hollow: the paper's at {AT:g} s/token, about"
            handles.append(Line2D([], [], color="none", marker="o", markeredgecolor=GREY, label=text))
        figure.legend(handles=handles, loc="outside lower left", ncols=6, frameon=False, fontsize=8.5)
        trace = f"{rows['trace_s'].iloc[0]:g} s of arrivals, {seeds_of(rows['seed']).replace('bars', 'bands')}"
        both = {**header, "workload": " and ".join(workloads)}
        entitle(figure, grid[0][0], "What request rate each system sustains", both, trace)
    return figure


def claims(rows: pd.DataFrame) -> list[Claim]:
    curves = dict(_curves(rows))
    best, judged = curves.get(("sharegpt", "vllm")), rows["paper_setting"].all()
    thresholds = rows.attrs.get("thresholds") or THRESHOLDS
    found = []
    for system, (low, high) in RANGES.items():
        if best is not None and ("sharegpt", system) in curves:
            times, spread = ratio(best, curves["sharegpt", system], AT)
            holds = low <= times <= high if judged and not math.isnan(times) else None
            text = f"vLLM sustains {low:g} to {high:g} times the rate of {system} on ShareGPT (figure 12a)"
            found.append(Claim(text, holds, f"{spread_of(times, spread) or 'beyond the grid'} at {AT:g} s/token"))
    if best is not None and ("sharegpt", "fastertransformer") in curves:
        each = {t: ratio(best, curves["sharegpt", "fastertransformer"], t) for t in thresholds}
        seen = [f"{spread_of(*times) or 'beyond the grid'} at {t:g}" for t, times in each.items()]
        text = f"up to {UP_TO} times FasterTransformer's (figure 12a, at a threshold that the paper does not state)"
        found.append(Claim(text, None, f"{', '.join(seen)} s/token"))
    return found + [_batch_claim(key, own) for key, own in curves.items() if key in BATCH and len(_at(key, own))]


def _batch_claim(key: Curve, own: pd.DataFrame) -> Claim:
    """A single seed is judged at twice the tolerance, as in `fragmentation`."""
    (theirs, tolerance), ours, slack = BATCH[key], float(_at(key, own).mean()), 1 if own["seed"].nunique() > 1 else 2
    text = f"{key[1]}: {theirs:.2f} requests batched at {BATCH_AT[key[0]]:g} req/s of {key[0]} (figure 13)"
    if tolerance is None:
        return Claim(f"{text}; depends on how fast full batches are, no target", None, f"{ours:.2f}")
    judged = (own["paper_setting"] & own["paper_clock"]).all()
    holds = bool(abs(ours - theirs) <= slack * tolerance * theirs + 0.005) if judged else None
    return Claim(f"{text}, +-{100 * slack * tolerance:g} %", holds, f"{ours:.2f}")


def _curves(rows: pd.DataFrame) -> Iterator[tuple[Curve, pd.DataFrame]]:
    for (workload, system), own in rows.groupby(["workload", "system"], sort=False):
        yield (str(workload), str(system)), own


def _name(run: Run) -> str:
    """The system's, also with the batch that the paper gave FasterTransformer on Alpaca."""
    like = replace(run, batch=KNOWN["fastertransformer"].settings["batch"])
    return label(like if (run.workload, run.batch) == ("alpaca", ALPACA_BATCH) else run)


def _at(key: Curve, own: pd.DataFrame) -> pd.Series:
    """Requests batched at the rate of figure 13, by run."""
    return own.loc[own["rate"] == BATCH_AT.get(key[0]), "batch"]


def _beside(key: Curve, own: pd.DataFrame, best: pd.DataFrame) -> dict[str, Any]:
    about, theirs = PAPER.get(key, ("", math.nan))
    ours, times = knee(own, AT), PAPER.get((key[0], "vllm"), ("", math.nan))[1] / theirs
    return {
        "paper": f"{about} {theirs:g}" if about else "",
        "ours": ours.text,
        "ours / paper": ours.rate / theirs,
        "paper: vllm / it": f"{about.replace('most', 'least')} {times:.2f}" if about else "",
        "ours: vllm / it": ratio_text(best, own, AT) if len(best) else "",
    }


def _batches(key: Curve, own: pd.DataFrame) -> dict[str, Any]:
    theirs, at, top = BATCH.get(key, (math.nan, None))[0], _at(key, own), own[own["rate"] == own["rate"].max()]
    return {
        "req/s": f"{BATCH_AT[key[0]]:g}" if len(at) else "",
        "paper": theirs,
        "ours": spread_of(at.mean(), at.std()),
        "off by %": 100 * (at.mean() / theirs - 1),
        "highest req/s": f"{top['rate'].iloc[0]:g}",
        "ours there": spread_of(top["batch"].mean(), top["batch"].std()),
    }


def _drains(own: pd.DataFrame, best: pd.DataFrame) -> dict[str, Any]:
    top, first = own[own["rate"] == own["rate"].max()], best.loc[best["rate"] == best["rate"].max(), "drain_per_s"]
    return {
        "offered/s": f"{top['rate'].iloc[0]:g}",
        "ended/s": spread_of(top["drain_per_s"].mean(), top["drain_per_s"].std()) or "its queue empties",
        "queue lasts (s)": round(top["queued_s"].mean()),
        "vllm / it": first.mean() / top["drain_per_s"].mean(),
    }


def _latencies(rows: pd.DataFrame) -> dict[tuple[Any, ...], dict[str, Any]]:
    points = rows.groupby(["workload", "system", "rate"], sort=False)["normalised_s"]
    return {key: {"s/token": spread_of(own.mean(), own.std())} for key, own in points}


def _base(options: Options) -> Run:
    """On the virtual clock unless torch or a device is asked for. InputError for what makes no sense here."""
    changes = options.changes
    if changes.get("arrivals") in ("all", "trace"):
        rule = "they come at times of their own, and this experiment varies their rate; take poisson or gamma"
        raise InputError(f"arrivals {changes['arrivals']!r}: {rule}")
    if changes.get("steps"):
        rule = "cut off, a run has no latency for those that still wait; shorten it with --duration or --count"
        raise InputError(f"steps {changes['steps']}: {rule}")
    return options.where(VIRTUAL, GPU, LAPTOP)


def _rates(run: Run, options: Options) -> list[float]:
    """Declared, with that of figure 13; where there are none, multiples of the drain of requests that come at once."""
    declared = RATES.get((run.workload, _name(run)))
    if declared and run.simulated and run.hardware == VIRTUAL.hardware and _paper_setting(run):
        rates = sorted({*declared, BATCH_AT[run.workload]})
        return rates[:: len(rates) // 2] if options.quick else rates
    if not run.simulated and run.workload == "sharegpt" and _paper_setting(run):
        name = real().device_name(run.device)
        known = next((rates for gpu, rates in ON_GPUS.items() if gpu in name), {})
        if _name(run) in known:
            return list(known[_name(run)])
    shares, count = OF_DRAIN if run.simulated else OF_DRAIN_REAL, 1000 if run.simulated else 128
    few = (shares[::5], count // 16) if options.quick else (shares, count)
    return _knees.rates_of_drain(run, *few, options.out / "runs")


def _paper_setting(run: Run) -> bool:
    """Are workload, model and pool the paper's, whatever the policy, the machine and the clock?"""
    changed = {name for name, value in asdict(run).items() if value != getattr(VIRTUAL, name)}
    theirs = run.workload in WORKLOADS and run.model.endswith("opt-13b") and run.pool in (None, "15728", "12GiB")
    return theirs and changed <= FREE | {"workload", "model", "pool", "rate", "seed", "duration_s", "count"}
