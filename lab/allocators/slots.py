"""A fixed context divided among a fixed number of slots, as llama.cpp's server with an explicit `--parallel`.

    | slot 0: ####........ | slot 1: ##########.. | slot 2: #........... | slot 3: free     |      --parallel 4

A sequence takes a whole slot while it runs, however short it is, and can never be longer than one. Nothing is split or
merged, so there is nothing to search; what is asked for is the slot, and its unwritten end is the policy's, not the
mechanism's. What does not divide evenly is never used.
"""

from __future__ import annotations

from functools import partial

from lab.allocators import ALLOCATORS, Allocator, Idle, blocks
from lab.core import Group, Limits, Request, Sequence


@ALLOCATORS.register("slots")
class Slots(Allocator):
    """Equal extents; each output of a request takes one, with a full copy of the prompt.

    Where their number is not given it is the careful operator's: as many as the pool holds of the longest sequence.
    """

    grows = False

    def __init__(
        self, capacity: int, block: int = 16, limits: Limits | None = None, *, slots: int | None = None
    ) -> None:
        super().__init__(capacity, block, limits)
        self.slots = slots or max(1, self.num_blocks // blocks(self.limits.length, block))
        self.size = self.num_blocks // self.slots  # blocks of a slot; 0 where there are fewer blocks than slots
        self.vacant = list(range(self.slots - 1, -1, -1)) if self.size else []  # a stack, lowest slot on top

    def wants(self, s: Sequence) -> int:
        return self.size * self.block

    def fits(self, request: Request) -> bool:
        return request.sampling.width <= self.slots and blocks(self.last(request), self.block) <= self.size

    def admit(self, group: Group, spare: int = 0) -> int | None:
        if all(self._take(s, len(s.tokens)) for s in group.live) and self.idle().free >= spare:
            return 0
        for s in group.live:
            self.release(s)
        return None

    def extend(self, s: Sequence, length: int) -> bool:
        return blocks(length, self.block) <= self.size if s in self.tables else self._take(s, length)

    def release(self, s: Sequence) -> None:
        held = self.tables.pop(s, None)
        if held is not None:
            self.vacant.append(held[0] // self.size)
            del self.asked[s]

    def idle(self) -> Idle:
        taken = len(self.tables) * self.size
        return Idle((self.num_blocks - taken) * self.block, 0, self.size * self.block if self.vacant else 0)

    def _take(self, s: Sequence, length: int) -> bool:
        if not self.vacant or blocks(length, self.block) > self.size:
            return False
        start = self.vacant.pop() * self.size
        self.tables[s] = range(start, start + self.size)
        self.asked[s] = self.size * self.block
        return True


# any number by its import path: --allocator lab.allocators.slots:four
four, eight, sixteen = (partial(Slots, slots=slots) for slots in (4, 8, 16))
