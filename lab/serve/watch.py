"""What a server's operator sees of an engine, instead of a record: counts of what happened, and where memory is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from lab.allocators import Allocator
from lab.core import Group, Request, Sampled, Sequence
from lab.engine import Engine
from lab.events import Launched
from lab.record import counted_before
from lab.serve.camera import Camera
from lab.serve.messages import Counts, Gauges

EVERY_S = 0.1  # between two looks at memory, which cost time for every sequence there is


class Watch:
    """Implements `lab.events.Recorder`."""

    def __init__(self) -> None:
        self.started: list[int] = []  # ids of requests that were admitted for the first time
        self.gauges: Gauges | None = None
        self.camera: Camera | None = None  # while somebody watches
        self._steps = 0
        self._counts: Counter[str] = Counter()
        self._gaps: Counter[float] = Counter()
        self._last_s: dict[Sequence, float] = {}  # when each had its last token
        self._looked_s = 0.0

    def take(self) -> tuple[list[int], Counts | None, Gauges | None]:
        """What is new since the last call."""
        counts, gaps, started, gauges = self._counts, self._gaps, self.started, self.gauges
        self._counts, self._gaps, self.started, self.gauges = Counter(), Counter(), [], None
        return started, Counts(gaps=dict(gaps), **{k: counts[k] for k in KEPT}) if counts else None, gauges

    def show(self, engine: Engine, watcher: int | None) -> None:
        """One more watches; None: nobody does."""
        if watcher is None:
            self.camera = None
            return
        if self.camera is None:
            running = engine.scheduler.running
            live, ended = ([s for g in running for s in g.live], [s for g in running for s in g.ended])
            now = look(engine.allocator, live, ended, len(engine.scheduler.waiting))
            self.camera = Camera(engine, self._steps, now)
        self.camera.begin(watcher)

    def film(self) -> list[tuple[int | None, str]]:
        """What those who watch are to be told by now."""
        return self.camera.take() if self.camera else []

    def failed(self, time_s: float, lost: list[int]) -> None:
        """A step failed, and all that was in memory is gone: these requests."""
        self._counts["failed_steps"] += 1
        self._last_s.clear()
        if self.camera:
            self.camera.failed(time_s, lost)

    def idle(self, time_s: float, allocator: Allocator) -> None:
        """Nothing is in flight."""
        self.gauges = look(allocator, [], [], 0)
        if self.camera:
            self.camera.idle(time_s, allocator, self.gauges)

    # What the engine tells.

    def arrived(self, time_s: float, request: Request) -> None:
        if self.camera:
            self.camera.arrived(time_s, request)

    def refused(self, time_s: float, request: Request, reason: str) -> None: ...

    def launched(self, step: Launched) -> None:
        for group, hit in step.plan.admitted.items():
            if not group.preemptions:
                self.started.append(group.request.id)
                if step.allocator.publishes:
                    self._counts["looked_up"] += len(group.request.prompt)
                    self._counts["found"] += hit
        if step.plan.preempted:
            self._counts["preemptions"] += len(step.plan.preempted)
        self._steps += 1
        if (now := time.perf_counter()) >= self._looked_s + EVERY_S or self.camera:
            self._looked_s = now
            self.gauges = look(step.allocator, step.live, step.ended, step.waiting)
            if self.camera:
                self.camera.launched(step, self.gauges)

    def collected(self, start_s: float, end_s: float, sampled: Mapping[Sequence, list[Sampled]]) -> None:
        last_s, counts = self._last_s, self._counts
        for s, tokens in sampled.items():
            before = last_s.get(s)
            if before is not None:
                self._gaps[end_s - before] += len(tokens)
            elif s.index == 0:
                counts["prompt_tokens"] += len(s.group.request.prompt)
            last_s[s] = end_s
            counts["generated"] += len(tokens)
        if self.camera:
            self.camera.collected(start_s, end_s, sampled)

    def ended(self, time_s: float, s: Sequence, reason: str) -> None:
        self._last_s.pop(s, None)
        if self.camera:
            self.camera.ended(time_s, s)

    def cancelled(self, time_s: float, group: Group) -> None:
        for s in group.sequences:
            self._last_s.pop(s, None)
        if self.camera:
            self.camera.cancelled(time_s, group)


KEPT = [name for name in Counts._fields if name != "gaps"]


def look(allocator: Allocator, live: list[Sequence], ended: list[Sequence], waiting: int) -> Gauges:
    """Where memory is: `lab.allocators.account`, quicker, with what is asked for and empty as one number."""
    owned, block = allocator.tables, allocator.block
    holders = [s for s in live if s in owned]
    num_live = len(holders)
    holders += [s for s in ended if s in owned]
    tables = [owned[s] for s in holders]
    idle = allocator.idle()
    several = sum(map(len, tables)) * block + idle.free + idle.cached != allocator.capacity  # hold the same block
    skips = counted_before(tables) if several else [0] * len(tables)
    sums = dict.fromkeys(("stored", "ended", "unwritten", "rounding"), 0)
    for i, (s, table, skip) in enumerate(zip(holders, tables, skips, strict=True)):
        held, first = len(table) * block, skip * block
        written = max(s.computed, first)
        asked = min(max(allocator.asked[s], written), held)
        sums["stored" if i < num_live else "ended"] += written - first
        sums["unwritten"] += asked - written
        sums["rounding"] += held - asked
    running = len({s.group for s in live})
    return Gauges(running, waiting, allocator.capacity, **sums, cached=idle.cached, free=idle.free)
