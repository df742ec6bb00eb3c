"""Placements against a bitmap that is searched block by block, and the pool of the paper."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.allocators.extents import PLACEMENTS, BestFit, Buddy, FirstFit, Placement

PAPER_BLOCKS = 983  # of 16 tokens: 12 GiB for OPT-13B (Kwon et al., table 1)
PAPER_TOP = 128  # blocks of the longest sequence, 2048 tokens


def free_runs(taken: list[bool]) -> list[tuple[int, int]]:
    """(start, size) of the maximal runs of free blocks, in ascending order."""
    runs = []
    for is_taken, group in groupby(range(len(taken)), key=lambda b: taken[b]):
        members = list(group)
        if not is_taken:
            runs.append((members[0], len(members)))
    return runs


def twins(num_blocks: int, top: int) -> set[tuple[int, int]]:
    """Every extent that a buddy system can ever grant: aligned powers of two inside those that it was cut into."""
    regions, start = set(), 0
    while start < num_blocks:
        size = next(1 << i for i in range(top.bit_length() - 1, -1, -1) if start + (1 << i) <= num_blocks)
        for part in (1 << i for i in range(size.bit_length())):
            regions |= {(at, part) for at in range(start, start + size, part)}
        start += size
    return regions


class Bitmap:
    """What each placement must answer, by looking at single blocks."""

    def __init__(self, name: str, num_blocks: int, top: int) -> None:
        self.name = name
        self.taken = [False] * num_blocks
        self.twins = twins(num_blocks, 1 << (top - 1).bit_length())

    def is_free(self, start: int, size: int) -> bool:
        return not any(self.taken[start : start + size])

    def take(self, start: int, size: int, value: bool = True) -> None:
        assert all(self.taken[b] != value for b in range(start, start + size))
        self.taken[start : start + size] = [value] * size

    def expected(self, size: int) -> tuple[int, int] | None:
        if self.name == "buddy":
            # A free twin is a hole if its parent is not wholly free. The smallest hole that is large enough is split.
            rounded = 1 << (size - 1).bit_length()
            holes = [(hole, start) for start, hole in self.holes() if hole >= rounded]
            return (min(holes)[1], rounded) if holes else None
        fits = [(hole, start) for start, hole in free_runs(self.taken) if hole >= size]
        if not fits:
            return None
        return (min(fits)[1] if self.name == "bestfit" else min(start for _, start in fits)), size

    def holes(self) -> list[tuple[int, int]]:
        if self.name != "buddy":
            return free_runs(self.taken)
        free = {(start, size) for start, size in self.twins if self.is_free(start, size)}
        return [(start, size) for start, size in free if (start & ~(2 * size - 1), 2 * size) not in free]

    def idle(self) -> tuple[int, int]:
        return self.taken.count(False), max((size for _, size in self.holes()), default=0)


@pytest.mark.parametrize("name", PLACEMENTS)
@given(st.data())
def test_against_a_bitmap(name: str, data: st.DataObject) -> None:
    num_blocks, top = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 40))
    placement, bitmap = PLACEMENTS[name](num_blocks, top), Bitmap(name, num_blocks, top)
    empty = placement.idle()
    held: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(("allocate", "allocate", "free", "grow")))
        if action == "allocate":
            size = data.draw(st.integers(1, top))
            extent = placement.allocate(size)
            assert extent == bitmap.expected(size)
            if extent:
                bitmap.take(*extent)
                held.append(extent)
        elif held:
            start, size = held.pop(data.draw(st.integers(0, len(held) - 1)))
            if action == "free":
                placement.free(start, size)
                bitmap.take(start, size, False)
            else:
                held.append((start, grow(placement, bitmap, start, size, size + data.draw(st.integers(1, 6)))))
        assert placement.idle() == bitmap.idle()
    for extent in held:
        placement.free(*extent)
    assert placement.idle() == empty


def grow(placement: Placement, bitmap: Bitmap, start: int, size: int, more: int) -> int:
    """Grows if the blocks behind are free, and never in the buddy system."""
    end = start + more
    can = bitmap.name != "buddy" and end <= len(bitmap.taken) and bitmap.is_free(start + size, more - size)
    assert placement.grow(start, size, more) == (more if can else size)
    if can:
        bitmap.take(start + size, more - size)
    return more if can else size


@given(st.lists(st.integers(1, PAPER_TOP), max_size=60))
def test_buddies_are_aligned_powers_of_two(sizes: list[int]) -> None:
    buddy = Buddy(PAPER_BLOCKS, PAPER_TOP)
    for size in sizes:
        extent = buddy.allocate(size)
        if extent:
            start, granted = extent
            assert size <= granted < 2 * size
            assert granted & (granted - 1) == 0
            assert start % granted == 0


def test_the_paper_s_pool_is_cut_into_seven_sequences_and_leftovers() -> None:
    buddy = Buddy(PAPER_BLOCKS, PAPER_TOP)
    assert {1 << order: starts for order, starts in enumerate(buddy.holes) if starts} == {
        128: [0, 128, 256, 384, 512, 640, 768],
        64: [896],
        16: [960],
        4: [976],
        2: [980],
        1: [982],
    }
    assert buddy.idle() == (PAPER_BLOCKS, 128)


def test_seven_of_the_longest_sequences_leave_8_85_percent_that_none_can_use() -> None:
    buddy = Buddy(PAPER_BLOCKS, PAPER_TOP)
    granted = [buddy.allocate(PAPER_TOP) for _ in range(8)]
    assert granted == [*((128 * i, 128) for i in range(7)), None]
    free, largest = buddy.idle()
    assert free == 87
    assert largest == 64
    assert round(100 * free / PAPER_BLOCKS, 2) == 8.85


def test_twins_merge_only_with_each_other() -> None:
    buddy = Buddy(8, 8)
    extents = [buddy.allocate(2) for _ in range(4)]
    assert extents == [(0, 2), (2, 2), (4, 2), (6, 2)]
    buddy.free(2, 2)
    buddy.free(4, 2)  # neighbours, not twins
    assert buddy.idle() == (4, 2)
    buddy.free(0, 2)
    assert buddy.idle() == (6, 4)
    buddy.free(6, 2)
    assert buddy.idle() == (8, 8)


def holes_of(placement: Placement, sizes: list[int]) -> None:
    """Leaves holes of these sizes, one block held between them, in a slab that has just their room."""
    extents = [placement.allocate(size) for hole in sizes for size in (hole, 1)]
    for extent in extents[::2]:
        assert extent is not None
        placement.free(*extent)


def test_first_fit_takes_the_first_hole_and_best_fit_the_smallest() -> None:
    for placement, start in ((FirstFit(18), 0), (BestFit(18), 10)):
        holes_of(placement, [5, 3, 4, 2])  # at 0, 6, 10, 15
        assert placement.allocate(4) == (start, 4)
    best = BestFit(18)
    holes_of(best, [5, 3, 4, 2])
    assert [best.allocate(size) for size in (1, 1, 3, 3, 3, 2, 1)] == [
        (15, 1), (16, 1), (6, 3), (10, 3), (0, 3), (3, 2), (13, 1)
    ]  # fmt: skip
    assert best.allocate(1) is None
    assert best.idle() == (0, 0)


def test_a_hole_merges_with_both_neighbours() -> None:
    slab = FirstFit(9)
    for _ in range(3):
        slab.allocate(3)
    slab.free(0, 3)
    slab.free(6, 3)
    assert slab.idle() == (6, 3)
    slab.free(3, 3)
    assert slab.holes == [(0, 9)]
