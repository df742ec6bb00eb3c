"""Recompute or swap? What it costs to take memory back from a request, per block size, by itself and end to end.

Kwon et al., SOSP'23, figure 19. (a) 256 tokens of OPT-13B's K and V: recomputing them takes about 20 to 30 ms at any
block size; swapping them out and in about 135 ms with blocks of 1, down to about as long as recomputing with large ones
(values read off the figure). (b) ShareGPT at 2.01 requests/s: with blocks of 16 to 64 the two serve equally well. The
text has recomputing never take more than "20 % of swapping's latency"; it holds only as never more than 20 % longer.

(a) here: the executor performs a plan of moves, then the moves back, then one with a prompt of 256 tokens, median after
a warm-up. On a GPU the blocks lie scattered, are gathered there, and cross to pinned host memory in runs of up to 16
blocks and all layers, K and V apart. The paper's engine issued a transfer for each block of each layer: "swap, block by
block" does so too, from Python, whose calls are part of the time. GB/s are of one way; the A100 of the paper had PCIe
gen4 (32 GB/s), an H100 has gen5. On the virtual clock (a) is a table of its prices, no test of anything: its 2.9 us per
transfer were chosen so that blocks of 1 take the figure's 135 ms, and its 140 TFLOP/s price a prompt of 256 tokens at
54 ms, where the figure's 20 to 30 would be 70 to 100 % of an A100's peak.

(b) here: the same requests under both, at the paper's rate and above it, on the virtual clock or on a real device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.blocksize import CPU, GPU, VIRTUAL, Load, distinct, load_name, loads_of, sizes_of
from lab import latency, metrics
from lab.allocators import moves
from lab.core import Group, Plan, Request, SamplingParams
from lab.harness import Claim
from lab.measured import Once, Row
from lab.options import Options
from lab.plot.style import FONT, GREY, entitle, seeds_of, style
from lab.record import Record, describe
from lab.run import Run, executor_of, real
from lab.schedulers import PREEMPTION
from lab.shapes import shape
from lab.systems import label

BLOCKS = (1, 4, 8, 16, 32, 64, 128, 256)  # tokens
REAL_BLOCKS = (1, 16, 32, 64, 256)  # end to end on a real device, where each takes minutes
QUICK_BLOCKS = (1, 16, 64)
TOKENS = 256  # that are swapped or recomputed in (a)
WARM, TIMED = 3, 10  # as the authors' script
MICRO, SERVED = "256 tokens", "served"
ONE_BY_ONE = "swap, block by block"

PAPER_RECOMPUTE_MS = (20, 30)  # read off figure 19a
PAPER_SWAP_MS = 135  # with blocks of 1
PAPER = {("swap", 1): "135", ("swap", 256): "as recompute"} | {("recompute", block): "20 to 30" for block in BLOCKS}
COMPARABLE = (16, 32, 64)  # tokens per block, for which the paper finds the two comparable
ABOUT = 0.25  # of the other's latency: comparable, on a figure
SLOWER = 1.2  # times swapping's duration, at most: recomputing
FLAT = 1.25  # times the shortest, at most: recomputing at any block size

VIRTUAL_LOADS = (Load("sharegpt", 2.01, 600.0), Load("sharegpt", 2.5, 600.0), Load("sharegpt", 4.0, 600.0))
QUICK_LOADS = (Load("sharegpt", 4.0, 40.0),)
GPU_LOADS = (Load("sharegpt", None, None, 256, "all"),)
CPU_LOADS = (Load("sharegpt", None, None, 24, "all"),)


def runs(options: Options) -> list[Run]:
    base = options.where(VIRTUAL, GPU, CPU)
    if base.simulated:
        known: tuple[Load, ...] = QUICK_LOADS if options.quick else VIRTUAL_LOADS
    else:
        known = GPU_LOADS if base.device != "cpu" else CPU_LOADS
        known = tuple(replace(load, count=8) for load in known) if options.quick else known
    points = [
        replace(base, block=block, seed=seed, preemption=preemption, **vars(load))
        for load in loads_of(options, known)
        for block in sizes_of(options, QUICK_BLOCKS if options.quick else BLOCKS if base.simulated else REAL_BLOCKS)
        for preemption in PREEMPTION
        for seed in options.seeds or ([0, 1, 2] if base.simulated and not options.quick else [0])
    ]
    return distinct(run for point in points for run in options.variants(point, ["vllm"]))


def row(run: Run, record: Record) -> dict[str, Any]:
    pressure = metrics.pressure(record)
    return {
        "part": SERVED,
        "system": label(run),
        "how": run.preemption,
        "seed": run.seed,
        "load": load_name(run),
        "block": run.block,
        "simulated": run.simulated,
        "model": run.model,
        "normalised_s": latency.latency_summary(record).loc["normalised_s", "mean"],
        "output_tokens_per_s": latency.throughput(record).output_tokens_per_s,
        "preemptions": pressure.preemptions,
        "recomputed": pressure.recomputed,
        "swapped": pressure.swapped_out + pressure.swapped_in,
    }


def measure(options: Options, places: Mapping[Run, Path], once: Once) -> tuple[list[Row], dict[str, Any]]:
    """(a): a row per block size, seed and way, in milliseconds. A virtual clock's prices take no time to find."""
    base = options.apply(options.where(VIRTUAL, GPU, CPU))
    warm, timed = (1, 2) if options.quick else (WARM, TIMED)
    where = base.hardware if base.simulated else real().device_name(base.device)
    rows: list[Row] = []
    for block in sizes_of(options, QUICK_BLOCKS if options.quick else BLOCKS):
        run = replace(base, block=block)
        executor = cache(partial(executor_of, run, 2 * max(TOKENS, block)))
        for seed in options.seeds or ([0] if options.quick else [0, 1, 2]):
            own = {"part": MICRO, "block": block, "seed": seed, "simulated": run.simulated, "model": run.model}
            point = own | {"where": where, "dtype": run.dtype, "warm": warm, "timed": timed}
            work = partial(_measured, own, executor, run, warm, timed)
            rows += work() if run.simulated else once(point, work)
    gpu = "" if base.simulated or base.device == "cpu" else where
    header = describe(model=base.model, workload=MICRO, seed=0, simulated=base.simulated, hardware=where, gpu=gpu)
    return rows, header


def _measured(own: Row, executor: Callable[[], Any], run: Run, warm: int, timed: int) -> list[Row]:
    return [own | {"system": how, "how": how, **ms} for how, ms in _times(executor(), run, own["seed"], warm, timed)]


def _times(executor: Any, run: Run, seed: int, warm: int, timed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Median milliseconds on the executor's own clock, and GB/s each way."""
    count = -(-TOKENS // run.block)
    table = Random(seed).sample(range(2 * count), count)  # scattered, as a table is after a while
    s = Group(Request(0, 0.0, range(TOKENS), 1, SamplingParams(max_tokens=1))).live[0]
    out = Plan(moves=list(moves("out", table, range(count), TOKENS, run.block)))
    back = Plan(moves=list(moves("in", range(count), table, TOKENS, run.block)))

    def carry(plan: Plan) -> float:
        start_s = executor.now
        executor.launch(plan, {s: table})
        executor.collect()
        _arrive(executor)
        return 1e3 * (executor.now - start_s)

    rounds = [[carry(plan) for plan in (out, back, Plan(work={s: TOKENS}))] for _ in range(warm + timed)][warm:]
    out_ms, in_ms, compute_ms = map(statistics.median, zip(*rounds, strict=True))
    per_token = (
        shape(run.model).kv_bytes_per_token()
        if run.simulated
        else executor.cache.nbytes / (executor.cache.num_blocks * run.block)
    )
    yield "recompute", {"ms": compute_ms}
    yield "swap", _swap(out_ms, in_ms, TOKENS * per_token)
    if not run.simulated:
        rounds = [_one_by_one(executor, table) for _ in range(warm + timed)][warm:]
        out_ms, in_ms = map(statistics.median, zip(*rounds, strict=True))
        yield ONE_BY_ONE, _swap(out_ms, in_ms, TOKENS * per_token)


def _swap(out_ms: float, in_ms: float, size: float) -> dict[str, float]:
    rates = {"out_gb_per_s": size / out_ms / 1e6, "in_gb_per_s": size / in_ms / 1e6}
    return {"ms": out_ms + in_ms, "out_ms": out_ms, "in_ms": in_ms, **rates}


def _arrive(executor: Any) -> None:
    """Until all that was queued is done: a number is read back from the pool, behind everything else."""
    if hasattr(executor, "cache"):
        executor.cache.k.flatten()[0].item()


def _one_by_one(executor: Any, table: list[int]) -> list[float]:
    """Milliseconds out and in, with a transfer for K and for V of each block in each layer."""
    cache, pinned = executor.cache, executor.device.type == "cuda"
    pairs = []
    for device in (cache.k, cache.v):  # [layers, num_blocks, block, Hk, D]
        host = device.new_empty((len(device), len(table), *device.shape[2:]), device="cpu", pin_memory=pinned)
        pairs += [(layer[b], there[i]) for layer, there in zip(device, host, strict=True) for i, b in enumerate(table)]
    took_ms = []
    for way in (0, 1):
        _arrive(executor)
        start_s = executor.now
        for pair in pairs:
            pair[1 - way].copy_(pair[way], non_blocking=True)
        _arrive(executor)
        took_ms.append(1e3 * (executor.now - start_s))
    return took_ms


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    micro, served = rows[rows["part"] == MICRO], rows[rows["part"] == SERVED]
    by = micro["simulated"].all() if len(micro) else False
    kind = "PRICES of the virtual clock, in part taken from this figure" if by else "measured"
    return {
        f"(a) {TOKENS} tokens of K and V, ms: the paper's figure beside ours ({kind})": _micro(micro),
        "(b) end to end: mean s per output token, swapping as a share of recomputing": _compared(served),
        "all that was seen end to end": _all(served),
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    micro, served = rows[rows["part"] == MICRO], rows[rows["part"] == SERVED]
    panels = [(f"(a) {TOKENS} tokens of K and V", micro, "ms", "time (ms): swapped out and in,\nor recomputed")]
    unit = "latency (s per output token)"
    panels += [(f"(b) {load}", own, "normalised_s", unit) for load, own in served.groupby("load", sort=False)]
    with mpl.rc_context(FONT):
        high = -(-len(panels) // 2)
        drawn = Figure(figsize=(8.4, 1.0 + 3.2 * high), layout="constrained")
        for i, (title, own, column, unit) in enumerate(panels):
            axes = drawn.add_subplot(high, 2, i + 1)
            _panel(axes, own, column)
            axes.set_ylabel(unit)
            axes.annotate(title, (0.97, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=9)
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)
        what = "prices and times of a virtual clock" if rows["simulated"].any() else "measured"
        entitle(drawn, drawn.axes[0], f"Recompute or swap, {what}", header, seeds_of(rows["seed"]))
    return drawn


def _panel(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    for how, own in rows.groupby("how", sort=False):
        points = own.groupby("block")[column].agg(["mean", "std"])
        look: dict[str, Any] = {**style(str(how)), "markersize": 5, "linewidth": 1.4}
        axes.plot(points.index, points["mean"], label=str(how), **look)
        low, high = (points["mean"] + sign * points["std"].fillna(0) for sign in (-1, 1))
        axes.fill_between(points.index, low, high, color=look["color"], alpha=0.18, linewidth=0)
    if column == "ms":
        axes.fill_between([1, 256], *PAPER_RECOMPUTE_MS, color=GREY, alpha=0.25, linewidth=0, label="paper: recompute")
        axes.plot([1], [PAPER_SWAP_MS], "x", color=GREY, markersize=8, label="paper: swap, blocks of 1")
    else:
        axes.axvspan(COMPARABLE[0], COMPARABLE[-1], color=GREY, alpha=0.15, linewidth=0)
        middle, at = (COMPARABLE[0] * COMPARABLE[-1]) ** 0.5, axes.get_xaxis_transform()
        axes.annotate("paper:\ncomparable", (middle, 0.03), xycoords=at, ha="center", fontsize=7.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens per block")
    axes.set_ylim(0, 1.15 * axes.dataLim.y1)  # room for the panel's name
    axes.spines[["top", "right"]].set_visible(False)


def claims(rows: pd.DataFrame) -> list[Claim]:
    micro, served = rows[rows["part"] == MICRO], rows[rows["part"] == SERVED]
    found = _prices(micro) if len(micro) else []
    if served.empty:
        return found
    return found + [claim for load, own in served.groupby("load", sort=False) for claim in _serving(str(load), own)]


def _serving(load: str, rows: pd.DataFrame) -> list[Claim]:
    """Figure 19 (b). Judged where the model is the paper's and something was preempted: else there is no choice."""
    mean = rows.groupby(["block", "how"])[["normalised_s", "preemptions"]].mean().unstack("how")
    if not set(PREEMPTION) <= set(rows["how"]):
        return []
    pressed = mean["preemptions"].min(axis=1) > 0
    ratio = (mean["normalised_s"]["swap"] / mean["normalised_s"]["recompute"])[pressed].dropna()
    judged = bool(rows["model"].str.endswith("opt-13b").all())
    near, one = ratio[ratio.index.isin(COMPARABLE)], ratio[ratio.index == 1]
    alike = f"{load}: with blocks of 16 to 64 swapping serves as well as recomputing (figure 19b; to {ABOUT:.0%})"
    worse = f"{load}: with blocks of 1 swapping serves worse (figure 19b)"
    found = []
    for text, own, holds in ((alike, near, (near - 1).abs().max() <= ABOUT), (worse, one, one.min() > 1)):
        seen = ", ".join(f"{size}: {value:.2f}" for size, value in own.items())
        seen = f"swap / recompute {seen}" if seen else "nothing was preempted there, or not run"
        found.append(Claim(text, bool(holds) if judged and len(own) else None, seen))
    return found


def _prices(micro: pd.DataFrame) -> list[Claim]:
    """Figure 19 (a). Of a virtual clock's prices nothing is judged: they are what goes in."""
    ms = micro.groupby(["how", "block"])["ms"].mean().unstack("how")
    compute, swap = ms["recompute"], ms[ONE_BY_ONE if ONE_BY_ONE in ms else "swap"]
    judged = not micro["simulated"].any() and bool(micro["model"].str.endswith("opt-13b").all())
    way = " block by block" if ONE_BY_ONE in ms else ""
    worst = (compute / swap).max()
    spread, dear = compute.max() / compute.min(), swap.iloc[0] / compute.iloc[0]
    tested = [
        (
            "recomputing takes as long at any block size (figure 19a; to 25 %)",
            spread <= FLAT,
            f"longest / shortest {spread:.2f}",
        ),
        (
            f"swapping{way} takes far longer than recomputing in blocks of {swap.index[0]} (figure 19a: 4 to 7 times)",
            dear >= 2,
            f"{dear:.1f} times",
        ),
        (
            f"recomputing never takes more than 20 % longer than swapping{way} (section 7.3, as it must be read)",
            worst <= SLOWER,
            f"at most {worst:.2f} times",
        ),
    ]
    note = "" if judged else "; prices and other models are no test"
    return [Claim(text, bool(holds) if judged else None, seen + note) for text, holds, seen in tested]


def _micro(micro: pd.DataFrame) -> pd.DataFrame:
    grouped = micro.groupby(["how", "block"], sort=False)
    mean, spread = grouped.mean(numeric_only=True), grouped["ms"].std()
    theirs = micro["model"].str.endswith("opt-13b").all()
    columns = {"paper (about)": [PAPER.get(key, "") if theirs else "" for key in mean.index], "ms": mean["ms"].round(1)}
    more = {"+-": spread.round(2), "out ms": mean["out_ms"].round(1), "in ms": mean["in_ms"].round(1)}
    rates = {"out GB/s": mean["out_gb_per_s"].round(2), "in GB/s": mean["in_gb_per_s"].round(2)}
    return pd.DataFrame({**columns, **more, **rates}, mean.index)


def _compared(served: pd.DataFrame) -> pd.DataFrame:
    mean = served.groupby(["load", "block", "how"], sort=False)["normalised_s"].agg(["mean", "std"]).unstack("how")
    table = pd.DataFrame(
        {f"{how} {what}": mean[what, how] for how in PREEMPTION for what in ("mean", "std") if (what, how) in mean}
    )
    if {"recompute mean", "swap mean"} <= set(table):
        table["swap / recompute"] = table["swap mean"] / table["recompute mean"]
    table["paper"] = ["comparable" if block in COMPARABLE else "" for block in table.index.get_level_values("block")]
    return table.round(3)


def _all(served: pd.DataFrame) -> pd.DataFrame:
    columns = ["output_tokens_per_s", "preemptions", "recomputed", "swapped"]
    names = dict(zip(columns, ("output tok/s", "preemptions", "tokens recomputed", "tokens swapped"), strict=True))
    return served.groupby(["load", "how", "block"], sort=False)[columns].mean().round(0).rename(columns=names)
