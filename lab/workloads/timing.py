"""What was asked about arrivals, checked before anything is drawn, and the arrival times that follow for a source."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lab.core import InputError, unknown
from lab.workloads.arrivals import ARRIVALS, gamma, poisson, scale
from lab.workloads.source import Item, Source

MOST_REQUESTS = 10_000_000
MOST_SECONDS = 10_000_000
MOST_PER_SECOND = 1_000_000

Timed = tuple[float, Item]  # seconds
Times = Callable[[], Iterator[float]]  # seconds, in order, anew for each call


@dataclass(frozen=True, slots=True)
class Timing:
    """Kind of arrivals, requests per second, and where they end: after `duration_s`, `count` requests, or the file."""

    arrivals: str
    rate_per_s: float | None
    duration_s: float | None
    count: int | None
    seed: int
    burstiness: float

    def __post_init__(self) -> None:
        rate, duration, count = self.rate_per_s, self.duration_s, self.count
        if self.arrivals not in ARRIVALS:
            raise InputError(unknown("arrivals", self.arrivals, ARRIVALS))
        if rate is not None and not 0 < rate <= MOST_PER_SECOND:
            raise InputError(
                f"rate {rate}: must be above 0, at most {MOST_PER_SECOND} requests/s; for no gaps choose arrivals all"
            )
        if duration is not None and not 0 < duration <= MOST_SECONDS:
            raise InputError(f"duration {duration}: must be above 0 and at most {MOST_SECONDS} seconds")
        if count is not None and not 1 <= count <= MOST_REQUESTS:
            raise InputError(f"count {count}: must be from 1 to {MOST_REQUESTS} requests")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}: must be from 0 to {2**32 - 1}")
        if not 0.001 <= self.burstiness <= 1e6:
            raise InputError(
                f"burstiness {self.burstiness}: must be from 0.001 to 1000000; 1 is Poisson, less comes in bursts"
            )

    def schedule(self, spec: str, source: Source) -> tuple[int, Callable[[], Iterator[Timed]]]:
        """How many requests there are, at least one, and a function whose every call goes through all of them.

        `spec` names the workload in messages.
        """
        if self.arrivals == "trace":
            count, pairs = self._recorded(spec, source)
        else:
            count, times = self._at_once(spec, source) if self.arrivals == "all" else self._drawn(spec, source)

            def pairs() -> Iterator[Timed]:
                return zip(times(), source.take(count), strict=True)

        if not count:
            raise InputError(
                f"workload {spec!r}: nothing arrives within {self.duration_s} s (rate {self.rate_per_s}): lengthen it"
            )
        return count, pairs

    def _at_once(self, spec: str, source: Source) -> tuple[int, Times]:
        if self.rate_per_s is not None or self.duration_s is not None:
            raise InputError("arrivals all come at time 0: leave rate and duration out, and give a count")
        count = self._number(spec, source, "a count")
        return count, lambda: itertools.repeat(0.0, count)

    def _recorded(self, spec: str, source: Source) -> tuple[int, Callable[[], Iterator[Timed]]]:
        if source.span_s is None or source.rows is None:
            raise InputError(f"workload {spec!r} has no arrival times: choose arrivals poisson, gamma or all")
        if self.count is not None and self.count > source.rows:
            raise InputError(f"count {self.count}: workload {spec!r} has {source.rows} arrivals: take no more")
        factor = scale(source.span_s, source.rows, self.rate_per_s, spec)
        most, end_s = self.count or source.rows, self.duration_s or math.inf

        def pairs() -> Iterator[Timed]:
            timed = (((item.arrival_s or 0.0) * factor, item) for item in source.take(most))
            return itertools.takewhile(lambda pair: pair[0] < end_s, timed)

        return most if self.duration_s is None else sum(1 for _ in pairs()), pairs

    def _drawn(self, spec: str, source: Source) -> tuple[int, Times]:
        rate, duration, count = self.rate_per_s, self.duration_s, self.count
        if rate is None:
            raise InputError(f"arrivals {self.arrivals} need a rate: give requests per second, or choose arrivals all")
        if duration is None:
            count = self._number(spec, source, "a duration or a count")
            if count / rate > MOST_SECONDS:
                raise InputError(f"rate {rate}: {count} requests take over {MOST_SECONDS} s: raise it or take fewer")
        elif count is None and rate * duration > MOST_REQUESTS:
            raise InputError(f"rate {rate}: over {MOST_REQUESTS} requests in {duration} s: lower it")

        def times() -> Iterator[float]:
            if self.arrivals == "poisson":
                return itertools.islice(poisson(rate, duration, self.seed), count)
            return itertools.islice(gamma(rate, self.burstiness, duration, self.seed), count)

        return count if duration is None and count else sum(1 for _ in times()), times

    def _number(self, spec: str, source: Source, remedy: str) -> int:
        number = self.count or source.rows
        if number is None:
            raise InputError(f"workload {spec!r} has no end: give {remedy}")
        return number
