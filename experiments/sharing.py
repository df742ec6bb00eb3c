"""What do parallel sampling and beam search save when outputs share memory?

Kwon et al., SOSP'23, section 6.3: figure 15 prints the share of blocks saved for OPT-13B on Alpaca, 6.1 to 9.8 % with 2
to 6 parallel outputs, 37.6 to 55.2 % with 2 to 6 beams; the text gives 16.2 to 30.5 % and 44.3 to 66.3 % for ShareGPT.
Figure 14: over Orca (Oracle), which copies, throughput grows from 1.3x (one output) to 2.3x (6 beams). Set-up: Alpaca
at 20 requests/s (the authors' artifact), ShareGPT at 4; means over the iterations between 300 and 900 s (Alpaca: 100
and 300 s, which is as long in outputs). As in the paper's vLLM, requests of several sequences are swapped when memory
runs short: recomputing them instead keeps many young ones running, whose prompts are most of what they hold, and would
show half as much again saved. On the virtual clock beams come and go as in searches of SmolLM2 that were measured
(`lab/executors/survival.py`); with `--device cpu` or `cuda` the search is the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments import fragmentation
from lab import latency, metrics, plot
from lab.core import InputError
from lab.harness import Claim
from lab.options import Options
from lab.record import Record
from lab.run import Run
from lab.systems import label

WIDTHS = (2, 4, 6)
RATES = {"alpaca": 20.0, "sharegpt": 4.0}
DURATION_S = {"alpaca": 300.0, "sharegpt": 900.0}
SYSTEMS = ("vllm", "orca-oracle")
PAPER = {  # figure 15, per cent of the blocks; for ShareGPT the text has the ends of a range
    ("alpaca", "parallel"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("alpaca", "beams"): {2: 37.56, 4: 53.13, 6: 55.16},
    ("sharegpt", "parallel"): {2: 16.2, 6: 30.5},
    ("sharegpt", "beams"): {2: 44.3, 6: 66.3},
}
SEEDS, MORE_SEEDS = 3, 10
POINTS = 2.0  # tolerance for parallel outputs, which follow from lengths alone
LAPTOP = replace(fragmentation.LAPTOP, workload="uniform:prompt=20-100,output=40", pool="3000", count=16)


def runs(options: Options) -> list[Run]:
    for name in ("n", "beams"):
        if name in options.changes:
            raise InputError(f"{name} {options.changes[name]}: this experiment varies it itself; leave --{name} out")
    where = options.where(Run(), fragmentation.GPU, LAPTOP)
    base = replace(where, preemption="swap")
    widths = WIDTHS[:2] if options.quick else WIDTHS
    loads = [replace(base, workload=w, rate=RATES[w], duration_s=DURATION_S[w]) for w in RATES]
    if not base.simulated or "workload" in options.changes:
        loads = [base]
    if options.quick and base.simulated:
        loads = [replace(loads[0], duration_s=30.0, rate=(loads[0].rate or 4.0) / 2)]
    modes: list[dict[str, Any]] = [{"n": k, "beams": k * searching} for searching in (0, 1) for k in widths]
    points = [replace(load, **mode) for load in loads for mode in modes]
    found = [
        run
        for point in points
        for seed in options.seeds or _seeds(point, options.quick)
        for run in options.variants(replace(point, seed=seed), SYSTEMS)
        if options.seeds or seed < SEEDS or run.allocator == "paged"
    ]
    return [r for r in found if r.allocator.startswith("paged")] if where is LAPTOP and not options.systems else found


def _seeds(point: Run, quick: bool) -> range:
    """More where a seed moves what is saved by 3 points (one standard deviation): few long requests at a time."""
    if quick or not point.simulated:
        return range(1)
    return range(MORE_SEEDS if point.workload == "sharegpt" and not point.beams else SEEDS)


def row(run: Run, record: Record) -> dict[str, Any]:
    window_s = fragmentation.window(run, record)
    pressure = metrics.pressure(record, window_s)
    batch = metrics.batch_size(record, window_s)
    return {
        "system": label(run),
        "workload": run.workload,
        "mode": "beams" if run.beams else "parallel",
        "width": run.n,
        "seed": run.seed,
        "simulated": run.simulated,
        "saved": 100 * metrics.sharing(record, window_s),
        "requests": batch.requests,
        "sequences": batch.sequences,
        "requests_per_s": latency.throughput(record, window_s).requests_per_s,
        "copied_per_request": pressure.copied / max(1, len(record.requests)),
        "preemptions": pressure.preemptions,
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    keys = ["workload", "mode", "width"]
    own = rows[rows["system"] == rows["system"].iloc[0]]
    saved = own.groupby(keys, sort=False)["saved"].agg(["mean", "std", "count"])
    paper = [PAPER.get((workload, mode), {}).get(width) for workload, mode, width in saved.index]
    columns = {"paper": paper, "ours": saved["mean"], "std": saved["std"], "seeds": saved["count"]}
    first = pd.DataFrame(columns, index=saved.index).round(1)
    mean = rows.groupby([*keys, "system"], sort=False)[["requests", "requests_per_s", "copied_per_request"]].mean()
    wide = mean.unstack("system").round(2)
    if len(set(rows["system"])) > 1:
        rates = mean["requests_per_s"].unstack("system")
        for other in rates.columns[1:]:
            wide["ratio", f"{rates.columns[0]} / {other}"] = (rates.iloc[:, 0] / rates[other]).round(2)
    return {
        f"per cent of the blocks that sharing saves, {own['system'].iloc[0]} (figure 15)": first,
        "running requests, requests ended per second, tokens copied per request": wide,
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    own = rows[rows["system"] == rows["system"].iloc[0]].copy()
    own["what"] = own["workload"] + "\n" + own["mode"]
    own["outputs"] = own["width"].astype(str) + " outputs"
    paper = {
        (f"{workload}\n{mode}", f"{width} outputs"): value
        for (workload, mode), values in PAPER.items()
        for width, value in values.items()
    }
    title = "What sharing between outputs of one prompt saves"
    ylabel = "blocks saved (%)"
    header = {**header, "workload": " and ".join(dict.fromkeys(own["workload"]))}
    return plot.bars(own, header, title, groups="what", by="outputs", y="saved", ylabel=ylabel, paper=paper)


def claims(rows: pd.DataFrame) -> list[Claim]:
    own = rows[rows["system"] == rows["system"].iloc[0]]
    saved = own.groupby(["workload", "mode", "width"])["saved"].mean()
    simulated = bool(rows["simulated"].all())
    found = []
    for workload, mode in dict.fromkeys(zip(own["workload"], own["mode"], strict=True)):
        mine = saved[workload, mode]
        grows = bool(mine.sort_index().diff().iloc[1:].gt(0).all())
        seen = ", ".join(f"{value:.1f}" for value in mine) + " %"
        found.append(Claim(f"{workload}, {mode}: the wider, the more is saved", grows, seen))
        paper = PAPER.get((workload, mode), {})
        off = {width: mine[width] - value for width, value in paper.items() if width in mine.index}
        if off:
            worst = max(off, key=lambda width: abs(off[width]))
            near = abs(off[worst]) <= POINTS if mode == "parallel" and simulated else None
            text = f"{workload}, {mode}: within {POINTS:g} points of the paper's (figure 15 and section 6.3)"
            found.append(Claim(text, near, f"{worst} outputs: {off[worst]:+.1f} points"))
    both = saved.unstack("mode")
    more = bool((both["beams"] > both["parallel"]).all())
    found.append(Claim("beams share more than parallel outputs", more, f"{len(both)} settings"))
    return found
