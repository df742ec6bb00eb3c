"""Everything that goes wrong at a server, one after the other, on a tiny random model; drawn from what it tells itself.

    python tests/serve/faults.py        # three minutes; writes tests/serve/faults.png

Each fault is a function that says what became of every request: answered, refused or failed with an error, left by
whoever sent it, or lost, which none may be. `test_faults.py` asserts it; here they come one after the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parents[1]) if str(path) not in sys.path]

import httpx  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
from plugins import ALLOCATOR, COLLECT, LAUNCH, UNTOKENISABLE  # noqa: E402
from running import Running, engine_of  # noqa: E402
from talking import tiny_llama  # noqa: E402

ANSWERED, REFUSED, FAILED, LEFT, LOST = "answered", "refused", "failed", "left", "lost"
OPTIONS = ("--allocator", "plugins:faulty", "--queue", "64")
AT_ONCE = 48
PROMPTS = [[20 + i, 40 + 3 * i, 90] for i in range(10)]
LONG: Any = {"prompt": [7] * 200, "max_tokens": 20, "ignore_eos": True}  # memory holds ten of them
EVERY_S = 0.1  # between two looks at /metrics
SEED = 0


class Reply(NamedTuple):
    kind: str
    status: int = 0
    text: str = ""


async def ask(server: Running, leave_s: float | None = None, **body: Any) -> Reply:
    """One request over a connection of its own, which is cut after `leave_s` unless all has come."""
    data = json.dumps({"model": "tiny", "temperature": 0, **body}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    host, _, port = server.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head.encode() + data)
        async with asyncio.timeout(leave_s):
            return told(await reader.read())
    except TimeoutError:
        return Reply(LEFT)
    except ConnectionError:
        return Reply(LOST)
    finally:
        writer.transport.abort()


def told(reply: bytes) -> Reply:
    head, _, body = reply.decode().partition("\r\n\r\n")
    status = int(head.split()[1]) if head else 0
    if "text/event-stream" in head:
        events = [event.removeprefix("data: ") for event in body.split("\n\n") if event]
        whole = bool(events) and events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[: len(events) - whole]]
        if any("error" in chunk for chunk in chunks):
            return Reply(FAILED, status)
        return Reply(ANSWERED if whole else LOST, status, "".join(c["choices"][0]["text"] for c in chunks))
    try:
        answer = json.loads(body)
    except ValueError:
        return Reply(LOST, status)
    if "error" in answer:
        return Reply(FAILED if status >= 500 else REFUSED, status)
    return Reply(ANSWERED, status, answer["choices"][0]["text"])


async def disconnects(server: Running, requests: int, expected: list[str] | None = None) -> list[Reply]:
    """A third of them go away, at any time: before the first token, in the middle of a stream, when all has come."""
    draw = random.Random(SEED)
    leaving = set(draw.sample(range(requests), requests // 3))
    room = asyncio.Semaphore(AT_ONCE)

    async def one(i: int, leave_s: float | None, stream: bool) -> Reply:
        async with room:
            prompt = i % len(PROMPTS)
            reply = await ask(server, leave_s, prompt=PROMPTS[prompt], max_tokens=16, stream=stream)
        if expected and reply.kind == ANSWERED:
            assert reply.text == expected[prompt], "another's text"
        return reply

    drawn = [(i, draw.uniform(0, 0.5) if i in leaving else None, draw.random() < 0.5) for i in range(requests)]
    return await asyncio.gather(*(one(*each) for each in drawn))


async def flood(server: Running, seconds: float) -> tuple[list[Reply], float]:
    """Ten times as many as it answers, whether it answers or not; and how many a second it answers at most."""
    start_s = time.monotonic()
    some = await asyncio.gather(*(ask(server, **LONG) for _ in range(30)))
    capacity = len(some) / (time.monotonic() - start_s)
    draw = random.Random(SEED)
    start_s = time.monotonic()
    asked: list[asyncio.Task[Reply]] = []
    due_s = 0.0
    while due_s < seconds:
        await asyncio.sleep(max(0.0, start_s + due_s - time.monotonic()))
        asked.append(asyncio.create_task(ask(server, **LONG, stream=len(asked) % 2 > 0)))
        due_s += draw.expovariate(10 * capacity)
    return some + await asyncio.gather(*asked), capacity


async def bodies(server: Running) -> list[Reply]:
    """None of them can be answered."""
    wrong: list[dict[str, Any]] = [
        {"prompt": "x" * 100_000_000},
        {"prompt": [7], "stop": [str(i) for i in range(10_000)]},
        {"prompt": [7], "n": 10**9},
        {"prompt": [7], "n": 16, "max_tokens": 250},
        {"prompt": {"a": 1}},
        {"prompt": "\ud800"},
        {"prompt": ["x" * 200] * 65},
    ]
    return [await ask(server, **body) for body in wrong]


async def failures(server: Running) -> list[Reply]:
    """In the allocator, the executor before and after a step, and the tokenizer, each beside requests that are fine."""
    planted: list[Any] = [[ALLOCATOR, 5], [LAUNCH, 5], [COLLECT, 5], UNTOKENISABLE]
    replies: list[Reply] = []
    for prompt in planted:
        beside = [asyncio.create_task(ask(server, **LONG, stream=i % 2 > 0)) for i in range(8)]
        await asyncio.sleep(0.4)
        replies.append(await ask(server, prompt=prompt, max_tokens=20))
        replies += await asyncio.gather(*beside)
    return [*replies, await ask(server, prompt=[7, 8], max_tokens=5)]


async def interrupted(server: Running, interrupt: Callable[[], None]) -> list[Reply]:
    """Streams and whole answers under way, when something happens to the server."""
    asked = [asyncio.create_task(ask(server, prompt=[7, i], max_tokens=60, stream=i % 2 > 0)) for i in range(20)]
    await asyncio.sleep(0.8)
    interrupt()
    return await asyncio.gather(*asked)


# ---- the drawing


class Sampler(threading.Thread):
    """Looks at /metrics again and again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.server: Running | None = None
        self.rows: list[tuple[float, ...]] = []  # s, share of the blocks that is held, requests in flight

    def run(self) -> None:
        while True:
            time.sleep(EVERY_S)
            try:
                now = self.server.metrics() if self.server else {}
            except (httpx.HTTPError, OSError, RuntimeError):  # it has ended, or takes no new connections
                continue
            if now:
                requests = now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]
                self.rows.append((time.monotonic(), 100 * now["vllm:kv_cache_usage_perc"], requests))


Panel = tuple[str, list[tuple[float, ...]]]  # a fault, and what was seen meanwhile


def main() -> int:
    panels: list[Panel] = []
    sampler = Sampler()
    sampler.start()

    @contextmanager
    def panel(name: str, server: Running) -> Iterator[list[Reply]]:
        sampler.server, sampler.rows = server, []
        start_s = time.monotonic()
        replies: list[Reply] = []
        yield replies
        time.sleep(1.0)  # so that one sees that nothing is held
        sampler.server = None
        kinds = Counter(reply.kind for reply in replies)
        print(f"{name}: {', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))}".replace("\n", " "), flush=True)
        assert not kinds[LOST]
        panels.append((name, [(now_s - start_s, *row) for now_s, *row in sampler.rows]))

    with tempfile.TemporaryDirectory() as scratch:
        tiny_llama(Path(scratch) / "model")
        with Running(Path(scratch), f"{scratch}/model", *OPTIONS) as server:
            with panel("2,000 requests,\na third go away", server) as replies:
                replies += asyncio.run(disconnects(server, 2000))
                server.until(server.nothing_held, 5)
            with panel("wrong\nbodies", server) as replies:
                replies += asyncio.run(bodies(server))
            with panel("four planted\nfailures", server) as replies:
                replies += asyncio.run(failures(server))
                server.until(server.nothing_held, 5)
            with panel("flood at ten times\nits capacity, 30 s", server) as replies:
                found, capacity = asyncio.run(flood(server, 30.0))
                replies += found
                server.until(server.nothing_held, 60)
            print(f"(capacity: {capacity:.1f} requests/s)")
            with panel("kill -9 of\nthe engine", server) as replies:
                replies += asyncio.run(interrupted(server, lambda: os.kill(engine_of(server), signal.SIGKILL)))
                assert server.process.wait(20) == 1
        with Running(Path(scratch), f"{scratch}/model", *OPTIONS) as server, panel("SIGTERM", server) as replies:
            replies += asyncio.run(interrupted(server, lambda: server.process.send_signal(signal.SIGTERM)))
            assert server.process.wait(20) == 0
    draw(panels, HERE / "faults.png")
    return 0


def draw(panels: list[Panel], path: Path) -> None:
    plt.rcParams.update({"font.size": 8})
    widths = [max(5.0, rows[-1][0]) for _, rows in panels]
    size: Any = {"figsize": (11, 3.6), "layout": "constrained", "width_ratios": widths}
    figure, axes = plt.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False, **size)
    for column, (name, rows) in enumerate(panels):
        for row, color in enumerate(("C0", "C1")):
            axis = axes[row][column]
            axis.fill_between([r[0] for r in rows], [r[1 + row] for r in rows], step="post", color=color, linewidth=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(0, widths[column])
        axes[0][column].set_title(name, fontsize=8)
        axes[1][column].set_xlabel("s")
    for row, label in enumerate(("blocks held (%)", "requests in flight")):
        axes[row][0].set_ylabel(label)
        axes[row][0].set_ylim(0, 1.05 * max(r[1 + row] for _, rows in panels for r in rows))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
