"""Paged allocation: block tables, reference counts, copy-on-write, shared prefixes (Kwon et al., sections 4.1 to 4.4).

    logical    | 0 | 1 | 2 |          of a sequence: positions [16 i, 16 i + 16)
    table        7   1   3            physical blocks, anywhere in the pool

Any block is as good as any other, so there are no holes: all that is lost is the unwritten end of the last block. The
reservation policies apply here too; `paged` asks for what it needs now.
"""

from __future__ import annotations

from functools import partial

from lab.allocators import ALLOCATORS, Allocator, Idle, blocks
from lab.allocators.prefixes import Prefixes
from lab.allocators.reserve import RESERVE, policy
from lab.core import Group, Limits, Move, Request, Sequence


class Paged(Allocator):
    """`paged`, `paged-RESERVE`, and `paged-prefix`, which keeps what it computed for whoever begins with the same."""

    tables: dict[Sequence, list[int]]  # type: ignore[assignment]

    def __init__(
        self,
        capacity: int,
        block: int = 16,
        limits: Limits | None = None,
        *,
        reserve: str = "need",
        prefix: bool = False,
    ) -> None:
        super().__init__(capacity, block, limits)
        self.ask = policy(reserve, self.limits.length)
        self.grows = reserve in ("need", "double")
        self.publishes = prefix
        self.holders = [0] * self.num_blocks  # reference count of each block
        self.free = list(range(self.num_blocks - 1, -1, -1))  # a stack, lowest block on top
        self.prefixes = Prefixes(block)
        self.known: dict[Sequence, int] = {}  # leading blocks of a sequence that are known by their content
        self.pinned: list[int] = []  # blocks of reserved prefixes: they have one holder more

    def wants(self, s: Sequence) -> int:
        return self.ask(s.group.request, len(s.tokens))

    def fits(self, request: Request) -> bool:
        """Shared blocks of the prompt count once, all else once for every output."""
        last = self.last(request)
        asked = blocks(self.ask(request, last), self.block)
        shared = (len(request.prompt) - 1) // self.block
        kept = self.prefixes.match(request.prompt, shared) if self.pinned else []
        mine = sum(b in self.pinned for b in kept)
        return asked - mine + (request.sampling.width - 1) * (asked - shared) <= self.num_blocks - len(self.pinned)

    def admit(self, group: Group, spare: int = 0) -> int | None:
        """Blocks for the leader; the others fork from it once the tokens they share are computed.

        What it begins with and is known is shared, but never its last token: without one there is nothing to compute.
        """
        leader = group.live[0]
        asked = self.wants(leader)
        hit = self.prefixes.match(leader.tokens, (len(leader.tokens) - 1) // self.block) if self.prefixes.found else []
        woken = sum(not self.holders[b] for b in hit)
        if blocks(asked, self.block) - len(hit) + woken + blocks(spare, self.block) > self._available():
            return None
        for b in hit:
            self._hold(b)
        self.tables[leader] = hit
        known = self.known[leader] = len(hit)
        self._append(leader, asked)
        return known * self.block

    def extend(self, s: Sequence, length: int) -> bool:
        table = self.tables.get(s)
        if table is None:
            table = self.tables[s] = []
            self.asked[s] = 0
        asked, held = self.asked[s], len(table)
        if length > asked:
            asked = self.ask(s.group.request, length)
        first = s.computed // self.block  # the block about to be written
        shared = first < held and self.holders[table[first]] > 1
        more = asked > held * self.block  # most steps need none: this runs for every sequence of every step
        if (more or shared) and blocks(asked, self.block) - held + shared > self._available():
            if not table:
                self.release(s)
            return False
        if self.publishes:
            self._publish(s)
        if shared:
            self._copy_on_write(s, first)
        if more:
            self._append(s, asked)
        else:
            self.asked[s] = asked
        return True

    def fork(self, parent: Sequence, child: Sequence, length: int) -> bool:
        """Share the blocks; whoever writes into one first gets a copy of its own."""
        self.release(child)
        shared = self.tables[parent][: blocks(length, self.block)]
        for b in shared:
            self._hold(b)
        self.tables[child] = shared
        self.asked[child] = length
        self.known[child] = min(self.known.get(parent, 0), length // self.block)
        return True

    def release(self, s: Sequence) -> None:
        """Tail first, so that the head of a sequence is the last to be handed out again."""
        if self.publishes and s in self.tables:
            self._publish(s)
        for b in reversed(self.tables.pop(s, [])):
            self._drop(b)
        self.asked.pop(s, None)
        self.known.pop(s, None)

    def pin(self, s: Sequence) -> int:
        """Full blocks only: what is left over of a reserved prefix is computed with each request."""
        self._publish(s)
        kept = self.tables[s][: self.known[s]]
        for b in kept:
            if b not in self.pinned:
                self._hold(b)
                self.pinned.append(b)
        return len(kept) * self.block

    def idle(self) -> Idle:
        """Of reserved prefixes, the blocks that only they hold count as cached, though they are never evicted."""
        free, unheld = len(self.free) * self.block, len(self.prefixes.unheld) * self.block
        pinned = sum(self.holders[b] == 1 for b in self.pinned) * self.block
        return Idle(free, unheld + pinned, free + unheld)

    def _available(self) -> int:
        """Blocks that can be handed out."""
        return len(self.free) + len(self.prefixes.unheld)

    def _take(self) -> int:
        b = self.free.pop() if self.free else self.prefixes.evict()
        self.holders[b] = 1
        return b

    def _hold(self, b: int) -> None:
        if not self.holders[b]:
            del self.prefixes.unheld[b]
        self.holders[b] += 1

    def _publish(self, s: Sequence) -> None:
        """Make known the blocks that are full and computed by now. Of two with the same content one is enough.

        Nothing while memory is to be swapped in: it counts as computed, and may yet be given back before it comes.
        """
        if any(move.kind == "in" for move in self.moves):
            return
        table = self.tables[s]
        for i in range(self.known.get(s, 0), min(s.computed // self.block, len(table))):
            own = table[i]
            b = self.prefixes.publish(table, s.tokens, i)
            if b != own:
                self._hold(b)
                table = self.tables[s] = [*table[:i], b, *table[i + 1 :]]
                self._drop(own)
            self.known[s] = i + 1

    def _append(self, s: Sequence, asked: int) -> None:
        table = self.tables[s]
        for _ in range(blocks(asked, self.block) - len(table)):
            table.append(self._take())
        self.asked[s] = asked

    def _copy_on_write(self, s: Sequence, index: int) -> None:
        """A new table, because the old object may still be in somebody's hands (tables grow at their ends only)."""
        table = self.tables[s].copy()
        old, new = table[index], self._take()
        table[index] = new
        self.tables[s] = table
        written = s.computed - index * self.block
        if written:
            self.moves.append(Move("copy", old, new, written))
        self._drop(old)

    def _drop(self, b: int) -> None:
        self.holders[b] -= 1
        if not self.holders[b]:
            if b in self.prefixes.keys:
                self.prefixes.unheld[b] = None
            else:
                self.free.append(b)


for _reserve in RESERVE:
    ALLOCATORS.register("paged" if _reserve == "need" else f"paged-{_reserve}")(partial(Paged, reserve=_reserve))
ALLOCATORS.register("paged-prefix")(partial(Paged, prefix=True))
