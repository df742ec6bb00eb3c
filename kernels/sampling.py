"""From logits to a token and its log-probability in one pass, in Triton: greedy, or as the winner of a race.

A program takes one tile of one row's logits and leaves four numbers: the largest logit, the sum of exponentials below
it, the best of the race and where that is. A second kernel combines the tiles of a row; nothing of the size of the
logits is ever written. Greedy rows take the time of reading S * V * b bytes. A drawn number costs some 90 instructions,
two thirds of them for its noise (products of 64 bits, a logarithm): of 3e13 a second, an H100's rate, five times as
long as reading it in bfloat16.

The race: token i arrives at E_i / p_i and the first wins, E_i being exponential and a hash of (key, i), as in
`kernels.reference.exponential`. The kernel looks for the largest exp((logit - largest) / temperature) / E in float32:
exponentials are at most 1, noise lies between 2**-54 and 38, so what underflows was too late by far.
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_sample

TILE = 2048  # logits of one program, 16 per thread of 4 warps: tried out on a GPU, 2 to 16 thousand and 4 to 16 warps


# fmt: off
@triton.jit
def sample_kernel(
    logits_ptr, temperature_ptr, keys_ptr, partial_ptr, index_ptr,  # [S, V], [S], [S], [S, splits, 3], [S, splits]
    stride_logits,
    SIZE: tl.constexpr, TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logits = tl.load(logits_ptr + row * stride_logits + at, mask=at < SIZE, other=float("-inf")).to(tl.float32)
    largest = tl.maximum(tl.max(logits, 0), -1e30)  # finite: -inf - -inf would be NaN
    below = (logits - largest) * 1.4426950408889634  # log2(e)
    temperature = tl.load(temperature_ptr + row)
    speed = tl.exp2(below * _inverse(temperature))
    if temperature > 0:
        speed = speed / _exponential(tl.load(keys_ptr + row), at)
    best, index = tl.max(speed, 0, return_indices=True)  # of equals the first
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + 3 * place, largest)
    tl.store(partial_ptr + 3 * place + 1, tl.sum(tl.exp2(below), 0))
    tl.store(partial_ptr + 3 * place + 2, best)
    tl.store(index_ptr + place, tl.program_id(1) * TILE + index)


@triton.jit
def choose_kernel(
    logits_ptr, temperature_ptr, partial_ptr, index_ptr, tokens_ptr, logprobs_ptr,  # as above, [S], [S]
    stride_logits,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED)
    partial_ptr += 3 * (row * SPLITS + split)
    largest = tl.load(partial_ptr, mask=split < SPLITS, other=float("-inf"))
    total = tl.load(partial_ptr + 1, mask=split < SPLITS, other=0.0)
    best = tl.load(partial_ptr + 2, mask=split < SPLITS, other=0.0)
    top = tl.max(largest, 0)
    below = (largest - top) * 1.4426950408889634  # log2(e)
    winner = tl.argmax(best * tl.exp2(below * _inverse(tl.load(temperature_ptr + row))), 0)
    token = tl.load(index_ptr + row * SPLITS + tl.minimum(winner, SPLITS - 1))
    token = tl.minimum(token, SIZE - 1)  # among NaN, anything may win: nothing is read out of bounds
    logit = tl.load(logits_ptr + row * stride_logits + token).to(tl.float32)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(logprobs_ptr + row, logit - top - tl.log(tl.sum(total * tl.exp2(below), 0)))
# fmt: on


@triton.jit
def _inverse(temperature):
    """Of the coldest float32 where it is 0: of speeds that differ at all, the largest stays 1, all others become 0."""
    return 1.0 / tl.maximum(temperature, 1.1754943508222875e-38)


@triton.jit
def _exponential(key, at):
    """`kernels.reference.exponential` at the places `at`, to some 20 bits however small, without float64."""
    state = key.to(tl.uint64) + (at + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    state = state ^ (state >> 31)
    high = (state >> 32).to(tl.uint32)
    low = (state.to(tl.uint32) & 0xFFFFF800) | 0x400  # 53 bits in all, and half of the last
    u = high.to(tl.float32) * 2.0**-32 + low.to(tl.float32) * 2.0**-64
    series = u * (1.0 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2))))
    return tl.where(u < 0.0625, series, -tl.log(tl.maximum(1.0 - u, 2.0**-54)))


@functools.cache
def specialise(size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time constants and warps of both kernels. `kernels.compile_ahead` compiles these."""
    tile = min(TILE, triton.next_power_of_2(size))
    splits = triton.cdiv(size, tile)
    combine = {"SIZE": size, "SPLITS": splits, "PADDED": triton.next_power_of_2(splits), "num_warps": 1}
    return {"SIZE": size, "TILE": tile, "num_warps": 4}, combine


def sample(logits: Tensor, temperature: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.sample`, but for photo finishes."""
    check_sample(logits, temperature, keys)
    rows, size = logits.shape
    tokens, logprobs = torch.empty_like(keys), torch.empty_like(temperature)
    if rows:
        tiles, combine = specialise(size)
        splits = combine["SPLITS"]
        partial = temperature.new_empty(rows, splits, 3)
        index = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
        with torch.cuda.device_of(logits):
            stride = logits.stride(0)
            sample_kernel[(rows, splits)](logits, temperature, keys, partial, index, stride, **tiles)
            choose_kernel[(rows,)](logits, temperature, partial, index, tokens, logprobs, stride, **combine)
    return tokens, logprobs
