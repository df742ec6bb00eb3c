"""The loop: requests arrive, the scheduler plans, the executor carries out, the recorder keeps what happened.

The engine decides nothing. It alone appends tokens and advances `computed`, and it tells when a sequence has ended.

depth 0   host    plan 1 .              . collect 1, plan 2 .              . collect 2, plan 3 .
          device         [ step 1       ]                   [ step 2       ]
depth 1   host    plan 1 . plan 2 .     . collect 1, plan 3 .     . collect 2, plan 4
          device         [ step 1       ][ step 2                 ][ step 3       what the host does costs nothing

That works because plans look at counts, which are committed when a step is launched, and not at values, which come when
it is collected: until then UNKNOWN stands for them, and the device fills in what the step before drew. So a sequence
whose length is known leaves right after the launch of its last step; whoever gets its memory writes in a later step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from lab.allocators import Allocator
from lab.beams import Beams, group_of
from lab.core import UNKNOWN, Group, Plan, Request, Sampled, Sequence
from lab.events import Launched, Recorder
from lab.executors import Executor
from lab.schedulers import Scheduler


@dataclass(slots=True)
class Flight:
    """A step that was launched and whose values have not been collected."""

    plan: Plan
    start_s: float
    hidden: bool  # the next step is launched before it is collected
    last: list[Sequence] = field(default_factory=list)  # which have left, with the token that it gives them


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
        on_token: Callable[[Sequence, Sampled, str | None], bool] | None = None,
        depth: int = 0,
    ) -> None:
        """`eos`: token ids that end a sequence whose length is not forced; `on_end` is told of each completed group.

        `on_token` is told of each token (not of beams) and why it is the last one, if so; True ends the sequence there.

        `depth`: steps that run while the next is planned. With 1 an end by `eos` or a stop token shows a step late: a
        row has been computed meanwhile whose token is dropped. Beams, and allocators that find blocks by their content,
        need values to plan: such a step is collected at once whatever the depth.
        """
        assert depth in (0, 1)
        self.scheduler = scheduler
        self.allocator = scheduler.allocator
        self.executor = executor
        self.recorder = recorder
        self.eos = frozenset(eos)
        self.on_end = on_end
        self.on_token = on_token
        self.depth = depth
        self.flights: deque[Flight] = deque()  # the oldest first
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
        self._land()
        kept = self.allocator.pin(group.live[0])
        self.scheduler.cancel(group)
        self.recorder = recorder
        return kept

    def refusal(self, request: Request) -> str | None:
        """Why the request can never run here, or None."""
        if request.id in self.groups:
            return f"request {request.id} is in flight already; give each request an id of its own"
        return self.scheduler.refusal(request)

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
                break
            next_s = min(until_s, upcoming.arrival_s) if upcoming else until_s
            if self.step(more=upcoming is not None, next_s=next_s) and not go_on():
                break
        self._land()

    def step(self, more: bool = False, next_s: float = math.inf) -> bool:
        """One iteration; where there is nothing to launch, collect what was, else wait (to `next_s` at most): False."""
        self._read_inbox()
        start_s = self.executor.now
        plan = self.scheduler.schedule(start_s, more)
        plan.moves, self.allocator.moves = self.allocator.moves, []
        if not (plan.work or plan.moves or plan.preempted):
            if self.flights:
                self._land()
            else:
                self._wait(min(plan.wake_s, next_s), more)
            return False
        flight = self._launch(plan, start_s)
        if flight.hidden:
            self._record(flight)
            self._leave(flight.last)
        while len(self.flights) > flight.hidden:
            self._collect()
        return True

    def _launch(self, plan: Plan, start_s: float) -> Flight:
        """Queue a step and commit its counts."""
        if plan.work or plan.moves:
            self.executor.launch(plan, self.allocator.tables)
        hidden = self.depth > 0 and not self.allocator.publishes and not any(s.group.together for s in plan.work)
        flight = Flight(plan, start_s, hidden)
        self.flights.append(flight)
        for s, tokens in plan.work.items():
            s.computed += tokens
            if s.computed == len(s.tokens) and not s.group.together:
                s.tokens.append(UNKNOWN)
                if hidden and self._reason(s, len(s.tokens), UNKNOWN):
                    flight.last.append(s)
        return flight

    def _collect(self) -> None:
        """The values of the oldest step in flight, and what ends by them."""
        flight = self.flights.popleft()
        sampled = self.executor.collect() if flight.plan.work or flight.plan.moves else {}
        done, searching = self._append(sampled)
        end_s = self.executor.now
        if not flight.hidden:
            self._record(flight)
        if self.recorder:
            self.recorder.collected(flight.start_s, end_s, sampled)
        for later in self.flights:
            later.start_s = end_s  # it was queued before, and the device does one step at a time
        for group in searching:
            for _, dropped in group.forks:
                dropped.computed = 0  # what its memory holds is not of its tokens any more
        self._finish(done)

    def _land(self) -> None:
        """Collect all that is in flight."""
        while self.flights:
            self._collect()

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
                continue
            self._land()  # then nothing of it is in flight
            if group := self.groups.pop(item, None):
                self.scheduler.cancel(group)
                if self.recorder:
                    self.recorder.cancelled(self.executor.now, group)

    def _wait(self, until_s: float, more: bool) -> None:
        if self.inbox:
            return
        if until_s == math.inf and not more:
            if not (self.groups or self.scheduler.waiting or self.scheduler.running):
                return
            policies = f"{type(self.scheduler).__name__} with {type(self.allocator).__name__}"
            raise RuntimeError(
                f"{policies} plans no work, preempts nothing and waits for nothing while {len(self.groups)} requests "
                "are in flight: a policy has a dead end"
            )
        self.executor.wait(until_s)

    def _append(self, sampled: dict[Sequence, list[Sampled]]) -> tuple[list[tuple[Sequence, str]], list[Beams]]:
        """Put in what was sampled; returns the sequences that have ended, each with the reason, and the searches."""
        done = []
        searching: dict[Group, None] = {}
        for s, samples in list(sampled.items()):
            if s.group.together:
                searching[s.group] = None
                continue
            tokens = s.tokens
            at = len(tokens) - 1
            if tokens[at] != UNKNOWN:  # it ended with the step before, when this one was on its way already
                del sampled[s]
                continue
            if tokens[at - 1] == UNKNOWN:
                at -= 1  # the other one is of the step after
            for sample in samples:
                tokens[at : at + 1] = (sample.token,)
                at += 1
                reason = self._reason(s, at, sample.token)
                if self.on_token and self.on_token(s, sample, reason):
                    reason = "stop"
                if reason:
                    done.append((s, reason))
                    del tokens[at:]
                    break
        beams = [group for group in searching if isinstance(group, Beams)]
        for group in beams:
            done += group.take(sampled, self.eos, self.scheduler.limits.length)
        return done, beams

    def _reason(self, s: Sequence, length: int, token: int) -> str | None:
        """Why `token`, which makes it `length` tokens long, is the last of a sequence; None if it is not."""
        request = s.group.request
        outputs = length - len(request.prompt)
        if request.output is not None:
            return "length" if outputs >= request.output else None
        if token in self.eos or token in request.sampling.stop:
            return "stop"
        return "length" if outputs >= request.sampling.max_tokens or length >= self.scheduler.limits.length else None

    def _record(self, flight: Flight) -> None:
        """The plan and the memory after it, before anybody leaves."""
        if self.recorder is None:
            return
        running = self.scheduler.running
        live = [s for group in running for s in group.live]
        ended = [s for group in running for s in group.ended if s in self.allocator.tables]
        waiting, host, compiled = len(self.scheduler.waiting), self.scheduler.host.used, self.executor.compiled
        step = Launched(flight.start_s, flight.plan, self.allocator, live, ended, waiting, host, compiled)
        self.recorder.launched(step)

    def _leave(self, ended: list[Sequence]) -> None:
        for s in ended:
            s.group.live.remove(s)
            s.group.ended.append(s)
            if s not in self.allocator.tables:
                self.scheduler.forget(s)
        if ended:
            self.scheduler.finish(ended)

    def _finish(self, done: list[tuple[Sequence, str]]) -> None:
        self._leave([s for s, _ in done if s in s.group.live])  # others have left when their last step was launched
        if self.recorder:
            for s, reason in done:
                self.recorder.ended(self.executor.now, s, reason)
        for group in {s.group: None for s, _ in done}:
            if group.complete:
                del self.groups[group.request.id]
                if self.on_end:
                    self.on_end(group)
