"""Request-level scheduling worked out by hand: who is in a batch, what it keeps, and the rectangle's padding."""

from __future__ import annotations

import pytest
from stepping import Bench, request

from lab.core import Limits


def test_static_waits_for_a_full_batch() -> None:
    bench = Bench("static", batch=2).submit(request(1, 3))
    assert bench.step(more=True, next_s=5.0) == {}
    assert bench.executor.now == 5.0
    bench.submit(request(2, 3))
    assert bench.step(more=True) == {1: 3, 2: 3}


def test_static_takes_fewer_when_no_more_will_come() -> None:
    bench = Bench("static", batch=2).submit(request(1, 3))
    assert bench.step(more=False) == {1: 3}


def test_static_takes_fewer_when_memory_has_no_room() -> None:
    bench = Bench("static", blocks=5, batch=3, watermark=0.0).submit(*(request(i, 7, 2) for i in range(3)))
    assert bench.step() == {0: 7, 1: 7}
    assert bench.blocked == 2


def test_nobody_joins_a_batch_that_runs_and_an_ended_row_keeps_its_memory() -> None:
    bench = Bench("static", batch=2, blocks=20).submit(request(1, 5, 4), request(2, 3, 2))
    assert bench.step() == {1: 5, 2: 3}
    bench.submit(request(3, 2, 1), request(4, 2, 1))
    assert bench.step() == {1: 1, 2: 1}
    assert bench.ended == [2]
    held = bench.allocator.idle().free
    assert bench.step() == {1: 1}
    assert bench.allocator.idle().free == held == 80 - 8 - 4
    assert bench.waiting == [3, 4]
    assert bench.step() == {1: 1}
    assert bench.ended == [2, 1]
    assert bench.allocator.idle().free == 80, "all of it is given back when the last row ends"
    assert bench.step() == {3: 2, 4: 2}


def test_the_rectangle_s_padding_by_hand() -> None:
    """Prompts of 5 and 3 tokens, outputs of 4 and 2: (dead tokens, dead positions) of each row.

    step     1        2         3         4
    row A    a a a a a   a         a         a         positions 5, 6, 7, 8
    row B    b b . . .   b         -         -         B computes 3 tokens, then 1, and has ended with 4
    """
    bench = Bench("static", batch=2).submit(request(1, 5, 4), request(2, 3, 2))
    padding = []
    for _ in range(4):
        bench.step()
        padding.append({(s.group.request.id): pad for s, pad in bench.plan.padding.items()})
    assert padding == [
        {2: (2, 2)},  # two dead tokens, which are the two dead positions
        {2: (0, 2)},  # B's 4 live positions in a rectangle of 6
        {2: (1, 3)},  # ended: one dead token; 7 positions, of which 4 hold something
        {2: (1, 4)},
    ]


def test_a_row_alone_has_no_padding_though_it_was_swapped() -> None:
    """Two rows grow until the six blocks are full; request 2 goes, and comes back to a batch of its own."""
    bench = Bench("static", blocks=6, batch=2, watermark=0.0, preemption="swap")
    bench.submit(request(1, 8, 8), request(2, 8, 8))
    while bench.engine.groups or bench.engine.inbox:
        bench.step()
    assert sum(len(plan.swapped) for plan in bench.plans) == 2, "out and in"
    assert not any(plan.padding for plan in bench.plans)


def test_a_batch_whose_rectangle_exceeds_the_cap_is_computed_in_parts() -> None:
    """Prompts of 6, 4 and 2 tokens under a cap of 12: 2 x 6 go first, 3 x 6 would be too many."""
    bench = Bench("static", batch=3, limits=Limits(tokens=12)).submit(request(1, 6), request(2, 4), request(3, 2))
    assert bench.step() == {1: 6, 2: 4}
    assert bench.step() == {3: 2}
    assert bench.step() == {1: 1, 2: 1, 3: 1}


def test_dynamic_starts_after_a_time_out() -> None:
    bench = Bench("dynamic", batch=4, timeout_s=10.0).submit(request(1, 3, arrival_s=2.0))
    bench.executor.now = 3.0
    assert bench.step(more=True, next_s=100.0) == {}
    assert bench.plan.wake_s == 12.0, "the oldest will have waited for 10 s"
    assert bench.executor.now == 12.0
    assert bench.step(more=True, next_s=100.0) == {1: 3}


def test_dynamic_wakes_for_an_arrival_before_the_time_out() -> None:
    bench = Bench("dynamic", batch=2, timeout_s=10.0).submit(request(1, 3, arrival_s=2.0))
    bench.executor.now = 3.0
    bench.step(more=True, next_s=5.0)
    assert bench.executor.now == 5.0
    assert bench.submit(request(2, 3, arrival_s=5.0)).step(more=True) == {1: 3, 2: 3}, "full before the time-out"


@pytest.mark.parametrize("scheduler", ["static", "dynamic"])
def test_a_batch_has_no_more_sequences_than_the_limit(scheduler: str) -> None:
    bench = Bench(scheduler, limits=Limits(seqs=3), batch=8).submit(*(request(i, 2) for i in range(8)))
    assert len(bench.step()) == 3
