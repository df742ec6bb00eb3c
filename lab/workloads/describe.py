"""What a header says about the requests of a run: how many, how long, how often, and a digest that tells two apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from lab.core import Request


class Requests(list[Request]):
    """Requests in order of arrival; `dropped` rows of their file are not among them because they reach the limit."""

    def __init__(self, requests: Iterable[Request] = (), dropped: int = 0) -> None:
        super().__init__(requests)
        self.dropped = dropped


def describe(requests: Seq[Request]) -> dict[str, Any]:
    """Plain numbers for a header or a table: tokens, seconds, requests per second; at least one request.

    `output_tokens` are the forced ones, or where nothing is forced the most a request may generate. `rate_per_s` is
    over the time from the first arrival to the last, None where all come at once.
    """
    assert requests, "nothing to describe"
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    return {
        "requests": len(requests),
        "outputs": sum(r.sampling.n for r in requests),
        "dropped": requests.dropped if isinstance(requests, Requests) else 0,
        "forced": all(r.output is not None for r in requests),
        "first_arrival_s": requests[0].arrival_s,
        "last_arrival_s": requests[-1].arrival_s,
        "rate_per_s": (len(requests) - 1) / span_s if span_s else None,
        "prompt_tokens": _spread([len(r.prompt) for r in requests]),
        "output_tokens": _spread([r.output or r.sampling.max_tokens for r in requests]),
        "digest": digest(requests),
    }


def digest(requests: Iterable[Request]) -> str:
    """16 hexadecimal digits that depend on every request: times, token ids (or lengths), forced output and sampling."""
    sha = hashlib.sha256()
    for r in requests:
        prompt = repr(r.prompt) if isinstance(r.prompt, range) else ",".join(map(str, r.prompt))
        s = r.sampling
        sampling: tuple[object, ...] = (s.max_tokens, s.n, s.temperature, s.top_k, s.top_p, s.seed, s.stop, s.logprobs)
        if s.beams:
            sampling = (*sampling, s.beams)
        sha.update(f"{r.id} {float(r.arrival_s)!r} {prompt} {r.output} {sampling}\n".encode())
    return sha.hexdigest()[:16]


def _spread(tokens: list[int]) -> dict[str, float]:
    p50, p90, p99 = (float(p) for p in np.percentile(tokens, (50, 90, 99)))
    return {
        "sum": sum(tokens),
        "mean": sum(tokens) / len(tokens),
        "min": min(tokens),
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": max(tokens),
    }
