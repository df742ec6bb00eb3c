"""Ragged causal attention over a KV cache in blocks, in Triton: prompts, chunks, decodes and any mixture of them.

One program takes one tile of queries and one KV head. It walks over the keys that some query of the tile sees and keeps
an online softmax in float32 (FlashAttention). The query heads that share a KV head (grouped-query attention) lie in the
same tile, so their keys and values are read once: the rows of the tile are (query token, head of the group) pairs,

    decode, 1 token x 16 heads             prompt, 64 tokens x 2 heads
    +-------------+                        +-------------+
    | token head 0|                        | t0   head 0 |
    | token head 1|                        | t0   head 1 |
    |  (group 4)  |                        | t1   head 0 |
    |   padding   | 16 rows: least of      |     ...     | 128 rows
    +-------------+ a matrix instruction   +-------------+

Cost of a row with context L in a model of H query heads and Hk KV heads, K and V in numbers of b bytes:

    decode    Hk * L * (D + DV) * b bytes are read for 2 * H * L * (D + DV) operations, 2 * H / (Hk * b) per byte. That
              is 1 to 8 where a GPU could do hundreds: time = bytes / memory bandwidth.
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

MAX_HEAD_DIM = 256
AMPLE_SHARED_BYTES = 163 * 1024  # the A100's
LOG2_E = math.log2(math.e)


# fmt: off
@triton.jit(do_not_specialize=["stride_table"])  # the width of the tables changes from step to step
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sinks_ptr,  # [T, H, D], [blocks, block, Hk, D], [.., DV], [T, H, DV], [H] or None
    starts_ptr, firsts_ptr, lengths_ptr, dead_ptr, tables_ptr, places_ptr,  # see Ragged
    logit_scale, cap, window,  # cap and window may be None
    stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_table,
    stride_k_block, stride_k_offset, stride_k_head, stride_v_block, stride_v_offset, stride_v_head,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr, DEAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):
    # -- which queries: tile `tl.program_id(1)` of the batch, its rows being pairs (token, head) --
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tl.program_id(0) // HEAD_TILES
    row = tl.load(places_ptr + 2 * tl.program_id(1)).to(tl.int64)
    before = tl.load(places_ptr + 2 * tl.program_id(1) + 1)  # tokens of the row before the tile
    start = tl.load(starts_ptr + row)
    left = tl.load(starts_ptr + row + 1) - start - before  # tokens of the row from here on
    first = tl.load(firsts_ptr + row) + before  # position of the tile's first token
    m = tl.arange(0, TOKENS * HEADS)
    head = tl.program_id(0) % HEAD_TILES * HEADS + m % HEADS  # [M] within the group
    live = (m // HEADS < left) & (head < GROUP)
    head += kv_head * GROUP
    token = (start + before + m // HEADS).to(tl.int64)
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    q_offsets = (token * stride_q_token + head * stride_q_head)[:, None] + d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [M, D_PAD]

    # -- which keys --
    low, high, end = _span(first, min(left, TOKENS), lengths_ptr + row, dead_ptr + row, window, DEAD)
    table = tables_ptr + row * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head

    # -- online softmax: the largest logit so far, the sum, the weighted values --
    largest = tl.full([TOKENS * HEADS], -1e30, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    if sinks_ptr is not None:  # a logit seen first, with no value
        largest = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        total += 1.0
    values = tl.zeros([TOKENS * HEADS, DV_PAD], tl.float32)
    for at in tl.range(low, end, N):
        key = at + tl.arange(0, N)
        stored = key < end
        block_id, offset = _address(key, low, high, table, stored, BLOCK, PAGED, DEAD)
        k_offsets = (block_id * stride_k_block + offset * stride_k_offset)[:, None] + d[None, :]
        v_offsets = (block_id * stride_v_block + offset * stride_v_offset)[:, None] + dv[None, :]
        k = tl.load(k_ptr + k_offsets, mask=stored[:, None] & (d < D)[None, :], other=0.0)  # [N, D_PAD]
        logits = _score(q, k, first + m // HEADS, key, high, logit_scale, cap, window, UPCAST, PRECISION)  # [M, N]
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        # A masked load gives 0, not what lies there: 0 times a NaN would be NaN.
        v = tl.load(v_ptr + v_offsets, mask=stored[:, None] & (dv < DV)[None, :], other=0.0)  # [N, DV_PAD]
        values = values * shrink[:, None] + _dot(weights.to(v.dtype), v, UPCAST, PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = larger
    values = values / tl.where(total == 0.0, 1.0, total)[:, None]  # no key seen: 0
    out_offsets = (token * stride_out_token + head * stride_out_head)[:, None] + dv[None, :]
    tl.store(out_ptr + out_offsets, values.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])
# fmt: on


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
def _address(key, low, high, table, stored, BLOCK: tl.constexpr, PAGED: tl.constexpr, DEAD: tl.constexpr):
    """Block id and offset of the positions key [N]. Here lies all that tells paged from contiguous memory."""
    if DEAD:  # dead positions wrap around inside the live ones
        key = low + (key - low) % (high - low)
    if PAGED:  # noqa: SIM108 (the two cases are the point)
        block_id = tl.load(table + key // BLOCK, mask=stored, other=0)
    else:
        block_id = tl.load(table) + key // BLOCK
    return block_id.to(tl.int64), key % BLOCK


@triton.jit
def _score(q, k, query, key, high, logit_scale, cap, window, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """Logits [M, N] in base 2; -inf where the query at position query [M] does not see the key at key [N]."""
    logits = _dot(q, tl.trans(k), UPCAST, PRECISION) * logit_scale
    if cap is not None:  # cap * tanh(x); logit_scale made the logits 2 * x * log2(e)
        logits = cap * (1 - 2 / (1 + tl.exp2(logits)))
    seen = (key < high)[None, :] & (key[None, :] <= query[:, None])
    if window is not None:
        seen &= query[:, None] - key[None, :] < window
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, summed in float32. UPCAST for Triton's interpreter, which multiplies bfloat16's raw bits as integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


class Machine(NamedTuple):
    """What a configuration depends on besides the shape."""

    amd: bool
    shared_bytes: int  # on-chip memory that one program may use


@functools.cache
def machine(device: torch.device) -> Machine:
    """The GPU at hand. AMD's, and the interpreter, are not asked for what decides nothing there: 0 bytes."""
    amd = torch.version.hip is not None
    if amd or device.type != "cuda":
        return Machine(amd, 0)
    return Machine(amd, torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


class Specialised(NamedTuple):
    constants: dict[str, Any]  # the kernel's compile-time constants
    options: dict[str, int]  # Triton's


def specialise(
    tokens: int,
    group: int,
    head_dims: tuple[int, int],
    block: int,
    paged: bool,
    dead: bool,
    dtype: torch.dtype,
    on: Machine,
) -> Specialised:
    """How tiles of `tokens` query tokens are computed: by shape, and never by paged or contiguous.

    head_dim  bytes   decode (1 token)              chunk, prompt (16, 64 tokens)
    up to 64      2   16 rows, 64 keys, 4 warps     64, 128 rows, 64 keys, 4, 8 warps
         128      2   16 rows, 64 keys, 4 warps     64, 128 rows, 64 keys, 4, 8 warps
         256      2   16 rows, 32 keys, 4 warps     64,  64 rows, 32 keys, 8 warps

    float32 has half as many keys from 128 on, and 64 rows shared by 8 warps from 65 on. Loads run one step less ahead
    on GPUs with less shared memory than an A100 (sm_86, sm_89, sm_120); there prompts in float32 fit up to head_dim 64.
    """
    padded = [max(16, triton.next_power_of_2(size)) for size in head_dims]
    row_bytes = max(padded) * dtype.itemsize
    wide = row_bytes > 256  # a row of the result takes so many registers that 8 warps must share 64 rows
    heads = triton.next_power_of_2(group)
    heads = min(max(heads, 16), 128) if tokens == 1 else min(heads, (64 if wide else 128) // tokens, 4)
    interpreted = not isinstance(attention_kernel, triton.JITFunction)
    constants = {
        "GROUP": group,
        "BLOCK": block,
        "PAGED": paged,
        "DEAD": dead,
        "D": head_dims[0],
        "D_PAD": padded[0],
        "DV": head_dims[1],
        "DV_PAD": padded[1],
        "TOKENS": tokens,
        "HEADS": heads,
        "N": min(64, max(16, 16384 // row_bytes)),  # 16 KiB of K per step, and as much of V
        "UPCAST": interpreted and dtype == torch.bfloat16,
        # Exact float32 products: AMD has an instruction; on NVIDIA three products in tf32 come close to one.
        "PRECISION": "ieee" if on.amd else "tf32x3",
    }
    warps = 8 if tokens * heads > (32 if wide else 64) else 4
    small = on.shared_bytes < AMPLE_SHARED_BYTES
    stages = 2 if on.amd else (4 if tokens == 1 else 3) - small  # how far ahead the loop loads
    return Specialised(constants, {"num_warps": warps, "num_stages": stages})


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
) -> Tensor:
    """As `kernels.reference.attention`, for head dims up to 256."""
    check_attention(q, k_cache, v_cache, ragged, window, softcap, sinks)
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
    batch = (ragged.starts, ragged.firsts, ragged.lengths, ragged.dead, ragged.tables)
    strides = (*q.stride()[:2], *out.stride()[:2], batch[-1].stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3])
    with torch.cuda.device_of(q):
        for tokens, places in ragged.tiles:
            tile = specialise(tokens, group, head_dims, ragged.block, ragged.paged, ragged.any_dead, q.dtype, on)
            grid = (num_kv_heads * triton.cdiv(group, tile.constants["HEADS"]), len(places))
            tensors = (q, k_cache, v_cache, out, sinks, *batch, places)
            attention_kernel[grid](*tensors, logit_scale, cap, window, *strides, **tile.constants, **tile.options)
    return out
