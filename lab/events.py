"""What the engine tells, step by step, whoever listens: a record, the answers of `lab.llm`, a server's watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from lab.allocators import Allocator
from lab.core import Group, Plan, Request, Sampled, Sequence


class Launched(NamedTuple):
    """A step on its way, and memory with it: counts are applied, sequences that end with it have not left."""

    time_s: float
    plan: Plan
    allocator: Allocator
    live: list[Sequence]  # of the groups that run
    ended: list[Sequence]  # of these groups, where they still hold memory
    waiting: int  # groups in the queue
    host_tokens: int  # whose K and V are swapped out
    compiled: bool = False  # kernels, or a step captured, on its way: its time says little


class Recorder(Protocol):
    """Times are the executor's. Each step is launched, then collected, the oldest first; with depth 1 two are open."""

    def arrived(self, time_s: float, request: Request) -> None: ...
    def refused(self, time_s: float, request: Request, reason: str) -> None: ...
    def launched(self, step: Launched) -> None: ...
    def collected(self, start_s: float, end_s: float, sampled: Mapping[Sequence, list[Sampled]]) -> None: ...
    def ended(self, time_s: float, s: Sequence, reason: str) -> None: ...
    def cancelled(self, time_s: float, group: Group) -> None: ...
