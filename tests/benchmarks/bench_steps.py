"""What the host does in a step: scheduling alone, and scheduling, allocation and recording together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from random import Random
from typing import Any

import pytest

from lab.allocators import ALLOCATORS
from lab.core import Group, Limits, Plan, Request, Sampled, Sequence
from lab.engine import Engine
from lab.events import Launched
from lab.record import Recorder
from lab.schedulers import SCHEDULERS, Scheduler

SEQUENCES = 2048  # in all, whatever one scheduler has: so that a round is as long, and memory as cold, for each size
ROOM = 1024  # tokens of a sequence
BAR_S = 1e-3  # of a step at 256 running sequences


class Nothing:
    """An executor that computes nothing, in no time."""

    now = 0.0
    compiled = False

    def __init__(self) -> None:
        self.token = [Sampled(0)]
        self.sampled: dict[Sequence, list[Sampled]] = {}

    def launch(self, plan: Plan, tables: Mapping[Sequence, Seq[int]]) -> None:
        self.sampled = dict.fromkeys(plan.work, self.token)

    def collect(self) -> dict[Sequence, list[Sampled]]:
        return self.sampled

    def wait(self, until_s: float) -> None:
        raise AssertionError("there is always work")

    def wake(self) -> None: ...


def decoding(sequences: int) -> Scheduler:
    """So many sequences, all running, their prompts of 20 to 200 tokens computed; one in 16 takes a block each step."""
    limits = Limits(seqs=sequences, tokens=ROOM * sequences)
    scheduler: Scheduler = SCHEDULERS.get("continuous")(ALLOCATORS.get("paged")(ROOM * sequences, 16, limits), limits)
    draw = Random(0)
    for i in range(sequences):
        scheduler.submit(Group(Request(i, 0.0, range(draw.randint(20, 200)), ROOM)))
    go_on(scheduler.schedule(0.0, False))
    assert len(scheduler.running) == sequences
    return scheduler


def go_on(plan: Plan) -> None:
    for s, tokens in plan.work.items():
        s.computed += tokens
        s.tokens.append(0)


@pytest.mark.parametrize("sequences", [16, 256, 2048])
def test_schedule(timed: Any, sequences: int) -> None:
    schedulers = [decoding(sequences) for _ in range(SEQUENCES // sequences)]
    plans: list[Plan] = []

    def prepare() -> None:
        for plan in plans:
            go_on(plan)
        plans.clear()

    def work() -> None:
        plans.extend(scheduler.schedule(0.0, False) for scheduler in schedulers)

    timed(work, prepare=prepare, count=len(schedulers), unit="steps")
    assert all(len(plan.work) == sequences for plan in plans)


def test_host_step(timed: Any) -> None:
    """Scheduling, allocation and recording together, at 256 sequences. Their tokens are appended before."""
    scheduler, recorder, token = decoding(256), Recorder(None, {}, chunk_rows=1 << 30), [Sampled(0)]
    plan = Plan()

    def work() -> None:
        nonlocal plan
        plan = scheduler.schedule(0.0, False)
        live = [s for group in scheduler.running for s in group.live]
        recorder.launched(Launched(0.0, plan, scheduler.allocator, live, [], 0, 0))
        recorder.collected(0.0, 0.0, dict.fromkeys(plan.work, token))

    timed(work, prepare=lambda: go_on(plan), unit="steps", bar_s=BAR_S)


def test_engine_step(timed: Any) -> None:
    """The same with the engine around it, whose executor takes no time."""
    engine = Engine(decoding(256), Nothing(), Recorder(None, {}, chunk_rows=1 << 30))
    timed(lambda: engine.step(False, math.inf), unit="steps")
