"""The loop: requests arrive, the scheduler plans, the executor carries out, the recorder keeps what happened.

The engine decides nothing. It alone appends tokens and advances `computed`, and it tells when a sequence has ended.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from lab.allocators import Allocator
from lab.beams import Beams, group_of
from lab.core import Group, InputError, Plan, Request, Sampled, Sequence
from lab.executors import Executor
from lab.schedulers import Scheduler


class Recorder(Protocol):
    """What the engine tells whoever keeps the record (see `lab.record`)."""

    def arrived(self, time_s: float, request: Request) -> None: ...
    def refused(self, time_s: float, request: Request, reason: str) -> None: ...
    def step(
        self,
        start_s: float,
        end_s: float,
        plan: Plan,
        sampled: Mapping[Sequence, list[Sampled]],
        allocator: Allocator,
        live: Iterable[Sequence],
        ended: Iterable[Sequence],
        waiting: int,
        host_tokens: int,
        compiled: bool = False,
    ) -> None: ...
    def ended(self, time_s: float, s: Sequence, reason: str) -> None: ...
    def cancelled(self, time_s: float, group: Group) -> None: ...


class Engine:
    """One allocator, one scheduler, one executor, one record.

    `submit` and `cancel` may be called from other threads: they fill an inbox that each step empties.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        recorder: Recorder | None = None,
        *,
        eos: Iterable[int] = (),
        on_end: Callable[[Group], None] | None = None,
    ) -> None:
        """`eos`: token ids that end a sequence whose length is not forced; `on_end` is told of each completed group."""
        self.scheduler = scheduler
        self.allocator = scheduler.allocator
        self.executor = executor
        self.recorder = recorder
        self.eos = frozenset(eos)
        self.on_end = on_end
        self.groups: dict[int, Group] = {}  # in flight, by request id
        self.inbox: deque[Request | int] = deque()  # a request to submit, or the id of one to cancel

    def submit(self, request: Request) -> None:
        self.inbox.append(request)
        self.executor.wake()

    def cancel(self, request_id: int) -> None:
        """Give up a request in whatever state it is; nothing happens if it has ended already."""
        self.inbox.append(request_id)
        self.executor.wake()

    def reserve(self, prompt: Seq[int]) -> int:
        """Compute a prefix that requests will share and keep it in memory, before any of them (unrecorded).

        Returns how many of its tokens are kept: whole blocks, and none where the allocator shares no memory.
        """
        assert not self.groups, "reserve before the first request"
        if type(self.allocator).pin is Allocator.pin:
            return 0
        recorder, self.recorder = self.recorder, None
        group = Group(Request(-1, self.executor.now, prompt, output=2))  # one more than what computes the prompt
        self.scheduler.submit(group)
        while group.live[0].computed < len(prompt):
            self.step()
        kept = self.allocator.pin(group.live[0])
        self.scheduler.cancel(group)
        self.recorder = recorder
        return kept

    def refusal(self, request: Request) -> str | None:
        """Why the request can never run here, or None."""
        limit = self.scheduler.limits.length
        tokens = len(request.prompt) + (request.output or 1)
        if tokens > limit:
            return (
                f"request {request.id}: {len(request.prompt)} prompt and {request.output or 1} output tokens exceed "
                f"the limit of {limit} tokens a sequence; shorten it or take a model with a longer context"
            )
        if request.id in self.groups:
            return f"request {request.id} is in flight already; give each request an id of its own"
        width = request.sampling.width
        most = min(self.scheduler.limits.seqs, self.scheduler.limits.tokens)
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

    def run(
        self, requests: Iterable[Request], until_s: float = math.inf, go_on: Callable[[], bool] = lambda: True
    ) -> None:
        """Serve requests, in order of arrival, until all have ended or the clock passes `until_s`.

        `go_on` is asked after each step whether to go on.
        """
        arrivals = iter(requests)
        upcoming = next(arrivals, None)
        while self.executor.now < until_s:
            while upcoming is not None and upcoming.arrival_s <= self.executor.now:
                self._arrive(upcoming)
                upcoming = next(arrivals, None)
            if upcoming is None and not self.groups and not self.inbox:
                return
            next_s = min(until_s, upcoming.arrival_s) if upcoming else until_s
            if self.step(more=upcoming is not None, next_s=next_s) and not go_on():
                return

    def step(self, more: bool = False, next_s: float = math.inf) -> bool:
        """One iteration; where there is nothing to do, wait (to `next_s` at most): False."""
        self._read_inbox()
        start_s = self.executor.now
        plan = self.scheduler.schedule(start_s, more)
        plan.moves, self.allocator.moves = self.allocator.moves, []
        if not (plan.work or plan.moves or plan.preempted):
            self._wait(min(plan.wake_s, next_s), more)
            return False
        sampled: dict[Sequence, list[Sampled]] = {}
        if plan.work or plan.moves:
            self.executor.launch(plan, self.allocator.tables)
            for s, tokens in plan.work.items():
                s.computed += tokens
            sampled = self.executor.collect()
        done, searching = self._append(sampled)
        self._record(start_s, plan, sampled)
        for group in searching:
            for _, dropped in group.forks:
                dropped.computed = 0  # what its memory holds is not of its tokens any more
        if done:
            self._finish(done)
        return True

    def _arrive(self, request: Request) -> None:
        reason = self.refusal(request)
        if self.recorder:
            self.recorder.arrived(request.arrival_s, request)
            if reason:
                self.recorder.refused(self.executor.now, request, reason)
        if reason is None:
            group = self.groups[request.id] = group_of(request)
            self.scheduler.submit(group)

    def _read_inbox(self) -> None:
        while self.inbox:
            item = self.inbox.popleft()
            if isinstance(item, Request):
                self._arrive(item)
            elif group := self.groups.pop(item, None):
                self.scheduler.cancel(group)
                if self.recorder:
                    self.recorder.cancelled(self.executor.now, group)

    def _wait(self, until_s: float, more: bool) -> None:
        if self.inbox:
            return
        if until_s == math.inf and not more:
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            policies = f"{type(self.scheduler).__name__} with {type(self.allocator).__name__}"
            raise RuntimeError(
                f"{policies} plans no work, preempts nothing and waits for nothing while {len(self.groups)} requests "
                "are in flight: a policy has a dead end"
            )
        self.executor.wait(until_s)

    def _append(self, sampled: dict[Sequence, list[Sampled]]) -> tuple[list[tuple[Sequence, str]], list[Beams]]:
        """Append what was sampled; returns the sequences that have ended, each with the reason, and the searches."""
        done = []
        searching: dict[Group, None] = {}
        limit = self.scheduler.limits.length
        for s, samples in sampled.items():
            request = s.group.request
            if request.sampling.beams:
                searching[s.group] = None
                continue
            for sample in samples:
                s.tokens.append(sample.token)
                outputs = len(s.tokens) - len(request.prompt)
                if request.output is not None:
                    if outputs >= request.output:
                        done.append((s, "length"))
                        break
                elif sample.token in self.eos or sample.token in request.sampling.stop:
                    done.append((s, "stop"))
                    break
                elif outputs >= request.sampling.max_tokens or len(s.tokens) >= limit:
                    done.append((s, "length"))
                    break
        beams = [group for group in searching if isinstance(group, Beams)]
        for group in beams:
            done += self._advance(group, sampled)
        return done, beams

    def _advance(self, group: Beams, sampled: dict[Sequence, list[Sampled]]) -> list[tuple[Sequence, str]]:
        """A step of a beam search, whose candidates become what was sampled; all its beams end together."""
        request = group.request
        drawn = {s: sampled.pop(s)[0] for s in group.live}
        if request.output is None:
            ends = self.eos | set(request.sampling.stop)
            most = min(request.sampling.max_tokens, self.scheduler.limits.length - len(request.prompt))
        else:
            ends, most = frozenset(), request.output
        sampled.update(group.advance(drawn, ends, most))
        if not group.over:
            return []
        reason = "length" if all(h.reason == "length" for h in group.finished) else "stop"
        return [(s, reason) for s in group.live]

    def _record(self, start_s: float, plan: Plan, sampled: Mapping[Sequence, list[Sampled]]) -> None:
        if self.recorder is None:
            return
        running = self.scheduler.running
        self.recorder.step(
            start_s,
            self.executor.now,
            plan,
            sampled,
            self.allocator,
            [s for group in running for s in group.live],
            [s for group in running for s in group.ended if s in self.allocator.tables],
            len(self.scheduler.waiting),
            self.scheduler.host.used,
            self.executor.compiled,
        )

    def _finish(self, done: list[tuple[Sequence, str]]) -> None:
        for s, reason in done:
            s.group.live.remove(s)
            s.group.ended.append(s)
            if self.recorder:
                self.recorder.ended(self.executor.now, s, reason)
        self.scheduler.finish([s for s, _ in done])
        for group in {s.group: None for s, _ in done}:
            if not group.live:
                del self.groups[group.request.id]
                if self.on_end:
                    self.on_end(group)
