"""How far may one trust the virtual clock? The same requests on a real device and at its fitted pace.

The paper has no such check; of simulators of LLM serving, Vidur reports latencies within 9 % (Agrawal et al.,
MLSys'24). Runs are those of `fragmentation` on a real device, and found again if they are there. From each record step
times are fitted as a function of tokens, positions read and sequences; then the same requests, policies and pool run on
a virtual clock at that pace. Memory shares must agree within a point; throughput and latency say how good the fit is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import fragmentation
from lab import latency, metrics, plot
from lab.core import InputError
from lab.executors.simulated import FittedCost
from lab.harness import Claim, writing
from lab.options import Options
from lab.record import Record
from lab.run import Run, carry_out, requests_of
from lab.shapes import shape

SHARES = ("stored", "reserved", "excess", "rounding", "free")
RATES = ("output_tokens_per_s", "normalised_s", "ttft_s", "tpot_s")
POINTS = 1.0
MOVES = "h100-80gb"  # the machine whose prices Moves are charged at: the fit leaves steps with Moves out
SHAPES = dict.fromkeys(("smollm2", "smollm2-135m-instruct", "random"), "smollm2-135m")


def runs(options: Options) -> list[Run]:
    changes = {"executor": "torch", **options.changes}
    if changes["executor"] != "torch":
        raise InputError(f"executor {changes['executor']!r}: this experiment checks the virtual clock against torch")
    found = fragmentation.runs(replace(options, changes=changes))
    for run in found:
        shape(shape_name(run))
        if any(request.output is None for request in requests_of(run)):
            rule = "both clocks need to know how long answers are"
            raise InputError(f"workload {run.workload!r}: {rule}; give output_tokens, or take prompts or sharegpt")
    return found


def row(run: Run, record: Record) -> dict[str, Any]:
    assert record.path is not None
    fit = FittedCost.fit(measured_steps(record))
    pace = write_pace(fit, record.path.parents[1] / "clock", record)
    twin = carry_out(twin_of(run, record, pace), None).record()
    shares = {"real": _shares(run, record), "virtual": _shares(run, twin)}
    return {
        "allocator": run.allocator,
        "scheduler": run.scheduler,
        "seed": run.seed,
        "fit_error": 100 * fit.error,
        **{f"{name}_{clock}": value for clock, values in shares.items() for name, value in values.items()},
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    mean = rows.groupby(["allocator", "scheduler"], sort=False).mean(numeric_only=True)
    memory = {(s, c): mean[f"{s}_{c}"] for s in SHARES for c in ("real", "virtual")}
    rates = {(s, c): mean[f"{s}_{c}"] for s in RATES for c in ("real", "virtual")}
    return {
        "per cent of the pool, on the real clock and on the virtual one": pd.DataFrame(memory).round(2),
        "speed, on the real clock and on the virtual one (mean over requests)": pd.DataFrame(rates).round(3),
        "error of the fitted step times, per cent of their sum": mean[["fit_error"]].round(1),
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    return plot.agreement(rows, header, SHARES, POINTS)


def claims(rows: pd.DataFrame) -> list[Claim]:
    off = [(r[f"{s}_virtual"] - r[f"{s}_real"], s, r["allocator"]) for _, r in rows.iterrows() for s in SHARES]
    worst, share, allocator = max(off, key=lambda one: abs(one[0]))
    text = f"every share of the pool within {POINTS:g} point of the real clock's"
    return [Claim(text, abs(worst) <= POINTS, f"worst is {share} of {allocator}, {worst:+.2f}")]


def measured_steps(record: Record) -> list[tuple[float, ...]]:
    """Rows (tokens, positions read, sequences, seconds) of the steps that only computed: no Move, nothing compiled.

    Padding counts as it is computed: dead tokens, dead positions, and a row for each that has ended in its batch. What
    passes between two steps is the host's work and part of the second one, unless nobody was in memory meanwhile.
    """
    steps, samples = record.steps, record.samples
    held = samples.groupby("step")[["computed", "ended"]].sum().reindex(steps["step"], fill_value=0).to_numpy()
    tokens = steps["tokens"] + steps["dead_tokens"]
    rows = steps["seqs"] + held[:, 1] * (steps["dead_tokens"] > 0)
    seconds = steps["end_s"] - steps["start_s"] + _host_s(record)
    table = np.stack([tokens, held[:, 0] + steps["dead_positions"], rows, seconds], axis=1).astype(float)
    moved = steps[["copied", "swapped_out", "swapped_in"]].sum(axis=1) > 0
    return [tuple(row) for row in table[(~moved & ~steps["compiled"] & (tokens > 0)).to_numpy()]]


def write_pace(fit: FittedCost, folder: Path, measured: Record) -> Path:
    """The fit as a file that `--hardware` takes, named after what is in it."""
    known = {"hardware": MOVES, "measured_on": measured.header["hardware"], "fit": asdict(fit)}
    text = json.dumps(known, indent=1) + "\n"
    path = folder / f"step-times-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def twin_of(run: Run, measured: Record, pace: Path) -> Run:
    """The same run on a virtual clock that keeps this pace, with the pool that the real device had."""
    pool = str(measured.header["pool"]["tokens"])
    return replace(run, executor="simulated", model=shape_name(run), hardware=str(pace), pool=pool)


def shape_name(run: Run) -> str:
    return SHAPES.get(run.model.lower(), run.model.removeprefix("random:"))


def _host_s(record: Record) -> np.ndarray:
    """Seconds between each step and the one before it, 0 where no sequence stayed in memory: [steps]."""
    steps, tenures = record.steps, record.tenures
    entered = np.bincount(tenures["from_step"], minlength=len(steps) + 1)
    left = np.bincount(tenures["to_step"], minlength=len(steps) + 1)
    staying = np.cumsum(entered)[:-2] - np.cumsum(left)[1:-1]  # across the gap behind each step but the last
    gap_s = steps["start_s"].to_numpy()[1:] - steps["end_s"].to_numpy()[:-1]
    return np.r_[0.0, np.where(staying > 0, gap_s, 0.0)]


def _shares(run: Run, record: Record) -> dict[str, float]:
    window_s = fragmentation.window(run, record)
    share = 100 * metrics.shares(record, window_s)
    summary = latency.latency_summary(record)["mean"]
    tokens_per_s = latency.throughput(record, window_s).output_tokens_per_s
    return {**{s: share[s] for s in SHARES}, "output_tokens_per_s": tokens_per_s, **{s: summary[s] for s in RATES[1:]}}
