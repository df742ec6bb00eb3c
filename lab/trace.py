"""A record in the Trace Event format: `python -m lab.trace RECORD` writes a file that Perfetto opens.

Two processes per record: the engine, with a slice per step and counters of memory, queue and throughput, and the
requests, each a thread whose slices say what it was doing. Times in the file are microseconds, to the nanosecond.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lab import metrics
from lab.command import Parser, status, write
from lab.film import Clock, about_of, agreeing, pauses, requests_of, spells
from lab.record import Record
from lab.view import different_pools, load

Event = dict[str, Any]

PHASES = ("waiting", "prompt", "decode", "preempted", "swapped", "ended, memory held")  # by number, as in lab.film
FIRST_THREAD = 1000  # above all processes: a thread with its process's number would be taken for its main one


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "no trace was written")


def _main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m lab.trace", description="Write what happened in runs as a trace for Perfetto.")
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="a run's folder, as results/runs/KEY")
    parser.add_argument("--out", type=Path, default=Path("trace.json"), metavar="FILE", help="(default: trace.json)")
    args = parser.parse_args(arguments)
    records = [load(path) for path in args.records]
    size = write(args.out, _lines(records))
    for record in records:
        print(f"{about_of(record)['name']}: {len(record.steps):,} steps, {len(requests_of(record)):,} requests")
    print(different_pools(map(about_of, records)), end="")
    print(f"trace    {args.out} ({size / 1e6:.1f} MB): open it in Perfetto (ui.perfetto.dev) or chrome://tracing")
    return 0


def _lines(records: list[Record]) -> Iterator[str]:
    """The file, an event on each line."""
    settings = {f"{i} {about_of(record)['name']}": about_of(record)["setting"] for i, record in enumerate(records, 1)}
    yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(settings)}, "traceEvents": [\n'
    before = ""
    threads = count(FIRST_THREAD)
    for i, record in enumerate(records):
        for event in events(record, 2 * i + 1, threads):
            yield before + json.dumps(event, allow_nan=False)
            before = ",\n"
    yield "\n]}\n"


def events(record: Record, process: int = 1, threads: Iterator[int] | None = None) -> Iterator[Event]:
    """Trace events: the engine is `process`, the requests are the next. InputError where tables contradict each other.

    A step's memory is what it left, and stands from the end of the step before, as in `metrics.shares(over="time")`;
    the throughput of a step is the tokens that it drew over the same time.
    """
    threads = count(FIRST_THREAD) if threads is None else threads
    with agreeing(record):
        origin_s = Clock(record).origin_s
        about = about_of(record)
        name = f"{about['name']} ({'simulated' if record.header.get('simulated') else 'measured'})"
        yield from _named(process, f"{name}: engine", about["setting"])
        yield from _steps(record, origin_s, process, next(threads))
        yield from _counters(record, origin_s, process)
        yield from _named(process + 1, f"{name}: requests", about["setting"])
        yield from _requests(record, origin_s, process + 1, threads)


def _steps(record: Record, origin_s: float, process: int, thread: int) -> Iterator[Event]:
    steps = record.steps
    starts, ends = (_ns(steps[column], origin_s) for column in ("start_s", "end_s"))
    if (starts > ends).any() or (starts[1:] < ends[:-1]).any():
        raise ValueError("steps overlap")
    yield _meta(process, thread, "thread_name", name="steps")
    shown = steps.drop(columns=["step", "start_s", "end_s"])
    for i, (start, end, row) in enumerate(zip(starts.tolist(), ends.tolist(), shown.to_dict("records"), strict=True)):
        name = f"{row['seqs']} sequences, {row['tokens']} tokens" if row["seqs"] else "nothing computed"
        happened = {"step": i} | {what: value for what, value in row.items() if value}
        yield _event("X", process, thread, start, name, happened) | {"dur": (end - start) / 1000}


def _counters(record: Record, origin_s: float, process: int) -> Iterator[Event]:
    """Each from the moment on at which its value changes."""
    steps = record.steps
    starts, ends = (_ns(steps[column], origin_s) for column in ("start_s", "end_s"))
    begins = np.r_[starts[:1], ends[:-1]]
    paused = pauses(record)
    idle = ends[:-1][paused[1:]]  # from here on until the next step, nothing is in memory
    begins = np.where(paused, starts, begins)
    memory = metrics.categories(record)[metrics.CATEGORIES]
    empty = dict.fromkeys(metrics.CATEGORIES, 0) | {"free": record.header["capacity"]}
    yield from _counter(process, "KV memory (tokens)", begins, memory, idle, empty)
    yield from _counter(process, "requests", begins, steps[["waiting"]])
    yield from _counter(process, "sequences", begins, steps[["running"]], idle, {"running": 0})
    if steps["host"].any():
        yield from _counter(process, "host memory (tokens)", begins, steps[["host"]].set_axis(["swapped"], axis=1))
    until, first = np.unique(ends, return_index=True)  # several steps may end at once, where a clock is coarse
    drawn = np.add.reduceat(steps["sampled"].to_numpy(), first)
    seconds = np.maximum(until - begins[first], 1) / 1e9
    rate = pd.DataFrame({"drawn": drawn / seconds})
    yield from _counter(process, "output tokens/s", begins[first], rate, idle, {"drawn": 0.0})


def _counter(
    process: int,
    name: str,
    begins: np.ndarray,
    values: pd.DataFrame,
    idle: np.ndarray | None = None,
    empty: dict[str, Any] | None = None,
) -> Iterator[Event]:
    """`values` hold from `begins` on, `empty` from `idle` on; one begins where the other ends."""
    rows = list(zip(begins.tolist(), values.to_dict("records"), strict=True))
    if idle is not None and empty is not None:
        rows = sorted([*rows, *((time, empty) for time in idle.tolist())], key=lambda row: row[0])
    last: dict[str, Any] | None = None
    for (time, value), (until, _) in zip(rows, [*rows[1:], (None, None)], strict=True):
        if value != last and time != until:  # of several at once the last is what stands
            yield _event("C", process, 0, time, name, value)
            last = value


def _requests(record: Record, origin_s: float, process: int, threads: Iterator[int]) -> Iterator[Event]:
    requests = requests_of(record)
    thread_of = dict(zip(requests.index.tolist(), threads, strict=False))
    sizes = requests[["prompt_tokens", "output_tokens"]].fillna(0).astype(int)
    for rank, (request, prompt, output) in enumerate(sizes.itertuples(name=None)):
        name = f"request {request}: {prompt} + {output} tokens" if output else f"request {request}: {prompt} tokens"
        yield _meta(process, thread_of[request], "thread_name", name=name)
        yield _meta(process, thread_of[request], "thread_sort_index", sort_index=rank)
    doing = spells(record, requests)
    doing = doing[doing["stop"] > doing["begin"]]
    begins, stops = (_ns(doing[column], origin_s).tolist() for column in ("begin", "stop"))
    for rank, kind, begin, stop in zip(doing["request"], doing["kind"], begins, stops, strict=True):
        thread = thread_of[requests.index[rank]]
        yield _event("X", process, thread, begin, PHASES[kind]) | {"dur": (stop - begin) / 1000}
    told = record.events[record.events["kind"].isin(["refused", "forked", "ended", "cancelled"])]
    times = _ns(told["time_s"], origin_s).tolist()
    for time, row in zip(times, told.itertuples(index=False), strict=True):
        name = row.kind if row.output < 0 else f"output {row.output} {row.kind}"
        happened = {"tokens": row.tokens, "step": row.step} | ({"reason": row.detail} if row.detail else {})
        yield _event("i", process, thread_of[row.request], time, name, happened) | {"s": "t"}


def _named(process: int, name: str, setting: str) -> Iterator[Event]:
    yield _meta(process, 0, "process_name", name=name)
    yield _meta(process, 0, "process_labels", labels=setting)
    yield _meta(process, 0, "process_sort_index", sort_index=process)


def _meta(process: int, thread: int, what: str, **value: Any) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": value}


def _event(phase: str, process: int, thread: int, time_ns: int, name: str, args: dict[str, Any] | None = None) -> Event:
    event = {"ph": phase, "pid": process, "tid": thread, "ts": time_ns / 1000, "name": name}
    return event | {"args": args} if args else event


def _ns(time_s: pd.Series, origin_s: float) -> np.ndarray:
    return np.round((time_s.to_numpy(float) - origin_s) * 1e9).astype(np.int64)


if __name__ == "__main__":
    sys.exit(main())
