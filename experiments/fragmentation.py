"""Where does KV memory go? Shares of the pool that hold token states, are reserved, or are lost, per system.

Kwon et al., SOSP'23, figure 2: 20.4 % (Orca, Max) to 38.2 % (Orca, Oracle) of the pool hold token states in systems
that reserve contiguous memory, 96.3 % under paging. Set-up: OPT-13B, A100 40 GB, a pool of 983 blocks of 16 tokens,
ShareGPT lengths at 4 requests/s, means over the iterations between 300 and 900 s (the authors' artifact). Added here:
first fit instead of the buddy system, and paging that reserves like Orca (Oracle), so that the paper's "external
fragmentation & others" splits into the mechanism's rounding and memory that is truly free.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lab import latency, metrics, plot
from lab.check import check
from lab.harness import Claim, writing
from lab.options import Options
from lab.record import Record
from lab.run import Run, carry_out, real, requests_of

SYSTEMS = {  # allocator: the paper's name, or ours in brackets
    "contiguous-max": "Orca (Max)",
    "contiguous-pow2": "Orca (Pow2)",
    "contiguous-oracle": "Orca (Oracle)",
    "contiguous-oracle-firstfit": "[Oracle, first fit]",
    "paged-oracle": "[Oracle, paged]",
    "paged": "vLLM",
}
SHARES = ("stored", "reserved", "excess", "others")
TITLES = dict(zip(SHARES, ("token states", "reservation", "internal frag.", "external & others"), strict=True))
PAPER = {  # figure 2, per cent of the pool; None where the figure prints no number
    "contiguous-max": (20.4, 13.3, 57.3, 8.9),
    "contiguous-pow2": (26.8, 17.9, 13.6, 41.6),
    "contiguous-oracle": (38.2, 25.2, 0.0, 36.6),
    "paged": (96.3, None, None, None),
}
BATCH = {  # figure 13a: mean requests batched, and our tolerance as a share of it
    "contiguous-max": (7.00, 0.0),
    "contiguous-pow2": (9.81, 0.03),
    "contiguous-oracle": (13.62, 0.05),
}
POINTS = 2.0  # tolerance of a mean over seeds
PRESSED = 50.0  # per cent of iterations in which the queue waits for memory: below, the pool is larger than needed
POINTS_POW2 = 3.5  # of Pow2's external & others, which a seed alone moves by 1.5 (one standard deviation)

VIRTUAL = Run()  # the paper's setting
GPU = Run(
    executor="torch",
    device="cuda",
    model="random:opt-13b",
    pool="15728",
    rate=16.0,  # above what any system here sustains
    duration_s=None,
    count=10_000,
    steps=6000,
)
GPU_BYTES = 44e9  # weights, the paper's 12 GiB pool, activations
ANSWER_TOKENS = 80  # at most, of the greedy pass that finds out how long the laptop's answers are
LAPTOP = Run(
    executor="torch",
    model="smollm2",
    dtype="float32",
    workload=f"prompts:max_tokens={ANSWER_TOKENS}",
    arrivals="all",
    rate=None,
    duration_s=None,
    count=32,
    pool="1200",
    length=256,
)


def runs(options: Options) -> list[Run]:
    base = _base(options)
    if options.quick:
        base = replace(base, **_quick(base))
    seeded = [replace(base, seed=seed) for seed in options.seeds or [0]]
    if not base.simulated and base.workload.startswith("prompts"):
        seeded = [replace(run, workload=str(_answers(run, options.out))) for run in seeded]
    if options.systems:
        return [variant for run in seeded for variant in options.variants(run, ())]
    return [
        replace(run, allocator=allocator, scheduler=scheduler)
        for allocator in options.allocators or SYSTEMS
        for scheduler in options.schedulers or [base.scheduler]
        for run in seeded
    ]


def row(run: Run, record: Record) -> dict[str, Any]:
    window_s = window(run, record)
    pool = 100 * metrics.shares(record, window_s)
    held = 100 * metrics.shares(record, window_s, of="held")
    batch = metrics.batch_size(record, window_s)
    blocked = metrics.blocked(record, window_s)
    pressure = metrics.pressure(record, window_s)
    return {
        "allocator": run.allocator,
        "scheduler": run.scheduler,
        "seed": run.seed,
        "simulated": run.simulated,
        "paper_model": run.model.endswith("opt-13b"),
        "paper_setting": _paper_setting(run),
        "refused": int((record.events["kind"] == "refused").sum()),
        **{name: pool[name] for name in SHARES[:3]},
        "others": pool[["rounding", "cached", "free"]].sum(),
        **{name: pool[name] for name in ("ended", "rounding", "cached", "free")},
        "stored_of_held": held["stored"],
        "batch": batch.sequences,
        "rounding_tokens": pool["rounding"] / 100 * record.header["capacity"] / max(batch.sequences, 1),  # per sequence
        "index": metrics.fragmentation_index(record, window_s).mean(),
        "blocked": 100 * blocked.all,
        "blocked_enough": 100 * blocked.enough,
        "preemptions": pressure.preemptions,
        "recomputed": pressure.recomputed,
        "swapped": pressure.swapped_out + pressure.swapped_in,
        "output_tokens_per_s": latency.throughput(record, window_s).output_tokens_per_s,
        "normalised_s": latency.latency_summary(record).loc["normalised_s", "mean"],  # of all that ended
        "compiled": metrics.compiled_steps(record, window_s),
        "iterations": len(latency.during(record.steps, window_s)),
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    mean = _mean(rows)
    scheduled = "" if mean.index.isin(rows["allocator"]).all() else " (continuous batching where no scheduler is named)"
    if rows["paper_model"].all():
        shares = {f"per cent of the pool: paper, ours, deviation{scheduled}": _beside(mean)}
    else:
        shares = {"per cent of the pool": mean[list(SHARES)].rename(columns=TITLES).round(1)}
    return {**shares, "what else was seen": _more(mean)}


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    return plot.fragmentation(rows, header, SYSTEMS, PAPER)


def claims(rows: pd.DataFrame) -> list[Claim]:
    mean = _mean(rows)
    slack = 1 if rows["seed"].nunique() > 1 else 2  # a single seed is judged at twice the tolerance
    judged = bool(rows["paper_setting"].all())
    found = [_near(mean, name, slack, judged) for name in PAPER if name in mean.index]
    found += [_batch(mean, name, slack, judged) for name in BATCH if name in mean.index]
    order = [name for name in PAPER if name in mean.index]
    if len(order) > 1:
        found.append(_order(mean.loc[order]))
    if "paged" in mean.index:
        lost = mean.loc["paged", "rounding_tokens"]
        text = "paging wastes less than a block per sequence"
        found.append(Claim(text, bool(lost < rows.attrs["block"]), f"{lost:.1f} tokens"))
    return found


def _order(mean: pd.DataFrame) -> Claim:
    """Of systems that want for memory: where requests do not queue for it, all hold the same."""
    holds = bool(mean["stored"].diff().iloc[1:].gt(0).all())
    text = "token states: " + " < ".join(SYSTEMS[name] for name in mean.index)
    seen = ", ".join(f"{share:.1f}" for share in mean["stored"]) + " % of the pool"
    if bool((mean["blocked"] < PRESSED).any()):
        return Claim(text, None, seen + ", but not all had requests queue for memory")
    return Claim(text, holds, seen)


def _near(mean: pd.DataFrame, name: str, slack: int, judged: bool) -> Claim:
    deviations = {
        s: mean.loc[name, s] - value for s, value in zip(SHARES, PAPER[name], strict=True) if value is not None
    }
    limits = {s: slack * (POINTS_POW2 if (name, s) == ("contiguous-pow2", "others") else POINTS) for s in deviations}
    worst = max(deviations, key=lambda s: abs(deviations[s]) / limits[s])
    text = f"{SYSTEMS[name]}: every share within {slack * POINTS:g} points of figure 2"
    if name == "contiguous-pow2":
        text += f" ({TITLES['others']}: {slack * POINTS_POW2:g})"
    holds = all(abs(deviations[s]) <= limits[s] for s in deviations) if judged else None
    return Claim(text, holds, f"{TITLES[worst]} off by {deviations[worst]:+.1f}")


def _batch(mean: pd.DataFrame, name: str, slack: int, judged: bool) -> Claim:
    expected, tolerance = BATCH[name]
    seen = float(mean.loc[name, "batch"])
    holds = abs(seen - expected) <= slack * tolerance * expected + 0.005 if judged else None
    return Claim(
        f"{SYSTEMS[name]}: {expected} requests batched (figure 13a), +-{100 * slack * tolerance:g} %",
        holds,
        f"{seen:.2f}",
    )


def _mean(rows: pd.DataFrame) -> pd.DataFrame:
    """Over seeds; indexed by allocator, and by scheduler where it is not the paper's."""
    label = rows["allocator"].where(rows["scheduler"] == "continuous", rows["allocator"] + " " + rows["scheduler"])
    mean = rows.groupby(label, sort=False).mean(numeric_only=True)
    return mean.rename_axis("allocator")


def _beside(mean: pd.DataFrame) -> pd.DataFrame:
    columns: dict[tuple[str, str], pd.Series] = {}
    for i, name in enumerate(SHARES):
        paper = pd.Series({a: PAPER[a][i] if a in PAPER else None for a in mean.index}, dtype=float)
        columns[TITLES[name], "paper"] = paper
        columns[TITLES[name], "ours"] = mean[name]
        columns[TITLES[name], "dev."] = mean[name] - paper
    return pd.DataFrame(columns).round(1)


def _more(mean: pd.DataFrame) -> pd.DataFrame:
    """A line per measure, which its name explains."""
    names = {
        "rounding": "% of pool: lost to rounding up",
        "free": "% of pool: free",
        "cached": "% of pool: kept for prefix hits",
        "ended": "% of pool: of rows that ended",
        "stored_of_held": "% of held: token states",
        "batch": "requests running",
        "index": "1 - largest hole / all free",
        "blocked": "% of steps: queue waits for room",
        "blocked_enough": "... though enough is free in all",
        "preemptions": "preemptions",
        "recomputed": "tokens computed again",
        "swapped": "tokens swapped out and in",
        "refused": "requests refused: can never fit",
        "compiled": "steps in which a kernel was compiled",
        "output_tokens_per_s": "output tokens per s",
        "normalised_s": "s per output token, queue included",
    }
    seen = mean[list(names)].rename(columns=names).T.loc[lambda table: (table != 0).any(axis=1)]
    return seen.map(lambda value: "" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}")


def _base(options: Options) -> Run:
    """On a GPU with room for OPT-13B, else on the virtual clock; `--device cpu` for the real model on any machine."""
    base = options.where(VIRTUAL, GPU, LAPTOP)
    changes = options.changes
    if changes.get("device") or changes.get("hardware") or changes.get("executor") == "simulated":
        return options.apply(base)
    free = _free_gpu_bytes()
    if free >= GPU_BYTES:
        return options.apply(GPU)
    if free:
        print(f"the GPU has {free / 1e9:.0f} GB free and OPT-13B's shape takes {GPU_BYTES / 1e9:.0f}: not used")
    return options.apply(base)


def _free_gpu_bytes() -> int:
    """Without importing torch where there is plainly no GPU."""
    return real().free_gpu_bytes() if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists() else 0


def _quick(base: Run) -> dict[str, Any]:
    if base.simulated:
        return {"duration_s": 90.0 if base.duration_s is None else min(base.duration_s, 90.0)}
    return {"steps": 300} if base.device != "cpu" else {"count": 8 if base.count is None else min(base.count, 8)}


def _paper_setting(run: Run) -> bool:
    theirs = (run.block, run.length, run.scheduler) == (16, 2048, "continuous") and run.pool in (None, "15728", "12GiB")
    lengths = run.arrivals == "poisson" and (run.workload == "sharegpt" or run.workload.startswith("paper:"))
    whole = (run.duration_s, run.count, run.steps) == (900, None, None) if run.simulated else run.steps == 6000
    saturated = (run.rate or 0) >= 4 and whole
    return theirs and lengths and saturated and run.model.endswith("opt-13b")


def window(run: Run, record: Record) -> tuple[float, float]:
    """Seconds in which the pool is under pressure: what is measured is the steady state."""
    steps = record.steps
    if run.steps:
        return float(steps["start_s"].iloc[min(run.steps // 6, len(steps) - 1)]), float(steps["end_s"].iloc[-1])
    if run.duration_s and run.duration_s / 3 < steps["end_s"].iloc[-1]:
        return run.duration_s / 3, run.duration_s
    queued = steps[steps["waiting"] > 0]
    return 0.0, float((queued if len(queued) else steps)["end_s"].iloc[-1])


def _answers(base: Run, out: Path) -> Path:
    """A file of real prompts and the lengths of the model's own greedy answers, which the oracles may then know."""
    at_once: dict[str, Any] = {"arrivals": "all", "rate": None, "duration_s": None, "steps": None}
    ask = replace(base, allocator="paged", pool=str(32 * base.length), **at_once)
    check(ask)
    path = out / "fragmentation" / f"answers-{ask.key()}.jsonl"
    if not path.exists():
        print(f"first the greedy answers of {ask.model} to {ask.count} prompts, for their lengths")
        record = carry_out(ask, None).record()
        drawn = record.tokens.groupby("request").size()
        prompts = {request.id: request.prompt for request in requests_of(ask)}
        lines = [json.dumps({"prompt": list(prompts[i]), "output_tokens": int(n)}) for i, n in drawn.items()]
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text("\n".join(lines) + "\n")
            path.with_suffix(".part").rename(path)
    return path
