"""A step in flight while the next is planned: what is known at launch, what shows late, and what waits for values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from serving import Watch
from stepping import Bench, request

from lab.core import UNKNOWN, Group, Limits, Plan, Request, SamplingParams, common_prefix
from lab.executors.checksum import text
from lab.record import Record, Recorder


def stopping(id: int, prompt: int, after: int, most: int = 30, n: int = 1) -> Request:
    """Its stop token is the one that its first output has `after` tokens before it."""
    free = Request(id, 0.0, range(id, id + prompt), None, SamplingParams(max_tokens=most, n=n))
    token = text(free)[0][after]
    return replace(free, sampling=replace(free.sampling, stop=(token,)))


def tokens(bench: Bench, id: int) -> list[int]:
    """The output of a group in flight, as far as it is known."""
    (s,) = bench.engine.groups[id].live
    return s.tokens[len(s.group.request.prompt) :]


def test_the_next_step_is_launched_before_a_step_is_collected() -> None:
    bench = Bench(depth=1).submit(request(1, 5, 4))
    expected = text(request(1, 5, 4))[0]
    assert bench.step() == {1: 5}
    assert tokens(bench, 1) == [UNKNOWN]
    assert bench.step() == {1: 1}
    assert tokens(bench, 1) == [expected[0], UNKNOWN]
    assert len(bench.engine.flights) == 1
    bench.drain()
    assert bench.texts == {1: [expected]}


def test_a_known_end_gives_memory_back_at_launch_and_shows_when_it_is_collected() -> None:
    """Two requests of which memory holds one: the second is admitted in the same step as at depth 0."""
    for depth in (0, 1):
        bench = Bench(blocks=3, watermark=0.0, depth=depth).submit(request(1, 9, 2), request(2, 9, 2))
        work = [bench.step() for _ in range(4)]
        assert work == [{1: 9}, {1: 1}, {2: 9}, {2: 1}]
        assert bench.allocator.idle().free == 12
        assert bench.ended == ([1, 2] if depth == 0 else [1])
        bench.drain()
        assert bench.texts == {id: text(request(id, 9, 2)) for id in (1, 2)}


def test_an_end_that_a_value_tells_shows_a_step_late() -> None:
    one = stopping(1, 5, 2)
    expected = text(one)
    for depth, last in ((0, [{1: 5}, {1: 1}, {1: 1}, {}]), (1, [{1: 5}, {1: 1}, {1: 1}, {1: 1}])):
        bench = Bench(depth=depth).submit(one)
        assert [bench.step() for _ in last] == last
        assert bench.texts == {1: expected}, "the dead row has left no token"
        bench.drain()
        assert bench.ended == [1]


def test_the_last_token_of_a_known_length_may_be_a_stop_token() -> None:
    """The length says at launch that it is the last, the value says when collected why."""
    watch = Watch(cancels=False)
    bench = Bench(depth=1).submit(stopping(1, 5, after=2, most=3))
    bench.engine.recorder, watch.engine = watch, bench.engine
    assert [bench.step() for _ in range(3)] == [{1: 5}, {1: 1}, {1: 1}]
    bench.drain()
    assert (watch.count["stop"], watch.count["length"]) == (1, 0)


def test_an_output_on_its_way_keeps_its_group_from_being_complete() -> None:
    """One ends by a token of step k, seen when the other, of known length, has left with the launch of step k + 1."""
    two = next(one for id in range(2, 99) if ends_alone(one := stopping(id, 5, after=6, most=8, n=2), after=6))
    bench = Bench(depth=1).submit(two)
    bench.step()
    bench.drain()
    assert bench.ended == [two.id]
    assert bench.texts == {two.id: text(two)}


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize(("n", "blocks", "after"), [(1, 6, 4), (2, 8, 3)])
def test_preempted_while_the_token_on_its_way_is_its_last(preemption: str, n: int, blocks: int, after: int) -> None:
    """Step 6 takes the memory of request 2 for the block that request 1 needs, and step 5 has ended an output of 2."""
    two = next(one for id in range(2, 99) if (one := stopping(id, 7, after, most=8, n=n)) and ends_alone(one, after))
    bench = Bench(blocks=blocks, watermark=0.0, preemption=preemption, depth=1)
    bench.submit(request(1, 8, 10), two)
    for _ in range(5):
        bench.step()
    group = bench.engine.groups[two.id]
    assert not group.ended
    bench.step()
    assert list(bench.plan.preempted) == [group]
    assert [s.index for s in group.ended] == [0]
    assert bench.waiting == ([two.id] if n > 1 else [])
    assert bench.scheduler.host.used == (12 if n > 1 and preemption == "swap" else 0), "what the other one is in stays"
    for _ in range(60):
        bench.step()
    bench.drain()
    assert bench.texts == {1: text(request(1, 8, 10)), two.id: text(two)}


def ends_alone(request: Request, after: int) -> bool:
    first, *others = text(request)
    return len(first) == after + 1 and all(len(other) == 8 for other in others)


@pytest.mark.parametrize("n", [1, 3])
def test_cancel_with_a_step_in_flight(n: int) -> None:
    bench = Bench(depth=1).submit(request(1, 5, 20), request(2, 6, 20, n=n))
    for _ in range(4):
        bench.step()
    group = bench.engine.groups[2]
    bench.engine.cancel(2)
    assert bench.step() == {1: 1}
    assert not any(UNKNOWN in s.tokens for s in group.sequences), "what it was given before it was cancelled has come"
    assert 2 not in bench.engine.groups
    for _ in range(30):
        bench.step()
    bench.drain()
    assert bench.texts == {1: text(request(1, 5, 20))}


def test_a_cancellation_that_comes_when_the_last_step_is_in_flight_is_too_late() -> None:
    bench = Bench(depth=1).submit(request(1, 5, 2))
    bench.step()
    bench.step()
    assert bench.engine.flights
    bench.engine.cancel(1)
    bench.step()
    assert bench.texts == {1: text(request(1, 5, 2))}


def test_what_needs_values_to_plan_is_collected_at_once() -> None:
    beams = Request(2, 0.0, range(6), 5, SamplingParams(beams=2))
    bench = Bench(depth=1).submit(request(1, 5, 20), beams)
    while 2 not in bench.ended:
        bench.step()
        assert not bench.engine.flights
    bench.step()
    assert bench.engine.flights, "without the search they overlap again"
    bench = Bench(allocator="paged-prefix", depth=1).submit(request(1, 5, 3))
    bench.step()
    assert not bench.engine.flights


def test_a_wait_collects_first() -> None:
    bench = Bench(depth=1).submit(request(1, 5, 1))
    bench.step()
    assert not bench.ended
    bench.step(more=True, next_s=100.0)
    assert bench.ended == [1]
    assert bench.executor.now == 1.0, "it has not waited yet"
    bench.step(more=True, next_s=100.0)
    assert bench.executor.now == 100.0


def test_a_run_that_is_cut_off_collects_what_it_launched() -> None:
    for limit in ({"until_s": 3.0}, {"go_on": iter([True, True, False]).__next__}):
        bench = Bench(depth=1)
        watch = Watch(cancels=False)
        bench.engine.recorder, watch.engine = watch, bench.engine
        bench.engine.run([request(1, 5, 20)], **limit)  # type: ignore[arg-type]
        assert (len(bench.plans), watch.count["steps"]) == (3, 3)
        assert not bench.engine.flights
        assert tokens(bench, 1) == text(request(1, 5, 20))[0][:3]


def test_a_failed_step_leaves_the_one_in_flight_to_be_collected() -> None:
    bench = Bench(depth=1).submit(request(1, 5, 3))
    bench.step()
    schedule = bench.scheduler.schedule

    def fail(now: float, more: bool) -> Plan:
        raise ZeroDivisionError

    bench.scheduler.schedule = fail  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        bench.engine.step()
    bench.scheduler.schedule = schedule  # type: ignore[method-assign]
    for _ in range(5):
        bench.step()
    assert bench.texts == {1: text(request(1, 5, 3))}


def test_a_reserved_prefix_is_computed_before_it_is_kept() -> None:
    bench = Bench(limits=Limits(tokens=8), depth=1)
    assert bench.engine.reserve(range(1, 14)) == 12
    assert not bench.engine.flights
    assert not bench.allocator.tables
    bench.submit(request(1, 20, 6))
    assert bench.step() == {1: 8}
    for _ in range(9):
        bench.step()
    assert bench.texts == {1: text(request(1, 20, 6))}


def record_of(depth: int) -> Record:
    recorder = Recorder(None, {}, chunk_rows=7)
    bench = Bench(blocks=12, watermark=0.0, preemption="swap", depth=depth)
    bench.engine.recorder = recorder
    bench.engine.run([request(i, 5 + i, 12 - i, n=1 + i % 2, arrival_s=float(i)) for i in range(8)])
    recorder.close()
    return recorder.record()


def test_the_record_is_that_of_depth_0_but_for_the_times() -> None:
    at_once, in_flight = record_of(0), record_of(1)
    assert (at_once.steps["preempted"] > 0).any()
    for name, times in (
        ("steps", ["start_s", "end_s"]),
        ("samples", []),
        ("tenures", []),
        ("tokens", []),
        ("requests", []),
    ):
        expected, got = (getattr(record, name).drop(columns=times) for record in (at_once, in_flight))
        assert got.equals(expected), name
    columns = ["step", "request", "output", "kind", "tokens", "detail"]
    events = [sorted(record.events[columns].to_numpy().tolist()) for record in (at_once, in_flight)]
    assert events[0] == events[1]
    steps = in_flight.steps
    assert (steps["start_s"] <= steps["end_s"]).all()
    assert (steps["end_s"].to_numpy()[:-1] <= steps["start_s"].to_numpy()[1:]).all()
    assert in_flight.events["time_s"].is_monotonic_increasing
    ended = in_flight.events[in_flight.events["kind"] == "ended"]
    assert ended["time_s"].tolist() == steps["end_s"][ended["step"]].tolist()


def test_unknown_tokens_share_nothing_that_is_computed_or_forked() -> None:
    """Two outputs whose last tokens are on their way: they pass for the same, and it makes no difference."""
    group = Group(Request(0, 0.0, (1, 2, 3), 9, SamplingParams(n=2)))
    for s in group.live:
        s.tokens += [4, UNKNOWN]
        s.computed = 4
    assert common_prefix([s.tokens for s in group.live]) == 5
    assert group.distinct == 4, "as if the tokens were known, whatever they are"
    for s in group.live:
        s.computed = 0
    assert group.to_share == 4, "known tokens only: each computes its own last one"
