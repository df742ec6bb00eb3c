"""Iteration-level scheduling worked out by hand: order, cap, memory, preemption, swapping. Blocks are of 4 tokens."""

from __future__ import annotations

from stepping import Bench, ids, request

from lab.core import Group, Limits
from lab.executors.checksum import text


def test_prompts_and_decodes_are_computed_in_one_step_in_order_of_arrival() -> None:
    bench = Bench()
    bench.submit(request(1, 5))
    assert bench.step() == {1: 5}
    bench.submit(request(2, 3), request(3, 7))
    work = bench.step()
    assert work == {1: 1, 2: 3, 3: 7}
    assert list(work) == [1, 2, 3], "running first, then the queue"
    assert bench.step() == {1: 1, 2: 1, 3: 1}


def test_a_whole_prompt_waits_for_room_under_the_cap_and_so_do_all_behind_it() -> None:
    bench = Bench(limits=Limits(tokens=10)).submit(request(1, 6), request(2, 6), request(3, 2))
    assert bench.step() == {1: 6}
    assert bench.waiting == [2, 3], "request 3 would fit, but it came later"
    assert bench.step() == {1: 1, 2: 6, 3: 2}


def test_a_prompt_longer_than_the_cap_is_computed_in_chunks() -> None:
    bench = Bench(limits=Limits(tokens=10)).submit(request(1, 23), request(2, 4))
    assert [bench.step() for _ in range(3)] == [{1: 10}, {1: 10}, {1: 3, 2: 4}]
    assert bench.scheduler.running[0].live[0].outputs == 1
    assert bench.step() == {1: 1, 2: 1}


def test_a_prompt_longer_than_the_cap_starts_beside_running_ones() -> None:
    bench = Bench(limits=Limits(tokens=6)).submit(request(1, 4, 5))
    bench.step()
    bench.submit(request(2, 9, 2), request(3, 1, 2))
    assert bench.step() == {1: 1, 2: 5}
    assert bench.step() == {1: 1, 2: 4, 3: 1}


def test_running_sequences_come_first_under_the_cap() -> None:
    bench = Bench(limits=Limits(tokens=4)).submit(*(request(i, 1) for i in range(4)))
    assert bench.step() == {0: 1, 1: 1, 2: 1, 3: 1}
    bench.submit(request(4, 1))
    assert bench.step() == {0: 1, 1: 1, 2: 1, 3: 1}
    assert bench.waiting == [4]


def test_no_more_sequences_than_the_limit() -> None:
    bench = Bench(limits=Limits(seqs=3)).submit(request(1, 2), request(2, 2, n=2), request(3, 2))
    bench.step()
    assert bench.running == [1, 2]
    assert bench.waiting == [3]


# ---- memory ----


def test_the_watermark_keeps_one_percent_of_the_blocks() -> None:
    """983 blocks of 16, the paper's pool: an admission leaves 9 of them free, the first one need not."""
    bench = Bench(blocks=983, block=16, limits=Limits(tokens=10**6, length=10**6))
    assert bench.scheduler.spare == 9 * 16
    bench.submit(request(1, 10 * 16), request(2, 16 * (983 - 10 - 8)))
    assert bench.step() == {1: 160}
    assert bench.blocked == 2
    bench = Bench(blocks=983, block=16, limits=Limits(tokens=10**6, length=10**6))
    bench.submit(request(1, 10 * 16), request(2, 16 * (983 - 10 - 9)))
    assert bench.step() == {1: 160, 2: 16 * 964}
    assert bench.allocator.idle().free == 9 * 16
    alone = Bench(blocks=983, block=16, limits=Limits(tokens=10**6, length=10**6)).submit(request(1, 16 * 982, 1))
    assert alone.step() == {1: 16 * 982}


def test_allocators_that_reserve_ahead_have_no_watermark() -> None:
    assert Bench(allocator="contiguous-max").scheduler.spare == 0
    assert Bench(allocator="paged-oracle").scheduler.spare == 0
    assert Bench(allocator="paged-oracle", watermark=0.5).scheduler.spare == 500 * 4
    assert Bench(allocator="contiguous-need").scheduler.spare == 10 * 4


def test_the_head_of_the_queue_blocks_those_behind_it() -> None:
    bench = Bench(blocks=6, watermark=0.0).submit(request(1, 9, 4), request(2, 16, 4), request(3, 2, 4))
    assert bench.step() == {1: 9}
    assert bench.blocked == 2
    assert bench.waiting == [2, 3]
    assert bench.allocator.idle().free == 12, "request 3 would fit"


def test_the_latest_arrival_is_the_victim() -> None:
    """Two blocks each, and one is left. The next token of each needs a block: 1 takes the last, and 2 gets 3's."""
    bench = Bench(blocks=7, watermark=0.0).submit(*(request(i, 8, 8) for i in (1, 2, 3, 4)))
    assert bench.step() == {1: 8, 2: 8, 3: 8}
    assert bench.blocked == 4
    assert bench.step() == {1: 1, 2: 1}
    assert ids(bench.plan.preempted) == [3]
    assert bench.running == [1, 2]
    assert bench.waiting == [3, 4], "before those who came later"


def test_whoever_came_last_gives_way_to_itself() -> None:
    bench = Bench(blocks=4, watermark=0.0).submit(request(1, 5, 8), request(2, 8, 8))
    assert bench.step() == {1: 5, 2: 8}
    assert bench.step() == {1: 1}
    assert ids(bench.plan.preempted) == [2]


def test_a_preempted_group_starts_over_from_the_head_of_the_queue() -> None:
    bench = Bench(blocks=4, watermark=0.0).submit(request(1, 7, 4), request(2, 7, 4), request(3, 1, 1))
    assert bench.step() == {1: 7, 2: 7}
    assert bench.step() == {1: 1, 2: 1}
    group = bench.scheduler.running[1]
    assert bench.step() == {1: 1}
    assert bench.plan.preempted == {group: 8}, "8 computed tokens are lost"
    assert bench.waiting == [2, 3]
    assert group.live[0].computed == 0
    assert group.preemptions == 1
    assert len(group.live[0].tokens) == 9, "what was generated is kept"
    assert bench.step() == {1: 1}
    assert bench.ended == [1]
    assert bench.step() == {2: 9, 3: 1}, "the prompt and what it had generated, in one go"
    while bench.scheduler.running:
        bench.step()
    assert group.ended[0].tokens[7:] == text(group.request)[0]


def gang(preemption: str) -> tuple[Bench, Group]:
    """Seven blocks; request 1 alone, and request 2 with three outputs, which in the third step want a block each.

    1  prompt    1: 1 block    2: the first two blocks, of which the leader has written 7 tokens
    2  fork      1: 1          2: 1 shared + 3, two of them copies
    3            1: 2          2: 1 shared + 3, and 3 more are wanted where 1 is left
    """
    bench = Bench(blocks=7, watermark=0.0, preemption=preemption).submit(request(1, 3, 9), request(2, 8, 4, n=3))
    assert bench.step() == {1: 3, 2: 7}, "the prompt less its last token, once"
    assert bench.step() == {1: 1, 2: 3}, "that token in a row of every output"
    group = bench.scheduler.running[1]
    assert bench.plan.forked == group.live[1:]
    assert [(move.kind, move.tokens) for move in bench.plan.moves] == [("copy", 3)] * 2, (
        "the last holder writes in place"
    )
    assert [s.computed for s in group.live] == [8, 8, 8]
    assert group.distinct == 8
    assert len({bench.allocator.tables[s][0] for s in group.live}) == 1
    assert len({bench.allocator.tables[s][1] for s in group.live}) == 3
    assert bench.allocator.idle().free == 2 * 4
    assert bench.step() == {1: 1}
    assert bench.plan.preempted == {group: 8}
    assert bench.waiting == [2]
    assert not bench.plan.admitted, "nobody is admitted in a step that preempted, though five blocks are free now"
    assert bench.allocator.idle().free == 5 * 4
    assert not any(s in bench.allocator.tables for s in group.live)
    assert [s.computed for s in group.live] == [0, 0, 0]
    return bench, group


def finish(bench: Bench, group: Group) -> None:
    while bench.engine.groups:
        bench.step()
    length = len(group.request.prompt)
    assert [s.tokens[length:] for s in sorted(group.ended, key=lambda s: s.index)] == text(group.request)
    assert bench.allocator.idle().free == bench.allocator.capacity
    assert bench.scheduler.host.used == 0


def test_a_group_is_preempted_as_one() -> None:
    bench, group = gang("recompute")
    assert bench.step() == {1: 1, 2: 7}
    assert bench.plan.admitted == {group: 0}
    assert not bench.plan.swapped
    assert bench.scheduler.host.used == 0
    finish(bench, group)


# ---- swapping ----


def test_swapping_saves_a_shared_block_once_and_brings_the_group_back_as_it_was() -> None:
    bench, group = gang("swap")
    assert group in bench.plan.swapped
    assert [(move.kind, move.tokens) for move in bench.plan.moves] == [("out", 4)] * 4
    assert bench.scheduler.host.used == 4 * 4, "four distinct blocks"
    assert bench.step() == {1: 1}
    assert bench.plan.admitted == {group: 8}
    assert group in bench.plan.swapped
    assert sum(move.tokens for move in bench.plan.moves if move.kind == "in") == 4 * 4
    assert bench.scheduler.host.used == 0
    assert [s.computed for s in group.live] == [8, 8, 8]
    assert len({bench.allocator.tables[s][0] for s in group.live}) == 1, "the first block is shared again"
    finish(bench, group)


def test_swapping_falls_back_to_recomputing_when_the_host_is_full() -> None:
    bench = Bench(blocks=4, watermark=0.0, preemption="swap", host_tokens=4)
    bench.submit(request(1, 7, 4), request(2, 7, 4))
    for _ in range(3):
        bench.step()
    assert ids(bench.plan.preempted) == [2]
    assert not bench.plan.swapped
    assert not bench.plan.moves
    assert bench.scheduler.host.used == 0
    assert bench.scheduler.waiting[0].live[0].computed == 0
