"""What to compute next: the queues of groups, and the verbs of which every scheduler is made. Standard library only.

Schedulers are the only callers of allocators. A scheduler defines `schedule`; a file dropped into this folder registers
itself.

    submit -> waiting --admit--> running --finish--> gone
                 ^                  |
                 +-----preempt------+        latest arrival first, all of a group or nothing of it
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import deque
from collections.abc import Iterable

from lab.allocators import Allocator
from lab.allocators.swap import Host
from lab.core import Group, InputError, Limits, Plan, Registry, Request, Sequence

SCHEDULERS = Registry("scheduler", __name__)
PREEMPTION = ("recompute", "swap")


class Scheduler:
    """Base of all schedulers. `running` is in order of arrival, so the latest arrival is its last group."""

    def __init__(
        self,
        allocator: Allocator,
        limits: Limits | None = None,
        *,
        watermark: float | None = None,
        preemption: str = "recompute",
        host_tokens: int | None = None,
        batch: int = 8,
        timeout_s: float = 1.0,
    ) -> None:
        """`watermark` is the share of blocks that an admission leaves free, by default 1 % where allocations grow and 0
        where they reserve ahead; `host_tokens` the room to swap to, by default as much as the pool. `batch` (requests)
        and `timeout_s` concern schedulers that wait for a batch."""
        if preemption not in PREEMPTION:
            raise InputError(f"preemption {preemption!r} is unknown: take {' or '.join(PREEMPTION)}")
        if watermark is not None and not 0 <= watermark < 1:
            raise InputError(f"watermark {watermark}: must be a share of the pool in [0, 1); the paper's is 0.01")
        if batch < 1:
            raise InputError(f"batch of {batch} requests: must be at least 1")
        if not timeout_s >= 0:
            raise InputError(f"time-out of {timeout_s} s: must be 0 or more")
        self.allocator = allocator
        self.limits = limits or allocator.limits
        share = (0.01 if allocator.grows else 0.0) if watermark is None else watermark
        self.spare = int(share * allocator.num_blocks) * allocator.block  # tokens
        self.host = Host(allocator.capacity if host_tokens is None else host_tokens, allocator.block)
        self.swaps = preemption == "swap"
        self.batch = batch
        self.timeout_s = timeout_s
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []

    def schedule(self, now: float, more: bool) -> Plan:
        """Decide one step. `more`: requests are still to come."""
        raise TypeError(f"{type(self).__name__} must define schedule()")

    def refusal(self, request: Request) -> str | None:
        """Why the request can never run here, not even alone, or None."""
        limit = self.limits.length
        tokens = len(request.prompt) + (request.output or 1)
        if tokens > limit:
            return (
                f"request {request.id}: {len(request.prompt)} prompt and {request.output or 1} output tokens exceed "
                f"the limit of {limit} tokens a sequence; shorten it or take a model with a longer context"
            )
        width = request.sampling.width
        most = min(self.limits.seqs, self.limits.tokens)
        if width > most:
            rule = f"{width} sequences exceed the {most} of a step"
            return f"request {request.id}: {rule}; lower n or beams"
        try:
            fits = self.allocator.fits(request)
        except InputError as error:
            return str(error)
        if not fits:
            return (
                f"request {request.id}: {width} x {min(request.most, limit)} tokens do not fit an empty "
                f"pool of {self.allocator.capacity} tokens under this allocator; enlarge it or lower max_tokens"
            )
        return None

    def submit(self, group: Group) -> None:
        self.waiting.append(group)

    def cancel(self, group: Group) -> None:
        """Give back all that the group holds, on the device and on the host, whatever its state."""
        for s in group.sequences:
            self.allocator.release(s)
        self.host.drop(group)
        if group in self.running:
            self.running.remove(group)
        elif group in self.waiting:
            self.waiting.remove(group)

    def finish(self, done: Iterable[Sequence]) -> None:
        """These sequences produced their last token."""
        for s in done:
            self.allocator.release(s)
            if not s.group.live and s.group in self.running:
                self.running.remove(s.group)

    def forget(self, s: Sequence) -> None:
        """It was preempted while the token on its way was its last: it holds nothing on the device."""
        self.host.forget(s)
        if not s.group.live:
            self.waiting.remove(s.group)

    def admit(self, group: Group, plan: Plan) -> bool:
        """From the head of the queue into the running ones, memory permitting."""
        spare = self.spare if self.running else 0  # an empty engine could wait for ever for room that it leaves itself
        if group in self.host.saved:
            hit = 0 if self.host.load(self.allocator, group, spare) else None
            plan.swapped.add(group)
        else:
            hit = self.allocator.admit(group, spare)
        if hit is None:
            plan.swapped.discard(group)
            plan.blocked = group
            return False
        if hit:
            group.live[0].computed = hit
        self.waiting.remove(group)
        self.running.append(group)
        plan.admitted[group] = group.distinct
        return True

    def room(self, group: Group, plan: Plan, budget: int) -> int | None:
        """Plan what the group computes, `budget` tokens at most, and get the memory; None where there is none."""
        if len(group.live) > 1:
            return self._room_for_several(group, plan, budget)
        s = group.live[0]
        return self._compute(s, len(s.tokens) - s.computed, plan, budget)

    def keep_running(self, groups: Iterable[Group], plan: Plan, budget: int) -> int:
        """Plan running groups, in order; where memory is short preempt the latest arrival. Returns the budget left."""
        for group in groups:
            if group in plan.preempted:
                continue
            tokens = self.room(group, plan, budget)
            while tokens is None:
                victim = next(g for g in reversed(self.running) if g.live)
                self.preempt(victim, plan)
                tokens = 0 if victim is group else self.room(group, plan, budget)
            budget -= tokens
        return budget

    def preempt(self, group: Group, plan: Plan) -> None:
        """Take all its memory back, by swap if the host has room, else to be recomputed; back to the queue's head."""
        plan.preempted[group] = group.distinct
        for s in group.live:
            plan.work.pop(s, None)
            if s in plan.forked:
                plan.forked.remove(s)
        if self.swaps and self.host.save(self.allocator, group):
            plan.swapped.add(group)
        else:
            group.forks.clear()
        for s in group.sequences:
            self.allocator.release(s)
            if s in group.live:
                s.computed = 0
        self.running.remove(group)
        self.waiting.appendleft(group)
        group.preemptions += 1

    def _room_for_several(self, group: Group, plan: Plan, budget: int) -> int | None:
        if group.forks and not self._reorder(group, plan):
            return None
        leader = group.live[0]
        share = group.to_share
        if leader.computed < share:
            return self._compute(leader, share - leader.computed, plan, budget)
        if share and not self._fork(group, share, plan):
            return None
        wait = group.together and budget < sum(s.pending for s in group.live)  # for a step that samples all of them
        total = 0
        for s in group.live:
            tokens = self._compute(s, s.pending - wait, plan, budget - total)
            if tokens is None:
                for other in group.live:
                    plan.work.pop(other, None)
                return None
            total += tokens
        return total

    def _compute(self, s: Sequence, tokens: int, plan: Plan, budget: int) -> int | None:
        if tokens > budget:
            tokens = budget
        if tokens:
            if not self.allocator.extend(s, s.computed + tokens):
                return None
            plan.work[s] = tokens
        return tokens

    def _fork(self, group: Group, share: int, plan: Plan) -> bool:
        """Every other sequence of the group takes over the leader's tokens, or none does."""
        leader, *children = group.live
        mark = len(self.allocator.moves)
        held = [s for s in children if s in self.allocator.tables]
        for child in children:
            if not self.allocator.fork(leader, child, share):
                for undo in children:
                    undo.computed = 0
                    if undo not in held:
                        self.allocator.release(undo)
                del self.allocator.moves[mark:]
                return False
            child.computed = share
        plan.forked += children
        return True

    def _reorder(self, group: Group, plan: Plan) -> bool:
        """Dropped beams take over the tokens of those that go on twice: all of them, or none."""
        mark = len(self.allocator.moves)
        for parent, child in group.forks:
            if not self.allocator.fork(parent, child, parent.computed):
                for _, undo in group.forks:
                    undo.computed = 0
                del self.allocator.moves[mark:]
                return False
            child.computed = parent.computed
        plan.forked += [child for _, child in group.forks]
        group.forks.clear()
        return True


def import_policies() -> None:
    """Import every file of this folder, so that each registers what it defines."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


import_policies()
