"""What a decoder layer computes between its matrix products, in Triton: norms, rotary embedding, SwiGLU's product.

All of it is limited by memory, some ten operations per number, so each kernel reads and writes every number once and
does in that pass what would be five to ten passes in torch. Of numbers of b bytes, read and written:

    norm                 2 * T * hidden * b; 4 * T * hidden * b with a residual
    rotate_and_store     2 * T * (H + 2 * Hk) * D * b, and 4 * T * D of the table of rotations
    silu_and_mul         3 * T * I * b

Time = bytes / memory bandwidth, or that of a launch: 256 tokens of 1024 numbers in bfloat16 take 1 MiB, 0.3 us.
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chain import chain, let_next_start, wait_for_last
from kernels.checks import check_norm, check_rotate, check_silu

MAX_HIDDEN = 16384  # numbers of a row that one program keeps in registers
TILE = 1024  # numbers one program loads at a time from each place: 16 bytes per thread of 4 warps in bfloat16


# fmt: off
@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,  # [T, HIDDEN], [HIDDEN], [HIDDEN] or None, [T, HIDDEN] or None
    eps, stride_x,
    HIDDEN: tl.constexpr, PADDED: tl.constexpr,
):
    """One program normalises one row: by its root mean square, or where there is a bias by mean and variance."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    inside = at < HIDDEN
    x = tl.load(x_ptr + row * stride_x + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    if residual_ptr is not None:
        residual_ptr += row * HIDDEN
        x = (wide + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + at, x, mask=inside)
        wide = x.to(tl.float32)  # what is normalised is the rounded sum
    if bias_ptr is None:
        out = _scaled(wide, tl.rsqrt(tl.sum(wide * wide) / HIDDEN + eps), weight, x.dtype)
    else:
        wide = tl.where(inside, wide - tl.sum(wide) / HIDDEN, 0.0)
        out = wide * tl.rsqrt(tl.sum(wide * wide) / HIDDEN + eps) * weight
        out += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + at, out.to(x.dtype), mask=inside)


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, rotation_ptr,  # [T, (H + 2 Hk) * D], [D] or None twice, [positions, D] or None
    positions_ptr, slots_ptr, q_ptr, k_cache_ptr, v_cache_ptr,  # [T], [T], [T, H, D], [blocks, block, Hk, D] twice
    eps, stride_qkv, stride_k_block, stride_k_offset, stride_k_head, stride_v_block, stride_v_offset, stride_v_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HALF_PAD: tl.constexpr, CHAINED: tl.constexpr,
):
    """One program takes ROWS heads of one token, be they queries, keys or values, as two halves [ROWS, HALF_PAD]."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    d = tl.arange(0, HALF_PAD)
    live = (head < HEADS + 2 * KV_HEADS) & (d < HALF)[None, :]
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    qkv_ptr += token * stride_qkv + head * D + d[None, :]
    let_next_start(CHAINED)
    wait_for_last(CHAINED)
    low = tl.load(qkv_ptr, mask=live, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + HALF, mask=live, other=0.0).to(tl.float32)
    dtype = q_ptr.dtype.element_ty
    if q_norm_ptr is not None:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)[:, None]
        low = tl.where(is_value, low, _normed(low, scale, q_norm_ptr + d, k_norm_ptr + d, is_query, d < HALF, dtype))
        q_norm_ptr += HALF
        k_norm_ptr += HALF
        high = tl.where(is_value, high, _normed(high, scale, q_norm_ptr + d, k_norm_ptr + d, is_query, d < HALF, dtype))
    if rotation_ptr is not None:
        rotation_ptr += tl.load(positions_ptr + token) * D
        cos = tl.load(rotation_ptr + d, mask=d < HALF, other=0.0)[None, :]
        sin = tl.load(rotation_ptr + HALF + d, mask=d < HALF, other=0.0)[None, :]
        turned = low * cos - high * sin
        high = tl.where(is_value, high, high * cos + low * sin)
        low = tl.where(is_value, low, turned)
    low, high = low.to(dtype), high.to(dtype)
    slot = tl.load(slots_ptr + token)
    kept = live & (slot >= 0)  # slot -1: nowhere
    q_ptr += token * HEADS * D + head * D + d[None, :]
    k_cache_ptr += slot // BLOCK * stride_k_block + slot % BLOCK * stride_k_offset
    k_cache_ptr += (head - HEADS) * stride_k_head + d[None, :]
    v_cache_ptr += slot // BLOCK * stride_v_block + slot % BLOCK * stride_v_offset
    v_cache_ptr += (head - HEADS - KV_HEADS) * stride_v_head + d[None, :]
    _store_halves(q_ptr, low, high, live & is_query, HALF)
    _store_halves(k_cache_ptr, low, high, kept & ~is_query & ~is_value, HALF)
    _store_halves(v_cache_ptr, low, high, kept & is_value, HALF)


@triton.jit
def silu_and_mul_kernel(gate_up_ptr, out_ptr, stride_gate_up, SIZE: tl.constexpr, TILE: tl.constexpr):
    """One program takes TILE numbers of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate_up_ptr += row * stride_gate_up + at
    gate = tl.load(gate_up_ptr, mask=at < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + SIZE, mask=at < SIZE, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * SIZE + at, out.to(out_ptr.dtype.element_ty), mask=at < SIZE)
# fmt: on


@triton.jit
def _scaled(x, scale, weight, dtype: tl.constexpr):
    """Llama's RMSNorm: rounded once before the weight, and by the caller once after it."""
    return (x * scale).to(dtype).to(tl.float32) * weight


@triton.jit
def _normed(x, scale, q_weights, k_weights, is_query, inside, dtype: tl.constexpr):
    """Half a head x [ROWS, HALF_PAD] normalised, by the weights of queries or of keys, and rounded."""
    q_weight = tl.load(q_weights, mask=inside, other=0.0).to(tl.float32)[None, :]
    k_weight = tl.load(k_weights, mask=inside, other=0.0).to(tl.float32)[None, :]
    return _scaled(x, scale, tl.where(is_query, q_weight, k_weight), dtype).to(dtype).to(tl.float32)


@triton.jit
def _store_halves(target, low, high, mask, HALF: tl.constexpr):
    tl.store(target, low, mask=mask)
    tl.store(target + HALF, high, mask=mask)


# Compile-time constants and warps, by shape; decided once. `kernels.compile_ahead` compiles these.
@functools.cache
def specialise_norm(hidden: int) -> dict[str, int]:
    padded = triton.next_power_of_2(hidden)
    return {"HIDDEN": hidden, "PADDED": padded, "num_warps": min(16, max(1, padded // 256))}


@functools.cache
def specialise_rotate(heads: int, kv_heads: int, head_dim: int, block: int) -> dict[str, int]:
    half = triton.next_power_of_2(head_dim // 2)
    rows = min(triton.next_power_of_2(heads + 2 * kv_heads), max(1, TILE // half))
    return {"HEADS": heads, "KV_HEADS": kv_heads, "D": head_dim, "BLOCK": block, "ROWS": rows, "HALF_PAD": half}


@functools.cache
def specialise_silu(size: int) -> dict[str, int]:
    return {"SIZE": size, "TILE": min(TILE, triton.next_power_of_2(size))}


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """As `kernels.reference.norm`, for rows of up to 16384."""
    check_norm(x, weight, bias, residual)
    tokens, hidden = x.shape
    if hidden > MAX_HIDDEN:
        raise ValueError(f"hidden = {hidden}: a program holds up to {MAX_HIDDEN}; run this model on kernels.reference")
    out = x.new_empty(tokens, hidden)
    if tokens:
        with torch.cuda.device_of(x):
            norm_kernel[(tokens,)](x, weight, bias, residual, out, eps, x.stride(0), **specialise_norm(hidden))
    return out


def rotate_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotation: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """As `kernels.reference.rotate_and_store`, in one launch."""
    heads = check_rotate(qkv, q_norm, k_norm, rotation, positions, slots, k_cache, v_cache)
    _, block, kv_heads, head_dim = k_cache.shape
    tokens = len(qkv)
    q = qkv.new_empty(tokens, heads, head_dim)
    if tokens:
        constants = specialise_rotate(heads, kv_heads, head_dim, block)
        grid = (tokens, triton.cdiv(heads + 2 * kv_heads, constants["ROWS"]))
        tensors = (qkv, q_norm, k_norm, rotation, positions, slots, q, k_cache, v_cache)
        strides = (qkv.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3])
        with torch.cuda.device_of(qkv):
            rotate_and_store_kernel[grid](*tensors, eps, *strides, **constants, **chain(qkv.device))
    return q


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As `kernels.reference.silu_and_mul`."""
    check_silu(gate_up)
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, size)
    if tokens:
        constants = specialise_silu(size)
        with torch.cuda.device_of(gate_up):
            grid = (tokens, triton.cdiv(size, constants["TILE"]))
            silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), **constants)
    return out
