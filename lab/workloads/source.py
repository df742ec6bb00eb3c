"""What a workload is made of: items without id or time, and a source that gives the same ones whenever it is asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from random import Random
from typing import NamedTuple

from lab.core import InputError

MOST_REDRAWS = 10_000  # in a row; a distribution that needs more lies above the limit


class Item(NamedTuple):
    """One request before it has an id and a time."""

    prompt: Seq[int]  # token ids; a `range` where only the length matters, `Pieces` where it is known what is shared
    output: int | None  # tokens it will generate, where that is forced
    max_tokens: int
    n: int = 1  # outputs that share the prompt
    arrival_s: float | None = None  # where a trace says so

    @property
    def tokens(self) -> int:
        """Tokens of one of its sequences at the end, or the most there can be."""
        return len(self.prompt) + (self.output or self.max_tokens)


class Source(NamedTuple):
    """Where items come from; `take(count)` begins anew each time it is called and gives the first `count`, one by one.

    All that can be wrong with the items has been found when the source is there, or is found by a pass through them.
    """

    take: Callable[[int], Iterator[Item]]
    rows: int | None = None  # items before they repeat; None where they are drawn without end
    span_s: tuple[float, float] | None = None  # first and last arrival, where the rows have them, in order
    dropped: int = 0  # rows left out because they reach the limit


def of_lengths(prompt: int, output: int, max_tokens: int | None = None) -> Item:
    """An item of which only the lengths matter, in tokens."""
    return Item(range(prompt), output, max_tokens or output)


def drawn(draw: Callable[[Random], Iterator[Item]], seed: int, spec: str, limit: int) -> Source:
    """Items without end, drawn anew from the seed for each pass; those that reach `limit` tokens are drawn again."""

    def take(count: int) -> Iterator[Item]:
        items = draw(Random(seed))
        return (below_limit(items, spec, limit) for _ in range(count))

    next(take(1))
    return Source(take)


def below_limit(items: Iterator[Item], spec: str, limit: int) -> Item:
    """The next item with less than `limit` tokens."""
    for item in itertools.islice(items, MOST_REDRAWS):
        if item.tokens < limit:
            return item
    raise InputError(
        f"workload {spec!r}: {MOST_REDRAWS} draws in a row reach the limit of {limit} tokens, prompt and output: "
        "raise the limit or shorten the lengths"
    )


def recycled(read: Callable[[], Iterable[Item]], spec: str, limit: int) -> Source:
    """The rows of a file in order, less those that reach `limit` tokens; from the start again when they run out.

    `read` goes through the file, now for whatever is wrong with it and again for every pass.
    """
    rows, dropped, first_s, last_s = 0, 0, None, None
    for item in read():
        if item.tokens < limit:
            rows += 1
            first_s, last_s = item.arrival_s if first_s is None else first_s, item.arrival_s
        else:
            dropped += 1
    if not rows:
        raise nothing_left(spec, dropped, limit)

    def take(count: int) -> Iterator[Item]:
        rows_again = itertools.chain.from_iterable(read() for _ in itertools.count())
        return itertools.islice((item for item in rows_again if item.tokens < limit), count)

    span_s = None if first_s is None or last_s is None else (first_s, last_s)
    return Source(take, rows, span_s, dropped)


def nothing_left(spec: str, dropped: int, limit: int) -> InputError:
    """What to raise for a file of which no row can be used."""
    if not dropped:
        return InputError(f"workload {spec!r} has no rows: give at least one request")
    return InputError(
        f"workload {spec!r}: each of its {dropped} rows reaches the limit of {limit} tokens: raise the limit"
    )
