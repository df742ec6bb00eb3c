"""Who watches: each has a bounded queue of what `lab.serve.camera` says, from which a browser is told as it comes."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable

from lab.serve.errors import ApiError
from lab.serve.messages import Show

MOST = 16  # who watch at the same time
BEHIND = 100  # messages, some ten seconds of steps: whoever is further behind begins anew
BEAT_S = 1.0  # after which a page is told the time, if nothing else


class Audience:
    """All of it belongs to the event loop."""

    def __init__(self, tell: Callable[[Show], None]) -> None:
        """`tell`: the engine's process. It says nothing while nobody watches."""
        self.queues: dict[int, asyncio.Queue[str]] = {}
        self._tell = tell
        self._numbers = itertools.count()

    def take(self, film: Iterable[tuple[int | None, str]]) -> None:
        for whom, text in film:
            for number in list(self.queues) if whom is None else [whom]:
                queue = self.queues.get(number)
                if queue is not None and queue.full():
                    del self.queues[number]
                elif queue is not None:
                    queue.put_nowait(text)

    def check_room(self) -> None:
        """ApiError where there is none."""
        if len(self.queues) >= MOST:
            said = f"{MOST} watch already: close a page, or come back later"
            raise ApiError(429, said, "rate_limit_exceeded", retry_after_s=10)

    async def events(self, over: Callable[[], str]) -> AsyncIterator[str]:
        """Server-sent events for one more, as long as `over` does not say why there are no more."""
        number = next(self._numbers)
        self.queues[number] = asyncio.Queue(BEHIND)
        self._tell(Show(number))
        try:
            while number in self.queues and not over():
                try:
                    text = await asyncio.wait_for(self.queues[number].get(), BEAT_S)
                except TimeoutError:
                    text = json.dumps({"now": round(time.perf_counter() * 1e6)})
                yield f"data: {text}\n\n"
            yield f"data: {json.dumps({'over': over()})}\n\n"
        finally:
            self.queues.pop(number, None)
            if not self.queues:
                self._tell(Show(None))
