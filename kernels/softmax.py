"""The online softmax over keys and values that lie in blocks (FlashAttention), N of them at a time.

Legend as in `kernels.attention`: M queries, N keys, D and DV head sizes, D_PAD and DV_PAD padded to powers of two.
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import triton
import triton.language as tl


# fmt: off
@triton.jit
def walk(
    state, q, query, begin, stop, low, high, memory, logit_scale, cap, window,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, PAGED: tl.constexpr, DEAD: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, RUNS: tl.constexpr,
):
    """Take keys [begin, stop) into the softmax. Not MASKED: each query sees them all, and N divides their number.

    The order of the N keys is free. Threads load RUNS of them at a time, so key i of the tile is number i / RUNS of run
    i % RUNS: what one thread loads are neighbours, in one block, which is looked up once.
    """
    largest, total, values = state
    table, k_ptr, stride_k_block, stride_k_offset, v_ptr, stride_v_block, stride_v_offset = memory
    d, dv = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    if window is None:  # N divides it; now the compiler knows
        begin = begin // N * N
    EACH: tl.constexpr = N // RUNS
    runs = tl.arange(0, RUNS) * EACH
    keys = tl.arange(0, N) % RUNS * EACH + tl.arange(0, N) // RUNS
    blocks = _look_up(_wrap(begin + runs, low, high, DEAD), high, table, BLOCK, PAGED, DEAD)  # [RUNS]
    place = _wrap(begin + keys, low, high, DEAD)  # [N]
    for at in tl.range(begin, stop, N):
        key = at + keys
        block_id = tl.reshape(tl.broadcast_to(blocks[None, :], [EACH, RUNS]), [N]).to(tl.int64)
        offset = ((place if DEAD else key.to(tl.uint32)) % BLOCK).to(tl.int32)
        # One step ahead: did the loads below depend on this one, only half as many would be in flight.
        blocks = _look_up(_wrap(at + N + runs, low, high, DEAD), high, table, BLOCK, PAGED, DEAD)
        place = _wrap(key + N, low, high, DEAD)  # a division, which is done once and kept
        k_offsets = (block_id * stride_k_block + offset * stride_k_offset)[:, None] + d[None, :]
        v_offsets = (block_id * stride_v_block + offset * stride_v_offset)[:, None] + dv[None, :]
        k = _load(k_ptr + k_offsets, key < stop, d, MASKED, D, D_PAD)  # [N, D_PAD]
        logits = _dot(q, tl.trans(k), UPCAST, PRECISION)  # [M, N]
        scale = logit_scale  # to base 2; multiplied where it is used, there it costs nothing
        if cap is not None:  # cap * tanh(x); logit_scale makes the logits 2 * x * log2(e)
            logits = cap * (1 - 2 / (1 + tl.exp2(logits * scale)))
            scale = 1.0
        if MASKED:
            seen = (key < high)[None, :] & (key[None, :] <= query[:, None])
            if window is not None:
                seen &= query[:, None] - key[None, :] < window
            logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - larger[:, None])
        shrink = tl.exp2(largest - larger)
        # A masked load gives 0, not what lies there: 0 times a NaN would be NaN.
        v = _load(v_ptr + v_offsets, key < stop, dv, MASKED, DV, DV_PAD)  # [N, DV_PAD]
        values = values * shrink[:, None] + _dot(weights.to(v.dtype), v, UPCAST, PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        largest = larger
    return largest, total, values
# fmt: on


@triton.jit
def _wrap(key, low, high, DEAD: tl.constexpr):
    """Where positions key [N] lie: dead ones wrap around inside the live ones, which takes a division.

    Unsigned: divided by a power of two in one instruction.
    """
    return (low + (key - low) % tl.maximum(high - low, 1) if DEAD else key).to(tl.uint32)


@triton.jit
def _look_up(place, high, table, BLOCK: tl.constexpr, PAGED: tl.constexpr, DEAD: tl.constexpr):
    """In which blocks `place` lies, past the last key in the last one's. All that tells paged from contiguous."""
    number = place // BLOCK
    if PAGED:
        last = (tl.maximum(high, 1) - 1).to(tl.uint32) // BLOCK  # of a row of length 0, which fills up a batch: 0
        return tl.load(table + (number if DEAD else tl.minimum(number, last)))
    else:
        return tl.load(table) + number.to(tl.int32)


@triton.jit
def _load(pointers, stored, column, MASKED: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=stored[:, None] & (column < SIZE)[None, :], other=0.0)
    elif SIZE < PADDED:
        return tl.load(pointers, mask=(column < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b, summed in float32. UPCAST for Triton's interpreter, which multiplies bfloat16's raw bits as integers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
