"""`timed`: rounds of a benchmark, each right after one of calibration, and what the first takes beside the second."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.benchmarks.calibration import python

SECONDS = 0.4  # of a benchmark, with calibration and all, on a machine of our own
FEWEST, MOST = 12, 300  # rounds
HERE = Path(__file__).parent


def clock(device: str) -> Callable[[], float]:
    """Of a CPU the time that it worked for us, which others who take it away from us do not lengthen."""
    return time.perf_counter if device == "cuda" else time.process_time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            device = item.callspec.params.get("device", "cpu") if hasattr(item, "callspec") else "cpu"
            item.add_marker(pytest.mark.benchmark(timer=clock(device)))
            if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@cache
def calibration(beside: str) -> Callable[[], None]:
    if beside == "python":
        return python
    return importlib.import_module("tests.benchmarks.calibration_of_tensors").tensors(beside)  # brings torch: seconds


class Timed:
    """Calls `work` in rounds, `prepare` before each, unmeasured; `count` things of the kind `unit` are done in a round.

    `beside` names the calibration: "python", "cpu" or "cuda". The ratio is the lower quartile of those of all rounds.
    So are the seconds, of which `bar_s` says what one of the things may take.
    """

    def __init__(self, benchmark: BenchmarkFixture) -> None:
        self.benchmark = benchmark

    def __call__(
        self,
        work: Callable[[], object],
        *,
        count: int = 1,
        unit: str = "calls",
        beside: str = "python",
        bar_s: float | None = None,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        fixed, now = calibration(beside), clock(beside)
        fixed_s: list[float] = []

        def before() -> None:
            prepare()
            start = now()
            fixed()
            fixed_s.append(now() - start)

        rounds = self.rounds(work, before)
        fixed_s.clear()
        self.benchmark.pedantic(work, setup=before, rounds=rounds)
        if self.benchmark.stats is None:  # --benchmark-disable: it ran, and that is all that was asked
            return
        work_s = self.benchmark.stats.stats.data
        ratio = quartile([one / other for one, other in zip(work_s, fixed_s, strict=True)])
        self.benchmark.extra_info.update(
            ratio=ratio,
            seconds=quartile(work_s) / count,
            best_s=min(work_s) / count,
            unit=unit,
            bar_s=bar_s,
            beside=beside,
            beside_s=quartile(fixed_s),
            device=importlib.import_module("torch").cuda.get_device_name() if beside == "cuda" else "",
        )

    def rounds(self, work: Callable[[], object], before: Callable[[], None]) -> int:
        """As many as fit the time; the first do not count, in which caches fill and kernels are compiled."""
        for trial in range(5):
            if trial == 2:
                start = time.process_time()
            before()
            work()
        return min(max(int(3 * SECONDS / (time.process_time() - start)), FEWEST), MOST)


def quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0]


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Iterator[Timed]:
    """The garbage collector rests: when it comes depends on all that was allocated before."""
    gc.collect()
    gc.disable()
    yield Timed(benchmark)
    gc.enable()
