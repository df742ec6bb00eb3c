"""Every allocator under every scheduler: the text is right, nothing leaks, and tight memory was tight.

The next token of the checksum model depends on every cell of the KV cache, read through the block tables, so a wrong
table, a lost copy or a wrong swap anywhere changes the text. New policies are tested as soon as they are registered.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from search import expected
from serving import BLOCK, LIMITS, MINE, TOO_LONG, Watch, requests_for, serve, smallest_pool

from lab.allocators import ALLOCATORS, Allocator
from lab.core import Group, Request, SamplingParams
from lab.engine import Engine
from lab.executors.checksum import ChecksumExecutor, text
from lab.schedulers import PREEMPTION, SCHEDULERS

ALL = [*ALLOCATORS.names(), MINE]
MOST_SEEDS = 12  # a tight combination is run with more and more seeds until it has shown all that its name says

allocators = pytest.mark.parametrize("allocator", ALL)
schedulers = pytest.mark.parametrize("scheduler", SCHEDULERS.names())
preemptions = pytest.mark.parametrize("preemption", PREEMPTION)
kinds = pytest.mark.parametrize("kind", BLOCK)


class Policy:
    """What an allocator can do to a sequence that runs, by which is known what a tight run must show."""

    def __init__(self, name: str) -> None:
        memory = ALLOCATORS.get(name)(4096, 4, LIMITS)
        self.grows: bool = memory.grows
        self.shares = (
            type(memory).fork is not Allocator.fork
        )  # then outputs beyond the first ask for memory as they run
        self.contiguous = not self.shares
        self.finds = getattr(memory, "publishes", False)
        self.preempts = self.grows or self.shares


def run(
    allocator: str, scheduler: str, preemption: str, memory: str, kind: str, seed: int, accounts: bool = False
) -> Counter[str]:
    """One run, its text compared; returns how often what happened."""
    requests = requests_for(allocator, kind, seed)
    pool = smallest_pool(allocator, BLOCK[kind], requests) if memory == "tight" else 4096
    watch = Watch(accounts=accounts)
    return served_right(requests, allocator, scheduler, preemption, pool, BLOCK[kind], watch)


def served_right(
    requests: list[Request],
    allocator: str,
    scheduler: str,
    preemption: str,
    pool: int,
    block: int,
    watch: Watch,
    depth: int = 0,
) -> Counter[str]:
    groups, executor = serve(requests, allocator, scheduler, preemption, pool, block, watch, depth)
    for request in requests:
        if request.id in groups:
            outputs = [tokens[len(request.prompt) :] for tokens in groups[request.id].outputs()]
            assert outputs == expected(request, LIMITS.length)
        else:
            assert request.id in watch.cancellations or request.id == TOO_LONG
    assert list(watch.refusals) == [TOO_LONG]
    assert len(groups) + len(watch.cancellations) + 1 == len(requests)
    return watch.count + Counter(executor.moved)


def missing(policy: Policy, scheduler: str, preemption: str, seen: Counter[str]) -> list[str]:
    """What a tight run must show and did not."""
    needed = {
        "forked": 1,
        "reordered": 5,
        "copy": 1,
        "chunked": 1,
        "length": 1,
        "cancel running": 1,
        "cancel waiting": 1,
    }
    if policy.finds:
        needed |= {"hit": 5}
    if policy.preempts:
        needed |= {"preempted": 5}
    else:
        needed |= {"blocked": 5}
    if policy.preempts and preemption == "swap":
        needed |= {"out": 1, "in": 1, "cancel swapped": 1}
    if policy.grows and policy.contiguous:
        needed |= {"relocated": 1}
    if SCHEDULERS.get(scheduler).__name__ in ("Static", "Dynamic"):
        needed |= {"padded": 1}
    return [f"{what}: {seen[what]} of {times}" for what, times in needed.items() if seen[what] < times]


@kinds
@preemptions
@schedulers
@allocators
def test_tight_memory(allocator: str, scheduler: str, preemption: str, kind: str) -> None:
    """The smallest pool in which every request fits alone."""
    policy = Policy(allocator)
    seen: Counter[str] = Counter()
    for seed in range(MOST_SEEDS):
        accounts = seed == 0 and kind == "adversarial" and preemption == "swap"
        seen += run(allocator, scheduler, preemption, "tight", kind, seed, accounts)
        if not missing(policy, scheduler, preemption, seen):
            break
    assert not missing(policy, scheduler, preemption, seen)
    if not policy.preempts:
        assert not seen["preempted"], "all memory is reserved at admission, so there is nothing to preempt for"
    if preemption == "recompute":
        assert not seen["out"]
        assert not seen["in"]


@kinds
@preemptions
@schedulers
@allocators
def test_roomy_memory(allocator: str, scheduler: str, preemption: str, kind: str) -> None:
    seen = run(allocator, scheduler, preemption, "roomy", kind, seed=0)
    assert seen["forked"]
    assert seen["copy"]
    assert seen["cancel running"]
    assert seen["length"]
    assert not seen["preempted"]
    assert not seen["blocked"]
    assert not seen["out"]


@preemptions
@schedulers
@allocators
def test_tight_memory_with_a_step_in_flight(allocator: str, scheduler: str, preemption: str) -> None:
    """Depth 1: the same text; and where lengths are known beforehand the plans of depth 0, to the last block."""
    policy = Policy(allocator)
    seen: Counter[str] = Counter()
    for kind, block in BLOCK.items():
        requests, forced = (requests_for(allocator, kind, count=24, forced=forced) for forced in (False, True))
        pool = smallest_pool(allocator, block, requests)
        at_once, in_flight, any_length = Watch(), Watch(accounts=kind == "adversarial"), Watch()
        served_right(forced, allocator, scheduler, preemption, pool, block, at_once)
        seen += served_right(forced, allocator, scheduler, preemption, pool, block, in_flight, depth=1)
        assert in_flight.plans == at_once.plans
        assert not at_once.count["overlaps"]
        seen += served_right(requests, allocator, scheduler, preemption, pool, block, any_length, depth=1)
    assert seen["overlaps"] == 0 if policy.finds else seen["overlaps"] > 100
    needed = {"forked", "copy", "chunked", "length", "cancel running", "cancel waiting"}
    needed |= (
        ({"preempted", "out", "in"} if preemption == "swap" else {"preempted"}) if policy.preempts else {"blocked"}
    )
    assert not [what for what in needed if not seen[what]]


@schedulers
@allocators
def test_single_outputs_of_reserved_memory_are_never_preempted(allocator: str, scheduler: str) -> None:
    policy = Policy(allocator)
    requests = [
        Request(i, 0.0, range(1 + 5 * (i % 5)), 3 + i % 7, SamplingParams(max_tokens=3 + i % 7)) for i in range(20)
    ]
    watch = Watch(cancels=False, accounts=True)
    pool = smallest_pool(allocator, 4, requests)
    groups, executor = serve(requests, allocator, scheduler, "recompute", pool, 4, watch)
    assert len(groups) == 20
    assert watch.count["blocked"]
    assert all(groups[r.id].ended[0].tokens[len(r.prompt) :] == text(r)[0] for r in requests)
    if not policy.grows:
        assert not watch.count["preempted"]
        assert not executor.moved


@pytest.mark.parametrize(("prefix", "depth"), [(3, 0), (4, 1), (9, 1), (20, 0)])
@schedulers
@allocators
def test_a_reserved_prefix_changes_no_text(allocator: str, scheduler: str, prefix: int, depth: int) -> None:
    """Full blocks of it are computed once and shared by all who begin with it; contiguous memory keeps nothing."""
    shared = tuple(range(50, 50 + prefix))
    requests = [
        replace(r, prompt=(*shared, *r.prompt[:20]) if r.id % 3 else r.prompt[:20])
        for r in requests_for(allocator, "random", count=16)
        if r.id != TOO_LONG
    ]
    memory = ALLOCATORS.get(allocator)(smallest_pool(allocator, 4, requests) + 2 * prefix, 4, LIMITS)
    policy = SCHEDULERS.get(scheduler)(memory, LIMITS, batch=4, timeout_s=3.0)
    executor = ChecksumExecutor(memory.num_blocks, 4)
    groups: dict[int, Group] = {}
    watch = Watch(cancels=False, accounts=True)
    engine = Engine(policy, executor, watch, on_end=lambda g: groups.update({g.request.id: g}), depth=depth)
    watch.engine = engine
    kept = engine.reserve(shared)
    assert kept == (prefix // 4 * 4 if Policy(allocator).shares else 0)
    assert memory.idle().cached == kept
    assert not memory.tables
    engine.run(requests)
    assert not watch.refusals
    for request in requests:
        outputs = [tokens[len(request.prompt) :] for tokens in groups[request.id].outputs()]
        assert outputs == expected(request, LIMITS.length)
    assert watch.count["hit"] >= 10 * (kept > 0)
    if not Policy(allocator).finds:
        assert memory.idle().cached == kept, "nothing but the reserved prefix stays"
        assert watch.count["hit"] == 0 or kept


def test_the_checksum_notices_one_wrong_cell() -> None:
    """The proof's own proof: a model that ignored part of its memory would find every policy right."""
    request = Request(0, 0.0, (5, 6, 7), 12)
    right = text(request)
    for position in range(3):
        prompt = [*request.prompt]
        prompt[position] += 1
        assert text(Request(0, 0.0, prompt, 12)) != right
    assert text(Request(0, 0.0, (6, 5, 7), 12)) != right
    assert text(Request(0, 0.0, request.prompt, 12, SamplingParams(n=2)))[0] == right[0]
    assert len({tuple(output) for output in text(Request(0, 0.0, request.prompt, 12, SamplingParams(n=3)))}) == 3
