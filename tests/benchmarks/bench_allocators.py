"""Allocators: what admitting, growing, forking and releasing cost, in a pool with holes."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest

from lab.allocators import ALLOCATORS, Allocator
from lab.core import Group, Request, SamplingParams, Sequence

NAMES = ("contiguous-max", "contiguous-double-firstfit", "paged", "paged-prefix")
SEQUENCES = 128
TOKENS = 8  # that each sequence grows by: every second takes a block
BLOCKS = 192 * SEQUENCES  # enough for all at their longest
each = pytest.mark.parametrize("name", NAMES)


@cache
def requests(n: int) -> list[Request]:
    """Prompts of 20 to 200 tokens; three of four begin with the same 64."""
    draw = Random(0)
    lengths = [draw.randint(20, 200) for _ in range(SEQUENCES // n)]
    prompts = [[1000 * (i if not i % 4 or p >= 64 else 0) + p for p in range(n)] for i, n in enumerate(lengths)]
    sampling = SamplingParams(max_tokens=200, n=n)
    return [Request(i, 0.0, prompt, 200, sampling) for i, prompt in enumerate(prompts)]


class Pool:
    """An allocator, and requests before and after their admission: the same in every round."""

    def __init__(self, name: str, n: int = 1) -> None:
        self.name, self.n = name, n

    def fresh(self) -> None:
        """Half of what came before has left, so that the pool has holes."""
        self.allocator: Allocator = ALLOCATORS.get(self.name)(16 * BLOCKS, 16)
        old = [Group(request) for request in requests(1)[::4]]
        for group in old:
            assert self.allocator.admit(group) is not None
        for group in old[::2]:
            self.allocator.release(group.live[0])
        self.groups = [Group(request) for request in requests(self.n)]

    def computed(self) -> None:
        """All are admitted, and their prompts computed, less the token that outputs do not share."""
        self.fresh()
        self.admit()
        for group in self.groups:
            group.live[0].computed = len(group.live[0].tokens) - 1

    def admit(self) -> None:
        for group in self.groups:
            assert self.allocator.admit(group) is not None

    def fork(self) -> None:
        """Every output takes over the first one's tokens, and then all write."""
        for group in self.groups:
            leader, *children = group.live
            for child in children:
                assert self.allocator.fork(leader, child, leader.computed)
                child.computed = leader.computed
            for s in group.live:
                assert self.allocator.extend(s, s.computed + 1)

    def release(self) -> None:
        for group in self.groups:
            for s in group.live:
                self.allocator.release(s)


@each
def test_admit(timed: Any, name: str) -> None:
    pool = Pool(name)
    timed(pool.admit, prepare=pool.fresh, count=SEQUENCES, unit="sequences")


@each
def test_extend(timed: Any, name: str) -> None:
    """Token by token, after the first, in which a prefix cache makes known what is full."""
    pool = Pool(name)
    calls: list[tuple[Sequence, int]] = []

    def prepare() -> None:
        pool.computed()
        for group in pool.groups:
            s = group.live[0]
            pool.allocator.extend(s, s.computed + 1)
            s.computed += 1
        calls[:] = [(g.live[0], g.live[0].computed + n) for n in range(1, TOKENS + 1) for g in pool.groups]

    def work() -> None:
        extend = pool.allocator.extend
        for s, length in calls:
            extend(s, length)

    timed(work, prepare=prepare, count=TOKENS * SEQUENCES, unit="tokens")


@each
def test_fork(timed: Any, name: str) -> None:
    """Four outputs of each request; where memory is shared, three of them copy the block that they write into."""
    pool = Pool(name, n=4)
    timed(pool.fork, prepare=pool.computed, count=SEQUENCES, unit="sequences")


@each
def test_release(timed: Any, name: str) -> None:
    pool = Pool(name)
    timed(pool.release, prepare=pool.computed, count=SEQUENCES, unit="sequences")
