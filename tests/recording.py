"""Hand-written engine calls, and an allocator small enough to read at a glance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lab.allocators import Allocator, Idle, blocks
from lab.core import Group, Move, Plan, Request, Sampled, SamplingParams, Sequence
from lab.events import Launched
from lab.record import Recorder


class Shelf(Allocator):
    """Tables set by hand, or blocks shared with reference counts and copied before they are written."""

    def __init__(self, num_blocks: int = 32, block: int = 4, most: int = 0) -> None:
        super().__init__(num_blocks * block, block)
        self.most = most  # tokens asked for at least
        self.references = [0] * num_blocks

    def idle(self) -> Idle:
        held = {b for table in self.tables.values() for b in table}
        free = self.capacity - len(held) * self.block
        return Idle(free, 0, free)

    def wants(self, s: Sequence) -> int:
        return len(s.tokens) + 1

    def extend(self, s: Sequence, length: int) -> bool:
        table = list(self.tables.get(s, ()))
        asked = max(self.most, length)
        if self.references.count(0) <= blocks(asked, self.block) - len(table):
            return False
        for i in range(s.computed // self.block, len(table)):
            if self.references[table[i]] > 1:
                self.references[table[i]] -= 1
                table[i] = self.take()
        table += [self.take() for _ in range(blocks(asked, self.block) - len(table))]
        self.tables[s], self.asked[s] = table, asked
        return True

    def fork(self, parent: Sequence, child: Sequence, length: int) -> bool:
        shared = list(self.tables[parent])[: blocks(length, self.block)]
        if self.references.count(0) < blocks(max(self.most, length), self.block) - len(shared):
            return False
        for b in shared:
            self.references[b] += 1
        self.asked[child] = max(self.most, length)
        self.tables[child] = shared + [self.take() for _ in range(blocks(self.asked[child], self.block) - len(shared))]
        return True

    def take(self) -> int:
        b = self.references.index(0)
        self.references[b] = 1
        return b

    def release(self, s: Sequence) -> None:
        for b in self.tables.pop(s):
            self.references[b] -= 1
        del self.asked[s]


def group(request_id: int = 0, prompt: int = 6, output: int | None = 3, n: int = 1, arrival_s: float = 0.0) -> Group:
    return Group(Request(request_id, arrival_s, range(prompt), output, SamplingParams(max_tokens=8, n=n)))


def step(
    recorder: Recorder,
    start_s: float,
    end_s: float,
    plan: Plan,
    sampled: Mapping[Sequence, list[Sampled]],
    pool: Allocator,
    live: Iterable[Sequence],
    ended: Iterable[Sequence],
    waiting: int,
    host_tokens: int,
    compiled: bool = False,
) -> None:
    """One that is collected before the next is launched."""
    recorder.launched(Launched(start_s, plan, pool, [*live], [*ended], waiting, host_tokens, compiled))
    recorder.collected(start_s, end_s, sampled)


def serve(recorder: Recorder) -> None:
    """Request 0: two outputs of 3 tokens, with a shared prompt; 1 is refused; 2 is preempted and cancelled."""
    pool = Shelf()
    a, c = group(0, n=2), group(2, prompt=4, output=None, arrival_s=0.25)
    first, second = a.live
    only = c.live[0]
    recorder.arrived(0.0, a.request)
    recorder.arrived(0.125, group(1, prompt=999).request)
    recorder.refused(0.125, group(1, prompt=999).request, "too long")
    recorder.arrived(0.25, c.request)
    table = [3, 4]
    pool.tables[first], pool.asked[first], first.computed = table, 5, 5
    plan = Plan(work={first: 5}, admitted={a: 0}, blocked=c, padding={first: (2, 7)})
    step(recorder, 0.25, 1.0, plan, {}, pool, [first], [], 1, 0, compiled=True)
    pool.tables[second], pool.asked[second], second.computed = [3, 7], 6, 6
    table.append(5)
    pool.asked[first], first.computed = 9, 6
    pool.tables[only], pool.asked[only], only.computed = range(10, 12), 8, 4
    for s, token in ((first, 11), (second, 12), (only, 13)):
        s.tokens.append(token)
    plan = Plan(work={first: 1, second: 1, only: 4}, moves=[Move("copy", 4, 7, 1)], admitted={c: 0}, forked=[second])
    drawn = {first: [Sampled(11, -0.5)], second: [Sampled(12, -1.0)], only: [Sampled(13, -2.0)]}
    step(recorder, 1.0, 1.5, plan, drawn, pool, [first, second, only], [], 0, 0)
    del pool.tables[only]
    c.preemptions, only.computed = 1, 0
    for s, tokens in ((first, (21, 31)), (second, (22, 32))):
        s.tokens.extend(tokens)
        s.computed = pool.asked[s] = 8
    plan = Plan(work={first: 2, second: 2}, preempted={c: 4}, swapped={c}, moves=[Move("out", 10, 0, 4)])
    drawn = {first: [Sampled(21), Sampled(31)], second: [Sampled(22), Sampled(32)]}
    step(recorder, 1.5, 2.0, plan, drawn, pool, [first, second], [], 1, 4)
    a.live.remove(second)
    a.ended.append(second)
    recorder.ended(2.0, second, "length")
    pool.tables[only], only.computed = range(20, 22), 4
    plan = Plan(admitted={c: 4}, swapped={c}, moves=[Move("in", 0, 20, 4)])
    step(recorder, 2.0, 2.5, plan, {}, pool, [first, only], [second], 0, 0)
    recorder.cancelled(2.5, c)
    recorder.ended(2.5, first, "length")
