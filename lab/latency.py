"""How long requests waited and how much was served: pure functions of a Record.

A window is (from, to) in seconds of the clock: rates count what happened in it, latencies the requests that arrived
in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from lab.core import InputError
from lab.record import Record

LATENCIES = ["normalised_s", "queue_s", "ttft_s", "tpot_s", "itl_s", "e2e_s"]

Window = tuple[float, float] | None


class Rate(NamedTuple):
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float  # prompts included


class Goodput(NamedTuple):
    share: float  # of the requests that arrived
    requests_per_s: float


def latencies(record: Record, window_s: Window = None) -> pd.DataFrame:
    """A row per output that ran to its end (length or stop): times, and durations in seconds.

    ttft_s: arrival to first token. e2e_s: arrival to last token. tpot_s: (e2e - ttft) / (tokens - 1), NaN for one.
    normalised_s: e2e / tokens, as Orca and the paper define it, per output. queue_s: arrival to first admission.
    """
    events, requests = record.events, _requests(record)
    done = events[(events["kind"] == "ended") & events["detail"].isin(["length", "stop"])]
    table = done[["request", "output"]].join(requests["arrival_s"], on="request")
    admitted = events[events["kind"] == "admitted"].drop_duplicates("request").set_index("request")["time_s"]
    table = table.join(admitted.rename("admitted_s"), on="request")
    drawn = record.tokens[["request", "output"]].assign(time_s=_times(record))
    drawn = drawn.groupby(["request", "output"], sort=False)["time_s"].agg(["first", "last", "size"])
    drawn.columns = pd.Index(["first_s", "finish_s", "output_tokens"])
    table = table.join(drawn, on=["request", "output"])
    if window_s is not None:
        table = table[table["arrival_s"].between(*window_s)]
    table["queue_s"] = table["admitted_s"] - table["arrival_s"]
    table["ttft_s"] = table["first_s"] - table["arrival_s"]
    table["e2e_s"] = table["finish_s"] - table["arrival_s"]
    table["tpot_s"] = (table["e2e_s"] - table["ttft_s"]) / (table["output_tokens"] - 1).replace(0, np.nan)
    table["normalised_s"] = table["e2e_s"] / table["output_tokens"]
    return table.reset_index(drop=True)


def gaps(record: Record, window_s: Window = None) -> np.ndarray:
    """Inter-token latencies: seconds between consecutive tokens of an output, over all outputs with two or more."""
    tokens, time_s = record.tokens, _times(record)
    arrived = tokens["request"].map(_requests(record)["arrival_s"])
    keep = np.ones(len(tokens), bool) if window_s is None else arrived.between(*window_s).to_numpy()
    owner = tokens.groupby(["request", "output"], sort=False).ngroup().to_numpy()[keep]
    order = np.argsort(owner, kind="stable")
    return np.diff(time_s[keep][order])[np.diff(owner[order]) == 0]


def latency_summary(record: Record, window_s: Window = None) -> pd.DataFrame:
    """Seconds: a row per measure, mean and percentiles (interpolated linearly) over outputs, for `itl_s` over gaps."""
    table = latencies(record, window_s)
    rows = {}
    for name in LATENCIES:
        values = gaps(record, window_s) if name == "itl_s" else table[name].dropna().to_numpy()
        points = np.percentile(values, [50, 90, 99]) if len(values) else [np.nan] * 3
        mean = values.mean() if len(values) else np.nan
        rows[name] = [mean, *points, len(values)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "p50", "p90", "p99", "count"])


def throughput(record: Record, window_s: Window = None) -> Rate:
    """Per second of the window: requests of which every output ended in it, tokens drawn in it.

    A prompt counts when its first token is drawn. Without a window: from the first arrival to the last step.
    """
    start_s, end_s = window_s or _span(record)
    table, prompts = latencies(record), _requests(record)["prompt_tokens"]
    ended = _whole(record, table)["finish_s"]
    time_s = _times(record)
    first = pd.Series(time_s).groupby(record.tokens["request"].to_numpy()).min()
    tokens = int(((time_s >= start_s) & (time_s <= end_s)).sum())
    prompt = prompts.reindex(first.index[first.between(start_s, end_s)]).sum()
    per_s = 1 / (end_s - start_s) if end_s > start_s else np.nan
    counts = (ended.between(start_s, end_s).sum(), tokens, tokens + prompt)
    return Rate(*(float(count * per_s) for count in counts))


def offered(record: Record, window_s: Window = None) -> Rate:
    """Load that arrived, whatever became of it; outputs as forced, or as generated (0 if they never ended)."""
    start_s, end_s = window_s or _span(record)
    requests = record.requests[record.requests["arrival_s"].between(start_s, end_s)]
    outputs = (requests["output_tokens"] * requests["n"]).sum()
    per_s = 1 / (end_s - start_s) if end_s > start_s else np.nan
    counts = (len(requests), outputs, outputs + requests["prompt_tokens"].sum())
    return Rate(*(float(count * per_s) for count in counts))


def goodput(record: Record, limits: Mapping[str, float], window_s: Window = None) -> Goodput:
    """Requests all of whose outputs ended within every limit in seconds, of those that arrived.

    Limits: ttft_s, tpot_s (an output of one token meets any), e2e_s, normalised_s, queue_s. Requests that were refused,
    cancelled, or unfinished when the record closed miss them.
    """
    known = [name for name in LATENCIES if name != "itl_s"]
    for name in limits:
        if name not in known:
            raise InputError(f"limit {name!r} is unknown: known are {', '.join(known)}")
    start_s, end_s = window_s or _span(record)
    worst = _whole(record, latencies(record, window_s))
    met = np.ones(len(worst), bool)
    for name, limit_s in limits.items():
        met &= worst[name].fillna(0).to_numpy() <= limit_s
    arrived = record.requests["arrival_s"].between(start_s, end_s).sum()
    share = met.sum() / arrived if arrived else np.nan
    return Goodput(float(share), float(met.sum() / (end_s - start_s)) if end_s > start_s else np.nan)


def _whole(record: Record, table: pd.DataFrame) -> pd.DataFrame:
    """A row per request of which every output ended: the worst of its outputs in every column."""
    outputs = table.groupby("request")
    n = _requests(record)["n"]
    return outputs.max()[outputs.size() == n.reindex(outputs.size().index)]


def during(steps: pd.DataFrame, window_s: Window) -> pd.DataFrame:
    """Steps that end in the window; the index is the number of the step."""
    return steps if window_s is None else steps[steps["end_s"].between(*window_s)]


def _requests(record: Record) -> pd.DataFrame:
    return record.requests.drop_duplicates("request").set_index("request")


def _times(record: Record) -> np.ndarray:
    """Seconds at which each row of `tokens` was drawn."""
    return record.steps["end_s"].to_numpy()[record.tokens["step"].to_numpy()]


def _span(record: Record) -> tuple[float, float]:
    """First arrival to last step."""
    start_s = float(record.requests["arrival_s"].min()) if len(record.requests) else 0.0
    return start_s, float(record.steps["end_s"].max()) if len(record.steps) else start_s
