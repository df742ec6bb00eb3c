"""The engine's process without the process: what is given back, what is told, and what a failing step costs."""

from __future__ import annotations

import math
from multiprocessing.connection import Connection, Pipe
from typing import Any

import pytest
from plugins import ALLOCATOR, COLLECT, LAUNCH, UNTOKENISABLE, plant_failures

import lab
from lab import LLM, SamplingParams
from lab.allocators import account
from lab.core import InputError
from lab.executors.torch import TorchExecutor
from lab.serve import watch, worker
from lab.serve.messages import Accepted, Answer, Broken, Cancel, Delta, Failed, Gauges, News, Ready, Stop, Submit
from lab.serve.worker import Options, Worker

LONG = [list(range(20 + i, 44 + i)) for i in range(4)]
PROMPTS = ["The quick", "A door opens. A", "ça", "def f(x):\n", "Nobody comes in", "la"]
MANY: list[Any] = [*LONG, *PROMPTS, *LONG]
POLICIES = [
    ("paged", "continuous", "recompute"),
    ("paged", "continuous", "swap"),
    ("paged-prefix", "continuous", "recompute"),
    ("contiguous-max-firstfit", "continuous", "recompute"),
    ("paged", "static", "recompute"),
]


class Driven:
    """A worker whose steps a test takes itself, and the other end of its pipe."""

    def __init__(self, model: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        monkeypatch.setattr(watch, "EVERY_S", 0.0)
        self.llm = LLM(model, device="cpu", recording=False, **{"kv_memory": 2048, "block": 8, **options})
        mine, theirs = Pipe()
        self.pipe: Connection = mine
        self.worker = Worker(self.llm, theirs, Options({}))
        self.events: list[Any] = []
        self.news: list[News] = []

    patient = False  # are more requests to come?

    def submit(self, key: int, prompt: Any, params: SamplingParams, streamed: bool = True) -> None:
        self.worker.prepare(Submit(key, prompt, params, key, 0.0, streamed, False, False))

    def cancel(self, *keys: int) -> None:
        self.worker.inbox.append(Cancel(keys))

    def step(self) -> None:
        self.worker.take()
        if not self.patient:
            self.worker.heard_s = -math.inf
        self.worker.step()
        self.hear()

    def hear(self) -> None:
        while self.pipe.poll():
            news = self.pipe.recv()
            self.news.append(news)
            self.events += [Delta._make(delta) for delta in news.deltas] + news.events

    def run(self) -> None:
        self.worker.take()
        while self.worker.busy or self.worker.done:
            self.step()
        self.hear()

    def texts(self) -> dict[int, str]:
        """Of streams, by key."""
        texts: dict[int, str] = {}
        for event in self.events:
            if isinstance(event, Delta):
                texts[event.key] = texts.get(event.key, "") + event.text
        return texts

    def of(self, kind: Any) -> dict[int, Any]:
        return {event.key: event for event in self.events if isinstance(event, kind)}

    @property
    def held(self) -> int:
        memory = self.llm.scheduler.allocator
        idle = memory.idle()
        return memory.capacity - idle.free - idle.cached + self.llm.scheduler.host.used


def params(length: int = 20, seed: int = 1, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=length, temperature=0.9, seed=seed, **more)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[str]:
    return [result.text for result in llm.generate(MANY, params(40))]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test plants."""
    monkeypatch.setattr(TorchExecutor, "launch", TorchExecutor.launch)
    monkeypatch.setattr(TorchExecutor, "collect", TorchExecutor.collect)
    monkeypatch.setattr(lab.LLM, "encode", lab.LLM.encode)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("allocator", "scheduler", "preemption"), POLICIES)
def test_cancelling_gives_all_back_within_one_step(
    tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, allocator: str, scheduler: str, preemption: str, depth: int
) -> None:
    """Of running requests, of those that wait, and of those that were preempted."""
    options = {"allocator": allocator, "scheduler": scheduler, "preemption": preemption, "depth": depth}
    driven = Driven(tiny[0], monkeypatch, kv_memory=160, length=128, **options)
    waited = 0
    for steps in (1, 2, 9, 25):
        for key, prompt in enumerate(PROMPTS * 2, start=100 * steps):
            driven.submit(key, prompt, params(60, n=1 + key % 2), streamed=key % 3 > 0)
        for _ in range(steps):
            driven.step()
        assert driven.held > 0
        waited += len(driven.llm.scheduler.waiting)
        driven.cancel(*range(100 * steps, 100 * steps + 12))
        driven.step()
        assert driven.held == 0
        assert not driven.worker.open
        assert not driven.llm.answers.jobs
        assert not driven.worker.busy
    assert waited
    heard = len(driven.events)
    driven.run()
    assert len(driven.events) == heard, "nothing more is said of them"


def test_one_that_is_cancelled_disturbs_no_other(tiny: tuple[str, Any], llm: LLM, monkeypatch: Any) -> None:
    driven = Driven(tiny[0], monkeypatch)
    for key, prompt in enumerate(PROMPTS):
        driven.submit(key, prompt, params())
    for _ in range(5):
        driven.step()
    driven.cancel(2, 99)
    driven.run()
    expected = [result.text for result in llm.generate(PROMPTS, params())]
    assert {key: driven.texts()[key] for key in driven.of(Answer)} == {
        key: text for key, text in enumerate(expected) if key != 2
    }
    assert driven.held == 0


@pytest.mark.parametrize(("allocator", "scheduler", "preemption"), POLICIES)
def test_gauges_are_the_account(
    tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, allocator: str, scheduler: str, preemption: str
) -> None:
    """Slot by slot, after every step; and the counts are those of what was submitted."""
    options = {"allocator": allocator, "scheduler": scheduler, "preemption": preemption}
    driven = Driven(tiny[0], monkeypatch, kv_memory=320, length=128, **options)
    expected: list[Gauges] = []
    look = watch.look

    def looking(memory: Any, live: Any, ended: Any, waiting: int) -> Gauges:
        usage = account(memory, live, ended)
        unwritten = usage.reserved + usage.excess
        running = len({s.group for s in live})
        sums = (usage.stored, usage.ended, unwritten, usage.rounding, usage.cached, usage.free)
        expected.append(Gauges(running, waiting, memory.capacity, *sums))
        return look(memory, live, ended, waiting)

    monkeypatch.setattr(watch, "look", looking)
    for start in (0, 10):
        for key, prompt in enumerate([*PROMPTS, *LONG], start):
            driven.submit(key, prompt, params(10 + 5 * (key % 7), n=1 + key % 2), streamed=False)
        driven.run()
        del expected[-2]  # of the last step: told is how things stand when all have left
    assert [news.gauges for news in driven.news if news.gauges] == expected
    assert len(expected) > 30
    answers = driven.of(Answer).values()
    counts = [news.counts for news in driven.news if news.counts]
    assert sum(c.prompt_tokens for c in counts) == sum(answer.prompt_tokens for answer in answers)
    assert sum(c.generated for c in counts) == sum(o.tokens for answer in answers for o in answer.outputs)
    assert sum(c.preemptions for c in counts) == sum(answer.memory.preemptions for answer in answers)
    assert sorted(key for news in driven.news for key in news.started) == list(range(20))
    gaps = sum(times for c in counts for times in c.gaps.values())
    assert gaps == sum(o.tokens - 1 for answer in answers for o in answer.outputs)
    found = sum(c.found for c in counts)
    assert (found > 0) == (allocator == "paged-prefix"), "the same prompts come again"
    assert found <= sum(c.looked_up for c in counts)


@pytest.mark.parametrize("where", [ALLOCATOR, LAUNCH, COLLECT])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("allocator", "scheduler", "preemption"), POLICIES)
def test_a_failing_step_costs_those_in_it_alone(
    tiny: tuple[str, Any],
    monkeypatch: Any,
    allocator: str,
    scheduler: str,
    preemption: str,
    depth: int,
    where: int,
    expected: list[str],
) -> None:
    """Whoever waits goes on, and with the text that it would have had; nothing is held, nobody is forgotten."""
    options = {"allocator": allocator, "scheduler": scheduler, "preemption": preemption, "depth": depth}
    driven = Driven(tiny[0], monkeypatch, kv_memory=120, length=96, **options)
    plant_failures(driven.llm.scheduler.allocator)
    prompts = [*MANY[:2], [where, 5, 6], *MANY[3:]]
    for key, prompt in enumerate(prompts):
        driven.submit(key, prompt, params(40), streamed=key % 3 > 0)
    driven.run()
    failed, answers = driven.of(Failed), driven.of(Answer)
    assert failed.keys() | answers.keys() == set(range(len(prompts)))
    assert not failed.keys() & answers.keys()
    assert "the step it was in failed: RuntimeError" in failed[2].said
    assert not failed[2].refused
    assert len(answers) >= 5
    assert driven.held == 0
    assert not driven.worker.open
    assert sum(news.counts.failed_steps for news in driven.news if news.counts) == 1
    for key, answer in answers.items():
        assert answer.outputs[0].text == expected[key]
        assert driven.texts().get(key) == (expected[key] if key % 3 else None), "streamed, or whole"


def test_a_failing_step_is_told_though_nothing_follows(tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what ended in it before it failed."""
    driven = Driven(tiny[0], monkeypatch)
    end: Any = driven.llm.engine.on_end

    def ending(group: Any) -> None:
        if group.request.id == 1:
            raise RuntimeError("planted where a request ends")
        end(group)

    driven.llm.engine.on_end = ending
    driven.submit(0, [5, 6], params(4, logprobs=1))
    driven.submit(1, [7, 8], params(4))
    driven.run()
    assert (list(driven.of(Answer)), list(driven.of(Failed))) == ([0], [1])
    assert sum(news.counts.failed_steps for news in driven.news if news.counts) == 1
    assert [news.gauges.free for news in driven.news if news.gauges][-1] == driven.llm.scheduler.allocator.capacity
    assert not driven.worker.open


@pytest.mark.parametrize("allocator", ["paged", "paged-prefix", "contiguous-max-firstfit"])
def test_whoever_comes_first_waits_for_no_compiler(
    tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, allocator: str
) -> None:
    """Prompts of all kinds and batches of most sizes have been computed when the engine says that it serves."""
    launch = TorchExecutor.launch
    sizes: list[list[int]] = []

    def launching(self: Any, plan: Any, tables: Any) -> None:
        assert not mine.poll(), "it said so before"
        sizes.append(sorted(plan.work.values()))
        launch(self, plan, tables)

    monkeypatch.setattr(TorchExecutor, "launch", launching)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    mine, theirs = Pipe()
    mine.send(Stop())
    llm = {"model": tiny[0], "device": "cpu", "kv_memory": 2048, "block": 8, "allocator": allocator}
    worker.main(theirs, Options(llm))
    assert sizes[0][-1] == 40
    assert [len(step) for step in sizes if step[-1] == 1] == [7, 6, 5, 4, 3, 2, 1]
    assert isinstance(mine.recv(), Ready)
    news = mine.recv()
    assert (news.events, news.started, news.counts) == ([], [], None), "nobody asked for it"
    assert news.gauges.free == 2048, "nothing is kept of it"


def test_a_device_that_is_too_small_is_said_before_it_serves(tiny: tuple[str, Any], monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise InputError("out of device memory")

    monkeypatch.setattr(TorchExecutor, "launch", full)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    mine, theirs = Pipe()
    worker.main(theirs, Options({"model": tiny[0], "device": "cpu", "kv_memory": 2048, "block": 8}))
    assert mine.recv() == Broken("out of device memory")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_token_without_a_name_is_a_failing_step(tiny: tuple[str, Any], monkeypatch: Any, streamed: bool) -> None:
    """Log-probabilities are told after the step, when some requests have ended already."""
    driven = Driven(tiny[0], monkeypatch)

    def nameless(token: int) -> tuple[str, bytes]:
        raise ValueError("planted in the tokenizer")

    driven.worker.tokens.of = nameless  # type: ignore[method-assign]
    driven.submit(0, "The quick", params(1, logprobs=2), streamed)
    driven.submit(1, "The quick", params(5), streamed)
    driven.run()
    assert "ValueError" in driven.of(Failed)[0].said
    assert driven.of(Failed).keys() | driven.of(Answer).keys() == {0, 1}
    driven.submit(2, "The quick", params(5))
    driven.run()
    assert 2 in driven.of(Answer)
    assert driven.held == 0
    assert not driven.worker.open


def test_text_that_fails_is_a_failing_step(tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(tiny[0], monkeypatch)
    decode = driven.llm.decode

    def decoding(tokens: list[int]) -> str:
        if (tokens[:2] == [5, 6] and len(tokens) > 4) or tokens[:2] == [5, 7]:
            raise ValueError("planted in the detokeniser")
        return decode(tokens)

    driven.llm.answers.decode = decoding
    driven.submit(0, [5, 6], params())
    driven.run()
    assert "ValueError" in driven.of(Failed)[0].said
    driven.submit(2, [5, 7], params())
    driven.submit(1, "The quick", params())
    driven.run()
    assert "could not be prepared: ValueError" in driven.of(Failed)[2].said
    assert 1 in driven.of(Answer)
    assert driven.held == 0
    assert not driven.worker.open


def test_a_prompt_that_cannot_be_prepared_fails_alone(
    tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    driven = Driven(tiny[0], monkeypatch)
    plant_failures(driven.llm.scheduler.allocator)
    driven.submit(0, "The quick", params())
    driven.submit(1, UNTOKENISABLE, params())
    driven.submit(2, "", params())
    driven.run()
    assert driven.of(Failed)[1] == Failed(1, "its prompt could not be prepared: RuntimeError")
    assert driven.of(Failed)[2].refused
    assert list(driven.of(Answer)) == list(driven.of(Accepted)) == [0]
    said = capfd.readouterr()
    assert UNTOKENISABLE not in said.out + said.err, "prompts are in no log"
    assert "RuntimeError" in said.err


def test_an_engine_that_fails_again_and_again_gives_up(tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven(tiny[0], monkeypatch)

    def broken(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(TorchExecutor, "launch", broken)
    for key in range(worker.FAILURES - 1):
        driven.submit(key, "The quick", params())
        driven.step()
        assert key in driven.of(Failed)
    driven.submit(99, "The quick", params())
    with pytest.raises(RuntimeError, match="the device is gone"):
        driven.step()


def test_a_batch_that_never_fills_starts_after_a_while(tiny: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE_S", 0.2)
    driven = Driven(tiny[0], monkeypatch, scheduler="static")
    driven.patient = True
    driven.submit(0, "The quick", params(4))
    start_s = driven.llm.executor.now
    driven.worker.take()
    while not driven.texts():
        driven.step()
    assert 0.2 <= driven.llm.executor.now - start_s < 1
    driven.run()
    assert 0 in driven.of(Answer)
