"""What is a prefix worth that many prompts share?

Kwon et al., SOSP'23, section 6.4, figure 16: LLaMA-13B translates English to German behind a reserved prefix of 80
tokens (one example) or 341 tokens (five); against Orca (Oracle), which computes and stores it with every request, vLLM
sustains 1.67 and 3.58 times the requests. Ours on the virtual clock: 2,000 requests at once, requests ended per second
until four fifths have. The data set (WMT16) is not carried: prompts have 29 and outputs 36 tokens on average,
because an example of the paper's prefix has (341 - 80) / 4 = 65; that lengths are lognormal and vary by half their
mean is a guess. Added here: a prefix cache instead, and its hit rate and throughput over the size of the pool, on
synthetic conversations (Llama-3-8B, A100 80 GB) or on a trace with prefix ids (`--workload PATH`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lab import latency, metrics, plot
from lab.core import InputError
from lab.harness import Claim
from lab.options import Options
from lab.record import Record
from lab.run import Run

PAPER = {80: 1.67, 341: 3.58}  # figure 16: throughput over Orca (Oracle)
RESERVED = "paged, reserved prefix"
TOLERANCE = 0.2
WAYS: dict[str, dict[str, Any]] = {
    "Orca (Oracle)": {"allocator": "contiguous-oracle"},
    "paged, no sharing": {"allocator": "paged"},
    RESERVED: {"allocator": "paged", "reserve_prefix": True},
    "paged, prefix cache": {"allocator": "paged-prefix"},
}
TRANSLATION = Run(
    model="llama-13b",
    workload="lognormal:prompt=29+-14,output=36+-18",
    arrivals="all",
    rate=None,
    duration_s=None,
    count=2000,
)
POOLS = (16_384, 32_768, 65_536, 131_072, 262_144)  # tokens
CHAT = Run(
    model="llama-3-8b",
    hardware="a100-80gb",
    workload="conversations:users=200,turns=8,system=200",
    length=4096,
    rate=3.0,
    duration_s=600.0,
)
CHAT_WAYS = {"prefix cache": "paged-prefix", "no sharing": "paged"}


def runs(options: Options) -> list[Run]:
    for name in ("allocator", "prefix", "reserve_prefix", "pool"):
        if options.changes.get(name) or options.allocators or options.systems:
            raise InputError(f"{name}: this experiment varies prefix, pool and allocator itself; leave them out")
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    translation = replace(TRANSLATION, count=300) if options.quick else TRANSLATION
    chat = replace(CHAT, duration_s=40.0) if options.quick else CHAT
    found = []
    if "workload" not in options.changes:
        found = [
            options.apply(replace(translation, prefix=prefix, seed=seed, **way))
            for prefix in PAPER
            for way in WAYS.values()
            for seed in seeds
        ]
    if not {"model", "device", "executor"} & set(options.changes):
        found += [
            options.apply(replace(chat, pool=str(pool), allocator=allocator, seed=seed))
            for pool in (POOLS[1:3] if options.quick else POOLS)
            for allocator in CHAT_WAYS.values()
            for seed in seeds
        ]
    return found


def row(run: Run, record: Record) -> dict[str, Any]:
    hits = metrics.prefix_hits(record)
    window_s = _busy(run, record)
    chat = not run.prefix
    way = next((name for name, way in WAYS.items() if _alike(run, way)), run.allocator)
    return {
        "system": next(n for n, a in CHAT_WAYS.items() if a == run.allocator) if chat else way,
        "part": "conversations" if chat else f"prefix of {run.prefix} tokens",
        "prefix": run.prefix,
        "pool": record.header["capacity"],
        "seed": run.seed,
        "simulated": run.simulated,
        "requests_per_s": latency.throughput(record, window_s).requests_per_s,
        "output_tokens_per_s": latency.throughput(record, window_s).output_tokens_per_s,
        "batch": metrics.batch_size(record, window_s).sequences,
        "hit_tokens": 100 * hits.tokens,
        "hit_requests": 100 * hits.requests,
        "normalised_s": latency.latency_summary(record).loc["normalised_s", "mean"],
        "ttft_s": latency.latency_summary(record).loc["ttft_s", "mean"],
    }


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    found = {}
    reserved, chat = rows[rows["prefix"] > 0], rows[rows["prefix"] == 0]
    if len(reserved):
        grouped = reserved.groupby(["prefix", "system"], sort=False)["requests_per_s"]
        ratio = _ratios(reserved)
        mean = pd.DataFrame({"requests/s": grouped.mean(), "std": grouped.std()}).round(2)
        mean["over Orca (Oracle)"] = ratio.groupby(level=[0, 1], sort=False).mean().round(2)
        mean["paper"] = [PAPER.get(p) if s == RESERVED else None for p, s in mean.index]
        mean["batch"] = reserved.groupby(["prefix", "system"], sort=False)["batch"].mean().round(1)
        found["requests per second behind a shared prefix (figure 16)"] = mean
    if len(chat):
        columns = ["hit_tokens", "hit_requests", "requests_per_s", "normalised_s", "ttft_s"]
        found["conversations: hits (%), requests per second and latency (s) over the size of the pool"] = (
            chat.groupby(["pool", "system"], sort=False)[columns].mean().round(3)
        )
    return found


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> dict[str, Figure]:
    reserved, chat = rows[rows["prefix"] > 0], rows[rows["prefix"] == 0]
    drawn = {}
    if len(reserved):
        drawn["figure"] = _beside(reserved, header)
    if len(chat):
        y = {"hit_tokens": "prompt tokens found (%)", "ttft_s": "time to first token (s)"}
        title = "What a prefix cache finds, over the size of its pool"
        about = dict(header) | {"model": CHAT.model, "workload": CHAT.workload, "hardware": CHAT.hardware}
        name = "cache" if drawn else "figure"
        drawn[name] = plot.lines(chat, about, title, x="pool", y=y, xlabel="pool (tokens)", log="x", policies=CHAT_WAYS)
    return drawn


def _beside(reserved: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    """The paper has ratios alone: they are drawn over our Orca (Oracle)."""
    orca = reserved[reserved["system"] == "Orca (Oracle)"].groupby("prefix")["requests_per_s"].mean()
    ratio = _ratios(reserved).groupby(level=[0, 1]).mean()
    paper, parts = {}, {}
    for prefix, name in reserved.groupby("prefix")["part"].first().items():
        parts[name] = name
        if prefix in PAPER:
            parts[name] += f"\nreserved: {ratio[prefix, RESERVED]:.2f}x Orca, paper {PAPER[prefix]:g}x"
            paper[parts[name], RESERVED] = PAPER[prefix] * orca[prefix]
    return plot.bars(
        reserved.assign(what=reserved["part"].map(parts)),
        header,
        "Requests per second behind a shared prefix",
        groups="what",
        y="requests_per_s",
        ylabel="requests per second",
        paper=paper,
        paper_is="paper, over our Orca (Oracle)",
        policies={name: name if way.get("reserve_prefix") else way["allocator"] for name, way in WAYS.items()},
    )


def claims(rows: pd.DataFrame) -> list[Claim]:
    found = []
    reserved, chat = rows[rows["prefix"] > 0], rows[rows["prefix"] == 0]
    if len(reserved):
        ratio = _ratios(reserved).groupby(level=[0, 1]).mean()
        for prefix, paper in PAPER.items():
            ours = float(ratio[prefix, RESERVED])
            text = f"prefix of {prefix} tokens: {paper:g}x Orca (Oracle) (figure 16), +-{100 * TOLERANCE:.0f} %"
            found.append(Claim(text, abs(ours / paper - 1) <= TOLERANCE, f"{ours:.2f}x"))
            cache = float(ratio[prefix, "paged, prefix cache"])
            text = f"prefix of {prefix} tokens: a cache finds what was reserved, within 5 %"
            found.append(Claim(text, abs(cache / ours - 1) <= 0.05, f"{cache:.2f}x"))
    if len(chat):
        hits = chat[chat["system"] == "prefix cache"].groupby("pool")["hit_tokens"].mean()
        text = "conversations: the larger the pool, the more is found"
        found.append(Claim(text, bool(hits.diff().iloc[1:].ge(-0.5).all()), ", ".join(f"{h:.0f}" for h in hits) + " %"))
    return found


def _ratios(rows: pd.DataFrame) -> pd.Series:
    """Requests per second over Orca (Oracle)'s with the same prefix and seed."""
    rates = rows.pivot_table(index=["prefix", "seed"], columns="system", values="requests_per_s", sort=False)
    ratios = pd.Series(rates.div(rates["Orca (Oracle)"], axis=0).stack())
    return ratios.reorder_levels(["prefix", "system", "seed"])


def _alike(run: Run, way: Mapping[str, Any]) -> bool:
    return (run.allocator, run.reserve_prefix) == (way["allocator"], way.get("reserve_prefix", False))


def _busy(run: Run, record: Record) -> tuple[float, float] | None:
    """Of requests that came at once, until four fifths of them have ended: the batch is full so long."""
    ended = latency.latencies(record)["finish_s"]
    return (0.0, float(ended.quantile(0.8))) if run.arrivals == "all" and len(ended) else None
