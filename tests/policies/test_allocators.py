"""Random walks over every allocator, against a model that keeps what each position holds and searches slot by slot.

A walk admits, computes, forks, ends, swaps and releases in any order that a scheduler could. After every step what each
sequence wrote is found through its table, blocks are shared only inside a group, reference counts are the numbers of
holders, and all seven categories, each found by itself, are what `account` says. What failed changed nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from bruteforce import Cells, categories, check_extents, check_reference_counts, perform
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lab.allocators import ALLOCATORS, Allocator, account
from lab.allocators.contiguous import Contiguous
from lab.allocators.paged import Paged
from lab.allocators.swap import Host
from lab.core import Group, Limits, Request, SamplingParams, Sequence
from lab.executors.checksum import mix

MINE = "tests.policies.my_allocator:SizeClasses"
NUM_BLOCKS = 14  # few, so that room is short
MOST_GROUPS = 6


class Walk(RuleBasedStateMachine):
    name: str
    block: int
    seen: Counter[str]  # over all walks

    def __init__(self) -> None:
        super().__init__()
        capacity = NUM_BLOCKS * self.block + self.block // 2  # what does not fill a block is left out
        limits = Limits(length=min(4 * self.block, 40))
        self.allocator: Allocator = ALLOCATORS.get(self.name)(capacity, self.block, limits)
        self.fresh: Allocator = ALLOCATORS.get(self.name)(capacity, self.block, limits)
        self.host = Host(NUM_BLOCKS // 2 * self.block, self.block)
        self.device: Cells = {}
        self.host_cells: Cells = {}
        self.values: dict[Sequence, list[int]] = {}  # what each sequence wrote, position by position
        self.groups: list[Group] = []
        self.away: dict[Group, dict[Sequence, int]] = {}  # swapped groups: what each sequence had computed
        self.prompts: list[tuple[int, ...]] = [(1,)]
        self.tokens = itertools.count(1000)
        self.ids = itertools.count()

    # ---- what the model knows ----

    @property
    def live(self) -> list[Sequence]:
        return [s for group in self.groups if group not in self.away for s in group.live]

    @property
    def ended(self) -> list[Sequence]:
        return [s for group in self.groups for s in group.ended if s in self.allocator.tables]

    def last(self, s: Sequence) -> int:
        return self.allocator.last(s.group.request)

    def state(self) -> Any:
        """Everything that a failure must leave as it was."""
        a = self.allocator
        sequences = [(s, s.computed, list(s.tokens)) for group in self.groups for s in group.sequences]
        host = (sorted(self.host.free), {group: dict(saved) for group, saved in self.host.saved.items()})
        tables = {s: list(table) for s, table in a.tables.items()}
        return tables, dict(a.asked), list(a.moves), a.idle(), sequences, host

    def tried(self, what: str, attempt: Callable[[], object]) -> Any:
        """Returns what the attempt returned; where that is False or None, nothing may have changed."""
        before = self.state()
        result = attempt()
        failed = result is False or result is None
        self.seen[f"{what} failed" if failed else what] += 1
        if failed:
            assert self.state() == before, "a failure changed something"
        return result

    def write(self, s: Sequence, end: int) -> None:
        table = self.allocator.tables[s]
        for p in range(s.computed, end):
            before = self.values[s][p - 1] if p else 0
            self.values[s].append(mix(before, s.tokens[p]))
            self.device[table[p // self.block] * self.block + p % self.block] = self.values[s][p]
        s.computed = end

    def launch(self) -> None:
        perform(self.allocator.moves, self.device, self.host_cells, self.block)
        self.allocator.moves = []

    # ---- what a scheduler may do ----

    @precondition(lambda self: len(self.groups) < MOST_GROUPS)
    @rule(data=st.data(), n=st.integers(1, 3), output=st.integers(1, 20), spare=st.sampled_from((0, 0, 1, 3)))
    def admit(self, data: st.DataObject, n: int, output: int, spare: int) -> None:
        longest = self.allocator.limits.length - 1
        again = data.draw(st.booleans())
        prompt = data.draw(st.sampled_from(self.prompts)) if again else tuple(range(data.draw(st.integers(1, longest))))
        output = min(output, longest + 1 - len(prompt))
        sampling = SamplingParams(max_tokens=output + data.draw(st.sampled_from((0, 5))), n=n)
        group = Group(Request(next(self.ids), 0.0, prompt, output, sampling))
        free = self.allocator.idle()
        hit = self.tried("admit", lambda: self.allocator.admit(group, spare * self.block))
        if hit is None:
            return
        assert 0 <= hit < len(prompt)
        group.live[0].computed = hit
        idle = self.allocator.idle()
        assert idle.free + idle.cached >= spare * self.block
        assert idle.free + idle.cached < free.free + free.cached
        assert group.live[0] in self.allocator.tables
        self.prompts.append(prompt)
        self.groups.append(group)
        for s in group.live:
            self.values[s] = []
        leader = group.live[0]
        for p in range(hit):
            self.values[leader].append(mix(self.values[leader][p - 1] if p else 0, prompt[p]))

    def compute(self, more: dict[Sequence, int]) -> None:
        """A step: sequences get room, one after the other; then all moves are made; then those that have room write."""
        ready: dict[Sequence, int] = {}
        for s, tokens in more.items():
            end = min(s.computed + tokens, self.last(s))
            s.tokens += [next(self.tokens) for _ in range(end + 1 - len(s.tokens))]
            if end > s.computed and self.tried("extend", partial(self.allocator.extend, s, end)):
                assert self.allocator.asked[s] >= end
                ready[s] = end
        self.launch()
        for s, end in ready.items():
            self.write(s, end)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def compute_any(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.live), min_size=1, max_size=5, unique=True))
        self.compute({s: data.draw(st.sampled_from((1, 2, self.block, 3 * self.block))) for s in chosen})

    @precondition(lambda self: self.live)
    @rule()
    def decode(self) -> None:
        self.compute(dict.fromkeys(self.live, 1))

    def leaders(self) -> list[Sequence]:
        """First sequences of groups that can still fork."""
        groups = [group for group in self.groups if group not in self.away and len(group.live) > 1]
        return [group.live[0] for group in groups if not any(s.computed for s in group.live[1:])]

    @precondition(lambda self: self.leaders())
    @rule(data=st.data(), aligned=st.booleans())
    def fork(self, data: st.DataObject, aligned: bool) -> None:
        """All that the leader has computed, or whole blocks of it, as far as their tokens agree."""
        leader = data.draw(st.sampled_from(self.leaders()))
        share = len(leader.group.request.prompt) - 1
        if not leader.computed:
            self.compute({leader: max(1, share - share % self.block if aligned else share)})
        for child in leader.group.live[1:]:
            agree = (a == b for a, b in zip(leader.tokens, child.tokens, strict=False))
            length = min(leader.computed, len(list(itertools.takewhile(bool, agree))))
            if length < leader.computed:
                length -= length % self.block
            if length and self.tried("fork", partial(self.allocator.fork, leader, child, length)):
                child.computed = length
                self.values[child] = self.values[leader][:length]
                assert self.allocator.asked[child] >= length

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data: st.DataObject, keep: bool) -> None:
        """A sequence ends, and holds its memory until its batch ends, or gives it back."""
        s = data.draw(st.sampled_from(self.live))
        s.group.live.remove(s)
        s.group.ended.append(s)
        if not keep or s not in self.allocator.tables:
            self.allocator.release(s)
        if not any(t in self.allocator.tables for t in s.group.ended) and not s.group.live:
            self.groups.remove(s.group)

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.groups))
        for s in group.sequences:
            self.allocator.release(s)
        self.host.drop(group)
        self.away.pop(group, None)
        self.groups.remove(group)

    @precondition(lambda self: any(group not in self.away for group in self.groups))
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([group for group in self.groups if group not in self.away]))
        computed = {s: s.computed for s in group.live}
        distinct = {
            b for s in group.live for b in list(self.allocator.tables.get(s, ()))[: -(-s.computed // self.block)]
        }
        room = len(self.host.free)
        if not self.tried("out", lambda: self.host.save(self.allocator, group)):
            assert not distinct or len(distinct) > room
            return
        assert room - len(self.host.free) == len(distinct), "each distinct block once"
        assert not any(s.computed or s in self.allocator.tables for s in group.live)
        for s in group.ended:
            self.allocator.release(s)
        self.away[group] = computed

    @precondition(lambda self: self.away)
    @rule(data=st.data(), spare=st.sampled_from((0, 0, 2)))
    def swap_in(self, data: st.DataObject, spare: int) -> None:
        group = data.draw(st.sampled_from(list(self.away)))
        if self.tried("in", lambda: self.host.load(self.allocator, group, spare * self.block)):
            assert {s: s.computed for s in group.live} == self.away.pop(group)
            assert group not in self.host.saved

    # ---- what must be true ----

    @invariant()
    def everything_written_is_found_through_the_tables(self) -> None:
        device, host = dict(self.device), dict(self.host_cells)
        perform(self.allocator.moves, device, host, self.block)
        for s in [*self.live, *self.ended]:
            table = self.allocator.tables.get(s, ())
            found = [device.get(table[p // self.block] * self.block + p % self.block) for p in range(s.computed)]
            assert found == self.values[s][: s.computed], f"{s} does not find what it wrote"
        for group, saved in self.host.saved.items():
            for s, (table, tokens) in saved.items():
                found = [host.get(table[p // self.block] * self.block + p % self.block) for p in range(tokens)]
                assert found == self.values[s]
                assert tokens == self.away[group][s]

    @invariant()
    def tables_are_sound(self) -> None:
        allocator = self.allocator
        assert set(allocator.tables) == set(allocator.asked) <= {*self.live, *self.ended}
        holders: dict[int, list[Sequence]] = {}
        for s, table in allocator.tables.items():
            assert len(set(table)) == len(table)
            assert all(0 <= b < NUM_BLOCKS for b in table)
            assert s.computed <= allocator.asked[s] <= len(table) * self.block
            for b in table:
                holders.setdefault(b, []).append(s)
        if isinstance(allocator, Paged) and allocator.publishes:
            self.only_alike_prefixes_are_shared(holders)
        else:
            assert all(len({s.group for s in sharers}) == 1 for sharers in holders.values()), "shared beyond a group"
        if isinstance(allocator, Paged):
            check_reference_counts(allocator, holders)
        else:
            assert all(len(sharers) == 1 for sharers in holders.values()), "extents overlap"
        if isinstance(allocator, Contiguous):
            check_extents(allocator, set(holders))
        free = sorted(self.host.free)
        saved = {b for tables in self.host.saved.values() for table, _ in tables.values() for b in table}
        assert sorted([*free, *saved]) == list(range(self.host.num_blocks)), "host blocks lost or handed out twice"

    def only_alike_prefixes_are_shared(self, holders: dict[int, list[Sequence]]) -> None:
        for b, sharers in holders.items():
            ends = {(list(self.allocator.tables[s]).index(b) + 1) * self.block for s in sharers}
            assert len(ends) == 1, "shared at different places"
            end = ends.pop()
            if len({s.group for s in sharers}) > 1:
                self.seen["hit"] += 1
                assert len({tuple(s.tokens[:end]) for s in sharers}) == 1, "shared without the same tokens before"

    @invariant()
    def every_slot_is_in_one_category(self) -> None:
        expected = categories(self.allocator, self.live, self.ended)
        assert account(self.allocator, self.live, self.ended) == expected
        assert sum(expected) == self.allocator.capacity == NUM_BLOCKS * self.block

    def teardown(self) -> None:
        for group in list(self.groups):
            for s in group.sequences:
                self.allocator.release(s)
            self.host.drop(group)
        idle, fresh = self.allocator.idle(), self.fresh.idle()
        assert (idle.free + idle.cached, idle.largest) == (fresh.free, fresh.largest), "memory leaked, or did not merge"
        assert not self.allocator.tables
        assert not self.allocator.asked
        assert len(self.host.free) == self.host.num_blocks
        assert not self.host.saved
        if isinstance(self.allocator, Contiguous) and isinstance(self.fresh, Contiguous):
            assert vars(self.allocator.slab) == vars(self.fresh.slab), "extents did not merge"


@pytest.mark.parametrize("name", [*ALLOCATORS.names(), MINE])
def test_any_walk(name: str) -> None:
    seen: Counter[str] = Counter()
    for block in (1, 3, 16):
        run_state_machine_as_test(type(f"WalkInBlocksOf{block}", (Walk,), {"name": name, "block": block, "seen": seen}))
    must = ["admit", "admit failed", "extend", "fork", "out", "out failed", "in"]
    if name == "paged-prefix":
        must.append("hit")
    for what in must:
        assert seen[what], f"no walk came to: {what}"
