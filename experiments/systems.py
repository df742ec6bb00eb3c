"""What do the systems people use do differently?

Tables that compare serving systems mix what a system decides (who gets which memory, what is computed next) with how
fast its kernels and host code are. Here only the decisions differ: every system of lab/systems runs on the same engine,
model, pool and requests. Its file there says what is modelled, from which source, and what is left out;
papers/systems.md what one reads about these systems and what is true.

Two loads. Saturated: 256 requests of ShareGPT lengths come at once and all are served; throughput is output tokens over
the time until the last has ended ("queueing": until the queue is empty). Moderate: 0.8 requests/s for ten minutes, two
fifths of what vLLM sustains in Kwon et al., SOSP'23, figure 12 (a), and more than static batching can serve. OPT-13B,
A100 40 GB, the paper's pool of 15,728 tokens.

The workload forces how long an answer gets; a client does not know that, and says `max_tokens`. Systems that reserve
for it (TGI, TensorRT-LLM's default) would be oracles if it were the true length, so clients here ask for 1024 tokens
(--max-tokens), or for the true length where that is more. The last panel varies it.

Expected, each from the source that its claim names: static batching below continuous; Kwon et al.'s order of
FasterTransformer, Orca (Max, Pow2, Oracle) and vLLM; no preemption where all memory is assured at admission; more
throughput with TensorRT-LLM's MAX_UTILIZATION; TGI's the smaller the more clients ask for. Ours: slots are Orca (Max).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lab import latency, metrics
from lab.core import InputError
from lab.harness import Claim
from lab.options import Options
from lab.plot import CATEGORIES, style
from lab.plot.style import FONT, INK, entitle, seeds_of
from lab.record import Record
from lab.run import Run
from lab.systems import SYSTEMS, label

ASKS = 1024  # tokens: three times the mean answer
ASKED = (None, 256, 512, 2048)  # besides; None: the true length, as if clients knew it
VIRTUAL = Run(max_tokens=ASKS, drain=True)
GPU = replace(VIRTUAL, executor="torch", device="cuda", model="random:opt-13b", pool="15728")
_SMALL = replace(VIRTUAL, workload="uniform:prompt=8-64,output=8-64", pool="1200", length=256, max_tokens=96)
LAPTOP = replace(_SMALL, executor="torch", model="smollm2", dtype="float32")
AT_ONCE: dict[str, Any] = {"arrivals": "all", "rate": None, "duration_s": None, "count": 256}
MODERATE: dict[str, Any] = {"rate": 0.8, "duration_s": 600.0}
TIMED = ("arrivals", "burstiness", "rate", "duration_s")  # options that say nothing where all come at once
PAPER = ("fastertransformer", "orca-max", "orca-pow2", "orca-oracle", "vllm")  # figure 12 (a), from slow to fast
QUEUED = 0.3  # share of the steps in which requests queue; with less, nobody wants for memory
RESERVING = ("orca-max", "orca-pow2", "orca-oracle", "tgi", "tensorrt-llm", "llama.cpp")
SAME = 0.02  # of a throughput: as good as equal
SHOWN = (  # load, column, title, decimal places
    ("saturated", "tokens_per_s", "tok/s", 1),
    ("saturated", "spread", "+-", 1),
    ("saturated", "queued_tokens_per_s", "queueing", 1),
    ("saturated", "batch", "running", 1),
    ("saturated", "stored", "stored %", 1),
    ("saturated", "dead", "padding", 0),
    ("saturated", "preemptions", "preempt.", 0),
    ("saturated", "refused", "refused", 1),
    ("saturated", "compiling_s", "compiling s", 1),  # which the throughput suffered from
    ("moderate", "normalised_s", "s/token", 3),
    ("moderate", "spread", "+- ", 3),
    ("moderate", "ttft_p50_s", "TTFT p50", 2),
    ("moderate", "ttft_p90_s", "TTFT p90", 2),
    ("moderate", "preemptions", "preempt. ", 1),
)


def runs(options: Options) -> list[Run]:
    base = options.where(VIRTUAL, GPU, LAPTOP)
    options.apply(base)  # complains of a rate for what comes at once
    closed = replace(options, changes={key: value for key, value in options.changes.items() if key not in TIMED})
    loads = [(closed, replace(base, **AT_ONCE))]
    if options.changes.get("arrivals") != "all":
        loads.append((options, replace(base, **MODERATE)))
    found: list[Run] = []
    for seed in options.seeds or ([0] if options.quick else [0, 1, 2]):
        for given, load in loads:
            load = replace(load, seed=seed, **_few(load, options.quick))
            found += given.variants(load, SYSTEMS)
    _distinct(found)
    if options.quick or "max_tokens" in options.changes or not base.simulated:
        return found
    reserving = [run for run in found if run.arrivals == "all" and "max-tokens" in run.allocator]
    return found + [replace(run, max_tokens=asked) for asked in ASKED for run in reserving]


def row(run: Run, record: Record) -> dict[str, Any]:
    steps = record.steps
    queued = steps.loc[steps["waiting"] > 0, "end_s"]
    window = (0.0, float(queued.iloc[-1])) if len(queued) and run.arrivals == "all" else None
    pressure, waits = metrics.pressure(record), latency.latency_summary(record)
    return {
        "system": label(run),
        "seed": run.seed,
        "load": "saturated" if run.arrivals == "all" else "moderate",
        "max_tokens": run.max_tokens or 0,  # 0: as the workload says
        "outputs": run.beams or run.n,
        "tokens_per_s": latency.throughput(record).output_tokens_per_s,
        "queued_tokens_per_s": latency.throughput(record, window).output_tokens_per_s,
        "queued": len(queued) / max(1, len(steps)),
        "normalised_s": waits.loc["normalised_s", "mean"],
        "ttft_p50_s": waits.loc["ttft_s", "p50"],
        "ttft_p90_s": waits.loc["ttft_s", "p90"],
        "batch": metrics.batch_size(record, window).sequences,
        **(100 * metrics.shares(record, window)).to_dict(),
        "preemptions": pressure.preemptions,
        "recomputed": pressure.recomputed,
        "dead": pressure.dead,
        "compiling_s": metrics.compiling_s(record),
        "refused": int((record.events["kind"] == "refused").sum()),
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    main, asked = _main(rows), _asked(rows)
    loads = ", ".join(dict.fromkeys(main["load"]))
    found = {f"what each does: {loads} (means over seeds, +- their deviation)": _beside(main)}
    if len(asked):
        found["output tok/s when saturated, by what clients ask for (max_tokens)"] = asked.round(1)
    reached = _reached(main["system"].unique())
    if len(reached):
        found["what the systems themselves reached: another machine, model or host, so read the setting"] = reached
    return found


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    asked, saturated, moderate = _asked(rows), *(_load(_main(rows), load) for load in ("saturated", "moderate"))
    order = list(saturated.groupby("system")["tokens_per_s"].mean().sort_values().index)
    panels = 2 + bool(len(moderate)) + bool(len(asked))
    with mpl.rc_context(FONT):
        down = -(-panels // 2)
        figure = Figure(figsize=(8.8, 1.1 + (0.8 + 0.36 * len(order)) * down), layout="constrained")
        grid = list(figure.subplots(down, 2, squeeze=False).flat)
        for unused in grid[panels:]:
            unused.remove()
        row = grid[:panels]
        if len(asked):
            _clients(row.pop(), asked, saturated)
        _dots(row[0], saturated, order, "tokens_per_s", "output tokens/s, saturated")
        _memory(row[1], saturated, order)
        if len(moderate):
            _dots(row[2], moderate, order, "normalised_s", "s per output token, moderate load")
            row[2].set_xscale("log")
        for i, axes in enumerate(row):
            axes.set_yticks(range(len(order)), order if i % 2 == 0 else [""] * len(order))
            axes.set_ylim(-0.6, len(order) - 0.4)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        handles, labels = row[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=8.5)
        entitle(figure, row[0], "What systems do differently, on one engine", header, seeds_of(rows["seed"]))
    return figure


def claims(rows: pd.DataFrame) -> list[Claim]:
    mean = _load(_main(rows), "saturated").groupby("system", sort=False).mean(numeric_only=True)
    speed, asked = mean["tokens_per_s"], _asked(rows)
    judged = bool((mean["queued"] >= QUEUED).all())
    here = [name for name in PAPER if name in mean.index]
    orders = [(f"Kwon et al., figure 12 (a): when saturated {' < '.join(here)}", speed[here])]
    kinds = speed.groupby([_scheduler(name) for name in speed.index])
    if kinds.ngroups > 1:
        text = "Yu et al., section 6: the slowest continuous batching is faster than the fastest static batching"
        orders.append((text, pd.Series([kinds.max()["static"], kinds.min()["continuous"]])))
    if {"tensorrt-llm", "tensorrt-llm-utilisation"} <= set(mean.index):
        text = "NVIDIA's documentation: MAX_UTILIZATION has a higher throughput than GUARANTEED_NO_EVICT"
        orders.append((text, speed[["tensorrt-llm", "tensorrt-llm-utilisation"]]))
    if "tgi" in asked.index:
        text = "TGI's launcher reference: the more tokens clients may ask for, the less is batched"
        orders.append((text, asked.loc["tgi"].iloc[::-1]))
    found = [_ordered(text, values, judged) for text, values in orders if len(values) > 1]
    reserving = [name for name in RESERVING if name in mean.index]
    if reserving:
        most = float(mean.loc[reserving, "preemptions"].max())
        text = f"NVIDIA's documentation: who is assured of memory is never paused ({', '.join(reserving)})"
        found.append(Claim(text, most == 0 if mean["outputs"].max() == 1 else None, f"{most:.0f} preemptions"))
    if {"llama.cpp", "orca-max"} <= set(mean.index):
        apart = abs(speed["llama.cpp"] / speed["orca-max"] - 1)
        text = f"ours: a slot for every longest sequence is Orca (Max), throughput within {100 * SAME:.0f} %"
        found.append(Claim(text, bool(apart <= SAME) if judged else None, f"{100 * apart:.1f} %"))
    return found


def _ordered(text: str, values: pd.Series, judged: bool) -> Claim:
    holds = bool(values.diff().iloc[1:].gt(0).all()) if judged else None
    return Claim(text, holds, ", ".join(f"{value:.0f}" for value in values) + " output tok/s")


def _scheduler(name: str) -> str:
    """Static or continuous: the system's, or what stands behind an allocator's name."""
    scheduler = SYSTEMS[name].settings["scheduler"] if name in SYSTEMS else name.partition(" ")[2]
    return "static" if scheduler in ("static", "dynamic") else "continuous"


def _main(rows: pd.DataFrame) -> pd.DataFrame:
    """Without those in which clients ask for something else."""
    return rows[rows["max_tokens"] == rows["max_tokens"].iloc[0]]


def _load(rows: pd.DataFrame, load: str) -> pd.DataFrame:
    return rows[rows["load"] == load]


def _beside(main: pd.DataFrame) -> pd.DataFrame:
    table = {}
    for load, column, title, digits in SHOWN:
        of = {"saturated": "tokens_per_s", "moderate": "normalised_s"}[load]
        groups = _load(main, load).groupby("system", sort=False)
        values = groups[of].std() if column == "spread" else groups[column].mean()
        if column != "compiling_s" or values.any():
            table[title] = values.round(digits)
    return pd.DataFrame(table).loc[list(dict.fromkeys(main["system"]))].dropna(axis=1, how="all")


def _asked(rows: pd.DataFrame) -> pd.DataFrame:
    """Output tokens per second of systems that reserve for max_tokens, a column for each that was asked for."""
    saturated = _load(rows, "saturated")
    several = saturated.groupby("system")["max_tokens"].nunique()
    own = saturated[saturated["system"].isin(several[several > 1].index)]
    return own.pivot_table(index="system", columns="max_tokens", values="tokens_per_s", sort=True).rename(
        columns={0: "true length"}
    )


def _reached(names: Seq[str]) -> pd.DataFrame:
    lines: list[tuple[str, str]] = []
    for name in names:
        for reached in SYSTEMS[name].reached if name in SYSTEMS else ():
            wrapped = textwrap.wrap(str(reached), 110)
            lines += [(name, wrapped[0]), *(("", more) for more in wrapped[1:])]
    width = max((len(text) for _, text in lines), default=0)
    return pd.DataFrame({"": [text.ljust(width) for _, text in lines]}, index=[name for name, _ in lines])


def _dots(axes: Axes, rows: pd.DataFrame, order: Seq[str], column: str, title: str) -> None:
    seen = rows.groupby("system")[column].agg(["mean", "std"]).fillna({"std": 0.0})
    for y, name in enumerate(order):
        value, look = seen.loc[name, "mean"], style(name)
        axes.errorbar(value, y, xerr=seen.loc[name, "std"], color=INK, linewidth=0.9, capsize=2, zorder=1)
        axes.plot(value, y, linestyle="", markersize=7, color=look["color"], marker=look["marker"], zorder=2)
        text = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
        axes.annotate(text, (value, y), (8, 3), textcoords="offset points", fontsize=7.5, color=INK)
    axes.grid(axis="y", color="#EDEDED", linewidth=0.8, zorder=0)
    axes.margins(x=0.22)
    axes.set_xlabel(title)


def _memory(axes: Axes, rows: pd.DataFrame, order: Seq[str]) -> None:
    mean = rows.groupby("system")[list(CATEGORIES)].mean().loc[list(order)]
    left = pd.Series(0.0, index=mean.index)
    for name in [name for name in CATEGORIES if mean[name].max() >= 0.05]:
        color, hatch, text = CATEGORIES[name]
        look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4, "label": text}
        axes.barh(range(len(order)), mean[name], 0.72, left, **look)
        left += mean[name]
    axes.set_xlim(0, 100)
    axes.set_xlabel("where the pool is while requests queue (%)")


def _clients(axes: Axes, asked: pd.DataFrame, saturated: pd.DataFrame) -> None:
    for name in asked.index:
        look: dict[str, Any] = {**style(str(name)), "markersize": 6, "label": name}
        axes.plot(range(len(asked.columns)), asked.loc[name], **look)
    vllm = saturated.loc[saturated["system"] == "vllm", "tokens_per_s"]
    if len(vllm):
        axes.axhline(vllm.mean(), color=style("vllm")["color"], linestyle="--", label="vllm: has no use for it")
    axes.set_xticks(range(len(asked.columns)), [str(column) for column in asked.columns], rotation=20)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("what clients ask for (max_tokens)")
    axes.set_ylabel("output tokens/s, saturated")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _few(load: Run, quick: bool) -> dict[str, Any]:
    """What two cores can carry, or a GPU in minutes, or anything in seconds."""
    if load.executor == "torch" and load.device == "cpu":
        return {"duration_s": None, "count": 6 if quick else 24}
    if load.arrivals == "all":
        return {"count": 40} if quick else {}
    return {"duration_s": 40.0 if quick else 120.0} if quick or not load.simulated else {}


def _distinct(found: Seq[Run]) -> None:
    """Two systems that come to the same settings would be one in tables and figure."""
    named = [(label(run), run.arrivals == "all", run.seed) for run in found]
    for name, *_ in (key for key in named if named.count(key) > 1):
        rule = "two of the systems are called that with these settings, and would be taken for one"
        raise InputError(f"system {name!r}: {rule}; leave one out, or the options that make them the same")
