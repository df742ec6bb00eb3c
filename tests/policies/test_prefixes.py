"""Prefixes found again: exactly what was computed, the end evicted before the beginning, duplicates kept once."""

from __future__ import annotations

from lab.allocators.paged import Paged
from lab.allocators.prefixes import Prefixes
from lab.allocators.swap import Host
from lab.core import Group, Limits, Request, SamplingParams, Sequence

BLOCK = 4


def pool(blocks: int) -> Paged:
    return Paged(blocks * BLOCK, BLOCK, Limits(length=64), prefix=True)


def enter(memory: Paged, id: int, tokens: list[int]) -> tuple[Sequence, int | None]:
    """Admit a request and compute its whole prompt."""
    group = Group(Request(id, 0.0, tuple(tokens), 2))
    s = group.live[0]
    hit = memory.admit(group)
    if hit is not None:
        s.computed = hit
        assert memory.extend(s, len(tokens))
        s.computed = len(tokens)
    return s, hit


def test_full_blocks_are_found_and_the_last_token_never() -> None:
    memory = pool(16)
    first, hit = enter(memory, 0, [1] * 10)
    assert hit == 0
    memory.release(first)
    assert memory.idle() == (14 * BLOCK, 2 * BLOCK, 16 * BLOCK)
    for tokens, expected in (([1] * 10, 8), ([1] * 8, 4), ([1] * 9, 8), ([1] * 4, 0), ([1] * 5, 4), ([2] + [1] * 9, 0)):
        s, hit = enter(memory, 1, tokens)
        assert hit == expected, tokens
        memory.release(s)


def test_a_block_is_found_only_behind_the_same_beginning() -> None:
    memory = pool(16)
    memory.release(enter(memory, 0, [1, 1, 1, 1, 7, 7, 7, 7, 0])[0])
    s, hit = enter(memory, 1, [2, 2, 2, 2, 7, 7, 7, 7, 0])
    assert hit == 0
    memory.release(s)
    assert enter(memory, 2, [1, 1, 1, 1, 7, 7, 7, 7, 0])[1] == 8
    assert enter(memory, 3, [2, 2, 2, 2, 7, 7, 7, 7, 0])[1] == 8


def test_what_is_still_being_computed_is_not_found() -> None:
    memory = pool(16)
    group = Group(Request(0, 0.0, (1,) * 12, 2))
    assert memory.admit(group) == 0
    group.live[0].computed = 6
    assert memory.extend(group.live[0], 12)
    assert enter(memory, 1, [1] * 12)[1] == 4


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    memory = pool(6)
    memory.release(enter(memory, 0, list(range(17)))[0])  # four full blocks stay
    assert memory.idle().cached == 4 * BLOCK
    other, _ = enter(memory, 1, [9] * 12)  # takes the two free ones and evicts one
    assert memory.idle().cached == 3 * BLOCK
    memory.release(other)
    assert enter(memory, 2, list(range(17)))[1] == 12


def test_the_longest_unused_goes_first() -> None:
    memory = pool(6)
    for id, token in enumerate((1, 2, 3)):
        memory.release(enter(memory, id, [token] * 5)[0])
    memory.release(enter(memory, 3, [1] * 5)[0])  # 1 is used again: now 2 is the oldest
    memory.release(enter(memory, 4, [4] * 16)[0])  # needs four blocks: three are free
    found = {token: len(memory.prefixes.match([token] * 5, 1)) for token in (1, 2, 3)}
    assert found == {1: 1, 2: 0, 3: 1}


def test_of_two_blocks_with_the_same_content_one_is_kept() -> None:
    memory = pool(16)
    a, _ = enter(memory, 0, [1] * 9)
    group = Group(Request(1, 0.0, (1,) * 9, 2))
    assert memory.admit(group) == 0, "a has computed its blocks, but nobody has said so yet"
    b = group.live[0]
    assert memory.extend(b, 9)
    b.computed = 9
    before = memory.tables[b]
    for s in (a, b):
        s.tokens.append(5)
        assert memory.extend(s, 10)
    assert memory.tables[a][:2] == memory.tables[b][:2]
    assert memory.tables[a][2] != memory.tables[b][2]
    assert memory.tables[b] is not before, "a table that changes elsewhere than at its end is a new object"
    assert memory.idle().free == 12 * BLOCK
    memory.release(a)
    memory.release(b)
    assert memory.idle() == (14 * BLOCK, 2 * BLOCK, 16 * BLOCK)


def test_contents_are_compared_and_not_their_hashes() -> None:
    prefixes = Prefixes(2)
    assert hash(-1) == hash(-2)
    assert prefixes.publish([3], [-1, -1], 0) == 3
    assert prefixes.match([-2, -2], 1) == []
    assert prefixes.match([-1, -1], 1) == [3]


def test_a_reserved_prefix_is_never_evicted() -> None:
    memory = Paged(6 * BLOCK, BLOCK, Limits(length=64))  # no cache: only what is reserved is kept
    s, _ = enter(memory, 0, list(range(11)))
    assert memory.pin(s) == 8
    memory.release(s)
    assert memory.idle() == (4 * BLOCK, 2 * BLOCK, 4 * BLOCK)
    big, _ = enter(memory, 1, [9] * 16)
    assert memory.idle() == (0, 2 * BLOCK, 0)
    memory.release(big)
    assert not memory.fits(Request(2, 0.0, (9,) * 16, 2)), "four blocks are left for those that do not begin with it"
    assert memory.fits(Request(3, 0.0, (*range(8), 9, 9, 9, 9), 2))
    assert enter(memory, 4, [*range(8), 9, 9])[1] == 8


def test_what_never_came_back_from_the_host_is_not_found() -> None:
    """Three outputs share two blocks; the third finds no room, so nothing is loaded, and the moves are given up."""
    memory = pool(12)
    host = Host(12 * BLOCK, BLOCK)
    group = Group(Request(0, 0.0, tuple(range(8)), 9, SamplingParams(n=3)))
    leader = group.live[0]
    assert memory.admit(group) == 0
    leader.computed = 8
    for child in group.live[1:]:
        assert memory.fork(leader, child, 8)
        child.computed = 8
    for i, s in enumerate(group.live):
        s.tokens += [100 + i] * 4
        assert memory.extend(s, 12)
        s.computed = 12
    assert host.save(memory, group)
    filler, _ = enter(memory, 1, [7] * 48)  # what was cached is evicted
    memory.moves = []
    memory.release(filler)
    memory.prefixes = Prefixes(BLOCK)
    memory.free = list(range(4))  # two shared blocks, and one for each of two outputs
    assert not host.load(memory, group)
    assert not memory.moves
    assert memory.prefixes.match(list(range(8)), 2) == []
