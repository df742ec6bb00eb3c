"""An allocator of one's own, registered nowhere: `--allocator tests.policies.my_allocator:SizeClasses` names it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from lab.allocators import Allocator, Idle, blocks
from lab.core import Group, Limits, Request, Sequence


class SizeClasses(Allocator):
    """Extents of fixed sizes, cut once and for all, as in the slab allocator (Bonwick 1994).

        |        8        |    4    |  2  | 1 |        8        |    4    |  2  | 1 |  ...

    A sequence takes the smallest free extent that holds it, and moves to a larger one when it outgrows that. Nothing is
    split or merged, so there is nothing to search; the price is memory that is free in a size that nobody wants.
    """

    def __init__(self, capacity: int, block: int = 16, limits: Limits | None = None) -> None:
        super().__init__(capacity, block, limits)
        largest = (blocks(self.limits.length, block) - 1).bit_length()  # the power of two that holds any sequence
        self.free: dict[int, list[int]] = {1 << power: [] for power in range(largest + 1)}  # size -> first blocks
        start = 0
        while start < self.num_blocks:
            for size in reversed(self.free):
                if start + size <= self.num_blocks:
                    self.free[size].append(start)
                    start += size

    def admit(self, group: Group, spare: int = 0) -> int | None:
        if all(self._take(s, len(s.tokens)) for s in group.live) and self.idle().free >= spare:
            return 0  # tokens found in memory: nothing is kept from request to request
        for s in group.live:
            self.release(s)
        return None

    def extend(self, s: Sequence, length: int) -> bool:
        held = self.tables.get(s, range(0))
        if length > len(held) * self.block:
            if not self._take(s, length):
                return False
            self.copy(held, self.tables[s], s.computed)
            self._give(held)
        self.asked[s] = max(self.asked[s], length)
        return True

    def release(self, s: Sequence) -> None:
        self._give(self.tables.pop(s, range(0)))
        self.asked.pop(s, None)

    def idle(self) -> Idle:
        sizes = [size for size, starts in self.free.items() for _ in starts]
        return Idle(sum(sizes) * self.block, 0, max(sizes, default=0) * self.block)

    def fits(self, request: Request) -> bool:
        empty = SizeClasses(self.capacity, self.block, self.limits)
        return all(empty._take(s, self.last(request)) for s in Group(request).live)

    def _take(self, s: Sequence, tokens: int) -> bool:
        size = next((size for size in self.free if size >= blocks(tokens, self.block) and self.free[size]), None)
        if size is None:
            return False
        start = self.free[size].pop()
        self.tables[s] = range(start, start + size)
        self.asked[s] = tokens
        return True

    def _give(self, held: Seq[int]) -> None:
        if held:
            self.free[len(held)].append(held[0])
