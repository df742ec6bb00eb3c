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

Where decodes are too few to fill the GPU, or one too long, the keys of each are split over several programs. Each
leaves the softmax of its share and the log of its sum; `combine_kernel` weighs the shares (FlashDecoding).

Cost of a row with context L in a model of H query heads and Hk KV heads, K and V in numbers of b bytes:

    decode    Hk * L * (D + DV) * b bytes are read for 2 * H * L * (D + DV) operations, 2 * H / (Hk * b) per byte. That
              is 1 to 8 where a GPU could do hundreds: time = bytes / memory bandwidth.
    split     8 * H * (DV + 1) bytes more per share, written and read: as many as 4 * H / (Hk * b) keys have. A share
              has at least 128 keys, so under 7 % in groups of 4; 8 rows of 8192 keys in 8 shares each: 0.8 %.
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

from kernels.checks import check_attention
from kernels.ragged import Ragged
from kernels.softmax import walk
from kernels.tuning import MAX_HEAD_DIM, Machine, Tuning, best, machine, plan_splits

LOG2_E = math.log2(math.e)


# fmt: off
@triton.jit(do_not_specialize=["stride_table", "share"])  # these change from step to step
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sinks_ptr,  # [T, H, D], [blocks, block, Hk, D], [.., DV], [T, H, DV], [H] or None
    parts_ptr, share,  # [tiles, H, splits, DV + 4] or None; least keys of a split
    starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, tables_ptr, places_ptr,  # see Ragged
    logit_scale, cap, window,  # cap and window may be None
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_table,
    stride_k_block, stride_k_offset, stride_k_head, stride_v_block, stride_v_offset, stride_v_head,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr, DEAD: tl.constexpr, PIECES: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    # -- which queries: a piece of one tile of the batch, and heads of one group; which keys --
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    # Neighbours read the same place: heads of a row, tiles of a head. All splits of a long row precede the next row.
    part, tile = tl.program_id(1 if TOKENS > 1 else 0), tl.program_id(0 if TOKENS > 1 else 2)
    split, splits = tl.program_id(2 if TOKENS > 1 else 1), tl.num_programs(2 if TOKENS > 1 else 1)
    place, kv_head = tile // PIECES, part // HEAD_TILES
    row, start, left, first = _queries(places_ptr + 2 * place, starts_ptr, firsts_ptr, tile % PIECES, PIECES, TOKENS)
    low, high, end = _span(first, min(left, TOKENS), lengths_ptr + row, dead_ptr + row, window, DEAD)
    at, stop = low, end
    if parts_ptr is not None:
        share = _share(end - low, share, splits, N)
        at, stop = low + split * share, min(end, low + split * share + share)
    if (left <= 0) | ((at >= end) & (split > 0)):  # no queries in this piece, no keys for this split
        return
    m = tl.arange(0, TOKENS * HEADS)  # rows of the tile are pairs (token, head); [M] heads within the group
    head = part % HEAD_TILES * HEADS + m % HEADS
    live = (m // HEADS < left) & (head < GROUP)
    head += kv_head * GROUP
    token = (start + m // HEADS).to(tl.int64)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q_offsets = (token * stride_q_token + head * stride_q_head)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [M, D_PAD]
    # -- online softmax: the largest logit so far, the sum, the weighted values --
    largest = tl.full([TOKENS * HEADS], -1e30, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    if sinks_ptr is not None:  # a logit seen first, in one of the splits, with no value
        sinks = tl.load(sinks_ptr + head, mask=live & (split == 0), other=-1e30).to(tl.float32)
        largest = tl.maximum(largest, sinks * 1.4426950408889634)  # log2(e)
        total += tl.where(split == 0, 1.0, 0.0)
    state = largest, total, tl.zeros([TOKENS * HEADS, DV_PAD], tl.float32)
    memory = (tables_ptr + row * stride_table, k_ptr + kv_head.to(tl.int64) * stride_k_head, stride_k_block,
              stride_k_offset, v_ptr + kv_head.to(tl.int64) * stride_v_head, stride_v_block, stride_v_offset)
    edges = _edges(at, stop, first, min(left, TOKENS), high, window, TOKENS, N)
    for stretch in tl.static_range(3):
        if (TOKENS > 1 and (stretch > 0 or window is not None)) or stretch == 2:
            state = walk(state, q, first + m // HEADS, edges[stretch], edges[stretch + 1], low, high, memory,
                logit_scale, cap, window, stretch != 1, BLOCK, PAGED, DEAD, D, D_PAD, DV, DV_PAD, N, UPCAST, PRECISION)
    largest, total, values = state
    total = tl.where(total == 0.0, 1.0, total)  # no key seen: 0
    values = values / total[:, None]
    stored = live[:, None] & (dv < DV)[None, :]
    if parts_ptr is None:
        out_offsets = (token * stride_out_token + head * stride_out_head)[:, None] + dv[None, :]
        tl.store(out_ptr + out_offsets, values.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        head += place.to(tl.int64) * (tl.num_programs(0) // HEAD_TILES * GROUP)  # decodes only: axis 0 is heads
        parts_ptr += (head * splits + split) * (DV + 4)  # [M]
        tl.store(parts_ptr[:, None] + dv[None, :], values, mask=stored)
        tl.store(parts_ptr + DV, largest + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["share"])
def combine_kernel(
    parts_ptr, out_ptr, share, starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, places_ptr, window,  # see above
    stride_out_token, stride_out_head,
    DEAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
):
    """One head of one decode: the average of its shares, weighed by their sums. Empty shares were never written."""
    head, place = tl.program_id(0), tl.program_id(1)
    row, start, left, first = _queries(places_ptr + 2 * place, starts_ptr, firsts_ptr, 0, 1, 1)
    low, _, end = _span(first, min(left, 1), lengths_ptr + row, dead_ptr + row, window, DEAD)
    share = _share(end - low, share, SPLITS, N)
    split, dv = tl.arange(0, SPLITS_PAD), tl.arange(0, DV_PAD)
    written = split < tl.cdiv(end - low, share)
    parts_ptr += ((place.to(tl.int64) * tl.num_programs(0) + head) * SPLITS + split) * (DV + 4)  # [SPLITS_PAD]
    log_sums = tl.load(parts_ptr + DV, mask=written, other=float("-inf"))
    values = tl.load(parts_ptr[:, None] + dv[None, :], mask=written[:, None] & (dv < DV)[None, :], other=0.0)
    weights = tl.exp2(log_sums - tl.maximum(tl.max(log_sums, 0), -1e30))
    total = tl.sum(weights, 0)
    values = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # [DV_PAD]
    out_ptr += start.to(tl.int64) * stride_out_token + head * stride_out_head
    tl.store(out_ptr + dv, values.to(out_ptr.dtype.element_ty), mask=dv < DV)
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
def _span(first, tokens, length_ptr, dead_ptr, window, DEAD: tl.constexpr):
    """Positions [low, high) hold the keys that queries [first, first + tokens) see; [high, end) are dead."""
    high = min(first + tokens, tl.load(length_ptr))
    low = high * 0
    if window is not None:  # what lies before every query's window is never read: it may belong to others by now
        low = max(0, min(first - window + 1, high - 1))
    end = high
    if DEAD:
        end += tl.load(dead_ptr)
    return low, high, end


@triton.jit
def _share(keys, least, splits, N: tl.constexpr):
    """Keys of each split, in whole steps: a row's splits run out of keys where it is short."""
    return tl.cdiv(max(least, tl.cdiv(keys, splits)), N) * N


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
    share: int  # see Tuning


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
    options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
    options |= {"maxnreg": tuning.registers} if tuning.registers else {}
    return Specialised(constants, options, triton.cdiv(group, tuning.heads), tuning.share)


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
            grid: tuple[int, ...] = (num_tiles * tile.constants["PIECES"], programs)
            parts, share = None, 0
            if tokens == 1:
                splits, share = _splits(ragged, window, num_tiles * programs, tile, on)
                grid = (programs, splits, num_tiles)
                if splits > 1:
                    parts = q.new_empty(num_tiles, num_heads, splits, head_dims[1] + 4, dtype=torch.float32)
            tensors = (q, k_cache, v_cache, out, sinks, parts, share, *rows, ragged.tables, places)
            attention_kernel[grid](*tensors, logit_scale, cap, window, *strides, **tile.constants, **tile.options)
            if parts is not None:
                _combine(parts, out, share, (*rows, places), window, tile.constants)
    return out


def _splits(ragged: Ragged, window: int | None, programs: int, tile: Specialised, on: Machine) -> tuple[int, int]:
    if ragged.splits is not None:
        return ragged.splits, tile.constants["N"]
    longest = ragged.longest if window is None or ragged.any_dead else min(ragged.longest, window)
    return plan_splits(programs, longest, tile.share, on)


def _combine(
    parts: Tensor, out: Tensor, share: int, rows: tuple[Tensor, ...], window: int | None, tile: dict[str, Any]
) -> None:
    places, num_heads, splits, _ = parts.shape
    constants = combining(splits, tile)
    combine_kernel[num_heads, places](parts, out, share, *rows, window, *out.stride()[:2], **constants)


def combining(splits: int, tile: dict[str, Any]) -> dict[str, Any]:
    """Compile-time constants of `combine_kernel`."""
    constants = {name: tile[name] for name in ("DEAD", "DV", "DV_PAD", "N")}
    return constants | {"SPLITS": splits, "SPLITS_PAD": 1 << (splits - 1).bit_length()}
