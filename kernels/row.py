"""The matrix product of a single row with what comes before and after it, in Triton: a decode that is alone.

With one row there is nothing to multiply twice. Every weight is read once, for two operations, so that

    time = bytes of the weight / memory bandwidth        1024 x 3072 in bfloat16: 6 MiB, 2 us on an H100

and what comes before and after it takes no time of its own, as long as it needs no launch of its own, which costs as
much as reading 6 MiB. So a layer is six launches in place of nine:

    residual -- norm, qkv -- rotate, store -- attention -- out, sum -- norm, gate, up, SwiGLU -- down, sum -- residual

The root mean square is one number, which may as well divide the sum as each term of it. So every program computes it
again, of the row that it has to read anyway. And weights depend on nothing, so that they are under way while the kernel
before still runs (`kernels.chain`).
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.chain import chain, let_next_start, wait_for_last
from kernels.checks import check_row

MAX_HIDDEN = 32768  # numbers of a weight's row, which a program holds in registers


# fmt: off
@triton.jit(do_not_specialize=["size"])
def row_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, residual_ptr, out_ptr,  # [K], [N, K], [N], [K], [N], [N]; GATED: 2 N weights
    eps, size,  # size: N
    K: tl.constexpr, K_PAD: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):
    """One program computes ROWS of the N numbers. Weights are under way before x is there."""
    let_next_start(CHAINED)
    n, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K_PAD)
    inside = n < size
    read = inside[:, None] & (k < K)[None, :]
    weight_ptr += n.to(tl.int64)[:, None] * K + k[None, :]
    weight = tl.load(weight_ptr, mask=read, other=0.0)  # [ROWS, K_PAD]
    if GATED:
        second = tl.load(weight_ptr + size.to(tl.int64) * K, mask=read, other=0.0)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            second_bias = tl.load(bias_ptr + size + n, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(CHAINED)
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + n, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        x *= norm.to(tl.float32)
    out = tl.sum(weight.to(tl.float32) * x[None, :], 1) * scale  # [ROWS]
    if bias_ptr is not None:
        out += bias
    if GATED:
        up = tl.sum(second.to(tl.float32) * x[None, :], 1) * scale
        if bias_ptr is not None:
            up += second_bias
        out *= tl.sigmoid(out) * up
    if residual_ptr is not None:
        out += residual
    tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=inside)
# fmt: on


@functools.cache
def specialise_row(hidden: int, gated: bool) -> dict[str, int]:
    """Compile-time constants and warps, by shape; `kernels.compile_ahead` compiles these."""
    padded = triton.next_power_of_2(hidden)
    rows = max(1 + gated, min(8, 16384 // padded))  # of weights, of which a gated product has two for a number
    warps = max(4, min(16, padded // 2048))
    return {"K": hidden, "K_PAD": padded, "GATED": gated, "ROWS": rows // (1 + gated), "num_warps": warps}


def row_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As `kernels.reference.row_product`, in one launch."""
    check_row(x, weight, bias, norm, gated, residual)
    hidden, size = weight.shape[1], weight.shape[0] // (1 + gated)
    out = x.new_empty(1, size) if residual is None else residual
    if hidden > MAX_HIDDEN:
        raise ValueError(f"hidden = {hidden}: a program holds up to {MAX_HIDDEN}; run this model on kernels.reference")
    constants = specialise_row(hidden, gated)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(size, constants["ROWS"]),)
        row_kernel[grid](x, weight, bias, norm, residual, out, eps, size, **constants, **chain(x.device))
    return out
