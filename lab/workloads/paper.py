"""The trace of the PagedAttention paper, from the authors' file of lengths (Kwon et al., section 6.1; their artifact).

The first N rows below the limit, N being the number of arrivals, and the file again when they run out; then shuffled:
a seed changes the order more than the content, and a longer run begins with other requests than a shorter one.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from random import Random
from typing import TypeVar

from lab.workloads.source import Item, Source, kept
from lab.workloads.traces import read_trace

T = TypeVar("T")


def paper(path: Path, spec: str, random: Random, limit: int) -> Source:
    """The authors' requests; `path` is a trace whose arrivals, if any, are not read."""
    items = read_trace(path).items
    rows = [items[i] for i in kept(items, spec, limit)]

    def take(count: int) -> list[Item]:
        first = list(itertools.islice(itertools.cycle(rows), count))
        shuffle(first, random)
        return first

    return Source(take, len(rows), dropped=len(items) - len(rows))


def shuffle(values: list[T], random: Random) -> None:
    """In place, as Python 3's `random.shuffle` has done so far; written out because no version promises to keep it."""
    for last in range(len(values) - 1, 0, -1):
        bits = (last + 1).bit_length()
        other = random.getrandbits(bits)
        while other > last:
            other = random.getrandbits(bits)
        values[last], values[other] = values[other], values[last]
