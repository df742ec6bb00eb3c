"""Placements: contiguous extents out of one slab of blocks. Buddy system, first fit, best fit.

    |####....######......###|        extents held (#) and holes (.): what a hole cannot hold is external fragmentation

An extent is `(start, size)` in blocks; `size` may be more than was asked for, which is the placement's rounding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Protocol

from lab.allocators.reserve import power_of_two


class Placement(Protocol):
    def allocate(self, size: int) -> tuple[int, int] | None:
        """An extent of at least `size` blocks, None where no hole is large enough."""
        ...

    def free(self, start: int, size: int) -> None:
        """An extent as it was granted; it merges with its free neighbours."""

    def grow(self, start: int, size: int, more: int) -> int:
        """Enlarge an extent in place to at least `more` blocks; its new size, `size` itself where that cannot be."""
        ...

    def idle(self) -> tuple[int, int]:
        """Blocks free, and the largest extent that could be granted."""
        ...


class Buddy:
    """The buddy system (Knowlton 1965): sizes are powers of two; an extent merges only with the twin it was split from.

    The slab is cut into twins of `top` blocks; what is left over at its end into ever smaller powers of two, as the
    authors' own Orca does (their artifact; the paper only says that a buddy system was assumed).
    """

    def __init__(self, num_blocks: int, top: int) -> None:
        self.top = power_of_two(top)
        self.holes: list[list[int]] = [[] for _ in range(self.top.bit_length())]  # by order, starts in ascending order
        start = 0
        while start < num_blocks:
            size = min(self.top, 1 << ((num_blocks - start).bit_length() - 1))
            self.holes[size.bit_length() - 1].append(start)
            start += size

    def allocate(self, size: int) -> tuple[int, int] | None:
        order = (size - 1).bit_length()
        for larger in range(order, len(self.holes)):
            if self.holes[larger]:
                start = self.holes[larger].pop(0)
                for split in range(larger - 1, order - 1, -1):
                    insort(self.holes[split], start + (1 << split))
                return start, 1 << order
        return None

    def free(self, start: int, size: int) -> None:
        order = size.bit_length() - 1
        while size < self.top and self._take(order, start ^ size):
            start &= ~size
            size <<= 1
            order += 1
        insort(self.holes[order], start)

    def grow(self, start: int, size: int, more: int) -> int:
        """Never in place: the twin on the right is as likely taken, and splitting it would break the pairing."""
        return size

    def idle(self) -> tuple[int, int]:
        free = sum(len(holes) << order for order, holes in enumerate(self.holes))
        largest = max((1 << order for order, holes in enumerate(self.holes) if holes), default=0)
        return free, largest

    def _take(self, order: int, start: int) -> bool:
        holes = self.holes[order]
        i = bisect_left(holes, start)
        if i == len(holes) or holes[i] != start:
            return False
        del holes[i]
        return True


class FirstFit:
    """The lowest hole that is large enough; sizes are exact, holes merge with both neighbours (Knuth, section 2.5)."""

    def __init__(self, num_blocks: int, top: int = 0) -> None:
        self.holes: list[tuple[int, int]] = [(0, num_blocks)]  # (start, size), in ascending order, never adjacent

    def choose(self, size: int) -> int | None:
        return next((i for i, (_, hole) in enumerate(self.holes) if hole >= size), None)

    def allocate(self, size: int) -> tuple[int, int] | None:
        i = self.choose(size)
        if i is None:
            return None
        start, hole = self.holes[i]
        self.holes[i : i + 1] = [(start + size, hole - size)] if hole > size else []
        return start, size

    def free(self, start: int, size: int) -> None:
        i = bisect_left(self.holes, (start, size))
        end = start + size
        first, last = i, i
        if i < len(self.holes) and self.holes[i][0] == end:
            end = sum(self.holes[i])
            last = i + 1
        if i > 0 and sum(self.holes[i - 1]) == start:
            start = self.holes[i - 1][0]
            first = i - 1
        self.holes[first:last] = [(start, end - start)]

    def grow(self, start: int, size: int, more: int) -> int:
        i = bisect_left(self.holes, (start + size, 0))
        if i == len(self.holes) or self.holes[i][0] != start + size or self.holes[i][1] < more - size:
            return size
        hole, room = self.holes[i]
        taken = more - size
        self.holes[i : i + 1] = [(hole + taken, room - taken)] if room > taken else []
        return more

    def idle(self) -> tuple[int, int]:
        sizes = [size for _, size in self.holes]
        return sum(sizes), max(sizes, default=0)


class BestFit(FirstFit):
    """The smallest hole that is large enough."""

    def choose(self, size: int) -> int | None:
        fits = [(hole, i) for i, (_, hole) in enumerate(self.holes) if hole >= size]
        return min(fits)[1] if fits else None


PLACEMENTS: dict[str, Callable[[int, int], Placement]] = {
    "buddy": Buddy,
    "firstfit": FirstFit,
    "bestfit": BestFit,
}
