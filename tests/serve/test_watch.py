"""`/watch`: what is told of each step against the allocator itself, and the page in a headless browser."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, Browser
from plugins import COLLECT
from running import Running
from test_worker import MANY, POLICIES, PROMPTS, Driven, params

from lab import LLM
from lab.allocators import account
from lab.events import Launched
from lab.film import DECODING, HOLDING, PREEMPTED, PROMPT, SWAPPED, WAITING
from lab.serve import camera, watch
from lab.serve.audience import BEHIND, MOST, Audience
from lab.serve.camera import GONE
from lab.serve.errors import ApiError
from lab.serve.messages import Show

KEY = "sesame"
SECRET = "The quick brown fox"


class Screen:
    """What a page makes of messages, the plain way: tables and counts of each step, and what requests do."""

    def __init__(self) -> None:
        self.frames: dict[int, list[int]] = {}
        self.does: dict[int, list[int]] = {}
        self.tables: dict[tuple[int, int], list[tuple[int, list[list[int]]]]] = {}  # of each: from a step on, its runs
        self.lines: dict[tuple[int, int], list[list[int]]] = {}
        self.first: int | None = None

    def take(self, text: str) -> None:
        message = json.loads(text)
        self.first = message.get("first", self.first)
        assert self.first is not None
        for id_, what, _ in message.get("doing", ()):
            self.does.setdefault(id_, []).append(what)
        for step, id_, output, kept, *runs in message.get("tables", ()):
            states = self.tables.setdefault((id_, output), [])
            before = states[-1][1][:kept] if states else []
            assert len(before) == kept
            pairs = [[runs[i], runs[i + 1]] for i in range(0, len(runs), 2)]
            states.append((step, before + pairs))
        for step, id_, output, *line in message.get("counts", ()):
            self.lines.setdefault((id_, output), []).append([step, *line])
        self.frames.update((frame[0], frame) for frame in message.get("frames", ()) if frame[0] >= self.first)

    def state(self, step: int) -> dict[tuple[int, int], tuple[list[int], int, int, int]]:
        """Of each that holds memory: its table, computed, asked, ended."""
        found = {}
        for name, states in self.tables.items():
            runs = [runs for since, runs in states if since <= step][-1:]
            if not runs or not runs[0]:
                continue
            begin, computed, grown, asked, more, ended = [line for line in self.lines[name] if line[0] <= step][-1]
            table = [b for first, count in runs[0] for b in range(first, first + count)]
            found[name] = (table, computed + (step - begin) * grown, asked + (step - begin) * more, ended)
        return found


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("allocator", "scheduler", "preemption"), POLICIES)
def test_each_step_is_told_as_it_was(
    tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, allocator: str, scheduler: str, preemption: str, depth: int
) -> None:
    """To one who watches from the start, and to one who comes in the middle; what is held, asked for and written."""
    monkeypatch.setattr(camera, "EVERY_S", 0.0)
    options = {"allocator": allocator, "scheduler": scheduler, "preemption": preemption, "depth": depth}
    driven = Driven(tiny[0], monkeypatch, kv_memory=600, length=200, **options)
    memory, seen = driven.llm.scheduler.allocator, {}
    launched = watch.Watch.launched

    def witness(self: watch.Watch, step: Launched) -> None:
        pool, ended = step.allocator, step.ended
        state = {
            (s.group.request.id, s.index): (list(pool.tables[s]), s.computed, pool.asked[s], int(s in ended))
            for s in [*step.live, *ended]
            if s in pool.tables
        }
        assert self.camera
        seen[self.camera.step] = state, account(pool, step.live, ended)
        launched(self, step)

    monkeypatch.setattr(watch.Watch, "launched", witness)
    screens = [Screen(), Screen()]
    driven.worker.inbox.append(Show(0))
    for key, prompt in enumerate(MANY):
        driven.submit(key, prompt, params(30 + key, n=1 + key % 2))
    for _ in range(12):
        driven.step()
    driven.worker.inbox.append(Show(1))
    driven.run()
    assert driven.held == 0
    for news in driven.news:
        for whom, text in news.film:
            for number, screen in enumerate(screens):
                if whom == number or (whom is None and screen.first is not None):
                    screen.take(text)
    assert len(seen) > 40
    for screen in screens:
        assert [step for step in seen if step >= (screen.first or 0)] == [s for s in screen.frames if s in seen]
        for step in set(screen.frames) & set(seen):
            state, usage = seen[step]
            assert screen.state(step) == state
            unwritten = usage.reserved + usage.excess
            memory_ = [usage.stored, usage.ended, unwritten, usage.rounding, usage.cached, usage.free]
            assert screen.frames[step][3:9] == memory_
        last = max(screen.frames)
        assert screen.state(last) == {}
        assert screen.frames[last][8] + screen.frames[last][7] == memory.capacity
        assert all(spells[-1] == GONE for spells in screen.does.values())
    whole = list(screens[0].does.values())
    assert all(spells[:2] == [WAITING, PROMPT] for spells in whole)
    happened = {what for spells in whole for what in spells}
    assert DECODING in happened
    assert (SWAPPED in happened) == (preemption == "swap")
    assert (HOLDING in happened) == (scheduler == "static")
    assert (PREEMPTED in happened) == (
        allocator.startswith("paged") and (preemption, scheduler) == ("recompute", "continuous")
    )
    assert 12 <= (screens[1].first or 0) < 20


def test_nothing_is_told_while_nobody_watches(tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(tiny[0], monkeypatch)
    for turn, watched in enumerate((False, True, False)):
        driven.worker.inbox.append(Show(turn if watched else None))
        for key, prompt in enumerate(PROMPTS, start=10 * turn):
            driven.submit(key, prompt, params(10))
        driven.run()
        assert any(news.film for news in driven.news) == watched
        assert (driven.worker.watch.camera is not None) == watched
        driven.news.clear()


def test_a_steady_batch_is_told_in_few_numbers(tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(tiny[0], monkeypatch, block=64)
    for key in range(20):
        driven.submit(key, [7] * 10, params(50))
    for _ in range(5):
        driven.step()
    driven.worker.inbox.append(Show(0))
    for _ in range(5):
        driven.step()
    monkeypatch.setattr(camera, "EVERY_S", 0.0)
    driven.news.clear()
    for _ in range(12):
        driven.step()
    texts = [text for news in driven.news for _, text in news.film]
    assert len(texts) == 12
    assert [json.loads(text).keys() for text in texts[1:]] == [{"frames"}] * 11


def test_who_is_behind_begins_anew_and_few_may_watch() -> None:
    told: list[Show] = []
    audience = Audience(told.append)
    over = ""

    async def watching() -> None:
        nonlocal over
        slow, quick = (aiter(audience.events(lambda: over)) for _ in range(2))
        heads = [asyncio.ensure_future(anext(each)) for each in (slow, quick)]
        await asyncio.sleep(0)
        assert told == [Show(0), Show(1)]
        audience.take([(0, "a"), (1, "b"), (7, "gone already")])
        assert [await head for head in heads] == ["data: a\n\n", "data: b\n\n"]
        for i in range(BEHIND + 1):
            audience.take([(None, str(i))])
            assert await anext(quick) == f"data: {i}\n\n"
        assert await remaining(slow) == ['data: {"over": ""}\n\n']
        assert told[-1] == Show(1)
        over = "it ends"
        assert await remaining(quick) == ['data: {"over": "it ends"}\n\n']
        assert told[-1] == Show(None)

    async def remaining(events: AsyncIterator[str]) -> list[str]:
        return [event async for event in events]

    asyncio.run(watching())
    audience.queues = {i: asyncio.Queue() for i in range(MOST)}
    with pytest.raises(ApiError, match="16 watch already"):
        audience.check_room()


# ---- the server


@pytest.fixture(scope="module")
def slow(tiny: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("slow"), tiny[0], "--allocator", "plugins:slow") as running:
        yield running


def told(server: Running, until: threading.Event) -> str:
    text = ""
    with server.http.stream("GET", "/watch/changes") as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            text += line
            if until.is_set():
                return text
    raise AssertionError("it ended")


def test_no_prompt_and_no_key_is_told(tiny: tuple[str, Any], tmp_path: Path, llm: LLM) -> None:
    with Running(tmp_path, tiny[0], env={"KVLAB_API_KEY": KEY}) as server:
        for path in ("/watch", "/watch/changes"):
            for auth in (None, ("any", "wrong"), ("any", "")):
                refused = httpx.get(server.url + path, auth=auth)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
                assert refused.headers["www-authenticate"].startswith("Basic ")
        broken = httpx.get(server.url + "/watch", headers={"authorization": "Basic sesame"})
        assert broken.status_code == 401
        assert "www-authenticate" not in httpx.get(server.url + "/v1/models").headers
        assert httpx.get(server.url + "/v1/models", auth=("any", KEY)).status_code == 401
        assert httpx.get(server.url + "/watch", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        page = httpx.get(server.url + "/watch", auth=("any", KEY))
        assert page.status_code == 200
        assert page.headers["cache-control"] == "no-store"
        server.http.headers["authorization"] = f"Bearer {KEY}"
        done = threading.Event()
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(told(server, done)))
        thread.start()
        answer = server.post("completions", prompt=SECRET, max_tokens=40, temperature=0).json()
        assert answer["usage"]["completion_tokens"] > 5
        assert server.metrics()["kvlab:watchers"] == 1
        done.set()
        thread.join()
        server.until(lambda: server.metrics()["kvlab:watchers"] == 0, 5)
        assert '"tables":[[' in texts[0]
        everything = texts[0] + page.text + server.output
        assert not any(word in everything for word in (SECRET, "quick", "brown", KEY))
        tokens = llm.encode(SECRET)
        assert ",".join(map(str, tokens[:3])) not in texts[0]


# ---- the page

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def visit(browser: Browser, url: str) -> None:
    browser.call("Page.navigate", url="about:blank")
    browser.wait("location.href == 'about:blank'")
    browser.complaints.clear()
    browser.call("Page.navigate", url=url)
    browser.wait("document.body && document.body.dataset.ready")


class Asking:
    """Requests that somebody waits for."""

    def __init__(self, server: Running, *bodies: dict[str, Any]) -> None:
        self.answers: list[httpx.Response] = []
        self.threads = [threading.Thread(target=self.ask, args=(server, body)) for body in bodies]
        for thread in self.threads:
            thread.start()

    def ask(self, server: Running, body: dict[str, Any]) -> None:
        self.answers.append(server.post("completions", **body))

    def join(self) -> None:
        for thread in self.threads:
            thread.join()


NOW = "document.querySelector('.now').textContent"
SUMS = """
(f => { const at = f.frame, sums = [];
  for (let i = 0; i < f.frames; i++) {
    f.seek(i);
    const sum = { stored: 0, ended: 0, excess: 0, rounding: 0 };
    f.holders.forEach((h, b) => {
      if (h.length) { const is = f.block_at(b); for (const name in sum) sum[name] += is[name]; }
    });
    sums.push(Object.keys(sum).map((name) => [sum[name], f["frame_" + name][i]]));
  }
  f.seek(at); return sums })(player.views[0].film)
"""


@needs_chromium
def test_the_page_follows_the_server(browser: Browser, slow: Running) -> None:
    visit(browser, f"{slow.url}/watch")
    browser.wait(f"{NOW}.includes('0 requests running')")
    several = [{"prompt": [7 + i] * 30, "max_tokens": 226, "n": 1 + (i == 3), "temperature": 0} for i in range(6)]
    asking = Asking(slow, *several)
    browser.wait("player.views[0].film.frame_running.at(-1) == 6")
    browser.wait("player.playing && player.end - player.t <= 1 && page('time').textContent == 'now'")
    browser.wait(f"{NOW}.includes('6 requests running')")
    owner = "t => f.ids[f.seq_request[f.ten_sequence[t]]]"
    shown = browser.evaluate(f"(f => [...new Set(f.holders.flat().map({owner}))].sort())(player.views[0].film)")
    assert shown == [0, 1, 2, 3, 4, 5]
    x, y = browser.evaluate("(b => [b.left + 8, b.top + 8])(player.views[0].map.getBoundingClientRect())")
    browser.mouse(x, y)
    assert "block 0: request " in browser.wait("document.querySelector('.tip').textContent")
    browser.mouse(x, y, click=True)
    browser.wait(f"player.chosen !== null && {NOW}.includes('answer of at most 226 tokens) is decoding')")
    browser.key("Escape")
    browser.key(" ")
    moment = "player.live.origin / 1e6 + player.t"
    stopped, end = browser.evaluate(f"[{moment}, player.end]")
    browser.wait(f"player.end > {end + 0.6}")
    assert browser.evaluate(moment) == pytest.approx(stopped, abs=1e-3)
    browser.wait("page('time').textContent.endsWith('s ago')")
    browser.evaluate("page('scrub').value = 0, page('scrub').dispatchEvent(new Event('input'))")
    browser.wait(f"{NOW}.includes('0 requests running')")
    sums = browser.evaluate(SUMS)
    assert len(sums) > 20
    assert max(stored for ((stored, _), *_) in sums) > 300
    assert all(found == said for frame in sums for found, said in frame)
    asking.join()
    browser.evaluate("page('present').click()")
    browser.wait(f"{NOW}.includes('0 requests running') && {NOW}.includes('100\\u00a0% free')")
    before = browser.evaluate("player.end")
    browser.wait(f"player.end > {before + 1.5} && player.end - player.t <= 1")  # time goes on where nothing happens
    assert browser.complaints == []
    assert {url.split("?")[0] for url in browser.requested if url.startswith(slow.url)} == {
        f"{slow.url}/watch",
        f"{slow.url}/watch/changes",
    }


@needs_chromium
def test_the_page_survives_a_step_that_fails(browser: Browser, tiny: tuple[str, Any], tmp_path: Path) -> None:
    with Running(tmp_path, tiny[0], "--allocator", "plugins:failing") as server:
        visit(browser, f"{server.url}/watch")
        for _ in range(2):
            failed = Asking(server, {"prompt": [COLLECT, 5], "max_tokens": 20})
            failed.join()
            assert failed.answers[0].status_code == 500
        browser.wait(f"{NOW}.includes('0 requests running') && {NOW}.includes('100\\u00a0% free')")
        assert server.post("completions", prompt=[7, 8], max_tokens=60).status_code == 200
        browser.wait("player.views[0].film.ids.includes(2)")
        sums = browser.evaluate(SUMS)
        assert all(found == said for frame in sums for found, said in frame)
        assert browser.evaluate("player.views[0].film.spell_stop.every(t => t <= player.end * 1e6 + 1)")
        browser.wait(f"{NOW}.includes('0 requests running')")
        assert browser.complaints == []


@needs_chromium
def test_the_page_says_when_the_server_is_gone_and_comes_back(
    browser: Browser, tiny: tuple[str, Any], tmp_path: Path
) -> None:
    with Running(tmp_path, tiny[0], env={"KVLAB_API_KEY": KEY}) as server:
        port = server.url.rpartition(":")[2]
        visit(browser, f"http://any:{KEY}@127.0.0.1:{port}/watch")
        server.process.send_signal(signal.SIGTERM)
        browser.wait("page('compare').textContent.includes('the server is shutting down')")
        assert server.process.wait(20) == 0, "who watches keeps no server from ending"
    browser.wait("page('compare').textContent.includes('the server does not answer')")
    assert browser.evaluate(NOW).startswith("Step 0: 0 requests running")
    browser.evaluate("window.old = true")
    with Running(tmp_path, tiny[0], "--port", port, env={"KVLAB_API_KEY": KEY}) as server:
        browser.wait("!window.old && document.body && document.body.dataset.ready")
        server.http.headers["authorization"] = f"Bearer {KEY}"
        server.post("completions", prompt=[7], max_tokens=30)
        browser.wait("player.views[0].film.ids.includes(0)")
        assert browser.evaluate("page('compare').textContent") == ""
        engine = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        spawned = [int(p) for p in engine if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        os.kill(spawned[0], signal.SIGKILL)
        browser.wait("page('compare').textContent.includes('the engine has died')")


@needs_chromium
def test_a_page_that_stays_open_keeps_some_minutes(browser: Browser, slow: Running) -> None:
    """20,000 steps of 8 requests at a time, as many as a page would see of hours, in one go."""
    visit(browser, f"{slow.url}/watch")
    sizes = browser.evaluate("""
    (() => { const live = new Live(player.live.about); live.begin({ first: 0, block: 8, blocks: 64, engine: 1 });
      let seen = 0;
      for (let i = 0; i < 20000; i++) {
        const id = Math.floor(i / 10), time = i * 50000;
        const frame = [i, time, time + 50000, 8, 0, 0, 0, 0, 504, 0, 1, 0, 1, 0];
        const message = { frames: [frame], requests: [], doing: [], tables: [], counts: [] };
        if (i % 10 == 0) {
          if (id) { message.tables.push([i, id - 1, 0, 0]); message.doing.push([id - 1, GONE, time]); }
          message.requests.push([id, time, 4, 8, 1]);
          message.doing.push([id, WAITING, time], [id, PROMPT, time]);
          message.tables.push([i, id, 0, 0, id % 64, 1]);
          message.counts.push([i, id, 0, 8, 0, 8, 0, 0]);
        }
        live.take(message);
        if (i % 100 == 99) seen = live.film();
      }
      const sizes = [live.frames.length, live.requests.size, live.sequences.size, live.lanes.length];
      return [...sizes, seen.end_s, seen.ten_first.length] })()
    """)
    frames, requests, sequences, lanes, end_s, tenures = sizes
    assert frames == 5000
    assert end_s == pytest.approx(250)
    assert 500 <= requests <= 511
    assert 500 <= sequences <= 511
    assert tenures <= 511
    assert lanes == 1
    assert browser.complaints == []
