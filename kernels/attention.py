"""Ragged causal attention over a KV cache in blocks, in Triton: prompts, chunks, decodes and any mixture of them.

One program takes one tile of queries and one KV head. It walks over the keys that some query of the tile sees and keeps
an online softmax in float32 (FlashAttention). The query heads that share a KV head (grouped-query attention) lie in the
same tile, so their keys and values are read once: the rows of the tile are (query token, head of the group) pairs,

    decode, 1 token x 16 heads             prompt, 64 tokens x 2 heads
    +-------------+                        +-------------+
    | token head 0|                        | t0   head 0 |
    | token head 1|                        | t0   head 1 |
    |  (group 4)  |                        | t1   head 0 |
    |   padding   | 16 rows: least of      |     ...     | 128 rows: two warpgroups
    +-------------+ a matrix instruction   +-------------+

Where decodes are too few to fill the GPU, or one too long, several programs share the keys of one (`kernels.shares`).
Each leaves the softmax of its share and the log of its sum; the last of them weighs all (FlashDecoding).

Cost of a row with context L in a model of H query heads and Hk KV heads, K and V in numbers of b bytes:

    decode    Hk * L * (D + DV) * b bytes are read for 2 * H * L * (D + DV) operations, 2 * H / (Hk * b) per byte. That
              is 1 to 8 where a GPU could do hundreds: time = bytes / memory bandwidth.
    shared    8 * H * (DV + 1) bytes more per share, written and read: as many as 4 * H / (Hk * b) keys have. A share
              has at least 64 keys, so under 13 % in groups of 4; 8 rows of 8192 keys in 8 shares each: 0.8 %.
    prompt    H * L**2 * (D + DV) operations, half of the square being masked: time = operations / arithmetic rate.

The block table adds 4 bytes per position and KV head: 1.6 % at D = DV = 64 in bfloat16, 0.8 % at 128.

Legend: M rows of a tile, N keys per step, D and DV head sizes, D_PAD and DV_PAD those padded to powers of two.
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chain import chain, let_next_start, wait_for_last
from kernels.checks import check_attention
from kernels.ragged import Ragged
from kernels.shares import combine, item, last_of, plan, span
from kernels.softmax import walk
from kernels.tuning import FEWEST_KEYS, MAX_HEAD_DIM, Machine, Tuning, best, machine, resident

LOG2_E = math.log2(math.e)
WARP_BYTES = 32 * 16  # that its threads load in one instruction


# fmt: off
@triton.jit(do_not_specialize=["stride_table"])  # it changes from step to step
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sinks_ptr,  # [T, H, D], [blocks, block, Hk, D], [.., DV], [T, H, DV], [H] or None
    parts_ptr, arrived_ptr,  # decodes: [items, H, DV + 4], [items, programs of an item]; else None
    starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, tables_ptr,  # see Ragged; decodes: only tables
    places_ptr,  # [tiles, 2], see Ragged; decodes: [items, FIELDS], see kernels.shares
    logit_scale, cap, window,  # cap and window may be None
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_table,
    stride_k_block, stride_k_offset, stride_k_head, stride_v_block, stride_v_offset, stride_v_head,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr, DEAD: tl.constexpr, PIECES: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    RUNS: tl.constexpr, CHAINED: tl.constexpr,
):
    let_next_start(CHAINED)
    wait_for_last(CHAINED)  # that is, before the first layer's, the kernel that made `places_ptr`
    # -- which queries: a piece of one tile of the batch, and heads of one group; which keys --
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    # Neighbours read the same place: heads of a share, tiles of a head.
    part, place = tl.program_id(1 if TOKENS > 1 else 0), tl.program_id(0 if TOKENS > 1 else 1)
    row, start, left, first, low, high, at, stop, split, splits = _work(
        places_ptr, place, starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, window, DEAD, PIECES, TOKENS)
    if left <= 0:  # no queries in this piece of a tile, no share for this program
        return
    kv_head = part // HEAD_TILES
    m = tl.arange(0, TOKENS * HEADS)  # rows of the tile are pairs (token, head); [M] heads within the group
    head = part % HEAD_TILES * HEADS + m % HEADS
    live = (m // HEADS < left) & (head < GROUP)
    head += kv_head * GROUP
    token = (start + m // HEADS).to(tl.int64)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q_offsets = (token * stride_q_token + head * stride_q_head)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [M, D_PAD]
    # -- online softmax: the largest logit so far, the sum, the weighted values --
    state = _before_any_key(sinks_ptr, head, live, split, TOKENS * HEADS, DV_PAD)
    memory = (tables_ptr + row * stride_table, k_ptr + kv_head.to(tl.int64) * stride_k_head, stride_k_block,
              stride_k_offset, v_ptr + kv_head.to(tl.int64) * stride_v_head, stride_v_block, stride_v_offset)
    edges = _edges(at, stop, first, min(left, TOKENS), high, window, TOKENS, N)
    for stretch in tl.static_range(3):
        if (TOKENS > 1 and (stretch > 0 or window is not None)) or stretch == 2:
            state = walk(state, q, first + m // HEADS, edges[stretch], edges[stretch + 1], low, high, memory,
                logit_scale, cap, window, stretch != 1, BLOCK, PAGED, DEAD, D, D_PAD, DV, DV_PAD, N, UPCAST,
                PRECISION, RUNS)
    largest, total, values = state
    total = tl.where(total == 0.0, 1.0, total)  # no key seen: 0
    values = values / total[:, None]
    stored = live[:, None] & (dv < DV)[None, :]
    if TOKENS > 1 or splits == 1:
        out_offsets = (token * stride_out_token + head * stride_out_head)[:, None] + dv[None, :]
        tl.store(out_ptr + out_offsets, values.to(out_ptr.dtype.element_ty), mask=stored)
    elif TOKENS == 1:
        num_heads = tl.num_programs(0) // HEAD_TILES * GROUP
        own_ptr = parts_ptr + (place.to(tl.int64) * num_heads + head) * (DV + 4)  # [M]
        tl.store(own_ptr[:, None] + dv[None, :], values, mask=stored)
        tl.store(own_ptr + DV, largest + tl.log2(total), mask=live)
        row_place = (place - split).to(tl.int64)
        if last_of(arrived_ptr + row_place * tl.num_programs(0) + part, splits):  # of this row and these heads
            _finish(parts_ptr + row_place * num_heads * (DV + 4), num_heads * (DV + 4), splits, kv_head,
                part % HEAD_TILES, out_ptr + start.to(tl.int64) * stride_out_token, stride_out_head,
                GROUP, HEADS, DV, DV_PAD)


@triton.jit
def _before_any_key(sinks_ptr, head, live, split, M: tl.constexpr, DV_PAD: tl.constexpr):
    largest, total = tl.full([M], -1e30, tl.float32), tl.zeros([M], tl.float32)  # finite: -inf - -inf would be NaN
    if sinks_ptr is not None:  # a logit seen first, in one of the shares, with no value
        sinks = tl.load(sinks_ptr + head, mask=live & (split == 0), other=-1e30).to(tl.float32)
        largest = tl.maximum(largest, sinks * 1.4426950408889634)  # log2(e)
        total += tl.where(split == 0, 1.0, 0.0)
    return largest, total, tl.zeros([M, DV_PAD], tl.float32)


@triton.jit
def _finish(
    parts_ptr, stride_part, splits, kv_head, head_tile, out_ptr, stride_out_head,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):
    """The result of one query and a tile's heads, out of the shares of the row."""
    head, dv = head_tile * HEADS + tl.arange(0, min(HEADS, triton.next_power_of_2(GROUP))), tl.arange(0, DV_PAD)
    live, head = head < GROUP, head + kv_head * GROUP
    values = combine(parts_ptr + head * (DV + 4), splits, stride_part, live, DV, DV_PAD, head.shape[0])
    out_ptr += (head * stride_out_head)[:, None] + dv[None, :]
    tl.store(out_ptr, values.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])


@triton.jit
def _work(
    places_ptr, place, starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, window,
    DEAD: tl.constexpr, PIECES: tl.constexpr, TOKENS: tl.constexpr,
):
    """A program's row, its first token and how many are left; positions of that, of all keys, of the share's."""
    if TOKENS == 1:
        row, start, first, low, high, at, stop, split, splits = item(places_ptr, place)
        return row, start, (row >= 0).to(tl.int32), first, low, high, at, stop, split, splits
    else:
        place_ptr, piece = places_ptr + 2 * (place // PIECES), place % PIECES
        row, start, left, first = _queries(place_ptr, starts_ptr, firsts_ptr, piece, PIECES, TOKENS)
        low, high, end = span(first, tl.minimum(left, TOKENS), lengths_ptr + row, dead_ptr + row, window, DEAD)
        return row, start, left, first, low, high, low, end, 0, 1
# fmt: on


@triton.jit
def _queries(place_ptr, starts_ptr, firsts_ptr, piece, PIECES: tl.constexpr, TOKENS: tl.constexpr):
    """A tile's row, its first token among all, how many of the row are left from there, and the position of the first.

    Of the pieces of a tile the last comes first: it has the longest context.
    """
    row = tl.load(place_ptr).to(tl.int64)
    before = tl.load(place_ptr + 1) + (PIECES - 1 - piece) * TOKENS  # tokens of the row before the tile
    start = tl.load(starts_ptr + row) + before
    return row, start, tl.load(starts_ptr + row + 1) - start, tl.load(firsts_ptr + row) + before


@triton.jit
def _edges(at, stop, first, tokens, high, window, TOKENS: tl.constexpr, N: tl.constexpr):
    """Where masks are needed: they make 40 % more instructions.

    at            whole                         whole_end     stop
    | window: not | all see all, in steps of N  | diagonal,   |
    | yet seen by |                             | end, dead   |
    | the last    |                             | positions   |
    """
    whole = at
    if window is not None and TOKENS > 1:
        whole = min(stop, at + tl.cdiv(max(first + tokens - window - at, 0), N) * N)
    whole_end = whole
    if TOKENS > 1:  # a decode, short of bandwidth, has time for masks, and none to start a second loop
        whole_end += max(min(first + 1, high, stop) - whole, 0) // N * N
    return at, whole, whole_end, stop


class Specialised(NamedTuple):
    constants: dict[str, Any]  # the kernel's compile-time constants
    options: dict[str, int]  # Triton's
    head_tiles: int  # programs for the heads of one group
    resident: int  # programs that run at a time, on all processors
    turns: int  # see Tuning


@functools.cache
def specialise(
    tile: int,
    group: int,
    head_dims: tuple[int, int],
    block: int,
    paged: bool,
    dead: bool,
    windowed: bool,
    dtype: torch.dtype,
    on: Machine,
    tuning: Tuning | None = None,
) -> Specialised:
    """How tiles of `tile` query tokens are computed: by shape, see `kernels.tuning`; never by paged or contiguous."""
    padded = [max(16, triton.next_power_of_2(size)) for size in head_dims]
    tuning = tuning or best(tile, group, max(padded), dtype.itemsize, on)
    interpreted = not isinstance(attention_kernel, triton.JITFunction)
    constants = {
        "GROUP": group,
        "BLOCK": block,
        "PAGED": paged,
        "DEAD": dead,
        "PIECES": tile // tuning.tokens,
        "D": head_dims[0],
        "D_PAD": padded[0],
        "DV": head_dims[1],
        "DV_PAD": padded[1],
        "TOKENS": tuning.tokens,
        "HEADS": tuning.heads,
        "N": min(tuning.keys, 64) if windowed else tuning.keys,  # a window takes registers that 128 keys do not leave
        "UPCAST": interpreted and dtype == torch.bfloat16,
        # Exact float32 products: AMD has an instruction; on NVIDIA three products in tf32 come close to one.
        "PRECISION": "ieee" if on.amd else "tf32x3",
    }
    # Keys that all threads load at a time, or more, so that one block holds a run of those that a thread loads.
    at_once, keys = tuning.warps * WARP_BYTES // (padded[0] * dtype.itemsize), constants["N"]
    constants["RUNS"] = keys if dead or windowed else keys // math.gcd(block, keys // max(1, min(at_once, keys)))
    options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
    options |= {"maxnreg": tuning.registers} if tuning.registers else {}
    at_a_time = resident(tuning, padded, dtype.itemsize, on)
    return Specialised(constants, options, triton.cdiv(group, tuning.heads), at_a_time, tuning.turns)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """As `kernels.reference.attention`, for head dims up to 256. `tuning` in place of the best known, to measure it."""
    check_attention(q, k_cache, v_cache, ragged, scale, window, softcap, sinks)
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    head_dims = k_cache.shape[3], v_cache.shape[3]
    if max(head_dims) > MAX_HEAD_DIM:
        raise ValueError(
            f"head dims {head_dims}: a tile holds up to {MAX_HEAD_DIM}; run this model on kernels.reference"
        )
    group, on = num_heads // num_kv_heads, machine(q.device)
    out = q.new_empty(*q.shape[:2], head_dims[1])  # [T, H, DV]
    # The kernel computes in base 2; under a cap it needs 2 x log2(e) for x = logit / cap.
    logit_scale, cap = (scale * LOG2_E, None) if softcap is None else (2 * scale * LOG2_E / softcap, softcap * LOG2_E)
    rows = (ragged.starts, ragged.firsts, ragged.lengths, ragged.dead)
    strides = (
        *q.stride()[:2],
        *out.stride()[:2],
        ragged.tables.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
    )
    shape = group, head_dims, ragged.block, ragged.paged, ragged.any_dead, window is not None, q.dtype, on, tuning
    with torch.cuda.device_of(q):
        for tokens, places in ragged.tiles:
            tile = specialise(tokens, *shape)
            num_tiles, programs = places.shape[0], num_kv_heads * tile.head_tiles
            grid, parts, arrived = (num_tiles * tile.constants["PIECES"], programs), None, None
            if tokens == 1:
                at_a_time = max(1, tile.resident // programs)
                places = plan(ragged, places, at_a_time, tile.turns, FEWEST_KEYS, tile.constants["N"], window)
                grid = (programs, len(places))
                parts = q.new_empty(len(places), num_heads, head_dims[1] + 4, dtype=torch.float32)
                arrived = _nobody(len(places) * programs, q.device)
            tensors = (q, k_cache, v_cache, out, sinks, parts, arrived, *rows, ragged.tables, places)
            options = tile.constants | tile.options | chain(q.device)
            attention_kernel[grid](*tensors, logit_scale, cap, window, *strides, **options)
    return out


def _nobody(programs: int, device: torch.device) -> Tensor:
    """Zeros, to which every launch brings them back: how many programs have written their share."""
    return _zeros(max(4096, triton.next_power_of_2(programs)), device)


@functools.cache  # and so kept for as long as a captured step might use them
def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
