"""What would each system do with my own trace?

`--workload PATH` names it: CSV, CSV.GZ or Parquet with `prompt_tokens` and `output_tokens`, and `arrival_s` where they
are known (`lab.workloads.traces`: ids of prompt blocks are read, too). Requests come at the trace's own times, or with
`--rate` at those times stretched to that many per second; a trace without times comes at 4 requests/s, as Poisson has
it, with three seeds. Rows that reach `--length` are left out and counted. All that arrives is served, so that nothing
is lost unseen. With no --workload, the 256 lengths of `opt13b-256` (like ShareGPT's) show what there is to see.

A trace is read row by row and a record written as it happens: the memory of a run grows with the queue, not with the
trace. (For its row of the tables the record is read whole: some 0.3 GB for each million tokens generated.)

No paper has these numbers, hence the claims are of bookkeeping: every request that arrived ended or was refused, all
systems served the same requests, and every token that was asked for was generated. Where a trace says which prompts
begin alike, paging with a prefix cache is compared, too. On the virtual clock answers have no text: a prompt that
quotes an earlier answer finds it in the cache only when a prompt quoted it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import latency, metrics, plot
from lab.harness import Claim
from lab.options import Options
from lab.plot.style import FONT, INK, entitle, seeds_of
from lab.record import Record
from lab.run import Run, requests_of
from lab.systems import label
from lab.workloads import alike, has_times

SYSTEMS = ("vllm", "orca-max", "orca-oracle", "orca-pow2")
CACHE = "paged-prefix"  # allocator, beside the systems where prompts begin alike
BUILT_IN = "opt13b-256"
BASE = Run(workload=BUILT_IN, rate=4.0, duration_s=None, drain=True)
GPU: dict[str, Any] = {"executor": "torch", "model": "random:opt-13b", "pool": "15728"}
LAPTOP: dict[str, Any] = {
    "executor": "torch",
    "model": "smollm2",
    "dtype": "float32",
    "pool": "2048",
    "length": 512,
    "count": 16,
}
QUICK = 64  # requests
SLICES = 100  # of the time, in the figure
LATENCIES = {  # column: what it is called, seconds
    "normalised": "per output\ntoken, mean\n(normalised)",
    "ttft_p50": "first token\np50",
    "ttft_p90": "first token\np90",
    "ttft_p99": "first token\np99",
    "tpot": "each further\ntoken, mean",
}


def runs(options: Options) -> list[Run]:
    base = options.apply(_base(options))
    if options.quick:  # a trace at its own times does not begin again when it is over
        most = len(requests_of(base)) if base.arrivals == "trace" else base.count or QUICK
        base = replace(base, count=min(QUICK, most))
    seeds = options.seeds or ([0] if options.quick or not base.simulated or base.arrivals == "trace" else [0, 1, 2])
    found = [run for seed in seeds for run in options.variants(replace(base, seed=seed), SYSTEMS)]
    found = [replace(run, count=base.count) for run in found]
    if options.allocators or options.schedulers or options.systems or not alike(base.workload):
        return found
    return [*found, *(replace(run, allocator=CACHE) for run in found if label(run) == SYSTEMS[0])]


def _base(options: Options) -> Run:
    """The machine, the trace, and its times where it has them."""
    base = options.where(BASE, replace(BASE, **GPU), replace(BASE, **LAPTOP))
    workload = options.changes.get("workload", BUILT_IN)
    if has_times(workload):
        return replace(base, workload=workload, arrivals="trace", rate=None)
    return replace(base, workload=workload)


def row(run: Run, record: Record) -> dict[str, Any]:
    pool = 100 * metrics.shares(record)
    seconds = latency.latency_summary(record)
    rate = latency.throughput(record)
    pressure = metrics.pressure(record)
    return {
        "system": label(run),
        "seed": run.seed,
        "simulated": run.simulated,
        "workload": run.workload,
        "digest": record.header["requests"]["digest"],
        "dropped": record.header["requests"]["dropped"],
        "cut": run.steps is not None or not run.drain,
        **_outcome(run, record),
        "seconds": float(record.steps["end_s"].max()),
        "requests_per_s": rate.requests_per_s,
        "output_tokens_per_s": rate.output_tokens_per_s,
        "normalised": seconds.loc["normalised_s", "mean"],
        "ttft_p50": seconds.loc["ttft_s", "p50"],
        "ttft_p90": seconds.loc["ttft_s", "p90"],
        "ttft_p99": seconds.loc["ttft_s", "p99"],
        "tpot": seconds.loc["tpot_s", "mean"],
        "batch": metrics.batch_size(record).sequences,
        **{name: pool[name] for name in metrics.CATEGORIES},
        "blocked": 100 * metrics.blocked(record).all,
        "preemptions": pressure.preemptions,
        "recomputed": pressure.recomputed,
        "queue": " ".join(f"{waiting:g}" for waiting in _queue(record)),
    }


def _outcome(run: Run, record: Record) -> dict[str, Any]:
    """What became of the requests; of prompts, the share that was found in memory; tokens due and generated."""
    events, requests = record.events, record.requests.drop_duplicates("request").set_index("request")
    kinds = dict(iter(events.groupby("kind")))
    nothing = events.iloc[:0]
    ended = kinds.get("ended", nothing).groupby("request").size()
    whole = ended.index[(ended == requests["n"].reindex(ended.index)).to_numpy()]
    refused = kinds.get("refused", nothing)["request"]
    served = requests.drop(index=refused)
    forced = bool(served["forced"].all()) and not run.beams
    admitted = kinds.get("admitted", nothing)
    prompts = requests["prompt_tokens"].reindex(admitted["request"]).sum()
    return {
        "arrived": len(requests),
        "completed": len(whole),
        "refused": len(refused),
        "due": int((served["output_tokens"] * served["n"]).sum()) if forced else None,
        "generated": len(record.tokens),
        "hit": 100 * float(admitted["tokens"].sum() / prompts) if prompts else 0.0,
    }


def _queue(record: Record) -> np.ndarray:
    """Requests waiting, means over the steps in each of equal slices of the time; [SLICES]."""
    steps = record.steps
    part = (steps["end_s"] / steps["end_s"].max() * SLICES).astype(int).clip(upper=SLICES - 1)
    return steps["waiting"].groupby(part).mean().reindex(range(SLICES)).ffill().fillna(0).round(2).to_numpy()


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    speed = {
        "requests_per_s": "requests/s",
        "output_tokens_per_s": "output tokens/s",
        "normalised": "s per output token",
        "ttft_p50": "TTFT p50 (s)",
        "ttft_p90": "p90",
        "ttft_p99": "p99",
        "tpot": "TPOT (s)",
        "batch": "requests running",
    }
    waste = {
        **dict(zip(metrics.CATEGORIES, metrics.CATEGORIES, strict=True)),
        "blocked": "% of steps: queue waits for room",
        "preemptions": "preemptions",
        "recomputed": "tokens computed again",
    }
    if rows["hit"].gt(0).any():
        waste["hit"] = "% of prompt tokens found in memory"
    fate = {
        "arrived": "arrived",
        "completed": "completed",
        "refused": "refused",
        "dropped": "left out: too long",
        "seconds": "s",
    }
    return {
        f"speed: {_what(rows)}": _spread(rows, speed),
        "memory: % of the pool, means over iterations": _spread(rows, waste),
        "what became of the requests": _spread(rows, fate),
    }


def _what(rows: pd.DataFrame) -> str:
    """The trace, and a word where none was named."""
    name = rows["workload"].iloc[0]
    return f"{name} (built in; name your own with --workload PATH)" if name == BUILT_IN else str(name)


def _spread(rows: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Means by system, with the standard deviation where there are several seeds."""
    groups = rows.groupby("system", sort=False)[list(names)]
    mean, deviation = groups.mean(), groups.std()

    def text(column: str) -> list[str]:
        pairs = zip(mean[column], deviation[column], strict=True)
        return [_number(m) + ("" if np.isnan(d) else f" ± {_number(d)}") for m, d in pairs]

    return pd.DataFrame({names[column]: text(column) for column in names}, index=mean.index)


def _number(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    """The queue over time, how long requests took, and where memory went."""
    systems = list(dict.fromkeys(rows["system"]))
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        queue, seconds, memory = figure.subplot_mosaic([["queue", "queue"], ["seconds", "memory"]]).values()
        for system in systems:
            own = rows[rows["system"] == system]
            waiting = np.array([[float(w) for w in text.split()] for text in own["queue"]])  # [seeds, SLICES]
            time_s = (np.arange(SLICES) + 0.5) / SLICES * own["seconds"].mean()
            mean, deviation = waiting.mean(axis=0), waiting.std(axis=0, ddof=1) if len(own) > 1 else 0.0
            color = plot.style(system)["color"]
            queue.plot(time_s, mean, label=system, color=color, linewidth=1.6)
            queue.fill_between(time_s, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
        queue.set_xlabel("time (s)")
        queue.set_ylabel("requests waiting")
        queue.set_ylim(bottom=0)
        _seconds(seconds, rows, systems)
        _memory(memory, rows, systems)
        for axes in (queue, seconds, memory):
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = queue.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=6, frameon=False, fontsize=8.5)
        entitle(figure, queue, "What each system does with the trace", header, seeds_of(rows["seed"]))
    return figure


def _seconds(axes: Axes, rows: pd.DataFrame, systems: list[str]) -> None:
    groups, width = rows.groupby("system"), 0.8 / len(systems)
    mean, deviation = (groups[list(LATENCIES)].agg(kind) for kind in ("mean", "std"))
    for k, system in enumerate(systems):
        at = np.arange(len(LATENCIES)) - 0.4 + width * (k + 0.5)
        axes.bar(at, mean.loc[system], 0.9 * width, color=plot.style(system)["color"])
        axes.errorbar(at, mean.loc[system], deviation.loc[system].fillna(0), color=INK, linewidth=0.9, linestyle="none")
    axes.set_xticks(range(len(LATENCIES)), list(LATENCIES.values()), fontsize=7.5)
    axes.set_yscale("log")
    axes.set_ylabel("latency (s)")


def _memory(axes: Axes, rows: pd.DataFrame, systems: list[str]) -> None:
    mean, left = rows.groupby("system")[metrics.CATEGORIES].mean().loc[systems[::-1]], np.zeros(len(systems))
    for name, (color, hatch, text) in plot.CATEGORIES.items():
        if mean[name].max() >= 0.05:
            axes.barh(mean.index, mean[name], 0.7, left, color=color, hatch=hatch, edgecolor="white", label=text)
            left = left + mean[name].to_numpy()
    axes.set_xlabel("share of the KV pool (%)")
    axes.set_xlim(0, 100)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=7.5)


def claims(rows: pd.DataFrame) -> list[Claim]:
    whole = not rows["cut"].any()
    lost = rows["arrived"] - rows["completed"] - rows["refused"]
    worst = rows.loc[lost.abs().idxmax()]
    seen = f"{rows['arrived'].sum()} arrived, {rows['completed'].sum()} ended, {rows['refused'].sum()} were refused"
    if lost.any():
        seen += f"; {worst['system']} has {lost.abs().max()} left over"
    same = bool((rows.groupby("seed")[["digest", "arrived"]].nunique() == 1).all(axis=None))
    found = [
        Claim("every request that arrived ended or was refused", bool((lost == 0).all()) if whole else None, seen),
        Claim("all systems served the same requests", same, f"digest {', '.join(dict.fromkeys(rows['digest']))}"),
    ]
    if rows["due"].notna().all():
        off = (rows["generated"] - rows["due"]).abs().max()
        text = f"{rows['generated'].sum()} tokens, {off:.0f} off at most"
        found.append(
            Claim("every token that was asked for was generated, once", bool(off == 0) if whole else None, text)
        )
    return found
