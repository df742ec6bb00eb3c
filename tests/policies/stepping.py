"""An engine that is stepped by hand, for scenarios small enough to be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lab.allocators import ALLOCATORS, Allocator
from lab.core import Group, Limits, Plan, Request, SamplingParams
from lab.engine import Engine
from lab.executors.checksum import ChecksumExecutor
from lab.schedulers import SCHEDULERS, Scheduler


def request(id: int, prompt: int, output: int = 100, n: int = 1, arrival_s: float = 0.0) -> Request:
    return Request(id, arrival_s, range(id, id + prompt), output, SamplingParams(max_tokens=output, n=n))


class Bench:
    """An engine that is stepped by hand and keeps its plans."""

    def __init__(
        self,
        scheduler: str = "continuous",
        allocator: str = "paged",
        blocks: int = 1000,
        block: int = 4,
        limits: Limits | None = None,
        depth: int = 0,
        **options: Any,
    ) -> None:
        self.limits = limits or Limits()
        self.allocator: Allocator = ALLOCATORS.get(allocator)(blocks * block, block, self.limits)
        self.scheduler: Scheduler = SCHEDULERS.get(scheduler)(self.allocator, self.limits, **options)
        self.executor = ChecksumExecutor(self.allocator.num_blocks, block, host_blocks=self.scheduler.host.num_blocks)
        self.engine = Engine(self.scheduler, self.executor, on_end=self._on_end, depth=depth)
        self.plans: list[Plan] = []
        self.ended: list[int] = []
        self.texts: dict[int, list[list[int]]] = {}
        decide = self.scheduler.schedule

        def schedule(now: float, more: bool) -> Plan:
            self.plans.append(decide(now, more))
            return self.plans[-1]

        self.scheduler.schedule = schedule  # type: ignore[method-assign]

    def _on_end(self, group: Group) -> None:
        self.ended.append(group.request.id)
        self.texts[group.request.id] = [tokens[len(group.request.prompt) :] for tokens in group.outputs()]

    def submit(self, *requests: Request) -> Bench:
        for one in requests:
            self.engine.submit(one)
        return self

    def drain(self) -> None:
        while self.engine.groups or self.engine.flights:
            self.engine.step()
        assert self.allocator.idle().free == self.allocator.capacity
        assert not self.scheduler.host.used
        assert not self.running
        assert not self.waiting

    def step(self, more: bool = False, next_s: float = float("inf")) -> dict[int, int]:
        """Request id -> tokens computed for it in this step."""
        self.engine.step(more, next_s)
        work: dict[int, int] = {}
        for s, tokens in self.plans[-1].work.items():
            work[s.group.request.id] = work.get(s.group.request.id, 0) + tokens
        return work

    @property
    def plan(self) -> Plan:
        return self.plans[-1]

    @property
    def blocked(self) -> int | None:
        return self.plan.blocked.request.id if self.plan.blocked else None

    @property
    def running(self) -> list[int]:
        return [group.request.id for group in self.scheduler.running]

    @property
    def waiting(self) -> list[int]:
        return [group.request.id for group in self.scheduler.waiting]


def ids(groups: Iterable[Group]) -> list[int]:
    return [group.request.id for group in groups]
