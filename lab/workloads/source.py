"""What a workload is made of: items without id or time, and a source from which the first so many are taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

from lab.core import InputError

MOST_REDRAWS = 10_000  # in a row; a distribution that needs more lies above the limit


class Item(NamedTuple):
    """One request before it has an id and a time."""

    prompt: Seq[int]  # token ids, or a `range` where only the length matters
    output: int | None  # tokens it will generate, where that is forced
    max_tokens: int
    n: int = 1  # outputs that share the prompt

    @property
    def tokens(self) -> int:
        """Tokens of one of its sequences at the end, or the most there can be."""
        return len(self.prompt) + (self.output or self.max_tokens)


class Source(NamedTuple):
    """Where items come from; `take(count)` gives the first `count`, and is called once."""

    take: Callable[[int], list[Item]]
    rows: int | None = None  # items before they repeat; None where they are drawn without end
    arrivals_s: list[float] | None = None  # one per row, not descending, where the source has them
    dropped: int = 0  # rows left out because they reach the limit


def of_lengths(prompt: int, output: int, max_tokens: int | None = None) -> Item:
    """An item of which only the lengths matter, in tokens."""
    return Item(range(prompt), output, max_tokens or output)


def drawn(items: Iterator[Item], spec: str, limit: int) -> Source:
    """Endless `items`; those that reach `limit` tokens are drawn again."""

    def take(count: int) -> list[Item]:
        return [_below(items, spec, limit) for _ in range(count)]

    return Source(take)


def _below(items: Iterator[Item], spec: str, limit: int) -> Item:
    for item in itertools.islice(items, MOST_REDRAWS):
        if item.tokens < limit:
            return item
    raise InputError(
        f"workload {spec!r}: {MOST_REDRAWS} draws in a row reach the limit of {limit} tokens, prompt and output: "
        "raise the limit or shorten the lengths"
    )


def kept(items: Iterable[Item], spec: str, limit: int) -> list[int]:
    """Places of the items that stay below `limit` tokens; at least one."""
    items = list(items)
    if not items:
        raise InputError(f"workload {spec!r} has no rows: give at least one request")
    places = [i for i, item in enumerate(items) if item.tokens < limit]
    if not places:
        raise InputError(
            f"workload {spec!r}: each of its {len(items)} rows reaches the limit of {limit} tokens: raise the limit"
        )
    return places


def recycled(items: list[Item], spec: str, limit: int, arrivals_s: list[float] | None = None) -> Source:
    """The rows of a file in order, less those that reach `limit` tokens; from the start again when they run out."""
    places = kept(items, spec, limit)
    rows = [items[i] for i in places]
    times = None if arrivals_s is None else [arrivals_s[i] for i in places]
    return Source(
        lambda count: list(itertools.islice(itertools.cycle(rows), count)), len(rows), times, len(items) - len(rows)
    )
