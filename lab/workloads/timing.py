"""What was asked about arrivals, checked before anything is drawn, and the arrival times that follow for a source."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lab.core import InputError, unknown
from lab.workloads.arrivals import ARRIVALS, gamma, poisson, scaled
from lab.workloads.source import Source

MOST_REQUESTS = 10_000_000
MOST_SECONDS = 10_000_000
MOST_PER_SECOND = 1_000_000


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

    def times_s(self, spec: str, source: Source) -> list[float]:
        """Arrival times in order, at least one. `spec` names the workload in messages."""
        if self.arrivals == "all":
            times = self._at_once(spec, source)
        elif self.arrivals == "trace":
            times = self._recorded(spec, source)
        else:
            times = self._drawn(spec, source)
        if not times:
            raise InputError(
                f"workload {spec!r}: nothing arrives within {self.duration_s} s (rate {self.rate_per_s}): lengthen it"
            )
        return times

    def _at_once(self, spec: str, source: Source) -> list[float]:
        if self.rate_per_s is not None or self.duration_s is not None:
            raise InputError("arrivals all come at time 0: leave rate and duration out, and give a count")
        return [0.0] * self._number(spec, source, "a count")

    def _recorded(self, spec: str, source: Source) -> list[float]:
        if source.arrivals_s is None:
            raise InputError(f"workload {spec!r} has no arrival times: choose arrivals poisson, gamma or all")
        if self.count is not None and self.count > len(source.arrivals_s):
            raise InputError(
                f"count {self.count}: workload {spec!r} has {len(source.arrivals_s)} arrivals: take no more"
            )
        times = scaled(source.arrivals_s, self.rate_per_s, spec)[: self.count]
        return [time_s for time_s in times if self.duration_s is None or time_s < self.duration_s]

    def _drawn(self, spec: str, source: Source) -> list[float]:
        if self.rate_per_s is None:
            raise InputError(f"arrivals {self.arrivals} need a rate: give requests per second, or choose arrivals all")
        count = self.count
        if self.duration_s is None:
            count = self._number(spec, source, "a duration or a count")
            if count / self.rate_per_s > MOST_SECONDS:
                raise InputError(
                    f"rate {self.rate_per_s}: {count} requests take over {MOST_SECONDS} s: raise it or take fewer"
                )
        elif count is None and self.rate_per_s * self.duration_s > MOST_REQUESTS:
            raise InputError(f"rate {self.rate_per_s}: over {MOST_REQUESTS} requests in {self.duration_s} s: lower it")
        if self.arrivals == "poisson":
            times = poisson(self.rate_per_s, self.duration_s, self.seed)
        else:
            times = gamma(self.rate_per_s, self.burstiness, self.duration_s, self.seed)
        return list(itertools.islice(times, count))

    def _number(self, spec: str, source: Source, remedy: str) -> int:
        number = self.count or source.rows
        if number is None:
            raise InputError(f"workload {spec!r} has no end: give {remedy}")
        return number
