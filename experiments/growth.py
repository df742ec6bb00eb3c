"""How do memory and throughput grow with the batch? Each system, from one sequence to all that memory holds.

Kwon et al., SOSP'23, figure 1 (right): memory (20 to 40 GB) and throughput (0 to 1.2k tokens/s) over batch size (0 to
40), OPT-13B on an A100 40 GB. Existing systems reach 40 GB at a small batch, vLLM slowly; points, trace and system are
not printed. What is printed of the same machine is where the batches end: figure 13a, 7.00 to 30.42 requests.

Ours: Poisson arrivals (ShareGPT) at rates from a trickle to an overload, cut off at the end, the first third left out.
Each iteration is a sample: sequences running, bytes held (weights, and what the allocator has handed out), tokens
sampled, seconds taken; samples of a batch size are summed over the rates. One in which a kernel was compiled says
nothing about serving and is left out. Only iterations in which memory keeps nobody
out, and none gives way, make the curve, of runs in which that is most of them: there the load sets the batch, its
sequences are of all ages, and a batch is not small because they are long. (As a queue runs empty, the last of a batch
are its longest outputs: memory per sequence would be overstated. In an overload memory is full, so that few run where
they are long.) What an overload ends at is a point of its own. With `--arrivals all` the curve is the end of the queue
after all, biased as said: what a GPU is given by default, since it takes one run per system. A row that has ended in a
static batch holds its memory and does not count as running.
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

from experiments.fragmentation import window
from lab.core import InputError
from lab.harness import Claim
from lab.latency import during
from lab.options import Options
from lab.plot.style import FONT, GREY, HALO, entitle, seeds_of, style
from lab.record import Record
from lab.run import Run
from lab.shapes import shape
from lab.systems import label

SYSTEMS = ("vllm", "orca-oracle", "orca-pow2", "orca-max", "fastertransformer")
RATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # requests/s; the last is above what any system here sustains
PAPER = {"vllm": 30.42, "orca-oracle": 13.62, "orca-pow2": 9.81, "orca-max": 7.00}  # figure 13a, at 2 requests/s
CARD_GB = 40  # the line in the figure
BINS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 32, 36, 40, 48, 64, 96, 128, 192, 256, 384, 512)  # from
SHOWN = (1, 2, 4, 7, 10, 14, 20, 28, 36)  # of them, in tables
SUMS = ("n", "running", "held", "sampled", "seconds")  # over the iterations of a bin
MEASURES = ("batch", "gb", "tokens_per_s")
OVERLOAD = 0.5  # of the iterations under pressure: more, and the run is no part of the curve
FEW = 30  # iterations: a bin with fewer, over all rates and seeds, is not drawn
SAME = 0.03  # of a throughput: a step back of less is noise
SHARES = (0.25, 0.5, 0.75)  # of the pool, for batches at equal memory

VIRTUAL = Run(duration_s=600.0)
AT_ONCE: dict[str, Any] = {"arrivals": "all", "rate": None, "duration_s": None, "count": 256}
GPU = Run(executor="torch", device="cuda", model="random:opt-13b", pool="15728", **AT_ONCE)
LAPTOP = Run(executor="torch", model="smollm2", dtype="float32", pool="1200", length=256, **{**AT_ONCE, "count": 32})


def runs(options: Options) -> list[Run]:
    changes = options.changes
    if changes.get("arrivals") == "trace":
        raise InputError("arrivals 'trace': its rate is its own; take poisson, gamma or all, for batches of every size")
    base = options.where(VIRTUAL, GPU, LAPTOP)
    if options.quick:
        base = replace(base, duration_s=40.0) if base.simulated else replace(base, count=8)
    at_once = (base.arrivals == "all" and "rate" not in changes) or changes.get("arrivals") == "all"
    if at_once:
        base = replace(base, arrivals="all", rate=None, duration_s=None, count=base.count or AT_ONCE["count"])
    seeds = options.seeds or ([0, 1, 2] if base.simulated and not options.quick else [0])
    rates = RATES[1::2] if options.quick else RATES
    found = []
    for variant in options.variants(base, SYSTEMS):
        ladder = [variant.rate] if at_once or "rate" in changes else rates
        found += [replace(variant, rate=rate, seed=seed) for rate in ladder for seed in seeds]
    return list(dict.fromkeys(found))


def row(run: Run, record: Record) -> dict[str, Any]:
    memory = record.header.get("device_memory", {})
    capacity = record.header["capacity"]
    token_bytes = memory["pool"] / capacity if memory else shape(run.model).kv_bytes_per_token()
    weights = memory["weights"] if memory else 2 * shape(run.model).parameters
    free, pressed = _split(run, record)
    return {
        "system": label(run),
        "seed": run.seed,
        "rate": run.rate,
        "weights_gb": weights / 1e9,
        "pool_gb": capacity * token_bytes / 1e9,
        "longest_gb": run.length * token_bytes / 1e9,
        "paper_setting": run.model.endswith("opt-13b") and run.workload == "sharegpt" and run.length == 2048,
        **_sums(free, capacity, token_bytes),
        **{f"{name}_full": value for name, value in _sum(pressed, capacity, token_bytes).items()},
    }


def _split(run: Run, record: Record) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Iterations of the curve, and those under pressure: somebody is kept out or gives way.

    In an overload the few without pressure are those that have just admitted a prompt: no measure of the throughput.
    """
    steps = during(record.steps, None if run.arrivals == "all" else window(run, record))
    steps = steps[(steps["running"] > 0) & (steps["end_s"] > steps["start_s"]) & ~steps["compiled"]]
    pressed = (steps["blocked"] > 0) | (steps["preempted"] > 0)
    free = ~pressed
    if run.arrivals == "all":
        free = ~pressed[::-1].cummax()[::-1]  # after the last of them
    elif pressed.mean() > OVERLOAD:
        free &= False
    return steps[free], steps[pressed]


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per system and bin, over all rates and seeds: batch, GB held with the weights, output tokens/s.

    `gb_std` and `tokens_per_s_std` are over what each seed alone gives.
    """
    found = []
    for system, own in rows.groupby("system", sort=False):
        for start in BINS:
            whole = own[[f"{name}_{start}" for name in SUMS]].set_axis(SUMS, axis=1)
            each = [_means(one.sum(), own) for _, one in whole.groupby(own["seed"]) if one["n"].sum() >= FEW / 3]
            if whole["n"].sum() >= FEW:
                spread = pd.DataFrame(each).std() if len(each) > 1 else pd.Series(dtype=float)
                beside = {f"{name}_std": spread.get(name, 0.0) for name in ("gb", "tokens_per_s")}
                found.append({"system": system, "bin": start, **_means(whole.sum(), own), **beside})
    return _frame(found, ["bin", *MEASURES, "gb_std", "tokens_per_s_std"])


def full(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per system and seed that memory held back, at its highest rate: the batch that it ends at."""
    found = []
    for (system, seed), own in rows.groupby(["system", "seed"], sort=False):
        top = own[own["rate"] == own["rate"].max()] if own["rate"].notna().any() else own
        sums = {name: top[f"{name}_full"].sum() for name in SUMS}
        if sums["n"] >= FEW:
            found.append({"system": system, "seed": seed, **_means(sums, own)})
    return _frame(found, ["seed", *MEASURES])


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    points, order = curves(rows), list(dict.fromkeys(rows["system"]))
    weights, pool = rows["weights_gb"].iloc[0], rows["pool_gb"].iloc[0]
    levels = [weights + share * pool for share in SHARES]
    equal = {f"{gb:.1f} GB": {system: _batch_at(points, system, gb) for system in order} for gb in levels}
    shown = points[points["bin"].isin(SHOWN)].astype({"bin": int}).set_index(["system", "bin"])
    size = f"{weights:.1f} GB of weights, {pool:.1f} GB of KV pool"
    return {
        f"where memory is full ({size}): the batch that an overload ends at": _ends(rows, order),
        "batch at equal memory, while nobody waits for it": pd.DataFrame(equal, index=order).round(1),
        "GB per running sequence, beyond the weights": _per_sequence(rows).round(3).to_frame("GB").T,
        "GB held, weights included, over batch size (from)": shown["gb"].unstack().reindex(order).round(1),
        "output tokens/s, over batch size (from)": shown["tokens_per_s"].unstack().reindex(order).round(),
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    """Figure 1 (right), one axis above the other."""
    points, ends = curves(rows), full(rows)
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(7.6, 7.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, name in ((above, "gb"), (below, "tokens_per_s")):
            for system in dict.fromkeys(rows["system"]):
                _draw(axes, points[points["system"] == system], ends[ends["system"] == system], name, str(system))
            axes.spines[["top", "right"]].set_visible(False)
        _lines(above, rows)
        above.set_ylabel("memory (GB): weights and KV held")
        below.set_ylabel("throughput (output tokens/s)")
        below.set_xlabel("batch size (sequences running)")
        below.set_ylim(bottom=0)
        below.set_xlim(left=0)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=5, frameon=False, fontsize=8.5)
        drawn = seeds_of(rows["seed"]).replace("bars", "bands")
        entitle(figure, above, "How memory and throughput grow with the batch", header, drawn)
    return figure


def claims(rows: pd.DataFrame) -> list[Claim]:
    points, ends = curves(rows), full(rows).groupby("system")["batch"].mean()
    order = [name for name in PAPER if name in set(rows["system"])]
    judged, found = bool(rows["paper_setting"].all()), []
    if "vllm" in order and len(order) > 1:
        level = rows["weights_gb"].iloc[0] + 0.5 * rows["pool_gb"].iloc[0]
        batches = pd.Series({name: _batch_at(points, name, level) for name in order})
        compared = {f"at equal memory ({level:.1f} GB)": batches, "where memory is full": ends.reindex(order)}
        for text, values in compared.items():
            holds = bool(values["vllm"] > values.drop("vllm").max()) if judged and values.notna().all() else None
            found.append(Claim(f"{text} vLLM batches more than existing systems (figure 1)", holds, _seen(values, 1)))
        each = _per_sequence(rows).reindex(order)
        holds = bool(each.is_monotonic_increasing) if judged and each.notna().all() else None
        found.append(Claim("memory per sequence: " + " < ".join(order), holds, _seen(each, 2) + " GB"))
    if "orca-max" in order:
        each, longest = float(_per_sequence(rows)["orca-max"]), float(rows["longest_gb"].iloc[0])
        holds = abs(each - longest) < 0.01 * longest if judged and not np.isnan(each) else None
        found.append(Claim(f"orca-max holds a longest sequence for each, {longest:.2f} GB", holds, f"{each:.2f} GB"))
    for name in order:
        grown = points.loc[points["system"] == name, "tokens_per_s"].to_numpy()
        holds = bool((grown[1:] > (1 - SAME) * grown[:-1]).all() and grown[-1] > grown[0]) if len(grown) > 1 else None
        seen = f"{grown[0]:.0f} to {grown[-1]:.0f} tokens/s" if len(grown) else "too few iterations"
        found.append(Claim(f"{name}: throughput grows with the batch (figure 1)", holds, seen))
    return found


def _ends(rows: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    ends = full(rows).groupby("system")[list(MEASURES)]
    mean, spread = ends.mean().reindex(order), ends.std().reindex(order)
    batch, gb, tokens = mean["batch"].round(2), mean["gb"].round(1), mean["tokens_per_s"].round()
    paper = pd.Series(PAPER, dtype=float).reindex(order)
    columns = {"paper (figure 13a)": paper, "ours": batch, "+-": spread["batch"].round(2), "GB": gb, "tokens/s": tokens}
    return pd.DataFrame({**columns, "+- tokens/s": spread["tokens_per_s"].round()})


def _frame(found: list[dict[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Numbers, even where nothing was found."""
    return pd.DataFrame(found, columns=["system", *columns]).astype(dict.fromkeys(columns, float))


def _sums(steps: pd.DataFrame, capacity: int, token_bytes: float) -> dict[str, float]:
    which = np.searchsorted(BINS, steps["running"], side="right") - 1
    each = {start: _sum(steps[which == i], capacity, token_bytes) for i, start in enumerate(BINS)}
    return {f"{name}_{start}": value for start, sums in each.items() for name, value in sums.items()}


def _sum(steps: pd.DataFrame, capacity: int, token_bytes: float) -> dict[str, float]:
    held = capacity - steps["free"] - steps["cached"]
    seconds = (steps["end_s"] - steps["start_s"]).sum()
    sums = (len(steps), steps["running"].sum(), held.sum() * token_bytes / 1e9, steps["sampled"].sum(), seconds)
    return dict(zip(SUMS, map(float, sums), strict=True))


def _means(sums: Mapping[str, float] | pd.Series, own: pd.DataFrame) -> dict[str, float]:
    """Memory over iterations, throughput over time."""
    gb = own["weights_gb"].iloc[0] + sums["held"] / sums["n"]
    return {"batch": sums["running"] / sums["n"], "gb": gb, "tokens_per_s": sums["sampled"] / sums["seconds"]}


def _per_sequence(rows: pd.DataFrame) -> pd.Series:
    """GB, over all iterations of the curve."""
    sums = {name: rows[[f"{name}_{start}" for start in BINS]].sum(axis=1) for name in ("held", "running")}
    both = pd.DataFrame(sums).groupby(rows["system"], sort=False).sum()
    return both["held"] / both["running"].where(both["running"] > 0)


def _batch_at(points: pd.DataFrame, system: str, gb: float) -> float:
    own = points[points["system"] == system]
    return float(np.interp(gb, np.maximum.accumulate(own["gb"]), own["batch"], np.nan, np.nan)) if len(own) else np.nan


def _seen(values: pd.Series, digits: int) -> str:
    return ", ".join("none" if np.isnan(value) else f"{value:.{digits}f}" for value in values)


def _draw(axes: Axes, points: pd.DataFrame, ends: pd.DataFrame, name: str, system: str) -> None:
    look: Any = style(system)
    axes.plot(points["batch"], points[name], label=system, markersize=4, linewidth=1.4, **look)
    low, high = (points[name] + sign * points[f"{name}_std"] for sign in (-1, 1))
    axes.fill_between(points["batch"], low, high, color=look["color"], alpha=0.18, linewidth=0)
    if len(ends):
        x, y = ends["batch"], ends[name]
        large: Any = {**look, "markersize": 9, "markeredgecolor": "black", "linestyle": "none"}
        axes.errorbar(x.mean(), y.mean(), np.nan_to_num(y.std()), np.nan_to_num(x.std()), capsize=2, **large)


def _lines(axes: Axes, rows: pd.DataFrame) -> None:
    weights, ceiling = rows["weights_gb"].iloc[0], rows["weights_gb"].iloc[0] + rows["pool_gb"].iloc[0]
    lines = {"weights": weights, "weights and pool": ceiling}
    if rows["paper_setting"].all():
        lines[f"{CARD_GB} GB: the paper's card, with activations"] = CARD_GB
        for system in [name for name in PAPER if name in set(rows["system"])]:
            look = style(system)
            hollow: Any = {"marker": look["marker"], "markeredgecolor": look["color"], "markerfacecolor": "white"}
            axes.plot(PAPER[system], ceiling, linestyle="none", markersize=8, zorder=3, **hollow)
        text = "large: where memory is full; hollow: the paper's batches (figure 13a)"
        axes.annotate(text, (0.99, 0.14), xycoords="axes fraction", ha="right", fontsize=7.5, color=GREY)
    for text, height in lines.items():
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "color": GREY, "path_effects": HALO}
        axes.annotate(text, (0.99, height), (0, 3), ("axes fraction", "data"), ha="right", va="bottom", **small)
