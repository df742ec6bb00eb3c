"""Carry a plan out and keep the clock. They alone own tensors and time; only `torch` and below import torch.

A step is two calls. `launch` performs the plan's Moves in order, builds one ragged batch and queues it; block tables
may change as soon as it returns. `collect` waits for the oldest launch and returns its sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from lab.core import Plan, Sampled, Sequence


class Executor(Protocol):
    @property
    def now(self) -> float:
        """Seconds since the run began, on the wall or on a virtual clock."""
        ...

    @property
    def compiled(self) -> bool:
        """Was a kernel compiled in the step launched last? Its duration then says nothing about serving."""
        ...

    def launch(self, plan: Plan, tables: Mapping[Sequence, Seq[int]]) -> None:
        """Queue a step. `computed` of each sequence is still what it was before the step."""

    def collect(self) -> dict[Sequence, list[Sampled]]:
        """Sampled tokens of the oldest launch, for the sequences all of whose pending tokens it computed."""
        ...

    def wait(self, until_s: float) -> None:
        """Let time pass until `until_s`; a wall clock returns early when something is submitted or cancelled."""

    def wake(self) -> None:
        """Called from any thread: end a `wait` that is under way, or the next one. A virtual clock does nothing."""
