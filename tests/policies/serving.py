"""Serve requests under one combination of policies, with the checksum model and no GPU, and watch every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from random import Random
from typing import Any

from lab.allocators import ALLOCATORS, Allocator, account
from lab.core import UNKNOWN, Group, InputError, Limits, Plan, Request, Sampled, SamplingParams, Sequence
from lab.engine import Engine
from lab.events import Launched
from lab.executors.checksum import ChecksumExecutor
from lab.schedulers import SCHEDULERS
from lab.workloads import workload

MINE = "tests.policies.my_allocator:SizeClasses"  # registered nowhere, named by its import path
LIMITS = Limits(seqs=12, tokens=24, length=64)  # prompts are up to 40 tokens long: more than a step computes
BLOCK = {"random": 3, "adversarial": 4}
STOP = tuple(range(8))  # of 97 tokens: an output is 12 tokens long on average
TOO_LONG = 1000  # id of a request that no allocator can serve


def random_requests(seed: int, count: int) -> list[Request]:
    random = Random(seed)
    requests: list[Request] = []
    for id in range(count):
        prompt = tuple(random.randrange(97) for _ in range(random.choice((1, 6, 20, 40))))
        if requests and id % 4 == 0:  # begins like the one before it
            prompt = (*requests[-1].prompt, *prompt)[: max(len(requests[-1].prompt), len(prompt))]
        output = random.randint(1, 24)
        sampling = SamplingParams(max_tokens=output + random.choice((0, 3)), n=random.randint(1, 3), seed=seed)
        requests.append(Request(id, id / 3, prompt, output, sampling))
    return requests


def adversarial_requests(seed: int, count: int) -> list[Request]:
    spec = f"adversarial:block={BLOCK['adversarial']},blocks=8,n=3,vocabulary=97"
    return list(workload(spec, rate_per_s=3.0, count=count, seed=seed, limit=LIMITS.length))


def with_stops(requests: list[Request]) -> list[Request]:
    """Every other request ends by a stop token instead of a forced length."""
    return [
        r if r.id % 2 else replace(r, output=None, sampling=replace(r.sampling, stop=STOP, max_tokens=20))
        for r in requests
    ]


def with_beams(requests: list[Request]) -> list[Request]:
    """Of those with several outputs every second searches instead, with one beam more than it gives outputs."""
    several = [r for r in requests if r.sampling.n > 1][::2]
    beams = {r.id: replace(r.sampling, beams=r.sampling.n, n=r.sampling.n - r.id % 2) for r in several}
    return [replace(r, sampling=beams.get(r.id, r.sampling)) for r in requests]


def requests_for(allocator: str, kind: str, seed: int = 0, count: int = 40, forced: bool = False) -> list[Request]:
    """Stop tokens too, unless the allocator is an oracle, and beams; and in the middle one that must be refused.

    With `forced` every length is known beforehand: no stops, no searches. The longer a request, the fewer its outputs,
    so that no single one needs a pool in which all others are at ease.
    """
    requests = {"random": random_requests, "adversarial": adversarial_requests}[kind](seed, count)
    requests = [replace(r, sampling=replace(r.sampling, n=max(1, min(r.sampling.n, 64 // r.most)))) for r in requests]
    if not forced:
        try:
            ALLOCATORS.get(allocator)(4096, BLOCK[kind], LIMITS).fits(Request(0, 0.0, range(4)))
            requests = with_stops(requests)
        except InputError:
            pass
        requests = with_beams(requests)
    middle = len(requests) // 2
    too_long = Request(TOO_LONG, requests[middle].arrival_s, range(LIMITS.length), 1)
    return [*requests[:middle], too_long, *requests[middle:]]


def smallest_pool(allocator: str, block: int, requests: Iterable[Request]) -> int:
    """Tokens of the smallest pool in which each request fits alone: as tight as memory can be."""
    served = [r for r in requests if r.id != TOO_LONG]
    tokens = block
    while not all(ALLOCATORS.get(allocator)(tokens, block, LIMITS).fits(r) for r in served):
        tokens += block
    return tokens


def written(plan: Plan) -> tuple[Any, ...]:
    """What a plan says, to be compared with that of another run."""

    def name(s: Sequence) -> tuple[int, int]:
        return s.group.request.id, s.index

    work = [(name(s), tokens) for s, tokens in plan.work.items()]
    padding = [(name(s), dead) for s, dead in plan.padding.items()]
    groups = [
        [(group.request.id, tokens) for group, tokens in some.items()] for some in (plan.admitted, plan.preempted)
    ]
    blocked = plan.blocked and plan.blocked.request.id
    return (
        work,
        padding,
        groups,
        plan.moves,
        {g.request.id for g in plan.swapped},
        list(map(name, plan.forked)),
        blocked,
    )


class Watch:
    """Implements the engine's Recorder: counts what happened, checks the account, cancels requests at random."""

    def __init__(self, cancels: bool = True, accounts: bool = False) -> None:
        self.engine: Engine  # set once there is one
        self.random = Random(1)
        self.cancels = cancels
        self.accounts = accounts
        self.count: Counter[str] = Counter()
        self.refusals: dict[int, str] = {}
        self.cancellations: dict[int, Group] = {}
        self.plans: list[Any] = []
        self.end_s = 0.0  # of the step before
        self.extents: dict[Sequence, Seq[int]] = {}  # the tables of the step before

    def arrived(self, time_s: float, request: Request) -> None: ...

    def ended(self, time_s: float, s: Sequence, reason: str) -> None:
        self.count[reason] += 1

    def refused(self, time_s: float, request: Request, reason: str) -> None:
        self.refusals[request.id] = reason

    def cancelled(self, time_s: float, group: Group) -> None:
        self.cancellations[group.request.id] = group
        assert not any(s in self.engine.allocator.tables for s in group.sequences), "a cancelled group holds memory"
        assert group not in self.engine.scheduler.host.saved, "a cancelled group holds host memory"

    def launched(self, step: Launched) -> None:
        plan, allocator = step.plan, step.allocator
        self.plans.append(written(plan))
        self.count["steps"] += 1
        self.count["preempted"] += len(plan.preempted)
        searching = [s for s in plan.forked if s.group.together and len(s.tokens) > len(s.group.request.prompt) + 1]
        self.count["reordered"] += len(searching)
        self.count["forked"] += len(plan.forked) - len(searching)
        self.count["hit"] += sum(hit > 0 for g, hit in plan.admitted.items() if g not in plan.swapped)
        self.count["blocked"] += plan.blocked is not None
        self.count["padded"] += bool(plan.padding)
        self.count["chunked"] += any(s.pending > 1 for s in plan.work)
        assert sum(plan.work.values()) <= LIMITS.tokens, "more tokens in a step than its limit"
        assert len(plan.work) <= LIMITS.seqs, "more sequences in a step than its limit"
        if self.accounts:
            self.count["accounts"] += 1
            assert all(slots >= 0 for slots in account(allocator, step.live, step.ended))
        self._extents(plan, allocator)
        if self.cancels and self.count["steps"] % 10 == 0:
            self._cancel()

    def collected(self, start_s: float, end_s: float, sampled: Mapping[Sequence, list[Sampled]]) -> None:
        self.count["overlaps"] += len(self.engine.flights)
        assert self.end_s <= start_s <= end_s, "two steps at the same time"
        self.end_s = end_s
        assert not any(sample.token == UNKNOWN for samples in sampled.values() for sample in samples)

    def _extents(self, plan: Plan, allocator: Allocator) -> None:
        """Counts extents that moved, and such that grew where they were, while their sequence ran."""
        for s, table in allocator.tables.items():
            before = self.extents.get(s)
            if isinstance(table, range) and before and s.group not in plan.admitted and s.group not in plan.preempted:
                self.count["relocated"] += table[0] != before[0]
                self.count["grown"] += table[0] == before[0] and len(table) > len(before)
        self.extents = dict(allocator.tables)

    def _cancel(self) -> None:
        scheduler = self.engine.scheduler
        swapped = list(scheduler.host.saved)
        states = {
            "running": scheduler.running,
            "waiting": [group for group in scheduler.waiting if group not in swapped],
            "swapped": swapped,
        }
        state = min((state for state in states if states[state]), key=lambda state: self.count[f"cancel {state}"])
        self.count[f"cancel {state}"] += 1
        self.engine.cancel(self.random.choice(list(states[state])).request.id)


def serve(
    requests: list[Request],
    allocator: str,
    scheduler: str,
    preemption: str,
    pool: int,
    block: int,
    watch: Watch,
    depth: int = 0,
) -> tuple[dict[int, Group], ChecksumExecutor]:
    """Run to the end; the groups that completed, by request id, and the executor."""
    memory = ALLOCATORS.get(allocator)(pool, block, LIMITS)
    policy = SCHEDULERS.get(scheduler)(memory, LIMITS, preemption=preemption, batch=4, timeout_s=3.0)
    executor = ChecksumExecutor(memory.num_blocks, block, host_blocks=policy.host.num_blocks)
    groups: dict[int, Group] = {}

    def on_end(group: Group) -> None:
        assert not any(UNKNOWN in s.tokens for s in group.ended), "told of its end before its last token has come"
        groups[group.request.id] = group

    engine = Engine(policy, executor, watch, on_end=on_end, depth=depth)
    watch.engine = engine
    empty = memory.idle()
    engine.run(requests)
    idle = memory.idle()
    assert (idle.free + idle.cached, idle.largest) == (empty.free, empty.largest), "memory leaked, or did not merge"
    assert not memory.tables
    assert not memory.asked
    assert not memory.moves
    assert not policy.host.saved
    assert not policy.host.used, "host memory leaked"
    assert not policy.running
    assert not policy.waiting
    assert not engine.groups
    assert not engine.flights
    assert not executor.launched
    assert empty.free == memory.capacity
    return groups, executor
