"""A solution of notebook 4: paging with a list of free blocks, and nothing shared. Look at it when yours works."""

from __future__ import annotations

from lab.allocators import Allocator, Idle, blocks
from lab.core import Group, Limits, Sequence


class Pages(Allocator):
    """Whatever a sequence needs now, in blocks from anywhere."""

    tables: dict[Sequence, list[int]]  # type: ignore[assignment]  # lists, so that they can grow

    def __init__(self, capacity: int, block: int = 16, limits: Limits | None = None) -> None:
        super().__init__(capacity, block, limits)
        self.free = list(range(self.num_blocks))

    def idle(self) -> Idle:
        free = len(self.free) * self.block
        return Idle(free, 0, free)  # nothing is cached, and any free block is as good as any other

    def admit(self, group: Group, spare: int = 0) -> int | None:
        needed = sum(blocks(len(s.tokens), self.block) for s in group.live)
        if needed * self.block + spare > self.idle().free:
            return None
        for s in group.live:
            self.extend(s, len(s.tokens))
        return 0

    def extend(self, s: Sequence, length: int) -> bool:
        missing = blocks(length, self.block) - len(self.tables.get(s, []))
        if missing > len(self.free):
            return False
        table = self.tables.setdefault(s, [])
        for _ in range(missing):
            table.append(self.free.pop())
        self.asked[s] = max(length, self.asked.get(s, 0))
        return True

    def release(self, s: Sequence) -> None:
        self.free += self.tables.pop(s, [])
        self.asked.pop(s, None)
