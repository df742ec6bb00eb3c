"""The trace of the PagedAttention paper, from the authors' file of lengths (Kwon et al., section 6.1; their artifact).

The first N rows below the limit, N being the number of arrivals, and the file again when they run out; then shuffled:
a seed changes the order more than the content, and a longer run begins with other requests than a shorter one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, MutableSequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import TypeVar

from lab.workloads.source import Item, Source, nothing_left, of_lengths
from lab.workloads.traces import read_trace

T = TypeVar("T")


def paper(path: Path, spec: str, seed: int, limit: int) -> Source:
    """The authors' requests; `path` is a trace of which the lengths are read. Shuffling needs them all: 12 bytes a row,
    and 4 bytes a request."""
    columns = prompts, outputs, most = array("I"), array("I"), array("I")
    dropped = 0
    for item in read_trace(path):
        if item.tokens < limit:
            for column, tokens in zip(columns, (len(item.prompt), item.output or 0, item.max_tokens), strict=True):
                column.append(tokens)
        else:
            dropped += 1
    if not prompts:
        raise nothing_left(spec, dropped, limit)

    @lru_cache(maxsize=1)
    def order(count: int) -> array[int]:
        places = array("I", (i % len(prompts) for i in range(count)))
        shuffle(places, Random(seed))
        return places

    def take(count: int) -> Iterator[Item]:
        return (of_lengths(prompts[i], outputs[i], most[i]) for i in order(count))

    return Source(take, len(prompts), dropped=dropped)


def shuffle(values: MutableSequence[T], random: Random) -> None:
    """In place, as Python 3's `random.shuffle` has done so far; written out because no version promises to keep it."""
    for last in range(len(values) - 1, 0, -1):
        bits = (last + 1).bit_length()
        other = random.getrandbits(bits)
        while other > last:
            other = random.getrandbits(bits)
        values[last], values[other] = values[other], values[last]
