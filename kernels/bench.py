"""How near the kernels come to what the GPU can do: time against floors that are measured in the same minute.

Physics first. Decode attention reads each key and value once and computes next to nothing: its floor is bytes / read
bandwidth. Prompt attention is arithmetic: its floor is operations / the rate of a large matrix product. Writing to
the cache moves bytes from place to place: its floor is that of a copy. `of floor` is floor / measured, at best 1.

Paged and contiguous run the same kernel in the same configuration; beside them is torch on contiguous memory.
"""

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import for_device
from kernels.bench_layers import bench_chain, bench_fused, bench_row
from kernels.ragged import Ragged
from kernels.timing import DTYPE, HEADER, Clock, Floors, Measured, measure_floors, median_us
from kernels.tuning import FEWEST_KEYS

BLOCK = 16
TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """`sequences` rows of `length` tokens; every head of 128 numbers, unless said otherwise."""

    sequences: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int = 128
    spread: float = 0.0  # of lognormal lengths whose mean is `length`, of their logarithm; none is longer than 8 means
    padded: bool = False  # lengths are anything up to `length`, and the rest of it is read for nothing

    def __str__(self) -> str:
        kind = "~" if self.spread else "<" if self.padded else ""
        return f"{self.sequences} x {self.heads}/{self.kv_heads} x {kind}{self.length}"

    def lengths(self) -> list[int]:
        draw, middle = random.Random(0), math.log(self.length) - self.spread**2 / 2
        if self.padded:
            return [draw.randint(1, self.length) for _ in range(self.sequences)]
        drawn = [round(draw.lognormvariate(middle, self.spread)) for _ in range(self.sequences)]
        return [min(max(length, 1), 8 * self.length) for length in drawn]


DECODES = [
    Shape(64, 40, 40, 1024),
    Shape(64, 32, 8, 1024),
    Shape(256, 32, 8, 512),
    Shape(8, 32, 8, 8192),
    Shape(64, 32, 8, 1024, spread=1.0),
]
PADDED = Shape(32, 40, 40, 1024, padded=True)  # a static batch of OPT-13B
PROMPT = Shape(8, 32, 8, 2048)


class Problem:
    """Attention of the last `queries` tokens of every row: 1 for decode, all for a prompt. In both kinds of memory."""

    def __init__(self, shape: Shape, queries: int, device: str, block: int = BLOCK) -> None:
        self.shape, self.queries, self.lengths = shape, queries, shape.lengths()
        self.needed = [-(-length // block) for length in self.lengths]  # blocks of each row
        self.scale = shape.head_dim**-0.5
        self.k_cache, self.v_cache = (make_cache(shape, sum(self.needed), block, device) for _ in range(2))
        self.q = torch.randn(shape.sequences * queries, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
        # Paged: blocks in random order. Contiguous: one sequence behind the other.
        self.orders = {"paged": torch.randperm(sum(self.needed)), "contiguous": torch.arange(sum(self.needed))}
        self.batches = {name: self._batch(order, name == "paged", device, block) for name, order in self.orders.items()}

    def _batch(self, order: Tensor, paged: bool, device: str, block: int) -> Ragged:
        tables = order.split(self.needed)
        rows = zip(self.lengths, tables, strict=True)
        n, padded = self.queries, self.shape.padded
        batch = [
            (n, length - n, length, self.shape.length - length if padded else 0, table.tolist())
            for length, table in rows
        ]
        return Ragged.build(batch, block, paged, device)

    def ours(self, memory: str, **options: Any) -> Tensor:
        attention = for_device(self.q.device).attention
        return attention(self.q, self.k_cache, self.v_cache, self.batches[memory], scale=self.scale, **options)

    def error(self, memory: str, **options: Any) -> float:
        """Relative, against torch's row by row."""
        expected = []
        for q, order, length in zip(
            self.q.split(self.queries), self.orders[memory].split(self.needed), self.lengths, strict=True
        ):
            blocks = order.to(q.device)
            k, v = (cache[blocks].flatten(0, 1)[:length] for cache in (self.k_cache, self.v_cache))
            expected.append(self._torch(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1))
        reference = torch.cat(expected).float()
        return float((self.ours(memory, **options).float() - reference).norm() / reference.norm())

    def torch_call(self) -> Callable[[], Tensor]:
        """Torch over all rows at once, in contiguous memory; where they are equally long."""
        batched = (self.shape.sequences, -1)
        dense = [x.reshape(*batched, *x.shape[-2:]) for x in (self.q, self.k_cache, self.v_cache)]
        q, k, v = (x[:, : self.lengths[0]].transpose(1, 2) for x in dense)  # [sequences, heads, tokens, head_dim]
        return lambda: self._torch(q, k, v)

    def _torch(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = self.shape.heads != self.shape.kv_heads
        return scaled_dot_product_attention(q, k, v, is_causal=self.queries > 1, enable_gqa=grouped)


def make_cache(shape: Shape, blocks: int, block: int, device: str) -> Tensor:
    return torch.randn(blocks, block, shape.kv_heads, shape.head_dim, dtype=DTYPE, device=device)


def bench_attention(
    name: str,
    shape: Shape,
    queries: int,
    floors: Floors,
    device: str,
    *,
    block: int = BLOCK,
    clock: Clock | None = None,
) -> Iterator[Measured]:
    """Ours and torch's in turn, so that a drift of the clock meets all; the median of five. `clock` as above."""
    clock = clock or median_us
    problem = Problem(shape, queries, device, block)
    seen = sum(queries * length - queries * (queries - 1) // 2 for length in problem.lengths)  # (query, key) pairs
    operations = 4 * shape.heads * shape.head_dim * seen
    stored = sum(problem.lengths) * shape.kv_heads * shape.head_dim  # not what fills up a last block
    bytes_ = (2 * stored + 2 * problem.q.numel()) * DTYPE.itemsize
    floor_us = max(bytes_ / floors.read, operations / floors.matmul)
    counted = {"operations": operations} if queries > 1 else {"bytes": bytes_}
    calls: dict[str, Callable[[], object]] = {
        memory: functools.partial(problem.ours, memory) for memory in problem.batches
    }
    if not (shape.spread or shape.padded):
        calls |= {f"torch {backend}": _with(kind, problem.torch_call()) for backend, kind in TORCH.items()}
    times: dict[str, list[float]] = {variant: [] for variant in calls}
    for _, variant in itertools.product(range(5), calls):
        try:
            times[variant].append(clock(calls[variant]))
        except RuntimeError:  # this build of torch, or this shape, has no such kernel
            if variant in problem.batches:
                raise
    us = {variant: statistics.median(found) for variant, found in times.items() if found}
    for variant, time_ in us.items():
        error = problem.error(variant) if variant in problem.batches else None
        table = time_ / us["contiguous"] - 1 if variant == "paged" else None
        yield Measured(name, str(shape), variant, time_, floor_us=floor_us, error=error, table=table, **counted)


def _with(kind: SDPBackend, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(kind):
            return call()

    return run


def bench_moves(shape: Shape, layers: int, floors: Floors, device: str) -> Iterator[Measured]:
    """Storing the tokens of a step in one layer; copying a quarter of the blocks in every layer."""
    ops = for_device(device)
    blocks = shape.sequences * -(-shape.length // BLOCK)
    k_cache, v_cache = (make_cache(shape, blocks, BLOCK, device) for _ in range(2))
    tokens = 2048 if shape.sequences * shape.length >= 2048 else 16
    new = torch.randn(tokens, shape.kv_heads, shape.head_dim, dtype=DTYPE, device=device)
    slots = torch.randperm(shape.sequences * shape.length)[:tokens].to(device)
    bytes_ = 4 * new.numel() * DTYPE.itemsize  # K and V, read and written
    us = median_us(lambda: ops.store(new, new, k_cache, v_cache, slots))
    yield Measured(
        "store", f"{tokens} tokens", f"{shape.kv_heads} heads", us, bytes=bytes_, floor_us=bytes_ / floors.copy
    )
    pool = k_cache.expand(layers, *k_cache.shape).clone()  # [layers, num_blocks, block, Hk, D]
    half = pool.shape[1] // 2
    pairs = torch.randperm(half)[: half // 2]
    pairs = torch.stack([pairs, pairs + half], 1).to(device)
    bytes_ = 2 * layers * len(pairs) * pool[0, 0].numel() * DTYPE.itemsize
    us = median_us(lambda: ops.copy_blocks(pool, pairs))
    shown = f"{len(pairs)} x {layers} layers"
    yield Measured("copy_blocks", shown, f"{shape.kv_heads} heads", us, bytes=bytes_, floor_us=bytes_ / floors.copy)


def bench_plan(device: str, rows: int = 256) -> Measured:
    """Which program reads what of which row: once a step, for the attention of all layers."""
    from kernels.shares import plan  # and Triton, which is not everywhere

    problem = Problem(Shape(rows, 4, 1, 512, head_dim=16, spread=1.0), 1, device)
    batch = problem.batches["paged"]
    us = median_us(lambda: plan(replace(batch), batch.tiles[0].places, 66, 2, FEWEST_KEYS, 32, None))
    return Measured("plan shares", f"{rows} x ~512", "once a step", us, bytes=16 * rows)


def run(device: str) -> Iterator[Measured]:
    torch.manual_seed(0)
    floors, rows = measure_floors(device)
    yield from rows
    for shape in (*DECODES, PADDED):
        yield from bench_attention("decode attention", shape, 1, floors, device)
    yield from bench_attention("prompt attention", PROMPT, PROMPT.length, floors, device)
    for heads in (8, 40):
        yield from bench_moves(Shape(16, heads, heads, 1024), 8, floors, device)
    yield from bench_fused(floors, device)
    yield bench_plan(device)
    yield from bench_row(floors, device)
    yield from bench_chain(floors, device)


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--out", type=Path, help="folder for kernels.txt (the table) and kernels.json (default: print only)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA GPU here, and times of the interpreter mean nothing; run this on a GPU", file=sys.stderr)
        return 2
    lines = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}", HEADER]
    print("\n".join(lines), flush=True)
    rows = []
    try:
        for row in run("cuda"):
            rows.append(asdict(row))
            lines.append(row.line())
            print(lines[-1], flush=True)
    finally:  # what is measured is kept, whatever comes after
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "kernels.txt").write_text("\n".join(lines) + "\n")
            (options.out / "kernels.json").write_text(json.dumps({"machine": lines[0], "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
