"""Why blocks of 16 tokens? Latency and waste for blocks of 1 to 256, on ShareGPT's and Alpaca's lengths.

Kwon et al., SOSP'23, figure 18 (b): at a fixed rate ShareGPT is served best with blocks of 16 to 128 tokens, Alpaca
with 16 to 32, and much worse with larger ones, in which its short sequences fill only a corner; 16 is the default.
Small blocks cost the kernel parallelism and reads, large ones cost memory. Set-up there: OPT-13B, A100 40 GB, Alpaca at
30.1 requests/s for 600 s; ShareGPT's rate is not stated, and we take that of figure 19 (b), 2.01. The pool stays 15,728
tokens, rounded down to whole blocks: 16 tokens are lost to blocks of 32, 112 to blocks of 128 and 256.

**The virtual clock shows the right side of this U only.** Its cost model has no term for what small blocks cost a
kernel or a transfer, so that the smallest block always looks best, and no claim about the left side is judged on it.
On a real device (`--device cuda`, `--device cpu`) both sides are measured; `indirection` times the kernel alone. There
the first run pays for what is set up once, and each size on a GPU for compiling its kernels, which is stated.

Two saturating rates are ours. ShareGPT at 4 requests/s is the setting of figure 2, for which a replay of the authors'
own trace gives the share of token states by block size: the numbers beside ours. Alpaca at 60 is twice the paper's
rate: the virtual clock has no cost per sequence either, so that at 30 it batches 57 requests where the paper's engine,
near its limit, had 132 (figure 13 b).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.fragmentation import window
from lab import latency, metrics, plot
from lab.harness import Claim
from lab.options import Options
from lab.plot.style import GREY, style
from lab.record import Record
from lab.run import Run
from lab.systems import label

BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens
QUICK_BLOCKS = (1, 16, 64, 256)
PAPER_BLOCK = 16
BEST = {"sharegpt": (16, 128), "alpaca": (16, 32)}  # figure 18 (b), as its text says
REPLAY_LOAD = "sharegpt, 4 requests/s"
REPLAY = {1: 97.8, 8: 97.1, 16: 96.2, 32: 94.5, 64: 91.4, 128: 85.6, 256: 75.1}  # per cent of the pool, token states
POINTS = 2.0  # tolerance of token states
NEAR = 1.10  # times the lowest latency: as good as the best
MUCH = 1.5  # times the latency of 16: "much worse"
ABOUT = 1.25  # times the latency of 16: read off a figure, the same
ROUNDING = Line2D([], [], color=GREY, linestyle=":", label="rounding: the rest of the last block of each")
REPLAYED = Line2D([], [], color=GREY, marker="x", markersize=8, linestyle="", label="replay of the authors' trace")
READABLE_S = 0.5  # s per token: what can be told apart on an axis up to 17.5, as the figure has


@dataclass(frozen=True)
class Load:
    """Fields of a Run: what arrives, and when."""

    workload: str
    rate: float | None
    duration_s: float | None
    count: int | None = None
    arrivals: str = "poisson"


PRESSED = (Load("sharegpt", 4.0, 900.0), Load("alpaca", 60.0, 300.0))
VIRTUAL_LOADS = (Load("sharegpt", 2.01, 600.0), PRESSED[0], Load("alpaca", 30.1, 600.0), PRESSED[1])
QUICK_LOADS = (Load("sharegpt", 4.0, 60.0), Load("alpaca", 60.0, 10.0))
GPU_LOADS = (Load("sharegpt", None, None, 256, "all"), Load("alpaca", None, None, 1024, "all"))
CPU_LOADS = (Load("sharegpt", None, None, 24, "all"), Load("alpaca", None, None, 32, "all"))

VIRTUAL = Run(drain=True)
GPU = Run(executor="torch", device="cuda", model="random:opt-13b", pool="15728", drain=True)
CPU = Run(executor="torch", model="smollm2", dtype="float32", pool="1200", length=256, drain=True)


def runs(options: Options) -> list[Run]:
    base = options.where(VIRTUAL, GPU, CPU)
    sizes = sizes_of(options, QUICK_BLOCKS if options.quick else BLOCKS)
    if base.simulated:
        known: tuple[Load, ...] = QUICK_LOADS if options.quick else VIRTUAL_LOADS
    else:
        known = GPU_LOADS if base.device != "cpu" else CPU_LOADS
        known = tuple(replace(load, count=4) for load in known) if options.quick else known
    seeds = options.seeds or ([0, 1, 2] if base.simulated and not options.quick else [0])
    points = [
        replace(base, block=block, seed=seed, **vars(load))
        for load in loads_of(options, known)
        for block in sizes
        for seed in seeds
    ]
    return distinct(run for point in points for run in options.variants(point, ["vllm"]))


def sizes_of(options: Options, known: Iterable[int]) -> list[int]:
    """The block sizes that are compared; --block-size asks for one of them, or another, alone."""
    return [options.changes["block"]] if "block" in options.changes else list(known)


def loads_of(options: Options, known: tuple[Load, ...]) -> list[Load]:
    """The experiment's loads of the workload that is asked for, or of all; a stranger comes at the first one's rate."""
    name = options.changes.get("workload")
    return [load for load in known if name in (None, load.workload)] or [known[0]]


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Without those that an option made alike: a row must not count twice because two loads became one."""
    found: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        found.setdefault((label(run), load_name(run), run.preemption, run.block, run.seed), run)
    return list(found.values())


def load_name(run: Run) -> str:
    """What arrives, in words: the same for the runs of one panel."""
    if run.arrivals == "all":
        return f"{run.workload}, {run.count or 'all'} at once"
    return f"{run.workload}, {run.rate:g} requests/s" if run.rate else f"{run.workload}, at its own times"


def row(run: Run, record: Record) -> dict[str, Any]:
    window_s = window(run, record)
    pool = 100 * metrics.shares(record, window_s)
    batch = metrics.batch_size(record, window_s)
    pressure = metrics.pressure(record)
    capacity = record.header["capacity"]
    live = record.samples[~record.samples["ended"]]
    return {
        "system": label(run),
        "allocator": run.allocator,
        "seed": run.seed,
        "load": load_name(run),
        "workload": run.workload,
        "block": run.block,
        "simulated": run.simulated,
        "kernels": not run.simulated and run.device != "cpu",
        "paper_model": run.model.endswith("opt-13b"),
        "capacity": capacity,
        "normalised_s": latency.latency_summary(record).loc["normalised_s", "mean"],
        "output_tokens_per_s": latency.throughput(record).output_tokens_per_s,
        "stored": pool["stored"],
        "rounding": pool["rounding"],
        "free": pool["free"] + pool["cached"],
        "rounding_tokens": pool["rounding"] / 100 * capacity / max(batch.sequences, 1),  # per running sequence
        "most_rounding": int((live["held"] - live["asked"]).max()) if len(live) else 0,  # of any, at any time
        "batch": batch.sequences,
        "preemptions": pressure.preemptions,
        "recomputed": pressure.recomputed,
        "compiling_s": metrics.compiling_s(record),  # part of the latencies on a GPU
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    note = "; to a virtual clock small blocks cost nothing, so it shows the large ones' side alone" * _virtual(rows)
    tables = {f"which sizes serve best{note}": _best(rows)}
    if REPLAY_LOAD in set(rows["load"]):
        title = f"token states, per cent of the pool: a replay of the authors' trace beside ours ({REPLAY_LOAD})"
        tables[title] = _states(rows)
    return {**tables, "all that was seen": _all(rows)}


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    side = ": the virtual clock shows the cost of large blocks only" if _virtual(rows) else ""
    loads = list(dict.fromkeys(rows["load"]))
    replayed = [REPLAYED] if REPLAY_LOAD in loads else []
    drawn = plot.lines(
        rows,
        {**header, "workload": " and ".join(dict.fromkeys(rows["workload"]))},
        f"Latency and token states over the block size{side}",
        x="block",
        y={"normalised_s": "latency (s per output token)", "stored": "token states, rounding (% of the pool)"},
        panels="load",
        xlabel="tokens per block",
        log="x",
        also=[ROUNDING, *replayed],
    )
    for load, above, below in zip(loads, drawn.axes, drawn.axes[len(loads) :], strict=False):
        _annotate(above, below, load, rows[rows["load"] == load])
    return drawn


def claims(rows: pd.DataFrame) -> list[Claim]:
    paged = rows[rows["allocator"] == "paged"]
    found = [_bounded(paged), _replayed(paged)]
    for load, own in paged.groupby("load", sort=False):
        latency_s = own.groupby("block")["normalised_s"].mean()
        judged = own["paper_model"].all() and PAPER_BLOCK in latency_s.index
        found += [claim._replace(holds=claim.holds if judged else None) for claim in _large(str(load), latency_s)]
        found.append(_small(str(load), latency_s, bool(judged and own["kernels"].all())))
    return found


def _bounded(rows: pd.DataFrame) -> Claim:
    text = "no sequence ever holds a block that it did not ask for: waste stays below one block each (section 4.3)"
    most = rows.groupby("block")["most_rounding"].max()
    seen = "at most " + ", ".join(f"{tokens} of {block}" for block, tokens in most.items())
    return Claim(text, bool((most < most.index).all()) if len(most) else None, seen)


def _replayed(rows: pd.DataFrame) -> Claim:
    """The paper prints no such numbers; the replay has the authors' trace and rules."""
    text = f"token states within {POINTS:g} points of the replay's at every block size ({REPLAY_LOAD})"
    own = rows[(rows["load"] == REPLAY_LOAD) & rows["paper_model"]]
    off = (own.groupby("block")["stored"].mean() - pd.Series(REPLAY)).dropna()
    if off.empty:
        return Claim(text, None, "this load was not run")
    worst = off.abs().idxmax()
    return Claim(text, bool(off.abs().max() <= POINTS), f"worst at {worst}: {off[worst]:+.1f}, of {len(off)} sizes")


def _large(load: str, latency_s: pd.Series) -> list[Claim]:
    """The right side of the U: what memory lost to large blocks costs."""
    at = latency_s.get(PAPER_BLOCK, float("nan"))
    if load.startswith("alpaca"):
        big = latency_s.get(256, float("nan"))
        much = f"{load}: blocks of 256 serve much worse than 16 (figure 18b; by {MUCH - 1:.0%} or more)"
        low, high = BEST["alpaca"]
        best, larger = latency_s.loc[low:high].min(), latency_s.loc[high + 1 :].min()
        better = f"{load}: no larger block serves better than {low} to {high} (figure 18b)"
        seen = f"{best:.3g} s per token, larger ones {larger:.3g} or more"
        return [
            Claim(much, _judge(big >= MUCH * at, big, at), f"{big:.3g} against {at:.3g} s per token"),
            Claim(better, _judge(best <= larger, best, larger), seen),
        ]
    if load.startswith("sharegpt"):
        big = latency_s.get(128, float("nan"))
        text = f"{load}: blocks of 128 serve about as well as 16 (figure 18b; to {READABLE_S} s or {ABOUT - 1:.0%})"
        near = big - at <= max(READABLE_S, (ABOUT - 1) * at)
        return [Claim(text, _judge(near, big, at), f"{big:.3g} against {at:.3g} s per token")]
    return []


def _small(load: str, latency_s: pd.Series, judged: bool) -> Claim:
    """The left side: only kernels on a GPU can tell."""
    one, at = latency_s.get(1, float("nan")), latency_s.get(PAPER_BLOCK, float("nan"))
    text = f"{load}: blocks of 1 serve worse than 16 (figure 18b; by {NEAR - 1:.0%} or more; judged on a GPU only)"
    return Claim(text, _judge(one >= NEAR * at, one, at) if judged else None, f"{one:.3g} against {at:.3g} s per token")


def _judge(holds: bool, *values: float) -> bool | None:
    return bool(holds) if pd.Series(values).notna().all() else None


def _virtual(rows: pd.DataFrame) -> bool:
    return bool(rows["simulated"].any())


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    mean = rows.groupby(["load", "system", "block"], sort=False)["normalised_s"].mean()
    found = {}
    for (load, system), own in mean.groupby(level=["load", "system"], sort=False):
        latency_s = own.droplevel(["load", "system"])
        near = latency_s.index[latency_s <= NEAR * latency_s.min()]
        low, high = BEST.get(str(load).partition(",")[0], (None, None))
        found[load, system] = {
            "paper: best": f"{low} to {high}" if low else "",
            f"ours: within {NEAR - 1:.0%} of the best": f"{near.min()} to {near.max()}",
            **{f"s/token, {size}": latency_s.get(size, float("nan")) for size in (PAPER_BLOCK, 64, 128, 256)},
        }
    return pd.DataFrame.from_dict(found, orient="index").rename_axis(["load", "system"]).round(3)


def _states(rows: pd.DataFrame) -> pd.DataFrame:
    own = rows[rows["load"] == REPLAY_LOAD].groupby(["system", "block"], sort=False)["stored"].agg(["mean", "std"])
    replay = pd.Series(own.index.get_level_values("block").map(REPLAY), own.index)
    columns = {"replay": replay, "ours": own["mean"], "deviation": own["mean"] - replay, "over seeds": own["std"]}
    return pd.DataFrame(columns).round(1)


def _all(rows: pd.DataFrame) -> pd.DataFrame:
    grouped = rows.groupby(["load", "system", "block"], sort=False)
    mean, spread = grouped.mean(numeric_only=True), grouped["normalised_s"].std()
    columns = {
        "pool tokens": mean["capacity"].astype(int),
        "s per token": mean["normalised_s"].round(3),
        "+-": spread.round(3),
        "output tok/s": mean["output_tokens_per_s"].round(0),
        "token states %": mean["stored"].round(1),
        "rounding %": mean["rounding"].round(1),
        "... tokens each": mean["rounding_tokens"].round(1),
        "free %": mean["free"].round(1),
        "running": mean["batch"].round(1),
        "preemptions": mean["preemptions"].round(0),
        "recomputed": mean["recomputed"].round(0),
    }
    if rows["kernels"].any():
        columns["compiling s"] = mean["compiling_s"].round(1)
    return pd.DataFrame(columns)


def _annotate(above: Axes, below: Axes, load: str, rows: pd.DataFrame) -> None:
    """The paper's best sizes behind the latencies; rounding and the replay's points beside the token states."""
    above.set_ylim(0, 1.2 * above.dataLim.y1)  # room for the panel's name
    below.set_ylim(0, 105)
    low, high = BEST.get(load.partition(",")[0], (None, None))
    if low and high:
        above.axvspan(low, high, color=GREY, alpha=0.15, linewidth=0, zorder=0)
        place, where = ((low * high) ** 0.5, 0.86), above.get_xaxis_transform()
        above.annotate("best in\nthe paper", place, xycoords=where, ha="center", va="top", fontsize=7.5)
    for system, own in rows.groupby("system", sort=False):
        lost = own.groupby("block")["rounding"].mean()
        below.plot(lost.index, lost, linestyle=":", color=style(str(system))["color"], linewidth=1.4)
    if load == REPLAY_LOAD:
        below.plot(list(REPLAY), list(REPLAY.values()), "x", color=GREY, markersize=8)
