"""The event loop's side of the engine: calls in flight, a bounded queue, and what to do when the engine dies."""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from lab.core import SamplingParams
from lab.serve import worker
from lab.serve.audience import Audience
from lab.serve.errors import ApiError
from lab.serve.messages import Accepted, Answer, Broken, Cancel, Delta, Failed, News, Ready, Show, Stop, Submit
from lab.serve.metrics import Metrics

DEAD = "the engine has died"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes; past it requests are refused."""

    queue: int = 256  # requests that wait for memory
    streams: int = 256  # open at the same time
    prompts: int = 64  # of one call
    n: int = 16
    stops: int = 16  # stop strings
    logprobs: int = 20  # alternatives to each token
    body: int = 1 << 20  # bytes
    seconds: float = 600.0  # for one call, waiting included


class Gone(NamedTuple):
    """Whoever asked does not listen any more."""


Event = Accepted | Failed | Delta | Answer | Gone


@dataclass(eq=False, slots=True)
class Call:
    """One call over HTTP: a request to the engine for each of its prompts."""

    keys: range
    n: int  # outputs of each
    streamed: bool
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    early: deque[Event] = field(default_factory=deque)  # of some prompts, while others were being accepted

    async def accepted(self) -> list[Accepted]:
        """Every prompt was taken. ApiError where one was not."""
        found: list[Accepted] = []
        early: deque[Event] = deque()
        while len(found) < len(self.keys):
            event = await self.next()
            if isinstance(event, Accepted):
                found.append(event)
            else:
                early.append(event)
        self.early = early
        return found

    @property
    def quiet(self) -> bool:
        """Is there nothing that has come already?"""
        return not self.early and self.events.empty()

    async def next(self) -> Accepted | Delta | Answer:
        """What comes next. ApiError where nothing more will."""
        event = self.early.popleft() if self.early else await self.events.get()
        if isinstance(event, Gone):
            raise ApiError(499, "the client closed the connection", "client_closed")
        if isinstance(event, Failed):
            if event.refused:
                raise ApiError(400, event.said, "invalid_request_error")
            raise ApiError(500, event.said, "server_error")
        return event


class Client:
    """Starts the engine's process and talks to it. All methods but `_read` and `_write` belong to the event loop."""

    def __init__(self, options: worker.Options, limits: Limits, metrics: Metrics) -> None:
        self.options = options
        self.limits = limits
        self.metrics = metrics
        self.ready: Ready | None = None
        self.broken = ""  # why it cannot start
        self.died = False
        self.draining = False
        self.on_end: Callable[[], None] = lambda: None  # told when the engine's process has ended by itself
        self.on_ready: Callable[[Ready], None] = lambda ready: None
        self.calls: dict[int, Call] = {}  # by key
        self.queued: set[int] = set()  # keys of requests that wait for memory
        self.streams = 0
        self._keys = itertools.count()
        self._ended_s: deque[float] = deque(maxlen=64)
        self._outbox: queue.SimpleQueue[Submit | Cancel | Show | Stop] = queue.SimpleQueue()
        self.audience = Audience(self._outbox.put)
        metrics.watchers.set_function(lambda: len(self.audience.queues))
        self._process: BaseProcess | None = None
        self._stopping = False

    # ---- the process

    def start(self) -> None:
        """In the event loop that will serve."""
        self._loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        self._process = context.Process(target=worker.main, args=(other, self.options), daemon=True)
        self._process.start()
        other.close()  # so that the pipe ends when that process does
        for work in (self._read, self._write):
            threading.Thread(target=work, args=(pipe,), daemon=True).start()

    def stop(self, patience_s: float = 5.0) -> None:
        """End the engine's process, by force if it takes too long."""
        self._stopping = True
        self._outbox.put(Stop())
        if self._process is not None:
            with suppress(KeyboardInterrupt):  # another signal
                self._process.join(patience_s)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _read(self, pipe: Connection) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._take, pipe.recv())
        except (EOFError, OSError, RuntimeError):  # it ended, or the event loop did
            if not self._stopping and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._end)

    def _write(self, pipe: Connection) -> None:
        try:
            while True:
                message = self._outbox.get()
                if isinstance(message, Submit) and message.key not in self.calls:
                    continue  # given up meanwhile
                pipe.send(message)
                if isinstance(message, Stop):
                    return
        except OSError:
            pass  # it ended: `_read` knows

    def _take(self, message: Ready | Broken | News) -> None:
        if isinstance(message, Ready):
            self.ready = message
            self.on_ready(message)
        elif isinstance(message, Broken):
            self.broken = message.said
        else:
            self.queued.difference_update(message.started)
            self.metrics.take(message)
            self.audience.take(message.film)
            for delta in message.deltas:
                self._give(Delta._make(delta))
            for event in message.events:
                self._give(event)

    def _give(self, event: Accepted | Failed | Delta | Answer) -> None:
        call = self.calls.get(event.key)
        if call is None:
            return  # given up
        call.events.put_nowait(event)
        if isinstance(event, Answer | Failed):
            self._ended_s.append(time.monotonic())
            self.queued.discard(event.key)
            del self.calls[event.key]
            self.metrics.ended(event)

    def _end(self) -> None:
        """The engine's process has ended by itself."""
        self.died = not self.broken
        for key in list(self.calls):
            self._give(Failed(key, self.broken or DEAD))
        self.metrics.gone()
        self.on_end()

    # ---- calls

    def submit(
        self,
        prompts: list[Any],
        params: SamplingParams,
        received_s: float,
        *,
        streamed: bool = False,
        open_end: bool = False,
        echo: bool = False,
        forced: bool = False,
    ) -> Call:
        """Whoever takes the call must `leave` it. ApiError where there is no room, or no engine."""
        self.check_serving()
        if len(self.queued) + len(prompts) > self.limits.queue:
            self._full("queue", f"{len(self.queued)} requests wait, of at most {self.limits.queue}")
        if streamed and self.streams >= self.limits.streams:
            self._full("streams", f"{self.streams} streams are open, of at most {self.limits.streams}")
        keys = [next(self._keys) for _ in prompts]
        call = Call(range(keys[0], keys[-1] + 1), params.n, streamed)
        self._count_stream(+streamed)
        for index, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            self.calls[key] = call
            self.queued.add(key)
            self._outbox.put(Submit(key, prompt, params, index, received_s, streamed, open_end, echo, forced))
        return call

    def check_serving(self) -> None:
        """ApiError where it does not."""
        if self.died or self.broken:
            raise ApiError(503, self.broken or DEAD, "server_error")
        if self.draining:
            raise ApiError(503, "the server is shutting down", "server_error", retry_after_s=5)
        if self.ready is None:
            raise ApiError(503, "the model is being loaded", "server_error", retry_after_s=5)

    def over(self) -> str:
        """Why there is nothing more to watch; empty while there is."""
        ending = "the server is shutting down" if self.draining else ""
        return DEAD if self.died else self.broken or ending

    def cancel(self, call: Call) -> None:
        """Give its memory back at once; whoever waits for it learns that it is over."""
        keys = tuple(key for key in call.keys if self.calls.pop(key, None))
        if keys:
            self.queued.difference_update(keys)
            self.metrics.cancelled(len(keys))
            self._outbox.put(Cancel(keys))
        call.events.put_nowait(Gone())

    def leave(self, call: Call) -> None:
        """Nobody will ask for more of it."""
        self.cancel(call)
        self._count_stream(-call.streamed)
        call.streamed = False

    def cancel_all(self) -> None:
        for call in set(self.calls.values()):
            self.cancel(call)

    def _count_stream(self, more: int) -> None:
        self.streams += more
        self.metrics.streams.set(self.streams)

    def _full(self, what: str, said: str) -> None:
        """429, and when to come back: after the time in which as many as wait have ended lately."""
        self.metrics.refused(what)
        span_s = time.monotonic() - self._ended_s[0] if self._ended_s else 0.0
        each_s = span_s / len(self._ended_s) if self._ended_s else 1.0
        wait_s = min(max(1, math.ceil(each_s * max(1, len(self.queued)))), 60)
        raise ApiError(429, f"{said}: come back in {wait_s} s", "rate_limit_exceeded", retry_after_s=wait_s)
