"""What becomes of each request of `lab.llm`: its text, what it waited for, what it held; told by the engine's steps."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from lab.allocators import Allocator
from lab.beams import Beams
from lab.core import Group, InputError, Request, Sampled, Sequence
from lab.detokenise import Decode, Text
from lab.events import Launched, Recorder


class Output(NamedTuple):
    """One of a request's outputs."""

    text: str  # without the token or string that stopped it
    tokens: list[int]  # all that were generated, those that stopped it included
    finish_reason: str  # stop, or length
    logprobs: list[Sampled] | None  # of each token, where `logprobs` asked for alternatives


class Timing(NamedTuple):
    """Seconds; of several outputs the longest."""

    queue_s: float  # arrival to admission
    ttft_s: float  # arrival to first token
    tpot_s: float  # from token to token after the first; NaN for one token
    e2e_s: float  # arrival to last token


class Memory(NamedTuple):
    blocks: int  # held at the same time, at most
    shared: int  # of its blocks, held by another sequence too, at most
    wasted: int  # tokens of memory held at the end and never written
    preemptions: int


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one prompt."""

    index: int  # of the prompt
    prompt_tokens: int
    outputs: list[Output]  # n; of a beam search the best first
    timing: Timing
    memory: Memory

    @property
    def text(self) -> str:
        """Of the first output."""
        return self.outputs[0].text


class Piece(NamedTuple):
    """What one step added to the text of an output."""

    prompt: int  # its index
    output: int
    text: str  # may be empty: half a character, or what may be the beginning of a stop string
    logprobs: list[Sampled]  # of its token, where they were asked for
    reason: str | None  # stop or length, with the last
    tokens: int  # of its output, so far


@dataclass(slots=True)
class Line:
    """One output in flight."""

    text: Text
    logprobs: list[Sampled] = field(default_factory=list)
    reason: str = ""
    tokens: int = 0
    drawn: int = 0  # of these, told by now: within a step they come first, and their time at its end
    first_s: float = math.nan
    last_s: float = math.nan
    wasted: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """One request in flight."""

    request: Request
    index: int
    lines: list[Line]
    done: deque[Result]  # where its result goes
    pieces: deque[Piece] | None = None  # where its text goes as it comes, if it is streamed
    admitted_s: float = math.nan
    blocks: int = 0
    shared: int = 0


class Answers:
    """Listens to an engine in place of its recorder, and passes on to that, if there is one, all that it is told."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.recorder: Recorder | None = None
        self.jobs: dict[int, Job] = {}  # by request id

    def expect(self, request: Request, index: int, done: deque[Result], pieces: deque[Piece] | None = None) -> None:
        params = request.sampling
        strings = [stop for stop in params.stop if isinstance(stop, str)]
        lines = [Line(Text(self.decode, request.prompt, strings)) for _ in range(params.width)]
        self.jobs[request.id] = Job(request, index, lines, done, pieces)

    def token(self, s: Sequence, sampled: Sampled, reason: str | None) -> bool:
        """A token has come, the last one if there is a reason. Does its text end here, by a stop string?"""
        job = self.jobs[s.group.request.id]
        line = job.lines[s.index]
        line.drawn += 1
        if job.request.sampling.logprobs:
            line.logprobs.append(sampled)
        piece = line.text.add(sampled.token) if reason != "stop" else ""
        if reason:
            piece += line.text.finish()
        stopped = line.text.stopped
        if job.pieces is not None:
            logprobs = line.logprobs[-1:]
            if piece or logprobs or reason or stopped:
                reason = "stop" if stopped else reason
                job.pieces.append(Piece(job.index, s.index, piece, logprobs, reason, line.drawn))
        return stopped

    def end(self, group: Group) -> None:
        """All outputs of a request have ended."""
        job = self.jobs.pop(group.request.id)
        arrival_s = job.request.arrival_s
        lines = job.lines
        tpots = [(line.last_s - line.first_s) / (line.tokens - 1) for line in lines if line.tokens > 1]
        timing = Timing(
            job.admitted_s - arrival_s,
            max(line.first_s for line in lines) - arrival_s,
            max(tpots, default=math.nan),
            max(line.last_s for line in lines) - arrival_s,
        )
        memory = Memory(job.blocks, job.shared, sum(line.wasted for line in lines), group.preemptions)
        job.done.append(Result(job.index, len(job.request.prompt), self._outputs(job, group), timing, memory))

    def _outputs(self, job: Job, group: Group) -> list[Output]:
        start, asked = len(job.request.prompt), job.request.sampling.logprobs > 0
        texts = [line.text for line in job.lines]
        reasons = [line.reason for line in job.lines]
        if isinstance(group, Beams):  # whose texts are known at the end only
            reasons = [h.reason for h in group.finished]
            texts = [Text(self.decode, job.request.prompt) for _ in group.outputs()]
            for text, tokens, reason in zip(texts, group.outputs(), reasons, strict=False):
                for token in tokens[start : len(tokens) - (reason == "stop")]:
                    text.add(token)
                text.finish()
        return [
            Output(text.text, tokens[start:], reason, line.logprobs if asked else None)
            for text, tokens, reason, line in zip(texts, group.outputs(), reasons, job.lines, strict=False)
        ]

    # What the engine tells a recorder.

    def arrived(self, time_s: float, request: Request) -> None:
        if self.recorder:
            self.recorder.arrived(time_s, request)

    def refused(self, time_s: float, request: Request, reason: str) -> None:
        del self.jobs[request.id]
        raise InputError(reason)

    def launched(self, step: Launched) -> None:
        for group in step.plan.admitted:
            job = self.jobs[group.request.id]
            job.admitted_s = step.time_s if math.isnan(job.admitted_s) else job.admitted_s
        self._look(step.allocator)
        if self.recorder:
            self.recorder.launched(step)

    def collected(self, start_s: float, end_s: float, sampled: Mapping[Sequence, list[Sampled]]) -> None:
        for s, tokens in sampled.items():
            line = self.jobs[s.group.request.id].lines[s.index]
            line.last_s = end_s
            if not line.tokens:
                line.first_s = end_s
            line.tokens += len(tokens)
        if self.recorder:
            self.recorder.collected(start_s, end_s, sampled)

    def ended(self, time_s: float, s: Sequence, reason: str) -> None:
        self.jobs[s.group.request.id].lines[s.index].reason = reason
        if self.recorder:
            self.recorder.ended(time_s, s, reason)

    def cancelled(self, time_s: float, group: Group) -> None:
        del self.jobs[group.request.id]
        if self.recorder:
            self.recorder.cancelled(time_s, group)

    def _look(self, allocator: Allocator) -> None:
        """Who holds what after a step's launch."""
        tables, jobs, block = allocator.tables, self.jobs, allocator.block
        idle = allocator.idle()
        held = sum(map(len, tables.values())) * block
        several = held + idle.free + idle.cached != allocator.capacity  # does some block have several holders
        own: dict[Job, list[Seq[int]]] = {}  # tables of a request that has more than one, or may share
        for s, table in tables.items():  # of every sequence, in every step
            if job := jobs.get(s.group.request.id):  # None: it has ended, and its batch goes on
                length = len(table)
                job.lines[s.index].wasted = length * block - s.computed
                if several or len(job.lines) > 1:
                    own.setdefault(job, []).append(table)
                elif length > job.blocks:
                    job.blocks = length
        shared = {b for b, n in Counter(chain.from_iterable(tables.values())).items() if n > 1} if several else set()
        for job, mine in own.items():
            blocks = set(chain.from_iterable(mine))
            job.blocks = max(job.blocks, len(blocks))
            job.shared = max(job.shared, len(blocks & shared))
