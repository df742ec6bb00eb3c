"""Request-level scheduling: a batch runs to completion as one rectangle, as FasterTransformer's (Kwon et al., 6.1).

prompt A . . | a a a a a a        . dead token: computed, thrown away
prompt B b b | b b - - - -        - ended row: a dead token per step, and its memory is kept
step 1       | 2 3 4 5 6 7
"""

from __future__ import annotations

from collections.abc import Iterable

from lab.core import Group, Plan, Sequence
from lab.schedulers import SCHEDULERS, Scheduler


@SCHEDULERS.register("static")
class Static(Scheduler):
    """Waits for a full batch of `batch` requests; takes fewer where memory has no room, or when no more will come."""

    width = 0  # positions of the rectangle

    def schedule(self, now: float, more: bool) -> Plan:
        plan = Plan()
        if not any(g.live for g in self.running):
            self._clear()
            self._form(plan, now, more)
        behind = [g for g in self.running if any(map(_behind, g.live))]
        if behind:
            self.keep_running(self._rectangle(behind), plan, self.limits.tokens)
        else:
            self.keep_running([g for g in self.running if g.live], plan, self.limits.tokens)
            self.width += 1
        self._pad(plan)
        return plan

    def ready(self, now: float, more: bool) -> float:
        """The time from which a batch may start with what is waiting."""
        full = len(self.waiting) >= self.batch
        return now if full or not more else float("inf")

    def finish(self, done: Iterable[Sequence]) -> None:
        if not any(g.live for g in self.running):
            self._clear()

    def _form(self, plan: Plan, now: float, more: bool) -> None:
        if not self.waiting:
            return
        ready_s = self.ready(now, more)
        if ready_s > now:
            plan.wake_s = ready_s
            return
        num_rows = 0
        while self.waiting and len(self.running) < self.batch:
            num_rows += len(self.waiting[0].live)
            if num_rows > self.limits.seqs or not self.admit(self.waiting[0], plan):
                break
        rows = [s for g in self.running for s in g.live]
        self.width = max((len(s.tokens) if _behind(s) else s.computed for s in rows), default=0)

    def _rectangle(self, behind: list[Group]) -> list[Group]:
        """The first groups whose prompts, padded to the longest of them, stay under the cap of a step; at least one."""
        rows = width = 0
        for i, group in enumerate(behind):
            rows += len(group.live)
            width = max(width, *(s.pending for s in group.live))
            if i and rows * width > self.limits.tokens:
                return behind[:i]
        return behind

    def _pad(self, plan: Plan) -> None:
        if not plan.work:
            return
        width = max(plan.work.values())
        for s, tokens in plan.work.items():
            dead = width - tokens
            positions = self.width - s.computed - tokens
            if dead or positions:
                plan.padding[s] = (dead, positions)
        if width == 1:
            plan.padding.update({s: (1, self.width - s.computed) for g in self.running for s in g.ended})

    def _clear(self) -> None:
        for group in self.running:
            for s in group.sequences:
                self.allocator.release(s)
        self.running = []


def _behind(s: Sequence) -> bool:
    """Not all of its prompt (or of what a preemption lost) is computed: it cannot decode yet.

    A dropped beam is where the one is that it takes over.
    """
    s = {child: parent for parent, child in s.group.forks}.get(s, s)
    return s.computed == 0 or s.pending > 1


@SCHEDULERS.register("dynamic")
class Dynamic(Static):
    """The same, but a batch starts with what is there once the oldest request has waited `timeout_s`."""

    def ready(self, now: float, more: bool) -> float:
        return min(super().ready(now, more), max(now, self.waiting[0].request.arrival_s + self.timeout_s))
