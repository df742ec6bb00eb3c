"""What a decoder computes around attention, timed: norms, SwiGLU, heads, tokens, and the products of a single row."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kernels import for_device
from kernels.timing import DTYPE, Floors, Measured, graph_us, median_us

BLOCK = 16
WIDTHS = (3072, 14336, 151936)  # of two SwiGLUs, of a vocabulary
ROWS = ((4096, 1024), (1024, 3072), (6144, 4096), (4096, 14336))  # of Qwen3-0.6B and Llama-3-8B: qkv, down
CHAIN = (1024, 4096, 2048, 3072)  # of Qwen3-0.6B: hidden, qkv, query heads, SwiGLU


def bench_fused(floors: Floors, device: str, batch: int = 256, widths: Sequence[int] = WIDTHS) -> Iterator[Measured]:
    """What a decoder computes around attention, beside what it reads and writes: norm, SwiGLU, heads, tokens.

    A call that moves less than a few MB takes the time of a launch, in a CUDA graph some 2 us; its share says nothing.
    """
    ops, cache = for_device(device), torch.zeros(batch, BLOCK, 8, 128, dtype=DTYPE, device=device)

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device=device)

    def moved(name: str, shape: str, variant: str, bytes_: int, call: Callable[[], object]) -> Measured:
        return Measured(name, shape, variant, median_us(call), bytes=bytes_, floor_us=bytes_ / floors.copy)

    for rows, hidden in ((batch, 1024), (batch // 4, 5120)):
        x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)
        call = functools.partial(ops.norm, x, weight, None, 1e-5, residual)
        yield moved("norm", f"{rows} x {hidden}", "residual", 4 * x.nbytes, call)
    qkv, places = random(batch, 32 * 128), torch.arange(batch, device=device)
    turns = torch.rand(batch, 128, device=device)
    call = functools.partial(
        ops.rotate_and_store, qkv, random(128), random(128), 1e-6, turns, places, BLOCK * places, cache, cache.clone()
    )
    yield moved("rotate_and_store", f"{batch} x 32 x 128", "norm, 16/8", 2 * qkv.nbytes + turns.nbytes, call)
    for size in widths[:2]:
        gate_up = random(batch, 2 * size)
        call = functools.partial(ops.silu_and_mul, gate_up)
        yield moved("silu_and_mul", f"{batch} x 2 x {size}", "", gate_up.nbytes * 3 // 2, call)
    logits = random(batch, widths[2])
    for variant, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        call = functools.partial(ops.sample, logits, torch.full((batch,), temperature, device=device), places)
        us = median_us(call)
        shape = f"{batch} x {widths[2]}"
        yield Measured("sample", shape, variant, us, bytes=logits.nbytes, floor_us=logits.nbytes / floors.read)


def bench_row(floors: Floors, device: str, shapes: Sequence[tuple[int, int]] = ROWS) -> Iterator[Measured]:
    """A row alone times a matrix: with a norm before or a sum behind, and torch's, which has neither."""
    product = for_device(device).row_product
    for size, hidden in shapes:
        weight = torch.randn(size, hidden, dtype=DTYPE, device=device) / hidden**0.5
        x, residual = (torch.randn(1, width, dtype=DTYPE, device=device) for width in (hidden, size))
        calls: dict[str, Callable[[], object]] = {
            "norm": functools.partial(product, x, weight, norm=x[0], eps=1e-6),
            "residual": functools.partial(product, x, weight, residual=residual),
            "torch": functools.partial(torch.nn.functional.linear, x, weight),
        }
        for variant, call in calls.items():
            us, shape = median_us(call), f"1 x {hidden} x {size}"
            yield Measured("row product", shape, variant, us, bytes=weight.nbytes, floor_us=weight.nbytes / floors.read)


def bench_chain(
    floors: Floors, device: str, layers: int = 28, sizes: tuple[int, int, int, int] = CHAIN
) -> Iterator[Measured]:
    """All products of a step of one row, in a graph, where each starts while the last still runs; and torch's."""
    hidden, qkv, heads, inner = sizes
    shapes = ((qkv, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner))
    weights = [[torch.randn(n, k, dtype=DTYPE, device=device) / k**0.5 for n, k in shapes] for _ in range(layers)]
    rows = {width: torch.randn(1, width, dtype=DTYPE, device=device) for width in (hidden, heads, inner)}
    residual, norm = rows[hidden].clone(), rows[hidden][0]
    product = for_device(device).row_product

    def ours() -> None:
        for into, out, up, down in weights:
            product(residual, into, norm=norm, eps=1e-6)
            product(rows[heads], out, residual=residual)
            product(product(residual, up, norm=norm, eps=1e-6, gated=True), down, residual=residual)

    def theirs() -> None:
        for weight in itertools.chain.from_iterable(weights):
            torch.nn.functional.linear(rows[weight.shape[1]], weight)

    bytes_ = sum(weight.nbytes for weight in itertools.chain.from_iterable(weights))
    for variant, call in (("norms, sums", ours), ("torch", theirs)):
        counted = {"bytes": bytes_, "floor_us": bytes_ / floors.read}
        yield Measured("row products", f"{4 * layers} in a graph", variant, graph_us(call), **counted)
