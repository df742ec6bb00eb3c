"""What a header says about the requests of a run: how many, how long, how often, and a digest that tells two apart.

One pass is enough for all of it, and no request is kept: lengths are counted, and their percentiles are exact.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

from lab.core import Request
from lab.workloads.pieces import Pieces


class Requests:
    """Requests in order of arrival, made anew each time they are gone through, and the same each time.

    There may be millions: only those that somebody holds on to are in memory. `dropped` rows of their file are not
    among them because they reach the limit. InputError may come in the midst of a pass; `check` makes one before work.
    """

    def __init__(self, read: Callable[[], Iterator[Request]], count: int, dropped: int = 0) -> None:
        """`read` begins anew each time and gives `count` requests."""
        self.read = read
        self.count = count
        self.dropped = dropped

    def __iter__(self) -> Iterator[Request]:
        return self.read()

    def __len__(self) -> int:
        return self.count

    def map(self, change: Callable[[Request], Request]) -> Requests:
        """Each of them changed, when it is its turn."""
        return Requests(lambda: map(change, self.read()), self.count, self.dropped)

    @cached_property
    def description(self) -> dict[str, Any]:
        return _described(self, self.dropped)


def describe(requests: Iterable[Request]) -> dict[str, Any]:
    """Plain numbers for a header or a table: tokens, seconds, requests per second; at least one request.

    `output_tokens` are the forced ones, or where nothing is forced the most a request may generate. `rate_per_s` is
    over the time from the first arrival to the last, None where all come at once.
    """
    return dict(requests.description) if isinstance(requests, Requests) else _described(requests)


def digest(requests: Iterable[Request]) -> str:
    """16 hexadecimal digits that depend on every request: times, token ids (or lengths), forced output and sampling."""
    sha = hashlib.sha256()
    for r in requests:
        sha.update(_line(r))
    return sha.hexdigest()[:16]


def _line(r: Request) -> bytes:
    prompt = repr(r.prompt) if isinstance(r.prompt, range | Pieces) else ",".join(map(str, r.prompt))
    s = r.sampling
    sampling: tuple[object, ...] = (s.max_tokens, s.n, s.temperature, s.top_k, s.top_p, s.seed, s.stop, s.logprobs)
    if s.beams:
        sampling = (*sampling, s.beams)
    return f"{r.id} {float(r.arrival_s)!r} {prompt} {r.output} {sampling}\n".encode()


def _described(requests: Iterable[Request], dropped: int = 0) -> dict[str, Any]:
    sha = hashlib.sha256()
    prompts: Counter[int] = Counter()
    outputs: Counter[int] = Counter()
    count, several, forced = 0, 0, True
    first_s = last_s = 0.0
    for r in requests:
        sha.update(_line(r))
        prompts[len(r.prompt)] += 1
        outputs[r.output or r.sampling.max_tokens] += 1
        first_s, last_s = r.arrival_s if not count else first_s, r.arrival_s
        count, several, forced = count + 1, several + r.sampling.n, forced and r.output is not None
    assert count, "nothing to describe"
    return {
        "requests": count,
        "outputs": several,
        "dropped": dropped,
        "forced": forced,
        "first_arrival_s": first_s,
        "last_arrival_s": last_s,
        "rate_per_s": (count - 1) / (last_s - first_s) if last_s > first_s else None,
        "prompt_tokens": _spread(prompts),
        "output_tokens": _spread(outputs),
        "digest": sha.hexdigest()[:16],
    }


def _spread(tokens: Counter[int]) -> dict[str, float]:
    """Of lengths and how often each occurs."""
    lengths = sorted(tokens)
    up_to = list(accumulate(tokens[length] for length in lengths))
    total = sum(length * tokens[length] for length in lengths)

    def percentile(share: float) -> float:
        """Interpolated linearly, as numpy does it."""
        whole, part = divmod(share * (up_to[-1] - 1), 1)
        below, above = (lengths[bisect_right(up_to, min(whole + i, up_to[-1] - 1))] for i in (0, 1))
        return below + (above - below) * part if part < 0.5 else above - (above - below) * (1 - part)

    return {
        "sum": total,
        "mean": total / up_to[-1],
        "min": lengths[0],
        "p50": percentile(0.5),
        "p90": percentile(0.9),
        "p99": percentile(0.99),
        "max": lengths[-1],
    }
