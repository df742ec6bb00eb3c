"""Writing to the KV cache, in Triton: new keys and values into their slots, and whole blocks from place to place.

Both only move bytes: store reads and writes T * Hk * (D + Dv) * b bytes for T tokens of b bytes a number; copy_blocks
reads and writes layers * n * block * Hk * D * b bytes for n blocks. Time = 2 * bytes / memory bandwidth.
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_copy, check_store
from kernels.upload import upload

TILE = 2048  # numbers one program moves at a time: 16 per thread of 4 warps, two loads of 16 bytes in bfloat16


# fmt: off
@triton.jit
def store_kernel(
    new_ptr, cache_ptr, slots_ptr,  # [T, Hk, D], [num_blocks, block, Hk, D], [T]
    stride_new_token, stride_new_head, stride_block, stride_offset, stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr,
):
    """One program moves ROWS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    mask = (head < HEADS)[:, None] & (d < D)[None, :] & (slot >= 0)  # slot -1: nowhere
    new = tl.load(new_ptr + token * stride_new_token + (head * stride_new_head)[:, None] + d[None, :], mask=mask)
    cache_ptr += slot // BLOCK * stride_block + slot % BLOCK * stride_offset
    tl.store(cache_ptr + (head * stride_head)[:, None] + d[None, :], new, mask=mask)


@triton.jit
def copy_blocks_kernel(
    cache_ptr, pairs_ptr,  # [layers, num_blocks, block, Hk, D], [n, 2]
    stride_layer, stride_block, stride_offset, stride_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr,
):
    """One program moves ROWS of the (offset, head) rows of one block in one layer."""
    source = tl.load(pairs_ptr + 2 * tl.program_id(0))
    target = tl.load(pairs_ptr + 2 * tl.program_id(0) + 1)
    cache_ptr += tl.program_id(1).to(tl.int64) * stride_layer
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    mask = (row < BLOCK * HEADS)[:, None] & (d < D)[None, :]
    inside = (row // HEADS * stride_offset + row % HEADS * stride_head)[:, None] + d[None, :]
    content = tl.load(cache_ptr + source * stride_block + inside, mask=mask)
    tl.store(cache_ptr + target * stride_block + inside, content, mask=mask)
# fmt: on


def specialise(heads: int, head_dim: int, block: int, rows: int) -> dict[str, int]:
    """Compile-time constants for moving `rows` rows of `head_dim` numbers. `kernels.compile_ahead` compiles these."""
    padded = triton.next_power_of_2(head_dim)
    tile = min(triton.next_power_of_2(rows), max(1, TILE // padded))
    return {"HEADS": heads, "D": head_dim, "BLOCK": block, "ROWS": tile, "D_PAD": padded}


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `kernels.reference.store`."""
    check_store(k, v, k_cache, v_cache, slots)
    if not len(slots):
        return
    with torch.cuda.device_of(k_cache):
        for new, cache in ((k, k_cache), (v, v_cache)):
            _, block, heads, head_dim = cache.shape
            constants = specialise(heads, head_dim, block, heads)
            grid = (len(slots), triton.cdiv(heads, constants["ROWS"]))
            store_kernel[grid](new, cache, slots, *new.stride()[:2], *cache.stride()[:3], **constants)


def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """As `kernels.reference.copy_blocks`, in one launch."""
    check_copy(cache, pairs)
    if not len(pairs):
        return
    layers, _, block, heads, head_dim = cache.shape
    constants = specialise(heads, head_dim, block, block * heads)
    grid = (len(pairs), layers, triton.cdiv(block * heads, constants["ROWS"]))
    pairs = pairs.contiguous() if pairs.is_cuda else upload(pairs.contiguous(), cache.device)
    with torch.cuda.device_of(cache):
        copy_blocks_kernel[grid](cache, pairs, *cache.stride()[:4], **constants)
