"""Memory cell by cell and block by block: what moves do, and what counts, extents and categories must be."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable

from lab.allocators import Allocator, Usage
from lab.allocators.contiguous import Contiguous
from lab.allocators.extents import Buddy, FirstFit
from lab.allocators.paged import Paged
from lab.core import Move, Sequence

Cells = dict[int, int]  # slot -> what was written there


def perform(moves: Iterable[Move], device: Cells, host: Cells, block: int) -> None:
    """Move cell by cell, so that a source that was never written leaves a hole behind."""
    for move in moves:
        assert move.tokens > 0
        assert move.kind in ("copy", "out", "in")
        source = host if move.kind == "in" else device
        target = host if move.kind == "out" else device
        for i in range(move.tokens):
            value = source.get(move.src * block + i)
            if value is None:
                target.pop(move.dst * block + i, None)
            else:
                target[move.dst * block + i] = value


def check_reference_counts(allocator: Paged, holders: dict[int, list[Sequence]]) -> None:
    counts = Counter({b: len(sharers) for b, sharers in holders.items()})
    assert allocator.holders == [counts[b] for b in range(allocator.num_blocks)]
    unheld = [*allocator.free, *allocator.prefixes.unheld]
    assert sorted(unheld) == [b for b in range(allocator.num_blocks) if not counts[b]]


def check_extents(allocator: Contiguous, held: set[int]) -> None:
    """Extents and holes cover the slab, each block once."""
    slab = allocator.slab
    holes: list[tuple[int, int]] = []
    if isinstance(slab, FirstFit):
        holes = slab.holes
    if isinstance(slab, Buddy):
        holes = [(start, 1 << order) for order, starts in enumerate(slab.holes) for start in starts]
    free = [b for start, size in holes for b in range(start, start + size)]
    assert sorted([*held, *free]) == list(range(allocator.num_blocks)), "extents and holes overlap, or blocks are lost"
    largest = max((size for _, size in holes), default=0)
    assert allocator.idle() == (len(free) * allocator.block, 0, largest * allocator.block)
    if largest:
        assert copy.deepcopy(slab).allocate(largest), "the largest grant is not granted"
    assert not copy.deepcopy(slab).allocate(largest + 1), "more is granted than the largest grant"


def categories(allocator: Allocator, live: list[Sequence], ended: list[Sequence]) -> Usage:
    """Sets of slots, each category by what it means."""

    def slots(sequences: list[Sequence], tokens: Callable[[Sequence], float]) -> set[int]:
        return {
            b * allocator.block + offset
            for s in sequences
            for i, b in enumerate(allocator.tables.get(s, ()))
            for offset in range(allocator.block)
            if i * allocator.block + offset < tokens(s)
        }

    held = slots(live + ended, lambda s: math.inf)
    stored = slots(live, lambda s: s.computed)
    left_behind = slots(ended, lambda s: s.computed) - stored
    asked = slots(live + ended, lambda s: allocator.asked[s]) - stored - left_behind
    coming = slots(live, lambda s: len(s.group.request.prompt) + (s.group.request.output or 0) - 1)
    cached = allocator.idle().cached  # nobody's, so that no table shows it
    return Usage(
        stored=len(stored),
        ended=len(left_behind),
        reserved=len(asked & coming),
        excess=len(asked - coming),
        rounding=len(held - stored - left_behind - asked),
        cached=cached,
        free=allocator.num_blocks * allocator.block - len(held) - cached,
    )
