"""What `/watch` shows of an engine: what changed in each step, in few numbers, from when somebody watches.

A message is JSON, for `film.html`. One with `first` (a step, blocks and their size, the engine's process) begins a film
with all that there is; later ones say what is new:

    frames    [step, from, to, stored, ended, unwritten, rounding, cached, free, waiting, running, host, sampled,
              preempted]: memory and host in tokens, times in microseconds of a clock that all messages share
    requests  [id, arrival, tokens of the prompt, most tokens of an answer, outputs]
    doing     [id, what, since]: what a request does from then on; GONE: nothing any more
    tables    [step, id, output, kept, first, count, ...]: of a table's runs of consecutive blocks the `kept` oldest
              stay, then come those that follow
    counts    [step, id, output, computed, grown, asked, more, ended]: tokens computed and asked for, which grow by
              `grown` and `more` in every later step until told otherwise: of a batch that decodes nothing need be said
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lab.allocators import Allocator
from lab.core import Group, Request, Sampled, Sequence
from lab.engine import Engine
from lab.events import Launched
from lab.film import DECODING, HOLDING, PREEMPTED, PROMPT, SWAPPED, WAITING
from lab.record import Held
from lab.serve.messages import Gauges

GONE = -1
EVERY_S = 0.1  # between two messages
TICKS = 1_000_000  # of a second


class Line(NamedTuple):
    """A sequence's tokens from a step on."""

    step: int
    computed: int
    grown: int
    asked: int
    more: int
    ended: bool

    def at(self, step: int) -> tuple[int, int, bool]:
        """Computed, asked, ended."""
        passed = step - self.step
        return self.computed + passed * self.grown, self.asked + passed * self.more, self.ended

    def since(self, step: int) -> Line:
        """The same, told from a later step on."""
        computed, asked, _ = self.at(step)
        return self._replace(step=step, computed=computed, asked=asked)


class Camera:
    """Told what a recorder is told. Keeps the state that a film begins with, and what has not been sent."""

    def __init__(self, engine: Engine, step: int, gauges: Gauges) -> None:
        """`step`: how many the engine has launched; `gauges`: how things stand."""
        scheduler, now = engine.scheduler, engine.executor.now
        self.step = step  # the next one
        self.zero_s = time.perf_counter() - now
        self.requests: dict[int, list[int]] = {}  # in flight, by id
        self.doing: dict[int, list[int]] = {}
        self.held: dict[Sequence, Held] = {}
        self.lines: dict[Sequence, Line] = {}
        self.block, self.blocks = engine.allocator.block, engine.allocator.num_blocks
        self.tables = engine.allocator.tables
        self.frame: list[int] = []  # the last one
        # what is known of the frames of steps in flight; None: launched before
        self.flights: deque[tuple[int, Gauges, int, int] | None] = deque([None] * len(engine.flights))
        self.rows: dict[str, list[list[int]]] = {}
        self.messages: list[tuple[int | None, str]] = []
        self.sent_s = 0.0
        for group in [*scheduler.waiting, *scheduler.running]:
            self.arrived(now, group.request)
            self.does(group.request.id, _does(group, engine), now)
        self.follow(
            engine.allocator,
            [s for group in scheduler.running for s in group.live],
            [s for group in scheduler.running for s in group.ended],
        )
        self.shoot(now, now, (step, gauges, scheduler.host.used, 0), 0)
        self.step += 1

    def begin(self, watcher: int) -> None:
        """A film of its own for one more watcher, who gets from here on what all get."""
        self.flush()
        step = self.step - 1
        rows = {
            "requests": list(self.requests.values()),
            "doing": list(self.doing.values()),
            "tables": [
                [step, *_name(s), 0, *(n for first, count, _ in held.runs for n in (first, count))]
                for s, held in self.held.items()
            ],
            "counts": [_row(s, line.since(step)) for s, line in self.lines.items()],
            "frames": [self.frame] if self.frame[0] == step else [],
        }
        pool = {"block": self.block, "blocks": self.blocks, "engine": os.getpid()}
        self.messages.append((watcher, _json({"first": step, **pool, **rows})))

    def take(self) -> list[tuple[int | None, str]]:
        """Messages, at most ten a second."""
        if self.rows and time.perf_counter() >= self.sent_s + EVERY_S:
            self.flush()
        messages, self.messages = self.messages, []
        return messages

    def flush(self) -> None:
        if self.rows:
            self.messages.append((None, _json(self.rows)))
            self.rows = {}
            self.sent_s = time.perf_counter()

    # What the engine tells.

    def arrived(self, time_s: float, request: Request) -> None:
        sizes = (len(request.prompt), request.sampling.max_tokens, request.sampling.n)
        row = self.requests[request.id] = [request.id, self.ticks(request.arrival_s), *sizes]
        self.put("requests", row)
        self.does(request.id, WAITING, request.arrival_s)

    def launched(self, step: Launched, gauges: Gauges) -> None:
        plan, time_s = step.plan, step.time_s
        for group in plan.admitted:
            # what was swapped is not computed again
            back = group in plan.swapped and any(s.outputs for s in group.live)
            self.does(group.request.id, DECODING if back else PROMPT, time_s)
        for group in plan.preempted:
            self.does(group.request.id, SWAPPED if group in plan.swapped else PREEMPTED, time_s)
        self.follow(step.allocator, step.live, step.ended)
        self.flights.append((self.step, gauges, step.host_tokens, len(plan.preempted)))
        self.step += 1

    def collected(self, start_s: float, end_s: float, sampled: Mapping[Sequence, list[Sampled]]) -> None:
        if flight := self.flights.popleft():
            self.shoot(start_s, end_s, flight, sum(map(len, sampled.values())))
        for s in sampled:
            if self.doing.get(s.group.request.id, (0, GONE))[1] == PROMPT:
                self.does(s.group.request.id, DECODING, end_s)

    def ended(self, time_s: float, s: Sequence) -> None:
        """A batch that goes on may still hold the memory of one that has ended."""
        if s.group.complete:
            held = any(other in self.tables for other in s.group.ended)
            self.does(s.group.request.id, HOLDING if held else GONE, time_s)

    def cancelled(self, time_s: float, group: Group) -> None:
        self.does(group.request.id, GONE, time_s)

    def failed(self, time_s: float, lost: Iterable[int]) -> None:
        """A step failed, and with it these requests."""
        self.flights.clear()
        for request in lost:
            self.does(request, GONE, time_s)

    def idle(self, time_s: float, allocator: Allocator, gauges: Gauges) -> None:
        """Nothing is in flight: a frame that lasts until the next."""
        self.follow(allocator, (), ())
        self.shoot(time_s, time_s, (self.step, gauges, 0, 0), 0)
        self.step += 1
        self.flush()

    # What is new.

    def ticks(self, time_s: float) -> int:
        return round((time_s + self.zero_s) * TICKS)

    def put(self, kind: str, row: list[Any]) -> None:
        self.rows.setdefault(kind, []).append(row)

    def does(self, request: int, what: int, time_s: float) -> None:
        if request not in self.requests:
            return  # it was refused, or is gone
        row = [request, what, self.ticks(time_s)]
        self.put("doing", row)
        if what == GONE:
            del self.requests[request], self.doing[request]
        else:
            self.doing[request] = row

    def shoot(self, start_s: float, end_s: float, flight: tuple[int, Gauges, int, int], sampled: int) -> None:
        step, now, host, preempted = flight
        memory = (now.stored, now.ended, now.unwritten, now.rounding, now.cached, now.free)
        counts = (now.waiting, now.running, host, sampled, preempted)
        self.frame = [step, self.ticks(start_s), self.ticks(end_s), *memory, *counts]
        self.put("frames", self.frame)

    def follow(self, allocator: Allocator, live: Iterable[Sequence], ended: Iterable[Sequence]) -> None:
        """Who holds which blocks in this step, and how much of them is written and asked for."""
        owned = self.tables = allocator.tables
        holders = {s: over for sequences, over in ((live, False), (ended, True)) for s in sequences if s in owned}
        for s in [s for s in self.held if s not in holders]:
            self.put("tables", [self.step, *_name(s), 0])
            del self.held[s], self.lines[s]
        for s, over in holders.items():
            table, length = owned[s], len(owned[s])
            held = self.held.get(s) or self.held.setdefault(s, Held(table))
            if held.table is not table or held.length != length:
                kept = len(held.runs) - len(held.change(table, length, self.step))
                runs = (n for first, count, _ in held.runs[kept:] for n in (first, count))
                self.put("tables", [self.step, *_name(s), kept, *runs])
            self.count(s, allocator.asked[s], over)
        over_s = (self.frame[2] if self.frame else 0) / TICKS - self.zero_s
        inside = {s.group.request.id for s in holders}
        for request in [row[0] for row in self.doing.values() if row[1] == HOLDING and row[0] not in inside]:
            self.does(request, GONE, over_s)

    def count(self, s: Sequence, asked: int, over: bool) -> None:
        line = self.lines.get(s)
        if line is None:
            line = Line(self.step, s.computed, 0, asked, 0, over)
        elif line.at(self.step) == (s.computed, asked, over):
            return
        else:
            computed, was_asked, _ = line.at(self.step - 1)
            line = Line(self.step, s.computed, s.computed - computed, asked, asked - was_asked, over)
        self.lines[s] = line
        self.put("counts", _row(s, line))


def _does(group: Group, engine: Engine) -> int:
    """What a request that is in flight does now."""
    if group in engine.scheduler.host.saved:
        return SWAPPED
    if group in engine.scheduler.waiting:
        return PREEMPTED if group.preemptions else WAITING
    if not group.live:
        return HOLDING
    return DECODING if any(s.outputs for s in group.sequences) else PROMPT


def _name(s: Sequence) -> tuple[int, int]:
    return s.group.request.id, s.index


def _row(s: Sequence, line: Line) -> list[int]:
    return [line.step, *_name(s), line.computed, line.grown, line.asked, line.more, int(line.ended)]


def _json(rows: Mapping[str, Any]) -> str:
    return json.dumps(rows, separators=(",", ":"))
