"""Metrics on records small enough to compute by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lab import latency, metrics
from lab.core import InputError
from lab.latency import Rate
from lab.metrics import Batch, Blocked, Pressure, Utilisation
from lab.record import Record
from lab.tables import COLUMNS, SCHEMAS

CODES = {"i": "int32", "q": "int64", "f": "float32", "d": "float64", "b": "bool", "t": "str"}


def record(header: Mapping[str, Any] | None = None, **tables: list[dict[str, Any]]) -> Record:
    """Rows as dictionaries; columns left out are 0, False or empty."""
    frames = {}
    for name in COLUMNS:
        columns = {c.split(":")[0]: CODES[c.split(":")[1]] for c in COLUMNS[name].split()}
        rows = [{c: "" if t == "str" else 0 for c, t in columns.items()} | row for row in tables.get(name, [])]
        frames[name] = pd.DataFrame(rows, columns=list(columns)).astype(columns)
    assert {name: list(frame) for name, frame in frames.items()} == {name: s.names for name, s in SCHEMAS.items()}
    return Record(header or {"capacity": 100}, None, frames)


def steps(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps of one second each, one after the other."""
    return [{"step": i, "start_s": i, "end_s": i + 1, "seqs": 1, **row} for i, row in enumerate(rows)]


def request(i: int, arrival_s: float, prompt: int, output: int, n: int = 1, forced: bool = True) -> dict[str, Any]:
    return {
        "request": i,
        "arrival_s": arrival_s,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "n": n,
        "forced": forced,
    }


@pytest.fixture
def memory() -> Record:
    """Requests: 0 runs; 1 is an ended row; 2 stopped, two outputs that share 8 tokens, not forced; 3 was cancelled."""
    return record(
        requests=[request(0, 0, 10, 6), request(1, 0, 4, 2), request(2, 0, 9, 3, 2, False), request(3, 0, 5, 20)],
        steps=steps({"free": 10, "cached": 2}, {"free": 6, "cached": 0}),
        samples=[
            {"step": 0, "request": 0, "computed": 11, "asked": 20, "held": 32},
            {"step": 0, "request": 1, "computed": 5, "asked": 8, "held": 16, "ended": True},
            {"step": 0, "request": 2, "computed": 9, "asked": 12, "held": 16},
            {"step": 0, "request": 2, "output": 1, "skip": 8, "computed": 9, "asked": 9, "held": 16},
            {"step": 0, "request": 3, "computed": 7, "asked": 12, "held": 16},
            {"step": 1, "request": 0, "computed": 15, "asked": 12, "held": 30},  # asked for less than it has
            {"step": 1, "request": 2, "computed": 11, "asked": 70, "held": 64},  # asked for more than it got
        ],
        events=[
            {"kind": "ended", "request": 0, "detail": "length"},
            {"kind": "ended", "request": 1, "detail": "length"},
            {"kind": "ended", "request": 2, "detail": "stop"},
            {"kind": "ended", "request": 2, "output": 1, "detail": "stop"},
            {"kind": "cancelled", "request": 3, "output": -1},
        ],
    )


def test_categories(memory: Record) -> None:
    table: Any = metrics.categories(memory)
    assert table["end_s"].tolist() == [1.0, 2.0]
    # 0: end 15; 2.0: it had 11 in the end; 2.1: 9; 3: 7
    assert table.loc[0, metrics.CATEGORIES].to_dict() == {
        "stored": 11 + 9 + 1 + 7,
        "ended": 5,
        "reserved": 4 + 2,
        "excess": 5 + 3 + 1 + 5,
        "rounding": 12 + 8 + 4 + 7 + 4,
        "cached": 2,
        "free": 10,
    }
    assert table.loc[1, metrics.CATEGORIES].tolist() == [26, 0, 0, 53, 15, 0, 6]


def test_last_token_moves_one_token_per_whole_sequence(memory: Record) -> None:
    ours, artifact = (metrics.categories(memory, last_token=x).iloc[0] for x in (False, True))
    assert (artifact["reserved"] - ours["reserved"], artifact["excess"] - ours["excess"]) == (1, -1)


def test_shared_block_that_is_not_full_counts_once() -> None:
    both = [{"computed": 6, "asked": 7, "held": 8}, {"output": 1, "skip": 8, "computed": 6, "asked": 7, "held": 16}]
    run = record({"capacity": 16}, requests=[request(0, 0, 4, 9, 2)], steps=steps({}), samples=both)
    assert metrics.categories(run)[metrics.CATEGORIES].iloc[0].tolist() == [6, 0, 1, 0, 9, 0, 0]


@pytest.mark.parametrize("change", [{"free": 9}, {"free": 130, "cached": -124}])
def test_identity_is_asserted(memory: Record, change: dict[str, int]) -> None:
    for column, value in change.items():
        memory.steps.loc[1, column] = value
    with pytest.raises(AssertionError, match=r"step 1 \(and 0 more\): .*of 100"):
        metrics.shares(memory)
    metrics.shares(memory, (0.5, 1.5))  # the other step is right


def test_shares_over_iterations_and_time() -> None:
    """Half full for 1 s, full for 2 s, a gap of 5 s with nothing in memory, empty of work for 2 s and half full."""
    run = record(
        requests=[request(0, 0, 50, 51), request(1, 0, 50, 51)],
        steps=[
            {"step": 0, "start_s": 0, "end_s": 1, "seqs": 1, "free": 50},
            {"step": 1, "start_s": 1, "end_s": 3, "seqs": 1},
            {"step": 2, "start_s": 8, "end_s": 10, "free": 50},
        ],
        samples=[
            {"step": 0, "computed": 25, "asked": 50, "held": 50},
            {"step": 1, "computed": 100, "asked": 100, "held": 100},
            {"step": 2, "request": 1, "computed": 50, "asked": 50, "held": 50},
        ],
        tenures=[{"from_step": 0, "to_step": 2}, {"request": 1, "from_step": 2, "to_step": 3}],
    )
    assert metrics.shares(run)["stored"] == pytest.approx((0.25 + 1) / 2)
    assert metrics.shares(run, of="held")["stored"] == pytest.approx((0.5 + 1) / 2)
    over_time = metrics.shares(run, over="time")
    assert over_time["stored"] == pytest.approx((0.25 * 1 + 1 * 2 + 0.5 * 2) / 10)
    assert over_time["free"] == pytest.approx((0.5 * 1 + 0 * 2 + 0.5 * 2 + 5) / 10)
    assert over_time.sum() == pytest.approx(1)
    assert metrics.shares(run, of="held", over="time")["stored"] == pytest.approx((0.5 * 1 + 1 * 2 + 1 * 2) / 5)
    assert metrics.shares(run, (20, 30)).isna().all()
    run.steps.loc[2, "seqs"] = 1
    run.steps.loc[2, "free"] = 100
    nothing_held = Record(run.header, None, {**run.frames, "samples": run.samples[:2]})
    assert metrics.shares(nothing_held, of="held")["stored"] == pytest.approx((0.5 + 1) / 2)
    run.steps.loc[2, ["seqs", "free"]] = [0, 50]
    assert metrics.utilisation(run) == Utilisation(0.75, 0.625, 0.75)


def test_time_between_steps_that_share_a_sequence_is_not_idle() -> None:
    run = record(
        requests=[request(0, 0, 50, 51)],
        steps=[{"step": i, "start_s": 2 * i, "end_s": 2 * i + 1, "seqs": 1, "free": 100 * i} for i in range(2)],
        samples=[{"step": 0, "computed": 100, "asked": 100, "held": 100}],
        tenures=[{"from_step": 0, "to_step": 2}],
    )
    assert metrics.shares(run, over="time")["stored"] == pytest.approx(1 / 3)  # step 1 stands for 1 s of host and 1 s


def test_paper_shares(memory: Record) -> None:
    mean = metrics.paper_shares(memory, (0.5, 1.5))
    expected = {"stored": 0.28, "reserved": 0.06, "excess": 0.14, "others": 0.35 + 0.02 + 0.10, "ended": 0.05}
    assert mean.to_dict() == pytest.approx(expected)


def test_fragmentation_and_blocking() -> None:
    run = record(
        steps=steps(
            {"free": 30, "cached": 10, "largest": 10, "blocked": 40},
            {"free": 0, "cached": 0, "largest": 0, "blocked": 1},
            {"free": 64, "largest": 64},
            {"free": 8, "largest": 8, "seqs": 0, "blocked": 8},  # computed nothing: no iteration
        )
    )
    index = metrics.fragmentation_index(run)
    assert index[0] == pytest.approx(0.75)
    assert math.isnan(index[1])
    assert index[2] == 0
    assert metrics.blocked(run) == pytest.approx(Blocked(2 / 3, 1 / 3))


def test_pressure() -> None:
    first = {"preempted": 2, "swapped_out": 7, "copied": 1, "dead_tokens": 3}
    run = record(
        steps=steps(first, {"preempted": 1, "swapped_in": 7}, {"preempted": 5}),
        events=[
            {"step": 0, "kind": "preempted", "tokens": 40, "detail": "recompute"},
            {"step": 0, "kind": "preempted", "tokens": 7, "detail": "swap"},
            {"step": 1, "kind": "preempted", "tokens": 2, "detail": "recompute"},
            {"step": 2, "kind": "preempted", "tokens": 99, "detail": "recompute"},
        ],
    )
    assert metrics.pressure(run, (0, 2)) == Pressure(3, 42, 7, 7, 1, 3)


def test_batch_size() -> None:
    samples = [{"step": 0, "output": i} for i in range(2)] + [{"step": 0, "request": 1}, {"step": 1, "request": 1}]
    samples.append({"step": 1, "request": 0, "ended": True})
    run = record(requests=[request(0, 0, 1, 1, n=2)], steps=steps({"running": 3}, {"running": 1}), samples=samples)
    assert metrics.batch_size(run) == Batch(2.0, 1.5)


@pytest.fixture
def served() -> Record:
    """Steps end at 1, 2, ..., 8 s. Request 0: tokens at 2, 3, 5 s; 1: one at 4 s; 2: two outputs, one stops late."""
    drawn = {(0, 0): [1, 2, 4], (1, 0): [3], (2, 0): [5, 5], (2, 1): [5, 6, 7], (3, 0): [7]}
    tokens = [{"step": s, "request": r, "output": o} for (r, o), when in drawn.items() for s in when]
    ended = [(0, 0, "length"), (1, 0, "stop"), (2, 0, "stop"), (2, 1, "length")]
    admitted = {0: 1.0, 1: 2.5, 2: 4.0, 3: 6.0}
    return record(
        requests=[request(0, 0.5, 10, 3), request(1, 2, 20, 1), request(2, 3, 30, 3, 2, False), request(3, 5, 40, 9)],
        steps=steps(*[{"compiled": i == 2} for i in range(8)]),
        tokens=sorted(tokens, key=lambda t: t["step"]),
        events=[{"kind": "admitted", "request": r, "output": -1, "time_s": t} for r, t in admitted.items()]
        + [{"kind": "ended", "request": r, "output": o, "detail": why} for r, o, why in ended],
    )


def test_latencies(served: Record) -> None:
    columns = ["queue_s", "ttft_s", "e2e_s", "tpot_s", "normalised_s", "output_tokens"]
    table: Any = latency.latencies(served).set_index(["request", "output"])[columns]
    assert table.loc[(0, 0)].tolist() == pytest.approx([0.5, 1.5, 4.5, 1.5, 1.5, 3])
    assert table.loc[(1, 0)].tolist() == pytest.approx([0.5, 2, 2, np.nan, 2, 1], nan_ok=True)
    assert table.loc[(2, 0)].tolist() == pytest.approx([1, 3, 3, 0, 1.5, 2])
    assert table.loc[(2, 1)].tolist() == pytest.approx([1, 3, 5, 1, 5 / 3, 3])
    assert len(table) == 4  # request 3 has not ended
    assert len(latency.latencies(served, (2, 3))) == 3


def test_gaps(served: Record) -> None:
    assert sorted(latency.gaps(served)) == [0, 1, 1, 1, 2]
    assert sorted(latency.gaps(served, (0, 1))) == [1, 2]


def test_gaps_of_many_outputs_in_the_same_steps() -> None:
    tokens = [{"step": 2 * s, "request": r} for s in range(50) for r in range(5)]
    run = record(requests=[request(r, 0, 1, 50) for r in range(5)], steps=steps(*[{}] * 100), tokens=tokens)
    assert latency.gaps(run).tolist() == [2.0] * 245


def test_latency_summary(served: Record) -> None:
    summary: Any = latency.latency_summary(served)
    assert summary.loc["e2e_s"].tolist() == pytest.approx([3.625, 3.75, 4.85, 4.985, 4])
    assert summary.loc["tpot_s", ["mean", "p50", "count"]].tolist() == pytest.approx([2.5 / 3, 1, 3])
    assert summary.loc["itl_s", ["mean", "count"]].tolist() == pytest.approx([1, 5])
    assert summary.index.tolist() == latency.LATENCIES


def test_throughput(served: Record) -> None:
    # 10 tokens in [0.5, 8]; prompts of 0, 1, 2 and 3; request 2 counts when its second output ends
    assert latency.throughput(served) == pytest.approx(Rate(3 / 7.5, 10 / 7.5, 110 / 7.5))
    assert latency.throughput(served, (2, 6)) == pytest.approx(Rate(2 / 4, 7 / 4, (7 + 60) / 4))
    assert latency.offered(served, (2, 6)) == pytest.approx(Rate(3 / 4, (1 + 6 + 9) / 4, (16 + 90) / 4))


def test_goodput(served: Record) -> None:
    assert latency.goodput(served, {}) == pytest.approx((3 / 4, 3 / 7.5))
    assert latency.goodput(served, {"ttft_s": 2.0}) == pytest.approx((2 / 4, 2 / 7.5))
    assert latency.goodput(served, {"ttft_s": 3.0, "tpot_s": 1.0}) == pytest.approx((2 / 4, 2 / 7.5))
    assert latency.goodput(served, {"e2e_s": 4.0}, (2, 4)) == pytest.approx((1 / 2, 1 / 2))
    with pytest.raises(InputError, match=r"limit 'ttft' is unknown: known are normalised_s, queue_s, ttft_s"):
        latency.goodput(served, {"ttft": 1.0})


def test_goodput_asks_for_every_output(served: Record) -> None:
    late = served.events[~((served.events["request"] == 2) & (served.events["output"] == 1))]
    assert latency.goodput(Record(served.header, None, {**served.frames, "events": late}), {}).share == 2 / 4


def test_device(served: Record) -> None:
    assert metrics.compiled_steps(served) == 1
    assert metrics.compiled_steps(served, (4, 9)) == 0
    start_s, end_s = served.steps.loc[2, ["start_s", "end_s"]]
    assert metrics.compiling_s(served) == pytest.approx(end_s - start_s)
    assert metrics.device_memory(served) == {}
    assert metrics.device_memory(record({"device_memory": {"weights": 5, "pool": 7}})) == {"weights": 5, "pool": 7}


def test_record_of_nothing() -> None:
    empty = record()
    assert len(metrics.categories(empty)) == len(latency.latencies(empty)) == len(latency.gaps(empty)) == 0
    assert metrics.shares(empty).isna().all()
    assert metrics.shares(empty, over="time").isna().all()
    assert latency.latency_summary(empty)["count"].tolist() == [0] * 6
    assert math.isnan(latency.goodput(empty, {}).share)
    assert math.isnan(latency.throughput(empty).requests_per_s)
