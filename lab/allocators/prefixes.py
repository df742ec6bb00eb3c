"""Blocks found again by their content: full, computed blocks of prompts and outputs, as a chain from the first token.

A block is found by its own tokens and by the block before it, so what is found is exactly a prefix: contents are
compared, not hashes of them. Blocks that nobody holds stay until their memory is wanted, the longest unused first; and
since a sequence lets go of its last block first, the end of a prefix is evicted before its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

ROOT = -1  # what the first block of a sequence is chained to


class Prefixes:
    """Blocks known by their content, and which of those nobody holds. Reference counts are the allocator's."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.found: dict[tuple[int, tuple[int, ...]], int] = {}  # (block before it, its tokens) -> block
        self.keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # the same, backwards
        self.unheld: dict[int, None] = {}  # known blocks that nobody holds, the longest unused first

    def match(self, tokens: Seq[int], most: int) -> list[int]:
        """The known blocks with which `tokens` begin, `most` at most."""
        table: list[int] = []
        before = ROOT
        for i in range(most):
            block = self.found.get((before, tuple(tokens[i * self.block : (i + 1) * self.block])))
            if block is None:
                break
            table.append(block)
            before = block
        return table

    def publish(self, table: Seq[int], tokens: Seq[int], index: int) -> int:
        """Make a full block known, those before it being known; returns the block with this content, maybe another."""
        before = table[index - 1] if index else ROOT
        key = (before, tuple(tokens[index * self.block : (index + 1) * self.block]))
        block = self.found.setdefault(key, table[index])
        self.keys[block] = key
        return block

    def evict(self) -> int:
        """The known block that nobody has held for the longest time; it is known no more."""
        block = next(iter(self.unheld))
        del self.unheld[block]
        del self.found[self.keys.pop(block)]
        return block
