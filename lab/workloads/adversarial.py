"""Requests made to catch an allocator: what goes wrong in a block table shows where blocks are alike or just full.

In turn: the same blocks in another order (exactly full), a whole prompt again, one token more or less than full blocks,
one token alone, and an earlier prompt with one token changed. Ends of outputs prefer block boundaries too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from random import Random

from lab.workloads.lengths import below
from lab.workloads.source import Item

Prompt = tuple[int, ...]


def adversarial(random: Random, *, block: int, blocks: int, n: int, vocabulary: int) -> Iterator[Item]:
    """Prompts of 1 to blocks * block + 1 tokens with ids below `vocabulary`; 1 to `n` outputs of 1 to 2 * block tokens.

    `block` is the block size in tokens that the requests aim at.
    """
    writer = _Writer(random, block, blocks, vocabulary)
    kinds: list[Callable[[], Prompt]] = [
        writer.reordered,
        writer.repeated,
        writer.ragged,
        writer.single,
        writer.diverging,
    ]
    while True:
        for kind in kinds:
            prompt = kind()
            writer.earlier.append(prompt)
            output = _output(random, len(prompt), block)
            yield Item(prompt, output, output, 1 + below(random, n))


def _output(random: Random, prompt: int, block: int) -> int:
    """1, an end of text or of written K and V (one token less) on a block boundary, or anything."""
    to_boundary = block - prompt % block
    return (1, to_boundary, to_boundary + 1, 1 + below(random, 2 * block))[below(random, 4)]


class _Writer:
    """Writes prompts out of few blocks, and remembers the latest."""

    def __init__(self, random: Random, block: int, blocks: int, vocabulary: int) -> None:
        self.random = random
        self.vocabulary = vocabulary
        self.words = [tuple(below(random, vocabulary) for _ in range(block)) for _ in range(blocks)]
        self.earlier: deque[Prompt] = deque(maxlen=16)

    def reordered(self) -> Prompt:
        words = list(self.words)
        for last in range(len(words) - 1, 0, -1):
            other = below(self.random, last + 1)
            words[last], words[other] = words[other], words[last]
        return tuple(token for word in words[: 1 + below(self.random, len(words))] for token in word)

    def repeated(self) -> Prompt:
        return self.earlier[below(self.random, len(self.earlier))]

    def ragged(self) -> Prompt:
        prompt = self.reordered()
        return prompt[:-1] or prompt if below(self.random, 2) else (*prompt, self._token())

    def single(self) -> Prompt:
        return (self.words[below(self.random, len(self.words))][0],)

    def diverging(self) -> Prompt:
        prompt = self.repeated()
        place = below(self.random, len(prompt))
        other = (prompt[place] + 1 + below(self.random, self.vocabulary - 1)) % self.vocabulary
        return (*prompt[:place], other, *prompt[place + 1 :])

    def _token(self) -> int:
        return below(self.random, self.vocabulary)
