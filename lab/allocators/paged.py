"""Paged allocation: block tables, reference counts, copy-on-write (Kwon et al., sections 4.1 to 4.4).

    logical    | 0 | 1 | 2 |          of a sequence: positions [16 i, 16 i + 16)
    table        7   1   3            physical blocks, anywhere in the pool

Any block is as good as any other, so there are no holes: all that is lost is the unwritten end of the last block. The
reservation policies apply here too; `paged` asks for what it needs now.
"""

from __future__ import annotations

from functools import partial

from lab.allocators import ALLOCATORS, Allocator, Idle, blocks
from lab.allocators.reserve import RESERVE, policy
from lab.core import Group, Limits, Move, Request, Sequence


class Paged(Allocator):
    """`paged` and `paged-RESERVE`."""

    tables: dict[Sequence, list[int]]  # type: ignore[assignment]

    def __init__(self, capacity: int, block: int = 16, limits: Limits | None = None, *, reserve: str = "need") -> None:
        super().__init__(capacity, block, limits)
        self.ask = policy(reserve, self.limits.length)
        self.grows = reserve in ("need", "double")
        self.holders = [0] * self.num_blocks  # reference count of each block
        self.free = list(range(self.num_blocks - 1, -1, -1))  # a stack, lowest block on top

    def wants(self, s: Sequence) -> int:
        return self.ask(s.group.request, len(s.tokens))

    def fits(self, request: Request) -> bool:
        """Shared blocks of the prompt count once, all else once for every output."""
        last = self.last(request)
        asked = blocks(self.ask(request, last), self.block)
        shared = (len(request.prompt) - 1) // self.block
        return asked + (request.sampling.width - 1) * (asked - shared) <= self.num_blocks

    def admit(self, group: Group, spare: int = 0) -> int | None:
        """Blocks for the leader; the others fork from it once the tokens they share are computed."""
        leader = group.live[0]
        asked = self.wants(leader)
        if blocks(asked, self.block) + blocks(spare, self.block) > len(self.free):
            return None
        self.tables[leader] = []
        self._append(leader, asked)
        return 0

    def extend(self, s: Sequence, length: int) -> bool:
        table = self.tables.get(s)
        if table is None:
            table = self.tables[s] = []
            self.asked[s] = 0
        asked = self.ask(s.group.request, length) if length > self.asked[s] else self.asked[s]
        first = s.computed // self.block  # the block about to be written
        shared = first < len(table) and self.holders[table[first]] > 1
        if blocks(asked, self.block) - len(table) + shared > len(self.free):
            if not table:
                self.release(s)
            return False
        if shared:
            self._copy_on_write(s, first)
        self._append(s, asked)
        return True

    def fork(self, parent: Sequence, child: Sequence, length: int) -> bool:
        """Share the blocks; whoever writes into one first gets a copy of its own."""
        self.release(child)
        shared = self.tables[parent][: blocks(length, self.block)]
        for b in shared:
            self.holders[b] += 1
        self.tables[child] = shared
        self.asked[child] = length
        return True

    def release(self, s: Sequence) -> None:
        """Tail first, so that the head of a sequence is the last to be handed out again."""
        for b in reversed(self.tables.pop(s, [])):
            self._drop(b)
        self.asked.pop(s, None)

    def idle(self) -> Idle:
        free = len(self.free) * self.block
        return Idle(free, 0, free)

    def _append(self, s: Sequence, asked: int) -> None:
        table = self.tables[s]
        for _ in range(blocks(asked, self.block) - len(table)):
            b = self.free.pop()
            self.holders[b] = 1
            table.append(b)
        self.asked[s] = asked

    def _copy_on_write(self, s: Sequence, index: int) -> None:
        """A new table, because the old object may still be in somebody's hands (tables grow at their ends only)."""
        table = self.tables[s].copy()
        old, new = table[index], self.free.pop()
        self.holders[new] = 1
        table[index] = new
        self.tables[s] = table
        written = s.computed - index * self.block
        if written:
            self.moves.append(Move("copy", old, new, written))
        self._drop(old)

    def _drop(self, b: int) -> None:
        self.holders[b] -= 1
        if not self.holders[b]:
            self.free.append(b)


for _reserve in RESERVE:
    ALLOCATORS.register("paged" if _reserve == "need" else f"paged-{_reserve}")(partial(Paged, reserve=_reserve))
