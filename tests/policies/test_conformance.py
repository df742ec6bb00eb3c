"""What is said of allocators that are right, and of those in which one thing is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.allocators import ALLOCATORS, Allocator, Idle, blocks
from lab.conformance import complaint, main
from lab.core import Group, InputError, Request, Sequence
from notebooks.solution import Pages
from tests.policies.serving import MINE


@pytest.mark.parametrize("name", [*ALLOCATORS.names(), MINE])
def test_nothing_is_wrong_with_ours(name: str) -> None:
    assert complaint(ALLOCATORS.get(name)) == ""


def test_it_is_asked_by_name_and_import_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paged", "notebooks.solution:Pages"]) == 0
    ours, theirs = "paged: nothing is wrong with it\n", "notebooks.solution:Pages: nothing is wrong with it\n"
    assert capsys.readouterr().out == ours + theirs
    assert main(["paged", f"{__name__}:Unwritten"]) == 1
    assert (
        capsys.readouterr().out
        == f"{ours}{__name__}:Unwritten: extend() is not written yet: room for `length` tokens\n"
    )
    assert main(["pages"]) == 2
    assert capsys.readouterr().err.startswith("error: allocator 'pages' is unknown: did you mean paged")


def test_nothing_is_wrong_with_the_solution() -> None:
    assert complaint(Pages) == ""


class Unwritten(Pages):
    def extend(self, s: Sequence, length: int) -> bool:
        raise NotImplementedError("room for `length` tokens")


class Undefined(Allocator):
    """Without a single method."""


class Crashes(Pages):
    def release(self, s: Sequence) -> None:
        self.free += self.tables.pop(s)  # which holds nothing the second time
        self.asked.pop(s, None)


class NoAnswer(Pages):
    def extend(self, s: Sequence, length: int) -> bool:
        super().extend(s, length)
        return None  # type: ignore[return-value]


class Overbooks(Pages):
    """Admits without looking at what is free."""

    def admit(self, group: Group, spare: int = 0) -> int | None:
        for s in group.live:
            self.extend(s, len(s.tokens))
        return 0


class HalfWay(Pages):
    """Takes what there is, then finds that it is not enough."""

    def extend(self, s: Sequence, length: int) -> bool:
        table = self.tables.setdefault(s, [])
        self.asked[s] = max(length, self.asked.get(s, 0))
        while len(table) < blocks(length, self.block):
            if not self.free:
                return False
            table.append(self.free.pop())
        return True


class HalfWayOnce(Pages):
    """The same, but only where several blocks are missing and some are there."""

    def extend(self, s: Sequence, length: int) -> bool:
        table = self.tables.setdefault(s, [])
        while len(table) < blocks(length, self.block):
            if not self.free:
                return False
            table.append(self.free.pop())
        self.asked[s] = max(length, self.asked.get(s, 0))
        return True


class TooFew(Pages):
    """Rounds down."""

    def extend(self, s: Sequence, length: int) -> bool:
        return super().extend(s, length // self.block * self.block)


class HandedOutTwice(Pages):
    def extend(self, s: Sequence, length: int) -> bool:
        missing = blocks(length, self.block) - len(self.tables.get(s, []))
        if missing > len(self.free):
            return False
        self.tables.setdefault(s, []).extend(self.free[: max(missing, 0)])  # and they stay in the list
        self.asked[s] = length
        return True


class Leaks(Pages):
    def release(self, s: Sequence) -> None:
        self.free += self.tables.pop(s, [])[1:]
        self.asked.pop(s, None)


class Remembers(Pages):
    def release(self, s: Sequence) -> None:
        self.free += self.tables.pop(s, [])


class Boasts(Pages):
    def idle(self) -> Idle:
        return super().idle()._replace(largest=2 * self.capacity)


class OutOfBounds(Pages):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.free = list(range(1, self.num_blocks + 1))


class ForksNothing(Pages):
    """The child's memory is there, and nobody copies into it."""

    def fork(self, parent: Sequence, child: Sequence, length: int) -> bool:
        return self.extend(child, length)


class Reorders(Pages):
    """Moves a sequence to other blocks and forgets to order the copy."""

    def extend(self, s: Sequence, length: int) -> bool:
        done = super().extend(s, length)
        if done and len(self.tables[s]) > 2:
            self.tables[s] = self.tables[s][::-1]
        return done


class RefusesAll(Pages):
    def fits(self, request: Request) -> bool:
        return False


class Demands(Pages):
    def admit(self, group: Group, spare: int = 0) -> int | None:
        raise InputError("this one wants more: give it")


SAID = {
    Unwritten: "extend() is not written yet: room for `length` tokens",
    Undefined: "must define idle()",
    Crashes: "release() failed with KeyError",
    NoAnswer: "extend() returned None: must be True, or False",
    Overbooks: "missing in tables or asked",
    HalfWay: "extend() found no room, but tables or idle() have changed",
    HalfWayOnce: "extend() found no room, but tables or idle() have changed",
    TooFew: "were asked for",
    HandedOutTwice: "together they must be all",
    Leaks: "after release() idle() says",
    Remembers: "release() left the sequence in tables or asked",
    Boasts: "for the largest single grant",
    OutOfBounds: "the pool has 0 to",
    ForksNothing: "is wrong: its blocks were overwritten, not copied",
    Reorders: "is wrong: its blocks were overwritten, not copied",
    RefusesAll: "fits() says no",
    Demands: "this one wants more: give it",
}


@pytest.mark.parametrize("wrong", SAID, ids=lambda wrong: wrong.__name__)
def test_what_is_wrong_is_said_in_words(wrong: Callable[..., Allocator]) -> None:
    said = complaint(wrong)
    assert SAID[wrong] in said  # type: ignore[index]
    assert "\n" not in said
