"""When requests arrive: Poisson as the authors of PagedAttention draw it, gamma with a burstiness, or a trace's times.

numpy's legacy generator is used because its streams are frozen: a seed means the same times in every version.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from lab.core import InputError

ARRIVALS = ("poisson", "gamma", "all", "trace")
QUANTUM_S = 0.01  # the authors' time quantum
_CHUNK = 8192  # draws at a time; does not change what is drawn


def poisson(rate_per_s: float, duration_s: float | None, seed: int) -> Iterator[float]:
    """A Poisson count for each quantum of 10 ms; all arrivals of a quantum share the time at which it begins.

    Without `duration_s` it never ends.
    """
    random = np.random.RandomState(seed)
    left = None if duration_s is None else int(duration_s * 100)  # quanta, as the authors round them
    for start in itertools.count(0, _CHUNK):
        size = _CHUNK if left is None else min(_CHUNK, left - start)
        if size <= 0:
            return
        counts = random.poisson(rate_per_s * QUANTUM_S, size)
        for quantum in np.flatnonzero(counts):
            yield from [(start + int(quantum)) * QUANTUM_S] * int(counts[quantum])


def gamma(rate_per_s: float, burstiness: float, duration_s: float | None, seed: int) -> Iterator[float]:
    """Gamma distributed gaps of mean 1 / rate and shape `burstiness`: coefficient of variation burstiness ** -0.5.

    1 is a Poisson process, less comes in bursts, more is regular; the first request comes after a first gap.
    Times are rounded to the microsecond, so that the last digit of a machine's mathematics library does not show.
    """
    random = np.random.RandomState(seed)
    now = 0.0
    while True:
        for gap in random.gamma(burstiness, 1 / (rate_per_s * burstiness), _CHUNK):
            now += float(gap)
            if duration_s is not None and round(now, 6) >= duration_s:
                return
            yield round(now, 6)


def scale(span_s: tuple[float, float], count: int, rate_per_s: float | None, spec: str) -> float:
    """What to multiply the times of a trace with, so that the mean gap of `count` arrivals is 1 / rate; None: 1."""
    if rate_per_s is None:
        return 1.0
    first_s, last_s = span_s
    if first_s == last_s:
        raise InputError(
            f"workload {spec!r}: all arrivals are at {first_s} s and cannot be scaled to a rate: leave the rate out"
        )
    return (count - 1) / ((last_s - first_s) * rate_per_s)
