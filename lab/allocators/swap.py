"""Swapping to host memory, written once over the allocator protocol (Kwon et al., section 4.5).

A group is saved with each distinct block once. While it is out it holds no device memory and nothing of it counts as
computed. Loading admits it anew and restores what its sequences shared by forking along their longest common prefix.
"""

from __future__ import annotations

from lab.allocators import Allocator, blocks, moves
from lab.core import Group, Sequence, common_prefix


class Host:
    """The host pool: blocks of the same size as on the device, and who is in them."""

    def __init__(self, capacity: int, block: int) -> None:
        self.block = block
        self.num_blocks = capacity // block
        self.free = list(range(self.num_blocks - 1, -1, -1))
        self.saved: dict[Group, dict[Sequence, tuple[list[int], int]]] = {}  # host blocks, tokens

    @property
    def used(self) -> int:
        """Tokens of host memory that are held."""
        return (self.num_blocks - len(self.free)) * self.block

    def save(self, allocator: Allocator, group: Group) -> bool:
        """Order the copy out and release the device memory; False (nothing changed) where the host pool is full."""
        tables = {s: allocator.tables[s][: blocks(s.computed, self.block)] for s in group.live if s.computed}
        distinct = list(dict.fromkeys(b for table in tables.values() for b in table))
        if not distinct or len(distinct) > len(self.free):
            return False
        host = {b: self.free.pop() for b in distinct}
        done: set[int] = set()
        self.saved[group] = {}
        for s, table in tables.items():
            self.saved[group][s] = ([host[b] for b in table], s.computed)
            new = next((i for i, b in enumerate(table) if b not in done), len(table))  # sharing is always a prefix
            done.update(table)
            tokens = s.computed - new * self.block
            allocator.moves += moves("out", table[new:], [host[b] for b in table[new:]], tokens, self.block)
        for s in group.live:
            allocator.release(s)
            s.computed = 0
        return True

    def load(self, allocator: Allocator, group: Group, spare: int = 0) -> bool:
        """Admit the group and order the copy in; False (nothing changed) where the device has no room."""
        if group not in self.saved:
            raise KeyError(group)
        mark = len(allocator.moves)
        hit = allocator.admit(group, spare)
        if hit is None:
            return False
        for s in group.live:
            if s in self.saved[group] and not self._restore(allocator, group, s, hit if s is group.live[0] else 0):
                for restored in group.live:
                    restored.computed = 0  # before its release: what it would say is computed never came
                    allocator.release(restored)
                del allocator.moves[mark:]
                return False
        self.drop(group)
        return True

    def drop(self, group: Group) -> None:
        """Forget a group that was loaded or cancelled."""
        tables = [table for table, _ in self.saved.pop(group, {}).values()]
        self.free += dict.fromkeys(b for table in tables for b in table)

    def forget(self, s: Sequence) -> None:
        """One of a group, which has ended; blocks that others of it are in stay."""
        saved = self.saved.get(s.group, {})
        table, _ = saved.pop(s, ([], 0))
        kept = {b for others, _ in saved.values() for b in others}
        self.free += [b for b in table if b not in kept]
        if not saved:
            self.saved.pop(s.group, None)

    def _restore(self, allocator: Allocator, group: Group, s: Sequence, hit: int) -> bool:
        """`hit` of its tokens are on the device already, in whole blocks."""
        table, tokens = self.saved[group][s]
        if hit:
            return self._copy_in(allocator, s, table, tokens, hit // self.block)
        shared = 0
        for other, (others, _) in self.saved[group].items():
            if other is s:
                break
            common = common_prefix([others, table])
            if common > shared:
                shared, parent = common, other
        s.computed = min(shared * self.block, tokens)
        if shared and not allocator.fork(parent, s, s.computed):
            return False
        return self._copy_in(allocator, s, table, tokens, shared)

    def _copy_in(self, allocator: Allocator, s: Sequence, table: list[int], tokens: int, shared: int) -> bool:
        """All but the `shared` leading blocks of a sequence."""
        s.computed = min(shared * self.block, tokens)
        if s.computed < tokens and not allocator.extend(s, tokens):
            return False
        new = allocator.tables[s][shared:]
        allocator.moves += moves("in", table[shared:], new, tokens - s.computed, self.block)
        s.computed = tokens
        return True
