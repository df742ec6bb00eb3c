"""Decodes cut into shares of equal work: planned on the device once a step, read by the attention of every layer.

One program for each row and KV head leaves most of a GPU idle where rows are few, and lets all wait for the longest
where their lengths differ. So rows are cut into *shares*, one program's work each, those of the longest row first:

    row a |======|======|======|======|      Say two programs run at a time. With nothing cut, one reads all of row a
    row b |======|======|                    while the other has long been done with b and c; in shares of this size
    row c |===|                              both read for as long, but for what the last share overhangs.

Which program reads which share of which row is a table of `items`, made by one small kernel out of the lengths as they
lie on the device: a captured step (CUDA graph) keeps its grid, and every replay cuts anew by the lengths that it finds.
(FlashDecoding cuts all rows alike; Stream-K cuts matrix products into equal shares, for the same reason.)
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.ragged import Ragged

# Of an item, int32: row (-1: nothing to do), its query's place and position; positions [low, high) hold the keys that
# it sees, [at, stop) those of this share; which of the row's shares it is, and how many there are.
FIELDS = tl.constexpr(9)


# fmt: off
@triton.jit(do_not_specialize=["rows", "items", "at_a_time", "turns", "fewest"])
def plan_kernel(
    places_ptr, starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, items_ptr,  # see Ragged; [items, FIELDS]
    rows, items, at_a_time, turns, fewest, window,  # items that run at a time; shares that each of them has, about
    DEAD: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
):
    """One program; a share is a multiple of N keys. ROWS: at least `rows`."""
    place = tl.arange(0, ROWS)
    inside = place < rows
    row = tl.load(places_ptr + 2 * place, mask=inside, other=0)
    start, first = tl.load(starts_ptr + row), tl.load(firsts_ptr + row)
    low, high, end = span(first, 1, lengths_ptr + row, dead_ptr + row, window, DEAD)
    keys = tl.where(inside, end - low, 0)
    each = tl.cdiv(tl.sum(keys, 0), at_a_time)  # for everyone, were all equal
    # All at once, in shares as small as the places suffice for: found by halving, in steps of N keys.
    share, longest = tl.cdiv(tl.maximum(each, fewest), N), tl.cdiv(tl.maximum(tl.max(keys, 0), 1), N)
    share, most = tl.minimum(share, longest), tl.maximum(at_a_time, rows)
    while share < longest:
        middle = (share + longest) // 2
        enough = tl.sum(tl.where(inside, tl.maximum(tl.cdiv(keys, middle * N), 1), 0), 0) <= most
        longest = tl.where(enough, middle, longest)
        share = tl.where(enough, share, middle + 1)
    at_once = tl.where(rows <= at_a_time, share * N, each + share * N // 2)  # more rows than places: whole, in turns
    # Or several shares for each place: all end half a share apart, and each takes time to begin.
    several = tl.cdiv(tl.maximum(tl.cdiv(each, turns), fewest), N)
    share = tl.where(at_once > each + several * N // 2 + N, tl.minimum(share, several), share)
    count = tl.where(inside, tl.maximum(tl.cdiv(keys, share * N), 1), 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(keys, tl.maximum(count, 1)), N), 1) * N  # [ROWS], each row's as equal as can be
    count = tl.where(inside, tl.maximum(tl.cdiv(keys, share), 1), 0)
    items_ptr += (tl.cumsum(count, 0) - count) * FIELDS
    for i in range(tl.max(count, 0)):
        item, left, at = items_ptr + i * FIELDS, i < count, low + i * share
        tl.store(item, row, mask=left)
        tl.store(item + 1, start, mask=left)
        tl.store(item + 2, first, mask=left)
        tl.store(item + 3, low, mask=left)
        tl.store(item + 4, high, mask=left)
        tl.store(item + 5, at, mask=left)
        tl.store(item + 6, tl.minimum(at + share, end), mask=left)
        tl.store(item + 7, i, mask=left)
        tl.store(item + 8, count, mask=left)
    items_ptr += (place - tl.cumsum(count, 0) + count) * FIELDS
    for i in range(tl.sum(count, 0), items, ROWS):
        tl.store(items_ptr + i * FIELDS, -1, mask=i + place < items)
# fmt: on


@triton.jit
def span(first, tokens, length_ptr, dead_ptr, window, DEAD: tl.constexpr):
    """Positions [low, high) hold the keys that queries [first, first + tokens) see; [high, end) are dead."""
    high = tl.minimum(first + tokens, tl.load(length_ptr))
    low = high * 0
    if window is not None:  # what lies before every query's window is never read: it may belong to others by now
        low = tl.maximum(0, tl.minimum(first - window + 1, high - 1))
    end = high
    if DEAD:
        end += tl.load(dead_ptr)
    return low, high, end


@triton.jit
def item(items_ptr, place):
    """Its fields; of a program without work only the row, all others having not been written."""
    item_ptr = items_ptr + place * FIELDS
    row = tl.load(item_ptr).to(tl.int64)
    start, first, low, high = tl.load(item_ptr + 1), tl.load(item_ptr + 2), tl.load(item_ptr + 3), tl.load(item_ptr + 4)
    at, stop, split, splits = tl.load(item_ptr + 5), tl.load(item_ptr + 6), tl.load(item_ptr + 7), tl.load(item_ptr + 8)
    return row, start, first, low, high, at, stop, split, splits


@triton.jit
def last_of(arrived_ptr, splits):
    """Is this program, whose share is written, the last of `splits`? They count from 0, where the last goes back to."""
    tl.debug_barrier()  # the whole program has written, before it says so
    last = tl.atomic_add(arrived_ptr, 1) == splits - 1
    tl.store(arrived_ptr, 0, mask=last)  # for the next launch
    return last


@triton.jit
def combine(parts_ptr, splits, stride, some, DV: tl.constexpr, DV_PAD: tl.constexpr, LIVE: tl.constexpr):
    """The average of the shares of `some` heads, weighed by their sums: [LIVE, DV_PAD]. `stride`: from share to share.

    parts_ptr [LIVE]: of each head its first share's values, and behind them the log of their sum.
    """
    AT_ONCE: tl.constexpr = max(1, 4096 // (LIVE * DV_PAD))  # shares
    split, dv = tl.arange(0, AT_ONCE), tl.arange(0, DV_PAD)
    largest = tl.full([LIVE], -1e30, tl.float32)
    total, values = tl.zeros([LIVE], tl.float32), tl.zeros([LIVE, DV_PAD], tl.float32)
    for at in range(0, splits, AT_ONCE):
        written = (at + split < splits)[:, None] & some[None, :]
        parts = parts_ptr[None, :] + (at + split).to(tl.int64)[:, None] * stride  # [AT_ONCE, LIVE]
        # Others wrote them while this program ran: not from the cache that only its processor has.
        log_sums = tl.load(parts + DV, mask=written, other=float("-inf"), cache_modifier=".cg")
        mask = written[:, :, None] & (dv < DV)[None, None, :]
        own = tl.load(parts[:, :, None] + dv[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")
        larger = tl.maximum(largest, tl.max(log_sums, 0))
        weights, shrink = tl.exp2(log_sums - larger[None, :]), tl.exp2(largest - larger)
        values = values * shrink[:, None] + tl.sum(own * weights[:, :, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        largest = larger
    return values / tl.where(total == 0.0, 1.0, total)[:, None]


def plan_items(rows: int, longest: int, at_a_time: int, turns: int, fewest: int) -> int:
    """As many items as `plan_kernel` may need for `rows`, none with more keys than `longest`; known before lengths are.

    In several turns every share but a row's last has each / turns keys, so that turns * at_a_time of them and one more
    per row suffice.
    """
    return max(rows, min(rows + turns * at_a_time, rows * -(-longest // fewest)))


def specialise_plan(rows: int, dead: bool, step: int) -> dict[str, Any]:
    """Compile-time constants; `kernels.compile_ahead` compiles these."""
    return {"DEAD": dead, "N": step, "ROWS": max(16, triton.next_power_of_2(rows))}


def plan(
    ragged: Ragged, places: Tensor, at_a_time: int, turns: int, fewest: int, step: int, window: int | None
) -> Tensor:
    """int32 [items, FIELDS], of the decodes at `places`; `at_a_time`: programs that run at a time for one KV head.

    Made once for a step: `ragged` keeps it.
    """
    how = (at_a_time, turns, fewest, step, window)
    if how not in ragged.plans:
        rows = places.shape[0]
        longest = ragged.longest if window is None or ragged.any_dead else min(ragged.longest, window)
        items = places.new_empty(plan_items(rows, longest, at_a_time, turns, fewest), FIELDS.value)
        lengths = (ragged.starts, ragged.firsts, ragged.lengths, ragged.dead)
        plan_kernel[(1,)](
            places,
            *lengths,
            items,
            rows,
            len(items),
            at_a_time,
            turns,
            fewest,
            window,
            **specialise_plan(rows, ragged.any_dead, step),
        )
        ragged.plans[how] = items
    return ragged.plans[how]
