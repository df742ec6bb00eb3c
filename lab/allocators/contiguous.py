"""Contiguous allocation: one extent per sequence, a reservation policy over a placement.

What every system before PagedAttention did, because kernels wanted K and V of a sequence side by side (Kwon et al.,
section 3.1). Outputs of one request share nothing: each holds a full copy of the prompt.
"""

from __future__ import annotations

from functools import partial

from lab.allocators import ALLOCATORS, Allocator, Idle, blocks
from lab.allocators.extents import PLACEMENTS
from lab.allocators.reserve import RESERVE, policy
from lab.core import Group, Limits, Request, Sequence


class Contiguous(Allocator):
    """`contiguous-RESERVE[-PLACEMENT]`; the placement is the buddy system where none is named, as in the paper."""

    def __init__(
        self,
        capacity: int,
        block: int = 16,
        limits: Limits | None = None,
        *,
        reserve: str = "max",
        placement: str = "buddy",
    ) -> None:
        super().__init__(capacity, block, limits)
        self.ask = policy(reserve, self.limits.length)
        self.grows = reserve in ("need", "double")
        top = blocks(self.limits.length, block)
        self.slab = PLACEMENTS[placement](self.num_blocks, top)
        self.empty = partial(PLACEMENTS[placement], self.num_blocks, top)

    def wants(self, s: Sequence) -> int:
        return self.ask(s.group.request, len(s.tokens))

    def fits(self, request: Request) -> bool:
        slab = self.empty()
        last = self.last(request)
        size = blocks(self.ask(request, last), self.block)
        return all(slab.allocate(size) for _ in range(request.sampling.width))

    def admit(self, group: Group, spare: int = 0) -> int | None:
        for i, s in enumerate(group.live):
            if not self._place(s, self.wants(s)) or (spare and self.idle().free < spare):
                for placed in group.live[: i + 1]:
                    self.release(placed)
                return None
        return 0

    def extend(self, s: Sequence, length: int) -> bool:
        """In place where the extent is large enough or can grow; else in a larger one, to which what is computed moves.

        The old and the new extent are both needed while the copy runs.
        """
        held = self.tables.get(s)
        if held is None:
            return self._place(s, self.ask(s.group.request, length))
        if length <= self.asked[s]:
            return True
        asked = self.ask(s.group.request, length)
        size = blocks(asked, self.block)
        if size > len(held):
            assert isinstance(held, range)
            grown = self.slab.grow(held.start, len(held), size)
            if grown > len(held):
                self.tables[s] = range(held.start, held.start + grown)
            elif not self._place(s, asked):
                return False
            else:
                self.copy(held, self.tables[s], s.computed)
                self.slab.free(held.start, len(held))
        self.asked[s] = asked
        return True

    def release(self, s: Sequence) -> None:
        held = self.tables.pop(s, None)
        if held is not None:
            assert isinstance(held, range)
            self.slab.free(held.start, len(held))
            del self.asked[s]

    def idle(self) -> Idle:
        free, largest = self.slab.idle()
        return Idle(free * self.block, 0, largest * self.block)

    def _place(self, s: Sequence, asked: int) -> bool:
        extent = self.slab.allocate(blocks(asked, self.block))
        if extent is None:
            return False
        self.tables[s] = range(extent[0], extent[0] + extent[1])
        self.asked[s] = asked
        return True


for _reserve in RESERVE:
    for _placement in PLACEMENTS:
        _name = f"contiguous-{_reserve}" + ("" if _placement == "buddy" else f"-{_placement}")
        ALLOCATORS.register(_name)(partial(Contiguous, reserve=_reserve, placement=_placement))
