"""The recorder against hand-written engine calls with known answers, and against the definition of the categories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import Shelf, group, serve, step

from lab import metrics
from lab.allocators import Usage, account
from lab.core import Plan, Sampled, Sequence
from lab.record import Record, Recorder


@pytest.fixture(scope="module")
def served() -> Record:
    recorder = Recorder(None, {"model": "m"})
    serve(recorder)
    recorder.close()
    return recorder.record()


def test_steps(served: Record) -> None:
    steps = served.steps
    assert steps["step"].tolist() == [0, 1, 2, 3]
    assert steps["end_s"].tolist() == [1.0, 1.5, 2.0, 2.5]
    assert steps["seqs"].tolist() == [1, 3, 2, 0]
    assert steps["tokens"].tolist() == [5, 6, 4, 0]
    assert steps["sampled"].tolist() == [0, 3, 4, 0]
    assert (steps["dead_tokens"][0], steps["dead_positions"][0], steps["blocked"][0]) == (2, 7, 5)
    assert steps["running"].tolist() == [1, 3, 2, 2]
    assert steps["free"].tolist() == [120, 104, 112, 104]
    assert (steps["copied"][1], steps["swapped_out"][2], steps["swapped_in"][3]) == (1, 4, 4)
    assert steps["host"].tolist() == [0, 0, 4, 0]
    assert steps["preempted"].tolist() == [0, 0, 1, 0]
    assert steps["compiled"].tolist() == [True, False, False, False]
    assert (served.header["capacity"], served.header["block"], served.header["model"]) == (128, 4, "m")


def test_tokens(served: Record) -> None:
    rows = served.tokens[["step", "request", "output", "value"]].to_numpy().tolist()
    assert rows == [
        [1, 0, 0, 11],
        [1, 0, 1, 12],
        [1, 2, 0, 13],
        [2, 0, 0, 21],
        [2, 0, 0, 31],
        [2, 0, 1, 22],
        [2, 0, 1, 32],
    ]
    assert served.tokens["logprob"].tolist() == [-0.5, -1.0, -2.0, 0, 0, 0, 0]


def test_events(served: Record) -> None:
    columns = ["time_s", "step", "request", "output", "kind", "tokens", "detail"]
    assert served.events[columns].to_numpy().tolist() == [
        [0.0, 0, 0, -1, "arrived", 6, ""],
        [0.125, 0, 1, -1, "arrived", 999, ""],
        [0.125, 0, 1, -1, "refused", 1002, "too long"],
        [0.25, 0, 2, -1, "arrived", 4, ""],
        [0.25, 0, 0, -1, "admitted", 0, ""],
        [1.0, 1, 2, -1, "admitted", 0, ""],
        [1.0, 1, 0, 1, "forked", 5, ""],
        [1.5, 2, 2, -1, "preempted", 4, "swap"],
        [2.0, 2, 0, 1, "ended", 3, "length"],
        [2.0, 3, 2, -1, "resumed", 4, "swap"],
        [2.5, 4, 2, -1, "cancelled", 1, ""],
        [2.5, 3, 0, 0, "ended", 3, "length"],
    ]


def test_samples(served: Record) -> None:
    columns = ["step", "request", "output", "skip", "computed", "asked", "held", "ended"]
    assert served.samples[columns].to_numpy().tolist() == [
        [0, 0, 0, 0, 5, 5, 8, False],
        [1, 0, 0, 0, 6, 9, 12, False],
        [1, 0, 1, 4, 6, 6, 8, False],
        [1, 2, 0, 0, 4, 8, 8, False],
        [2, 0, 0, 0, 8, 8, 12, False],
        [2, 0, 1, 4, 8, 8, 8, False],
        [3, 0, 0, 0, 8, 8, 12, False],
        [3, 2, 0, 0, 4, 8, 8, False],
        [3, 0, 1, 4, 8, 8, 8, True],
    ]


def test_tenures(served: Record) -> None:
    columns = ["first", "count", "request", "output", "from_step", "to_step"]
    assert served.tenures[columns].to_numpy().tolist() == [
        [10, 2, 2, 0, 1, 2],  # swapped out
        [3, 2, 0, 0, 0, 4],
        [5, 1, 0, 0, 1, 4],
        [3, 1, 0, 1, 1, 4],
        [7, 1, 0, 1, 1, 4],
        [20, 2, 2, 0, 3, 4],
    ]


def test_requests(served: Record) -> None:
    rows: Any = served.requests.set_index("request")[
        ["arrival_s", "prompt_tokens", "output_tokens", "forced", "max_tokens", "n"]
    ]
    assert rows.loc[0].tolist() == [0.0, 6, 3, True, 8, 2]
    assert rows.loc[1].tolist() == [0.0, 999, 3, True, 8, 1]
    assert rows.loc[2].tolist() == [0.25, 4, 1, False, 8, 1]


def test_tenures_of_a_table_that_is_replaced() -> None:
    pool, recorder = Shelf(), Recorder(None, {})
    s = group().live[0]
    for table in ([4, 5, 6, 9], [4, 5, 6, 8], [4, 5, 6, 8], [7], []):
        pool.tables[s], pool.asked[s] = table, 0
        step(recorder, 0, 0, Plan(), {}, pool, [s], [], 0, 0)
    recorder.close()
    columns = ["first", "count", "from_step", "to_step"]
    rows = recorder.record().tenures[columns].to_numpy().tolist()
    assert rows == [[9, 1, 0, 1], [4, 3, 0, 3], [8, 1, 1, 3], [7, 1, 3, 4]]


def test_memory_held_is_bounded(tmp_path: Path) -> None:
    pool, most = Shelf(), 0
    with Recorder(tmp_path / "run", {}, chunk_rows=100) as recorder:
        for i in range(1000):
            g = group(i, output=None)
            s = g.live[0]
            recorder.arrived(float(i), g.request)
            pool.extend(s, 6)
            s.tokens.append(1)
            step(recorder, i, i + 1, Plan(work={s: 6}, admitted={g: 0}), {s: [Sampled(1)]}, pool, [s], [], 0, 0)
            recorder.ended(i + 1, s, "stop")
            pool.release(s)
            buffers = [len(rows) for rows in recorder._rows.values()]
            buffers += [len(recorder._samples), len(recorder._tokens), len(recorder._open), len(recorder._unfinished)]
            most = max(most, *buffers)
    assert most <= 102
    record = Record.load(tmp_path / "run")
    assert len(record.samples) == len(record.tokens) == len(record.requests) == 1000
    assert record.samples["step"].tolist() == record.requests["request"].tolist() == list(range(1000))
    assert (record.requests["output_tokens"] == 1).all()


OPERATIONS = st.tuples(
    st.sampled_from(["start", "compute", "fork", "fork", "borrow", "end", "leave"]), st.integers(0, 63)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OPERATIONS, min_size=12, max_size=40), st.sampled_from([0, 7, 19]))
def test_categories_are_those_of_account(operations: list[tuple[str, int]], most: int) -> None:
    """Shared prefixes, copies on write, ended holders: the closed form counts every slot as the definition does."""
    pool, recorder = Shelf(40, 4, most), Recorder(None, {})
    live: list[Sequence] = []
    ended: list[Sequence] = []
    expected: list[Usage] = []
    for i, (what, pick) in enumerate([("start", 5), *operations]):
        act(pool, live, ended, what, pick, i, recorder)
        if live:
            live.append(live.pop(pick % len(live)))  # the order is that of ranks, which change
        step(recorder, i, i + 1, Plan(), {}, pool, live, ended, 0, 0)
        expected.append(account(pool, live, ended))
    recorder.close()
    table = metrics.categories(recorder.record())
    assert [Usage(*row) for row in table[metrics.CATEGORIES].to_numpy().tolist()] == expected


def act(
    pool: Shelf, live: list[Sequence], ended: list[Sequence], what: str, pick: int, i: int, recorder: Recorder
) -> None:
    s = live[pick % len(live)] if live else None
    if what == "start":
        new = group(i, prompt=5, output=14)
        recorder.arrived(i, new.request)
        if pool.extend(new.live[0], 1 + pick % 9):
            new.live[0].computed = 1 + pick % 9
            live.append(new.live[0])
    elif s is None:
        return
    elif what == "compute":
        length = min(s.computed + 1 + pick % 5, s.end)
        if length > s.computed and pool.extend(s, length):
            s.computed = length
    elif what in ("fork", "borrow"):
        child = Sequence(s.group if what == "fork" else group(1000 + i).live[0].group, 4 + i, [], 0)
        length = s.computed if what == "fork" else s.computed // pool.block * pool.block
        if child.group is not s.group:
            recorder.arrived(i, child.group.request)
        if 0 < length <= child.end and pool.fork(s, child, length):
            child.computed = length
            live.append(child)
    elif what == "end":
        live.remove(s)
        ended.append(s)
    else:
        live.remove(s)
        pool.release(s)


def test_a_group_that_is_admitted_and_lost_in_one_plan_was_admitted() -> None:
    """A batch that is formed and finds no memory for its first step: two events, in this order."""
    recorder = Recorder(None, {})
    lost = group(1)
    recorder.arrived(0.0, lost.request)
    lost.preemptions = 1
    plan = Plan(admitted={lost: 0}, preempted={lost: 0})
    step(recorder, 0.0, 1.0, plan, {}, Shelf(128, 4), [], [], 1, 0)
    again = Plan(admitted={lost: 0})
    step(recorder, 1.0, 2.0, again, {}, Shelf(128, 4), [], [], 0, 0)
    recorder.close()
    assert recorder.record().events["kind"].tolist() == ["arrived", "admitted", "preempted", "resumed"]


def test_a_refused_request_leaves_the_one_with_its_id_alone() -> None:
    recorder = Recorder(None, {})
    first, second = group(1, prompt=6, output=None).request, group(1, prompt=2, output=None).request
    recorder.arrived(0.0, first)
    recorder.arrived(1.0, second)
    recorder.refused(1.0, second, "in flight already")
    recorder.close()
    rows = recorder.record().requests
    assert rows[["request", "arrival_s", "prompt_tokens"]].to_numpy().tolist() == [[1, 0.0, 6]]
