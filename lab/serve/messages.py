"""What the two processes of a server tell each other, over a pipe."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from lab.answers import Memory, Timing
from lab.core import SamplingParams


class Submit(NamedTuple):
    """To the engine: a prompt."""

    key: int  # of the request, among all of this server
    prompt: Any  # text, token ids, or messages of a chat
    params: SamplingParams
    place: int  # of the prompt in its call: what is drawn depends on it, and on the seed
    received_s: float  # time.perf_counter(), which all processes of a machine share
    streamed: bool
    open_end: bool  # nobody said how long the answer may be
    echo: bool
    forced: bool = False  # it goes on to `max_tokens`, whatever the model says


class Cancel(NamedTuple):
    """To the engine: nobody waits for these any more."""

    keys: tuple[int, ...]


class Show(NamedTuple):
    """To the engine: this watcher wants to see all that happens from now on; None: nobody does any more."""

    watcher: int | None


class Stop(NamedTuple):
    """To the engine: end at once."""


class Ready(NamedTuple):
    """From the engine: it serves."""

    capacity: int  # tokens of KV memory
    block: int
    length: int  # tokens of the longest sequence
    hardware: str


class Broken(NamedTuple):
    """From the engine: it cannot start, because of what a user typed."""

    said: str


class Accepted(NamedTuple):
    key: int
    prompt_tokens: int
    echo: str  # text of the prompt, where it is to be given back


class Failed(NamedTuple):
    """It ends here, without an answer."""

    key: int
    said: str
    refused: bool = False  # the fault is the request's


Alternative = tuple[str, bytes, float]  # a token's text, its bytes, its log-probability (natural)
Score = tuple[str, bytes, float, tuple[Alternative, ...]]  # the token that was drawn, and alternatives to it


class Delta(NamedTuple):
    """What one step added to an output that is streamed."""

    key: int
    output: int
    text: str
    scores: list[Score]
    reason: str | None
    tokens: int  # of the output, so far


class Output(NamedTuple):
    text: str
    tokens: int
    reason: str
    scores: list[Score] | None


class Answer(NamedTuple):
    """All outputs of a request have ended."""

    key: int
    prompt_tokens: int
    outputs: list[Output]
    timing: Timing
    memory: Memory


class Gauges(NamedTuple):
    """How things stand after a step; memory in tokens, and the categories those of `lab.allocators.Usage`."""

    running: int = 0  # requests
    waiting: int = 0
    capacity: int = 0
    stored: int = 0
    ended: int = 0
    unwritten: int = 0  # reserved and excess: which it will have been is known at the end only
    rounding: int = 0
    cached: int = 0
    free: int = 0


class Counts(NamedTuple):
    """What happened since the last news."""

    prompt_tokens: int
    generated: int
    gaps: dict[float, int]  # s from a token to the next of its sequence: how often
    preemptions: int
    looked_up: int  # tokens of prompts that a prefix cache was asked for
    found: int  # of these, in memory
    failed_steps: int


class News(NamedTuple):
    """From the engine, once per step.

    Deltas are one per stream: as plain tuples they are pickled five times as fast.
    """

    events: list[Accepted | Failed | Answer]
    started: Seq[int] = ()  # keys of requests that were admitted to memory for the first time
    counts: Counts | None = None
    gauges: Gauges | None = None
    deltas: Seq[tuple[int, int, str, list[Score], str | None, int]] = ()
    film: Seq[tuple[int | None, str]] = ()  # JSON for a watcher, or, with None, for all (see `lab.serve.camera`)
