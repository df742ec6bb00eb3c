"""Where the time of a step goes: on the GPU by kind of kernel, in gaps between kernels, and on the host."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from lab.bench.cases import CASES, executor_for, serve
from lab.bench.workloads import Rows
from lab.executors.torch import TorchExecutor

KINDS = {  # of kernel, by its name; the first that is found in it
    "attention": r"^attention_kernel",
    "planning shares": r"^plan_kernel",
    "norm": r"^norm_kernel",
    "rotate and store": r"^rotate_and_store_kernel",
    "SwiGLU": r"^silu_and_mul_kernel",
    "sampling": r"^(sample|choose)_kernel",
    "matrix products": r"^row_kernel|gemm|gemv|nvjet|cutlass|cublas|splitK",
    "copies": r"^(Memcpy|Memset|store_kernel|copy_blocks_kernel)|copy_kernel",
}
AFTER, STEPS = 0.4, 100  # steps are watched when this share of the longest answer is written, so many of them


class Span(NamedTuple):
    """A kernel, or a copy, on the device."""

    name: str
    begin_us: float
    end_us: float


def steps_of(names: list[str], depth: int, device: str) -> Rows:
    """A table for each case, all of whose requests come at once, in the midst of decoding."""
    for name in names:
        case = CASES[name]
        executor = executor_for(case, device)
        requests = case.requests()
        serve(case, executor, requests, depth, recorded=False)  # compiles, captures
        first = int(AFTER * max(request.output or 1 for request in requests))
        watch = Watch(executor, first, STEPS)
        serve(case, executor, requests, depth, False, watch.after)
        found = watch.found()
        print(f"{name}: {found['step_us']:.0f} us a step, of {found['steps']} after the first {first}")
        for kind, (calls, us) in found["kinds"].items():
            print(f"  {kind:18} {us:8.1f} us  {100 * us / found['step_us']:5.1f} %  {calls:6.1f} calls")
        for kind in ("gaps", "host"):
            print(f"  {kind:18} {found[f'{kind}_us']:8.1f} us  {100 * found[f'{kind}_us'] / found['step_us']:5.1f} %")
        yield {"case": name, "depth": depth, **found}
        del executor, watch
    print("gaps: no kernel runs; host: the engine, its policies and launches, in part while kernels run")


class Watch:
    """Profiles `steps` steps after the first `first`; tells `serve` to stop when they are over."""

    def __init__(self, executor: TorchExecutor, first: int, steps: int) -> None:
        self.steps = steps
        self._first = first
        self._executor = executor
        self._profiler = profile(
            activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
        )
        self._start_s = self._waited_s = self.seconds = 0.0
        self._collect = executor.collect
        self.spans: list[Span] = []

    def after(self, step: int) -> bool:
        """Is asked after each step, counted from 1, whether to go on."""
        if step == self._first:
            self._executor.collect = self._timed  # type: ignore[method-assign]
            self._profiler.start()
            self._start_s = time.perf_counter()
        if step < self._first + self.steps:
            return True
        self.seconds = time.perf_counter() - self._start_s
        self._profiler.stop()
        del self._executor.collect  # the method is the class's again
        on_device = [event for event in self._profiler.events() if event.device_type.name == "CUDA"]
        self.spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in on_device]
        return False

    def found(self) -> dict[str, Any]:
        step_us = 1e6 * self.seconds / self.steps
        host_us = step_us - 1e6 * self._waited_s / self.steps
        busy = {"kinds": by_kind(self.spans, self.steps), "gaps_us": step_us - busy_us(self.spans) / self.steps}
        return {"steps": self.steps, "step_us": step_us, **busy, "host_us": host_us}

    def _timed(self) -> Any:
        start_s = time.perf_counter()
        drawn = self._collect()
        self._waited_s += time.perf_counter() - start_s
        return drawn


def by_kind(spans: Iterable[Span], steps: int) -> dict[str, tuple[float, float]]:
    """Calls and microseconds per step of each kind, the longest first; where kernels overlap, the first one's time."""
    sums: dict[str, list[float]] = {}
    for span, us in _one_by_one(spans):
        kind = next((kind for kind, name in KINDS.items() if re.search(name, span.name)), "others")
        own = sums.setdefault(kind, [0.0, 0.0])
        own[0] += 1 / steps
        own[1] += us / steps
    return {kind: (calls, us) for kind, (calls, us) in sorted(sums.items(), key=lambda item: -item[1][1])}


def busy_us(spans: Iterable[Span]) -> float:
    """Time in which anything runs."""
    return sum(us for _, us in _one_by_one(spans))


def _one_by_one(spans: Iterable[Span]) -> Iterator[tuple[Span, float]]:
    """Each with the time that it ran after all that began before it had ended: kernels may start early, and wait."""
    until = 0.0
    for span in sorted(spans, key=lambda span: span.begin_us):
        yield span, max(0.0, span.end_us - max(span.begin_us, until))
        until = max(until, span.end_us)
