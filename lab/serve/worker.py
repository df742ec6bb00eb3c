"""The engine's process: takes requests from a pipe, steps, and tells once per step what came of it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from array import array
from collections import deque
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

import lab
from lab.answers import Piece, Result
from lab.core import InputError, Request
from lab.serve.messages import Accepted, Answer, Broken, Cancel, Failed, News, Output, Ready, Show, Stop, Submit
from lab.serve.tokens import Tokens
from lab.serve.watch import Watch

PATIENCE_S = 1.0  # that a scheduler may wait for more requests before it starts with those it has
WARM = 8  # requests, of 5 to 40 tokens and 1 to 8 answered: kernels have a tile for each kind, a batch for most sizes
FAILURES = 5  # steps that fail, one after the other, before the engine gives up


T = TypeVar("T")


class Options(NamedTuple):
    """Of the engine's process."""

    llm: dict[str, Any]  # what `lab.LLM` takes
    prompt_tokens: int | None = None  # of the longest prompt that is taken


def main(pipe: Connection, options: Options) -> None:
    """The process: serves until it is told to stop, whoever started it is gone, or it cannot go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # who started it is asked to end, and tells
    try:
        try:
            llm = lab.LLM(**options.llm, recording=False)
            warm_up(llm)
        except InputError as error:
            pipe.send(Broken(str(error)))
            return
        Worker(llm, pipe, options).serve()
    except BaseException:
        traceback.print_exc()
        print("the engine cannot go on", file=sys.stderr, flush=True)
        os._exit(1)  # a thread is reading, and a device may not let go


def warm_up(llm: lab.LLM) -> None:
    """Serve a few requests that nobody asked, so that whoever comes first need not wait for kernels to compile."""
    made = [Request(i, 0.0, array("i", [0] * 5 * i), output=i) for i in range(1, WARM + 1)]
    for _ in llm.serve(request for request in made if not llm.scheduler.refusal(request)):
        pass
    llm.restart()  # a cache would remember them


class Prepared(NamedTuple):
    request: Request
    streamed: bool


class Worker:
    """Only `listen` runs in a thread of its own: it turns prompts into tokens while steps are taken."""

    def __init__(self, llm: lab.LLM, pipe: Connection, options: Options) -> None:
        self.llm = llm
        self.pipe = pipe
        self.most = options.prompt_tokens
        self.tokens = Tokens(llm.tokenizer, llm.eos)
        self.watch = llm.answers.recorder = Watch()
        self.inbox: deque[Prepared | Cancel | Show] = deque()
        self.open: set[int] = set()  # keys of the requests in flight
        self.done: deque[Result] = deque()
        self.pieces: deque[Piece] = deque()
        self.failures = 0  # steps that failed, since one did not
        self.heard_s = -math.inf  # when something came last
        self.stopping = False
        self._sending = threading.Lock()

    def serve(self) -> None:
        llm = self.llm
        memory, limits = llm.scheduler.allocator, llm.scheduler.limits
        self.send(Ready(memory.capacity, memory.block, limits.length, str(llm.executor.device)))
        threading.Thread(target=self.listen, daemon=True).start()
        self.watch.idle(llm.executor.now, memory)
        self.tell()
        while not self.stopping:
            self.take()
            if self.busy or self.done:  # which a step that failed may leave
                self.step()
            else:
                llm.executor.wait(math.inf)

    @property
    def busy(self) -> bool:
        engine = self.llm.engine
        return bool(engine.groups or engine.inbox or engine.flights)

    def step(self) -> None:
        """One iteration of the engine, and its news; where it fails, what was in it is lost and the rest goes on."""
        engine = self.llm.engine
        try:
            until_s = self.heard_s + PATIENCE_S
            patient = self.llm.executor.now < until_s
            worked = engine.step(more=patient, next_s=until_s if patient else math.inf)
            if not self.busy:
                self.watch.idle(self.llm.executor.now, self.llm.scheduler.allocator)
            self.tell()
            self.failures = 0 if worked else self.failures
        except Exception as error:
            self.failures += 1
            if self.failures == FAILURES:
                raise
            traceback.print_exc()
            self.recover(error)

    def recover(self, error: Exception) -> None:
        going = self.llm.restart()
        ended = {result.index for result in self.done}
        lost = sorted(self.open - going - ended)
        self.watch.failed(self.llm.executor.now, lost)
        for piece in _emptied(self.pieces):
            if piece.prompt not in lost:
                self.pieces.append(piece)
        self.open.difference_update(lost)
        if not self.busy:
            self.watch.idle(self.llm.executor.now, self.llm.scheduler.allocator)
        print(f"a step failed; {len(lost)} requests were in it, {len(going)} go on", file=sys.stderr, flush=True)
        failed: list[Any] = [Failed(key, f"the step it was in failed: {type(error).__name__}") for key in lost]
        self.send(News(failed, *self.watch.take(), film=self.watch.film()))  # now: nothing may follow

    def take(self) -> None:
        """Hand to the engine what has come."""
        while self.inbox:
            item = self.inbox.popleft()
            if isinstance(item, Show):
                self.watch.show(self.llm.engine, item.watcher)
                self.tell()
                continue
            self.heard_s = self.llm.executor.now
            if isinstance(item, Cancel):
                for key in self.open.intersection(item.keys):
                    self.llm.engine.cancel(key)
                    self.open.discard(key)
                continue
            request = item.request
            self.open.add(request.id)
            try:
                self.llm.answers.expect(request, request.id, self.done, self.pieces if item.streamed else None)
            except Exception as error:  # a tokenizer's, of the prompt's last tokens
                self.open.discard(request.id)
                self.fail(request.id, error)
            else:
                self.llm.engine.submit(request)

    def tell(self) -> None:
        """What the step brought, in one message."""
        pieces, done = _emptied(self.pieces), _emptied(self.done)
        score = self.tokens.score
        deltas = [
            (key, output, text, score(logprobs, reason) if logprobs else [], reason, tokens)
            for key, output, text, logprobs, reason, tokens in pieces
        ]
        events: list[Accepted | Failed | Answer] = [self.answer(result) for result in done]
        self.open.difference_update(result.index for result in done)  # now: had that failed, they would be lost
        news = News(events, *self.watch.take(), deltas, self.watch.film())
        if any(news):
            self.send(news)

    def answer(self, result: Result) -> Answer:
        outputs = []
        for text, tokens, reason, logprobs in result.outputs:
            scores = None if logprobs is None else self.tokens.score(logprobs, reason)
            outputs.append(Output(text, len(tokens), reason, scores))
        return Answer(result.index, result.prompt_tokens, outputs, result.timing, result.memory)

    def send(self, message: Ready | News) -> None:
        try:
            with self._sending:
                self.pipe.send(message)
        except OSError:  # whoever started it is gone
            self.stopping = True

    # In the listening thread.

    def listen(self) -> None:
        try:
            while not isinstance(message := self.pipe.recv(), Stop):
                if isinstance(message, Submit):
                    self.prepare(message)
                else:
                    self.inbox.append(message)
                self.llm.executor.wake()
        except (EOFError, OSError):
            pass  # whoever started it is gone
        except Exception:
            traceback.print_exc()
        self.stopping = True
        self.llm.executor.wake()

    def prepare(self, message: Submit) -> None:
        """Its tokens, checked; what can never run is refused at once."""
        try:
            request = self.request(message)
            echo = self.llm.decode(list(request.prompt)) if message.echo else ""
        except InputError as error:
            self.send(News([Failed(message.key, str(error), refused=True)]))
        except Exception as error:  # whatever a tokenizer or a policy comes to
            self.fail(message.key, error)
        else:
            self.send(News([Accepted(message.key, len(request.prompt), echo)]))
            self.inbox.append(Prepared(request, message.streamed))

    def fail(self, key: int, error: Exception) -> None:
        traceback.print_tb(error.__traceback__)
        said = f"its prompt could not be prepared: {type(error).__name__}"
        print(said, file=sys.stderr, flush=True)  # the error itself may quote the prompt
        self.send(News([Failed(key, said)]))

    def request(self, message: Submit) -> Request:
        """Where nobody said how long: up to the longest sequence, or half of that, a quarter: what fits."""
        tokens = self.llm.encode(message.prompt, message.place)
        if self.most is not None and len(tokens) > self.most:
            rule = f"more than the {self.most} that this server takes: shorten it"
            raise InputError(f"prompt {message.place}: {len(tokens)} tokens, {rule}")
        params = message.params
        if message.open_end:
            params = replace(params, max_tokens=max(1, self.llm.scheduler.limits.length - len(tokens)))
        while True:
            try:
                request = self.llm.request(message.place, tokens, params)
                break
            except InputError:
                if not message.open_end or params.max_tokens == 1:
                    raise
                params = replace(params, max_tokens=params.max_tokens // 2)
        arrival_s = self.llm.executor.now - (time.perf_counter() - message.received_s)
        output = params.max_tokens if message.forced else None
        return replace(request, id=message.key, arrival_s=arrival_s, noise=message.place, output=output)


def _emptied(items: deque[T]) -> list[T]:
    """What was in it; the object stays, as whoever adds to it knows it."""
    taken = list(items)
    items.clear()
    return taken
