"""A record as a film: who held which block and how full it was, in few numbers, and the moments at which to look.

What a film holds is exact: who holds which block (tenures), and what is written of it (segments, straight lines of
tokens computed and asked for). Only the moments are thinned: a frame is the state in one step and stands for the steps
since the frame before.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lab import metrics
from lab.core import InputError
from lab.record import Record

FRAMES = 25_000  # of a film, unless admissions, preemptions and ends alone are more
KEPT = ["admitted", "resumed", "preempted", "ended", "cancelled"]  # events whose step is always a frame
WAITING, PROMPT, DECODING, PREEMPTED, SWAPPED, HOLDING = range(6)  # what a request is doing; names are in film.html


class Film(NamedTuple):
    """What a page plays. Every column is of whole numbers; times are in ticks of `about["tick_s"]` seconds."""

    about: dict[str, Any]
    columns: dict[str, np.ndarray]


def film(record: Record, frames: int = FRAMES) -> Film:
    """Everything the page needs of a record. InputError where its tables do not agree with each other."""
    with agreeing(record):
        kept = moments(record, frames)
        clock = Clock(record)
        codes, sequences = _sequences(record)
        requests = requests_of(record)
        doing = spells(record, requests)
        doing = doing.assign(begin=clock.ticks(doing["begin"]), stop=clock.ticks(doing["stop"]))
        columns = {
            **_frames(record, kept, clock),
            **_renamed("seq", sequences.assign(request=requests.index.get_indexer(sequences["request"]))),
            **_renamed("seg", segments(record, codes, kept)),
            **_renamed("ten", tenures(record, sequences, kept)),
            **_renamed("req", _drawn(requests, doing, clock)),
            **_renamed("spell", doing),
        }
    about = about_of(record) | {"frames": len(kept), "most_steps": int(np.diff(kept, prepend=-1).max())}
    about |= {"tick_s": clock.tick_s, "origin_s": clock.origin_s, "done": all_served(record, requests)}
    about["ids"] = requests.index.tolist()
    about["columns"] = [[name, len(column)] for name, column in columns.items()]
    return Film(about, columns)


@contextmanager
def agreeing(record: Record) -> Iterator[None]:
    """InputError where its tables turn out to contradict each other."""
    try:
        yield
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        said = " ".join(str(error).split())[:160]
        raise InputError(f"{record.path or 'the record'}: its tables do not agree ({said}): run it again") from None


def about_of(record: Record) -> dict[str, Any]:
    """What it is called, and in what setting it was made."""
    header, run = record.header, record.header.get("run", {})
    name = run.get("allocator") or (record.path.name if record.path else "a record")
    if run.get("scheduler", "continuous") != "continuous":
        name += f", {run['scheduler']} batches"
    clock = "simulated" if header.get("simulated") else "measured"
    hardware = Path(str(header.get("hardware", "unknown hardware"))).stem
    workload = Path(str(header.get("workload", "unknown requests"))).name
    if run.get("n", 1) > 1 or run.get("beams"):
        workload += f", beams of {run['beams']}" if run["beams"] else f", {run['n']} outputs each"
    rate = f" at {run['rate']:g} requests/s" if run.get("rate") else ""
    setting = f"{header.get('model', 'unknown model')}, {workload}{rate}, {clock} on {hardware}"
    block, capacity = int(header["block"]), int(header["capacity"])
    return {"name": name, "setting": setting, "block": block, "blocks": capacity // block, "steps": len(record.steps)}


class Clock:
    """Seconds of the run's clock as whole ticks; of one that ran long before, from the second of its first event."""

    def __init__(self, record: Record) -> None:
        steps = record.steps
        if not np.isfinite(steps[["start_s", "end_s"]].to_numpy()).all() or (steps["end_s"].diff() < 0).any():
            raise ValueError("steps do not follow each other")
        first, last = min([steps["start_s"].iloc[0], *record.events["time_s"].iloc[:1]]), steps["end_s"].iloc[-1]
        self.origin_s = 0.0 if 0 <= first <= last - first else float(math.floor(first))
        most_s = max(steps["end_s"].iloc[-1] - self.origin_s, 1e-3)
        self.tick_s = 10.0 ** max(-6, math.ceil(math.log10(most_s / 2**30)))  # a microsecond, up to 17 minutes

    def ticks(self, time_s: Any) -> np.ndarray:
        return np.round((np.asarray(time_s, float) - self.origin_s) / self.tick_s).astype(np.int64)


def moments(record: Record, frames: int = FRAMES) -> np.ndarray:
    """The steps that become frames: every k-th, the last, those with an event, and those around a pause."""
    steps, events = record.steps, record.events
    count = len(steps)
    keep = np.zeros(count, bool)
    every = -(-count // frames)
    keep[every - 1 :: every] = True
    keep[np.minimum(events[events["kind"].isin(KEPT)]["step"], count - 1)] = True
    keep[-1] = True
    before = np.flatnonzero(pauses(record))
    keep[before] = keep[before - 1] = True
    return np.flatnonzero(keep)


def pauses(record: Record) -> np.ndarray:
    """Of each step: was there time before it in which nothing was in memory?"""
    steps, tenures = record.steps, record.tenures
    came = np.bincount(tenures["from_step"], minlength=len(steps) + 1).cumsum()[: len(steps) - 1]
    left = np.bincount(tenures["to_step"], minlength=len(steps) + 1).cumsum()[1 : len(steps)]
    gap = steps["start_s"].to_numpy()[1:] - steps["end_s"].to_numpy()[:-1]
    return np.r_[False, (came == left) & (gap > 0)]


def _frames(record: Record, kept: np.ndarray, clock: Clock) -> dict[str, np.ndarray]:
    """A frame is shown from the end of the frame before it, or from its start after a pause, to its own end."""
    steps, totals = record.steps, metrics.categories(record)
    ends = clock.ticks(steps["end_s"])[kept]
    ends = np.maximum.accumulate(ends - np.arange(len(ends))) + np.arange(len(ends))  # each lasts, if only for a tick
    begins = np.r_[clock.ticks(steps["start_s"].iloc[:1]), ends[:-1]]
    begins = np.where(pauses(record)[kept], np.maximum(begins, clock.ticks(steps["start_s"])[kept]), begins)
    columns = {"step": kept, "begin": begins, "end": ends}
    columns |= {name: totals[name].to_numpy()[kept] for name in metrics.CATEGORIES}
    columns |= {name: steps[name].to_numpy()[kept] for name in ("waiting", "running", "host")}
    for name in ("sampled", "preempted"):  # what happened in all the steps that the frame stands for
        columns[name] = np.diff(steps[name].to_numpy().cumsum()[kept], prepend=0)
    return {f"frame_{name}": column for name, column in columns.items()}


def _sequences(record: Record) -> tuple[np.ndarray, pd.DataFrame]:
    """Which sequence each sample is of, and a row per sequence: the tokens it had, or will have, at its end."""
    samples = record.samples
    codes, keys = pd.factorize(_keys(record, samples))
    end = np.zeros(len(keys), np.int64)
    end[codes] = metrics.final_lengths(record)
    request, output = np.divmod(keys, _width(record))
    return codes, pd.DataFrame({"request": request, "output": output, "end": end}, index=keys)


def _width(record: Record) -> int:
    return max(int(record.samples["output"].max()) + 1 if len(record.samples) else 1, 1)


def _keys(record: Record, table: pd.DataFrame) -> np.ndarray:
    """One number per sequence."""
    return table["request"].to_numpy().astype(np.int64) * _width(record) + table["output"].to_numpy()


def segments(record: Record, codes: np.ndarray, kept: np.ndarray) -> pd.DataFrame:
    """Steps [begin, stop) in which a sequence's tokens, computed and asked for, grow by the same in each step."""
    samples = record.samples
    order = np.lexsort((samples["step"].to_numpy(), codes))
    sequence, step, over = codes[order], samples["step"].to_numpy()[order], samples["ended"].to_numpy()[order]
    computed = samples["computed"].to_numpy().astype(np.int64)
    asked = np.clip(samples["asked"].to_numpy(), computed, samples["held"].to_numpy())[order]
    computed = computed[order]
    new = np.r_[True, (np.diff(sequence) != 0) | (np.diff(step) != 1) | (over[1:] != over[:-1])][: len(order)]
    grown, more = np.diff(computed, prepend=0), np.diff(asked, prepend=0)
    bend = np.r_[False, (grown[1:] != grown[:-1]) | (more[1:] != more[:-1])][: len(order)]
    starts = np.flatnonzero(new | (bend & ~np.r_[False, new[:-1]][: len(order)]))
    lasts = np.append(starts[1:], len(order))[: len(starts)] - 1
    longer = lasts > starts
    following = np.minimum(starts + 1, max(len(order) - 1, 0))
    table = pd.DataFrame(
        {
            "sequence": sequence[starts],
            "begin": step[starts],
            "stop": step[lasts] + 1,
            "computed": computed[starts],
            "grown": np.where(longer, grown[following], 0),
            "asked": asked[starts],
            "more": np.where(longer, more[following], 0),
            "ended": over[starts],
        }
    )
    seen = np.searchsorted(kept, table["stop"]) > np.searchsorted(kept, table["begin"])
    return table[seen]


def tenures(record: Record, sequences: pd.DataFrame, kept: np.ndarray) -> pd.DataFrame:
    """Frames [begin, stop) in which a sequence holds consecutive blocks, which are its blocks from number `at` on.

    A table changes at its tail, so its runs are a stack: what came later lies on top and goes first. Of runs that came
    together the one that goes first lies on top, too; those that also go together are recorded from the bottom up.
    """
    table = record.tenures
    num_blocks = record.header["capacity"] // record.header["block"]
    if len(table) and (table["first"].min() < 0 or (table["first"] + table["count"]).max() > num_blocks):
        raise ValueError("a sequence holds blocks outside the pool")
    owner = sequences.index.get_indexer(_keys(record, table))
    if (owner < 0).any():
        raise ValueError("somebody holds blocks who was never sampled")
    since, until, counts = (table[c].to_numpy() for c in ("from_step", "to_step", "count"))
    at = np.zeros(len(table), np.int64)
    of, top = -1, 0
    stack: list[tuple[int, int]] = []  # what lies below: until when, and the number of the block above it
    order = np.lexsort((-until, since, owner))
    rows = (column[order].tolist() for column in (owner, since, until, counts))
    for i, who, begin, stop, count in zip(order.tolist(), *rows, strict=True):
        stack = stack if who == of else []
        of = who
        while stack and stack[-1][0] <= begin:
            stack.pop()
        at[i] = top = stack[-1][1] if stack else 0
        stack.append((stop, top + count))
    columns = {"first": table["first"], "count": counts, "at": at, "sequence": owner}
    columns |= {"begin": np.searchsorted(kept, since), "stop": np.searchsorted(kept, until)}
    moved = pd.DataFrame(columns)
    return moved[moved["stop"] > moved["begin"]].sort_values("begin", kind="stable")


def requests_of(record: Record) -> pd.DataFrame:
    """By request id, in order of arrival: also those that the record names in memory and nowhere else."""
    known = record.requests.drop_duplicates("request").set_index("request")
    known = known.reindex(known.index.union(record.samples["request"].unique()))
    return known.sort_values(["arrival_s"], kind="stable")


def spells(record: Record, requests: pd.DataFrame) -> pd.DataFrame:
    """What each request (its rank in `requests`) was doing, from when to when, in seconds of the run's clock.

    It decodes from the first token after its (last) admission on.
    """
    end_s = record.steps["end_s"].to_numpy()
    rank = {request: i for i, request in enumerate(requests.index)}
    leaves = record.tenures.groupby("request")["to_step"].max().to_dict()
    outputs = requests["n"].fillna(1).to_dict()
    drew = _first_tokens(record, requests)
    rows: list[tuple[int, int, float, float]] = []
    now: dict[int, tuple[int, float, float]] = {}  # what it is doing, since when; when a prompt gives its first token

    def change(request: int, time_s: float) -> None:
        what, since_s, first_s = now.pop(request)
        time_s = max(time_s, since_s)
        if what == PROMPT and first_s < time_s:
            rows.append((rank[request], PROMPT, since_s, first_s))
            what, since_s = DECODING, first_s
        rows.append((rank[request], what, since_s, time_s))

    events = record.events[["time_s", "step", "request", "kind", "detail"]]
    for time_s, step, request, kind, detail in events.itertuples(index=False, name=None):
        if kind == "arrived":
            now.setdefault(request, (WAITING, time_s, math.inf))
        elif request not in now:
            continue
        elif kind in ("admitted", "resumed"):
            change(request, time_s)
            before, first = drew(rank[request], step)
            what = DECODING if detail == "swap" and before else PROMPT  # what was swapped is not computed again
            now[request] = (what, time_s, float(end_s[first]) if first < len(end_s) else math.inf)
        elif kind == "preempted":
            change(request, time_s)
            now[request] = (SWAPPED if detail == "swap" else PREEMPTED, time_s, math.inf)
        elif kind in ("ended", "cancelled", "refused"):
            outputs[request] = outputs[request] - 1 if kind == "ended" else 0
            if outputs[request] <= 0:
                change(request, time_s)
                gone_s = float(end_s[leaves[request] - 1]) if request in leaves else time_s
                if gone_s > time_s:
                    rows.append((rank[request], HOLDING, time_s, gone_s))
    for request in list(now):
        change(request, float(end_s[-1]))
    table = pd.DataFrame(rows, columns=["request", "kind", "begin", "stop"]).astype({"request": int, "kind": int})
    return table.sort_values(["request", "begin", "stop"], kind="stable")


def all_served(record: Record, requests: pd.DataFrame) -> bool:
    """Has everybody who came also gone, by the end of the record?"""
    events = record.events
    ended = events[events["kind"] == "ended"].groupby("request").size()
    turned_away = events[events["kind"].isin(("cancelled", "refused"))]["request"]
    came = requests.loc[requests.index.difference(turned_away.unique()), "n"].fillna(1)
    return bool((ended.reindex(came.index, fill_value=0) >= came).all())


def _first_tokens(record: Record, requests: pd.DataFrame) -> Callable[[int, int], tuple[bool, int]]:
    """Of the request of a rank: had it a token before a step, and the first step from there on that gave it one."""
    width = len(record.steps) + 1
    drew = np.unique(requests.index.get_indexer(record.tokens["request"]) * width + record.tokens["step"].to_numpy())

    def look(rank: int, step: int) -> tuple[bool, int]:
        i = int(np.searchsorted(drew, rank * width + step))
        before = i > 0 and drew[i - 1] >= rank * width
        return bool(before), int(drew[i] - rank * width) if i < len(drew) and drew[i] < (rank + 1) * width else width

    return look


def _drawn(requests: pd.DataFrame, spells: pd.DataFrame, clock: Clock) -> pd.DataFrame:
    """A row per request: its lengths, and the lane of the chart that is its own from its admission to its end."""
    inside = spells[spells["kind"] != WAITING].groupby("request").agg(begin=("begin", "min"), stop=("stop", "max"))
    lanes = np.full(len(requests), -1)
    leaving: list[tuple[int, int]] = []
    free: list[int] = []
    used = 0
    for request, begin, stop in inside.sort_values("begin", kind="stable").itertuples():
        while leaving and leaving[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(leaving)[1])
        if not free:
            heapq.heappush(free, used)
            used += 1
        lanes[request] = heapq.heappop(free)
        heapq.heappush(leaving, (stop, lanes[request]))
    sizes = {name: requests[name].fillna(0).astype(int) for name in ("prompt_tokens", "output_tokens", "n")}
    return pd.DataFrame({"arrival": clock.ticks(requests["arrival_s"].fillna(clock.origin_s)), **sizes, "lane": lanes})


def _renamed(prefix: str, table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {f"{prefix}_{name}": table[name].to_numpy().astype(np.int64) for name in table.columns}
