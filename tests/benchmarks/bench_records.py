"""Recording a step, accounting for its memory, and whole runs on the virtual clock."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from bench_steps import decoding, go_on

from lab.allocators import account
from lab.core import Sampled, Sequence
from lab.events import Launched
from lab.metrics import categories
from lab.record import Record, Recorder
from lab.run import Run, carry_out

STEPS = 4
RUN = Run(workload="sharegpt", arrivals="all", rate=None, duration_s=None, count=8)


def test_record_a_step(timed: Any) -> None:
    """256 decodes: the plan, the tokens, and who holds which memory."""
    scheduler = decoding(256)
    recorder = Recorder(None, {}, chunk_rows=1 << 30)
    plan = scheduler.schedule(0.0, False)
    live = [s for group in scheduler.running for s in group.live]
    token = [Sampled(0)]

    def prepare() -> None:
        nonlocal plan
        go_on(plan)
        plan = scheduler.schedule(0.0, False)

    def work() -> None:
        for _ in range(STEPS):
            recorder.launched(Launched(0.0, plan, scheduler.allocator, live, [], 0, 0))
            recorder.collected(0.0, 0.0, dict.fromkeys(plan.work, token))

    timed(work, prepare=prepare, count=STEPS, unit="steps")


def test_account_slot_by_slot(timed: Any) -> None:
    """The definition of the seven categories, on 16 sequences."""
    scheduler = decoding(16)
    live: list[Sequence] = [s for group in scheduler.running for s in group.live]
    timed(lambda: account(scheduler.allocator, live), unit="accounts")


@cache
def recorded() -> Record:
    return carry_out(RUN, None).record()


def test_account_of_a_record(timed: Any) -> None:
    """The same from a record, in closed form, for every step of it."""
    record = recorded()
    steps = len(categories(record))
    timed(lambda: categories(record), count=steps, unit="steps")


@pytest.mark.parametrize("allocator", ["contiguous-max", "paged"])
def test_virtual_clock(timed: Any, allocator: str) -> None:
    """All of a run: policies, cost model, record in memory."""
    run = Run(**{**RUN.__dict__, "allocator": allocator})
    timed(lambda: carry_out(run, None), count=RUN.count, unit="requests")
