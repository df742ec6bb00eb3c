"""Iteration-level scheduling (Yu et al., Orca, OSDI'22), first come first served, as in the paper's vLLM and Orca."""

from __future__ import annotations

from lab.core import Group, Plan
from lab.schedulers import SCHEDULERS, Scheduler


@SCHEDULERS.register("continuous")
class Continuous(Scheduler):
    """Running sequences first, then whole prompts from the queue, in one mixed step under one cap on tokens.

    The head of the queue waits, and all others behind it, until there is memory for it. Nobody is admitted in a step
    that preempted. A prompt longer than the cap is computed in chunks, of what the others leave.
    """

    def schedule(self, now: float, more: bool) -> Plan:
        plan = Plan()
        budget = self.keep_running(list(self.running), plan, self.limits.tokens)
        if not plan.preempted:
            self._admit(plan, budget)
        return plan

    def _admit(self, plan: Plan, budget: int) -> None:
        rows = sum(len(group.live) for group in self.running)
        while self.waiting:
            group = self.waiting[0]
            first = self._first_work(group)
            rows += len(group.live)
            if rows > self.limits.seqs or not budget or budget < first <= self.limits.tokens:
                return
            if not self.admit(group, plan):
                return
            tokens = self.room(group, plan, budget)
            if tokens is None:  # a swapped gang is back, but its next tokens do not fit yet
                return
            budget -= tokens

    def _first_work(self, group: Group) -> int:
        if group in self.host.saved:
            return len(group.live)
        return group.to_share or sum(s.pending for s in group.live)
