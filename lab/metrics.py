"""Pure functions of a Record: where memory went, how full the batches were (time: `lab.latency`).

A window is (from, to) in seconds of the run's clock: the steps that end in it. Shares are fractions of 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from lab.latency import Window, during
from lab.record import Record

CATEGORIES = ["stored", "ended", "reserved", "excess", "rounding", "cached", "free"]


class Utilisation(NamedTuple):
    """Means over iterations."""

    held: float  # of the pool, by sequences in memory: what serving systems report as cache usage
    stored: float  # of the pool, K and V of running sequences: the paper's token states
    stored_of_held: float


class Blocked(NamedTuple):
    """Shares of the iterations in which the head of the queue found no memory."""

    all: float
    enough: float  # although as many tokens as it asked for were free or evictable: fragmentation alone kept it out


class Pressure(NamedTuple):
    """Work that memory pressure and padding caused: groups, and tokens."""

    preemptions: int
    recomputed: int  # computed tokens thrown away
    swapped_out: int
    swapped_in: int
    copied: int
    dead: int  # padding that was computed


class Batch(NamedTuple):
    """Running at the same time, means over iterations."""

    sequences: float
    requests: float


class Hits(NamedTuple):
    """What a prefix cache or a reserved prefix saved: shares of what was admitted, the first time."""

    tokens: float  # of the prompts
    requests: float  # that found anything


def categories(record: Record, window_s: Window = None, last_token: bool = False) -> pd.DataFrame:
    """Tokens of the pool in each of the seven categories: a row per step, sampled at `end_s`; the index is the step.

    Each category is computed by itself; that they sum to the capacity is asserted. `last_token` counts the last token
    of a sequence as if its K and V were written, as the paper's artifact does.
    """
    steps, samples, ends = during(record.steps, window_s), record.samples, final_lengths(record, last_token)
    first, last = (steps.index[0], steps.index[-1]) if len(steps) else (0, -1)
    inside = slice(*np.searchsorted(samples["step"], [first, last + 1]))  # both are in order of time
    samples, ends = samples[inside], ends[inside]
    over = samples["ended"].to_numpy()
    skip, computed, asked, held = (samples[c].to_numpy() for c in ("skip", "computed", "asked", "held"))
    asked = np.clip(asked, computed, held)
    low = np.maximum(skip, computed)  # [low, asked): asked for and empty
    written = np.maximum(computed - skip, 0)
    ends = np.where(over, 0, ends)  # an ended row writes no more
    rows = {
        "stored": np.where(over, 0, written),
        "ended": np.where(over, written, 0),
        "reserved": np.maximum(np.minimum(asked, ends) - low, 0),
        "excess": np.maximum(asked - np.maximum(ends, low), 0),
        "rounding": np.maximum(held - np.maximum(asked, skip), 0),
    }
    when = samples["step"].to_numpy() - first
    sums = {name: np.bincount(when, row, len(steps)).astype(np.int64) for name, row in rows.items()}
    table = pd.DataFrame({"end_s": steps["end_s"], **sums, "cached": steps["cached"], "free": steps["free"]})
    _check(table[CATEGORIES], record.header.get("capacity", 0))
    return table


def shares(
    record: Record,
    window_s: Window = None,
    of: Literal["pool", "held"] = "pool",
    over: Literal["iterations", "time"] = "iterations",
    last_token: bool = False,
) -> pd.Series:
    """Mean share of each category, of the pool or of what sequences hold (which leaves out `cached` and `free`).

    Over iterations (the paper's: steps that computed something) or over time, where gaps in which nothing is in memory
    count as free. NaN where nothing was sampled.
    """
    table = categories(record, window_s, last_token)
    tokens = table[CATEGORIES]
    weights, idle_s = _weights(record, table.index, over)
    if of == "held":
        tokens, idle_s = tokens.drop(columns=["cached", "free"]), 0.0
        weights = weights * (tokens.sum(axis=1).to_numpy() > 0)
    total = tokens.sum(axis=1).clip(lower=1)
    weighted = tokens.div(total, axis=0).mul(weights, axis=0).sum()
    if of == "pool":
        weighted["free"] += idle_s
    seconds = weights.sum() + idle_s
    return weighted / seconds if seconds else weighted * np.nan


def paper_shares(record: Record, window_s: Window = None, last_token: bool = False) -> pd.Series:
    """Shares of the pool under the paper's four names (Kwon et al., section 3.1, figure 2), ours beside them.

    token states = stored; reservation = reserved; internal fragmentation = excess; external fragmentation & others =
    rounding + cached + free. The paper has no name for `ended`, which is 0 under continuous batching and stays apart.
    The last token of a sequence is sampled but its K and V are never computed: where a policy asks for prompt + output
    tokens, we count that one as excess, the artifact as reserved. `last_token=True` is the artifact's account:
    reserved = sum(prompt + output - computed), excess = sum(asked - (prompt + output)). For Orca (Oracle) at the
    paper's setting the two differ by 0.09 points: one token of each of 14 sequences, of 15,728.
    """
    mean = shares(record, window_s, last_token=last_token)
    others = mean[["rounding", "cached", "free"]].sum()
    return pd.concat([mean[["stored", "reserved", "excess"]], pd.Series({"others": others, "ended": mean["ended"]})])


def utilisation(record: Record, window_s: Window = None) -> Utilisation:
    pool = shares(record, window_s)
    of_held = shares(record, window_s, of="held")
    return Utilisation(1 - float(pool["free"] + pool["cached"]), float(pool["stored"]), float(of_held["stored"]))


def fragmentation_index(record: Record, window_s: Window = None) -> pd.Series:
    """External fragmentation per step: 1 - largest / (free + cached); NaN where nothing is idle."""
    steps = during(record.steps, window_s)
    idle = (steps["free"] + steps["cached"]).astype(float)
    return 1 - steps["largest"] / idle.where(idle > 0)


def blocked(record: Record, window_s: Window = None) -> Blocked:
    steps = _iterations(record, window_s)
    waits = steps["blocked"] > 0
    enough = waits & (steps["free"] + steps["cached"] >= steps["blocked"])
    return Blocked(float(waits.mean()), float(enough.mean()))


def pressure(record: Record, window_s: Window = None) -> Pressure:
    steps = during(record.steps, window_s)
    events = record.events[record.events["step"].isin(steps.index)]
    lost = events[(events["kind"] == "preempted") & (events["detail"] == "recompute")]["tokens"].sum()
    out, back, copied, dead = (int(steps[c].sum()) for c in ("swapped_out", "swapped_in", "copied", "dead_tokens"))
    return Pressure(int(steps["preempted"].sum()), int(lost), out, back, copied, dead)


def batch_size(record: Record, window_s: Window = None) -> Batch:
    """Of figure 13: mean number of running sequences, and of the requests they belong to."""
    steps = _iterations(record, window_s)
    samples = record.samples[~record.samples["ended"]]
    pairs = samples[["step", "request"]]
    if (record.requests["n"] > 1).any():
        pairs = pairs.drop_duplicates()
    requests = np.bincount(pairs["step"], minlength=len(record.steps))[steps.index]
    return Batch(float(steps["running"].mean()), float(requests.mean()) if len(requests) else np.nan)


def sharing(record: Record, window_s: Window = None) -> float:
    """Share of the blocks that sharing saves: 1 - 1 / mean(blocks in all tables / distinct blocks), over iterations.

    So the authors' artifact computes figure 15 (Kwon et al., section 6.3); NaN where nothing was held.
    """
    steps = _iterations(record, window_s)
    samples = record.samples[record.samples["step"].isin(steps.index)]
    held = samples.groupby("step")[["held", "skip"]].sum()
    ratio = held["held"] / (held["held"] - held["skip"])
    return float(1 - 1 / ratio.mean())


def prefix_hits(record: Record, window_s: Window = None) -> Hits:
    steps = during(record.steps, window_s)
    events = record.events
    found = events[(events["kind"] == "admitted") & events["step"].isin(steps.index)].set_index("request")["tokens"]
    prompts = record.requests.drop_duplicates("request").set_index("request")["prompt_tokens"].reindex(found.index)
    return Hits(float(found.sum() / prompts.sum()) if len(found) else np.nan, float((found > 0).mean()))


def device_memory(record: Record) -> dict[str, int]:
    """Bytes of the device by use (weights, pool, activations), where the run had a device; empty otherwise."""
    return dict(record.header.get("device_memory", {}))


def compiled_steps(record: Record, window_s: Window = None) -> int:
    """Steps in which a kernel was compiled: their durations say nothing about serving."""
    return int(during(record.steps, window_s)["compiled"].sum())


def compiling_s(record: Record) -> float:
    """Seconds of those steps."""
    compiling = record.steps[record.steps["compiled"]]
    return float((compiling["end_s"] - compiling["start_s"]).sum())


def _iterations(record: Record, window_s: Window) -> pd.DataFrame:
    steps = during(record.steps, window_s)
    return steps[steps["seqs"] > 0]


def final_lengths(record: Record, last_token: bool = False) -> np.ndarray:
    """Per row of `samples`: tokens of its sequence that were ever written, or will be.

    prompt + output - 1 where the output was forced and the sequence ran to its length, or still runs; else the most it
    ever had in memory, which for one that ran to its end is the same thing.
    """
    samples = record.samples
    width = int(samples["output"].max()) + 1 if len(samples) else 1
    codes, keys = pd.factorize(samples["request"].to_numpy() * width + samples["output"].to_numpy())
    ends = np.zeros(len(keys), np.int64)
    np.maximum.at(ends, codes, samples["computed"].to_numpy())
    requests = record.requests[record.requests["forced"]].drop_duplicates("request").set_index("request")
    total = (requests["prompt_tokens"] + requests["output_tokens"]).reindex(keys // width).to_numpy()
    events = record.events
    cut = events[(events["kind"] == "ended") & (events["detail"] != "length")]
    gone = events[events["kind"] == "cancelled"]["request"]
    early = np.isin(keys, cut["request"] * width + cut["output"]) | np.isin(keys // width, gone)
    full = ~early & ~np.isnan(total)
    ends[full] = total[full].astype(np.int64) - 1
    return (ends + (last_token & ~early))[codes]


def _check(table: pd.DataFrame, capacity: int) -> None:
    tokens = table.to_numpy()
    wrong = (tokens.sum(axis=1) != capacity) | (tokens < 0).any(axis=1)
    if wrong.any():
        first = table[wrong].iloc[0]
        raise AssertionError(
            f"step {first.name} (and {wrong.sum() - 1} more): {first.to_dict()} sum to {first.sum()} of {capacity}"
        )


def _weights(record: Record, index: pd.Index, over: str) -> tuple[np.ndarray, float]:
    """Weight of each step, and idle seconds between them. A step's state stands from the end of the step before it."""
    steps = record.steps
    if over == "iterations":
        return (steps["seqs"].to_numpy() > 0)[index].astype(float), 0.0
    start_s, end_s, tenures = steps["start_s"].to_numpy(), steps["end_s"].to_numpy(), record.tenures
    entered = np.bincount(tenures["from_step"], minlength=len(steps) + 1)
    left = np.bincount(tenures["to_step"], minlength=len(steps) + 1)
    staying = np.cumsum(entered)[:-2] - np.cumsum(left)[1:-1]  # tenures across the gap after each step but the last
    gap_s = start_s[1:] - end_s[:-1]
    before_s = np.r_[0.0, np.where(staying > 0, gap_s, 0.0)]
    idle_s = np.r_[0.0, np.where(staying > 0, 0.0, gap_s)]
    return (end_s - start_s + before_s)[index], float(idle_s[index].sum())
