"""Who gets which blocks: the protocol, and the account of where memory goes. Standard library only.

An allocator keeps tables and orders Moves; it never touches a tensor. A file dropped into this folder registers itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from lab.core import Group, InputError, Kind, Limits, Move, Registry, Request, Sequence

ALLOCATORS = Registry("allocator", __name__)


class Idle(NamedTuple):
    """What nobody holds, in tokens."""

    free: int
    cached: int  # held by no live sequence, but a prefix hit can find it; evictable
    largest: int  # the largest single grant; evictable blocks count


class Allocator:
    """Base of all allocators: four methods to write (`admit`, `extend`, `release`, `idle`), the rest has defaults.

    Position p of sequence s lives in block `tables[s][p // block]`, at offset `p % block`. Only the allocator writes
    `tables`, `asked` and `moves`. A table grows at its end; any other change installs a new object. Every method tries
    and reports: on failure nothing has changed.
    """

    publishes = False  # finds blocks by their content: a step is collected before the next is planned
    grows = True  # may ask for more memory while a sequence runs; False where all of it is reserved at admission

    def __init__(self, capacity: int, block: int = 16, limits: Limits | None = None) -> None:
        """A pool of `capacity` tokens in blocks of `block`; what does not fill a block is left out."""
        if block < 1:
            raise InputError(f"block size {block}: must be at least 1 token; the paper's is 16")
        if capacity < block:
            raise InputError(
                f"a pool of {capacity} tokens is smaller than a block of {block}: enlarge it, or shrink blocks"
            )
        self.block = block
        self.num_blocks = capacity // block
        self.capacity = self.num_blocks * block  # tokens
        self.limits = limits or Limits()
        self.tables: dict[Sequence, Seq[int]] = {}
        self.asked: dict[Sequence, int] = {}  # tokens the policy wanted; what it got is rounded up
        self.moves: list[Move] = []  # ordered, not yet performed; the engine takes them

    def admit(self, group: Group, spare: int = 0) -> int | None:
        """Memory for every live sequence of a new group, or none, leaving `spare` tokens idle.

        Returns how many tokens of the leader are in memory already (prefix hits), None where there is no room.
        """
        raise TypeError(f"{type(self).__name__} must define admit()")

    def extend(self, s: Sequence, length: int) -> bool:
        """Room for positions [0, length), those from `s.computed` on about to be written; False where there is none."""
        raise TypeError(f"{type(self).__name__} must define extend()")

    def release(self, s: Sequence) -> None:
        """All that the sequence holds."""
        raise TypeError(f"{type(self).__name__} must define release()")

    def idle(self) -> Idle:
        raise TypeError(f"{type(self).__name__} must define idle()")

    def fork(self, parent: Sequence, child: Sequence, length: int) -> bool:
        """The child's first `length` tokens become the parent's, all of them computed. Default: full copies."""
        if not self.extend(child, length):
            return False
        self.copy(self.tables[parent], self.tables[child], length)
        return True

    def pin(self, s: Sequence) -> int:
        """Keep the first tokens of `s` for good, for others that begin with them (Kwon et al., section 4.4).

        Returns how many are kept; the sequence itself is then released like any other. Default: none, as in systems
        that share no memory.
        """
        return 0

    def wants(self, s: Sequence) -> int:
        """Tokens the policy would ask for if `s` were admitted now."""
        return len(s.tokens)

    def fits(self, request: Request) -> bool:
        """Alone in an empty pool, to its last token? Asked once, at arrival.

        The default is for allocators to which one block is as good as another and whose outputs share nothing.
        """
        return request.sampling.width * blocks(self.last(request), self.block) <= self.num_blocks

    def last(self, request: Request) -> int:
        """Tokens in memory when one of its sequences ends; K and V of the last token are never computed."""
        return max(min(request.most, self.limits.length) - 1, len(request.prompt))

    def copy(self, src: Seq[int], dst: Seq[int], tokens: int) -> None:
        """Order the copy of the first `tokens` positions from one table to another."""
        self.moves += moves("copy", src, dst, tokens, self.block)


def blocks(tokens: int, block: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block)


def moves(kind: Kind, src: Seq[int], dst: Seq[int], tokens: int, block: int) -> Iterator[Move]:
    """The first `tokens` positions of one table to another, one Move per run of consecutive blocks."""
    start = 0
    n = blocks(tokens, block)
    for i in range(1, n + 1):
        if i == n or src[i] != src[i - 1] + 1 or dst[i] != dst[i - 1] + 1:
            yield Move(kind, src[start], dst[start], min(tokens, i * block) - start * block)
            start = i


class Usage(NamedTuple):
    """Where every slot of the pool is, in tokens; reserved and excess are told apart once the ends are known.

    A slot belongs to the first category that fits, once, however many sequences hold its block.
    """

    stored: int  # K and V of a running sequence
    ended: int  # K and V held only by ended rows of a batch that has not ended
    reserved: int  # asked for, empty, will be written
    excess: int  # asked for, never written: the policy asked for too much
    rounding: int  # held but not asked for: block, page, power of two
    cached: int  # no live sequence holds it, a prefix hit can
    free: int


def account(allocator: Allocator, live: Iterable[Sequence], ended: Iterable[Sequence] = ()) -> Usage:
    """The seven categories, slot by slot: the definition, against which quicker ways are tested. Slow on purpose."""
    held: dict[int, list[tuple[Sequence, int, bool]]] = {}  # block -> its holders, index in their tables, ended
    for sequences, is_ended in ((live, False), (ended, True)):
        for s in sequences:
            for i, b in enumerate(allocator.tables.get(s, ())):
                held.setdefault(b, []).append((s, i * allocator.block, is_ended))
    counts = dict.fromkeys(Usage._fields, 0)
    for holders in held.values():
        for offset in range(allocator.block):
            counts[_category(allocator.asked, holders, offset)] += 1
    free, cached, _ = allocator.idle()
    usage = Usage(**counts)._replace(free=free, cached=cached)
    assert sum(usage) == allocator.capacity, f"{usage} does not sum to {allocator.capacity}"
    return usage


def _category(asked: Mapping[Sequence, int], holders: list[tuple[Sequence, int, bool]], offset: int) -> str:
    if any(s.computed > start + offset for s, start, is_ended in holders if not is_ended):
        return "stored"
    if any(s.computed > start + offset for s, start, is_ended in holders if is_ended):
        return "ended"
    if not any(asked[s] > start + offset for s, start, _ in holders):
        return "rounding"
    will = any(s.end > start + offset for s, start, is_ended in holders if not is_ended)
    return "reserved" if will else "excess"


def import_policies() -> None:
    """Import every file of this folder, so that each registers what it defines."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


import_policies()
