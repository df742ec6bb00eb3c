"""The loop: dead ends, cancelling in every state, other threads, and what is refused before any work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from stepping import Bench, request

from lab.allocators import ALLOCATORS, Allocator, Idle
from lab.core import Group, InputError, Limits, Request
from lab.engine import Engine
from lab.executors.checksum import ChecksumExecutor
from lab.schedulers import SCHEDULERS


class Stubborn(Allocator):
    """Says that everything fits and then never gives anything."""

    def admit(self, group: Group, spare: int = 0) -> int | None:
        return None

    def release(self, s: object) -> None: ...

    def idle(self) -> Idle:
        return Idle(self.capacity, 0, self.capacity)


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_a_dead_end_raises_and_never_spins(scheduler: str) -> None:
    allocator = Stubborn(64, 4)
    executor = ChecksumExecutor(16, 4)
    engine = Engine(SCHEDULERS.get(scheduler)(allocator, batch=1), executor)
    engine.submit(request(1, 3, 2))

    def steps() -> None:
        for _ in range(100):
            engine.step()

    with pytest.raises(RuntimeError, match=r"Stubborn plans no work.*dead end"):
        steps()


def states() -> list[tuple[str, Callable[[], tuple[Bench, int]]]]:
    def waiting() -> tuple[Bench, int]:
        bench = Bench(blocks=4, watermark=0.0).submit(request(1, 12, 3), request(2, 12, 3))
        bench.step()
        assert bench.waiting == [2]
        return bench, 2

    def running() -> tuple[Bench, int]:
        bench = Bench(blocks=9, watermark=0.0).submit(request(1, 12, 3), request(2, 8, 3, n=3))
        bench.step()
        bench.step()
        assert bench.running == [1, 2]
        assert len(bench.allocator.tables) == 4
        return bench, 2

    def swapped() -> tuple[Bench, int]:
        bench = Bench(blocks=4, watermark=0.0, preemption="swap").submit(request(1, 7, 4), request(2, 7, 4))
        for _ in range(3):
            bench.step()
        assert bench.scheduler.host.used == 8
        return bench, 2

    def half_ended() -> tuple[Bench, int]:
        bench = Bench("static", batch=2).submit(request(1, 4, 2), request(2, 4, 9))
        for _ in range(3):
            bench.step()
        assert bench.ended == [1]
        assert len(bench.allocator.tables) == 2
        return bench, 2

    return [("waiting", waiting), ("running", running), ("swapped", swapped), ("half ended", half_ended)]


@pytest.mark.parametrize(("state", "make"), states(), ids=[state for state, _ in states()])
def test_cancel_frees_everything_within_one_step(state: str, make: Callable[[], tuple[Bench, int]]) -> None:
    bench, id = make()
    bench.engine.cancel(id)
    bench.engine.cancel(12345)  # nobody
    assert id not in bench.step()
    assert id not in bench.engine.groups
    assert id not in bench.running + bench.waiting
    assert all(s.group.request.id != id for s in bench.allocator.tables)
    assert bench.scheduler.host.used == 0
    while bench.engine.groups:
        bench.step()
    assert bench.allocator.idle().free == bench.allocator.capacity
    assert id not in bench.ended


def test_submit_and_cancel_from_other_threads() -> None:
    bench = Bench(blocks=40)
    bench.executor.wait = lambda until_s: None  # type: ignore[method-assign]
    kept, dropped = range(0, 60, 2), range(1, 60, 2)
    submitted = threading.Barrier(5)

    def client(first: int) -> None:
        for id in range(first, 60, 4):
            bench.engine.submit(request(id, 5 + id % 7, 4 if id % 2 == 0 else 2000, arrival_s=0.0))
        submitted.wait()
        for id in range(first, 60, 4):
            if id % 2:
                bench.engine.cancel(id)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        bench.step(more=True)
    submitted.wait()
    while any(thread.is_alive() for thread in threads) or bench.engine.inbox or bench.engine.groups:
        bench.step(more=True)
    assert sorted(bench.ended) == list(kept)
    assert not set(bench.ended) & set(dropped)
    assert bench.allocator.idle().free == bench.allocator.capacity


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request(1, 60, 5), "60 prompt and 5 output tokens exceed the limit of 64"),
        (Request(1, 0.0, range(64)), "64 prompt and 1 output tokens exceed the limit of 64"),
        (request(1, 30, 12), "1 x 42 tokens do not fit"),
        (request(1, 20, 11, n=2), "2 x 31 tokens do not fit"),
        (request(1, 2, 2, n=5), "5 sequences exceed the 4 of a step"),
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(bad: Request, words: str) -> None:
    bench = Bench(blocks=10, limits=Limits(seqs=4, length=64))
    reason = bench.engine.refusal(bad)
    assert reason is not None
    assert words in reason
    assert "\n" not in reason
    bench.submit(bad)
    bench.step()
    assert not bench.engine.groups
    assert not bench.waiting


def test_what_just_fits_is_served() -> None:
    """40 tokens of memory, 41 of prompt and output: the last one's K and V are never computed."""
    for one in (request(1, 30, 11), request(1, 40, 1), request(1, 17, 8, n=2), request(1, 1, 40)):
        bench = Bench(blocks=10, limits=Limits(length=64)).submit(one)
        while bench.engine.groups or bench.engine.inbox:
            bench.step()
        assert bench.ended == [1]


def test_an_id_in_flight_is_refused() -> None:
    bench = Bench().submit(request(1, 3))
    bench.step()
    reason = bench.engine.refusal(request(1, 3))
    assert reason is not None
    assert "in flight already" in reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preemption": "drop"}, "preemption 'drop' is unknown: take recompute or swap"),
        ({"watermark": 1.0}, "watermark 1.0: must be a share"),
        ({"watermark": -0.1}, "watermark -0.1"),
        ({"batch": 0}, "batch of 0 requests"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Bench(**options)


@pytest.mark.parametrize("registry", [ALLOCATORS, SCHEDULERS], ids=["allocators", "schedulers"])
def test_an_unknown_policy_is_named_with_the_nearest(registry: Any) -> None:
    name = registry.names()[0]
    with pytest.raises(InputError, match=f"{name[:-1]}.* is unknown: did you mean .*{name}.*module:Class"):
        registry.get(name[:-1])
    for path in ("no_such_module:Mine", "lab.core:Nobody"):
        with pytest.raises(InputError, match=r"cannot be imported.*PYTHONPATH"):
            registry.get(path)


def test_an_oracle_refuses_a_request_whose_length_nobody_knows() -> None:
    """As a refusal, in the midst of a run: a server must not end over one request."""
    bench = Bench(allocator="contiguous-oracle")
    unknown = Request(1, 0.0, range(3), None)
    reason = bench.engine.refusal(unknown)
    assert reason is not None
    assert "no known output length" in reason
    bench.submit(unknown, request(2, 3, 2))
    bench.step()
    bench.step()
    assert bench.ended == [2]
