"""How near the kernels come to what the GPU can do: time against floors that are measured in the same minute.

Physics first. Decode attention reads each key and value once and computes next to nothing: its floor is bytes / read
bandwidth. Prompt attention is arithmetic: its floor is operations / the rate of a large matrix product. Writing to
the cache moves bytes from place to place: its floor is that of a copy. `of floor` is floor / measured, at best 1.

Paged and contiguous run the same kernel in the same configuration; beside them is torch on contiguous memory.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import for_device
from kernels.ragged import Ragged

BLOCK = 16
DTYPE = torch.bfloat16
FLUSH_BYTES = 2**28  # written before every measured call: more than any L2 cache holds
TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

Clock = Callable[[Callable[[], object]], float]  # microseconds that a call takes


@dataclass(frozen=True)
class Shape:
    """`sequences` rows of `length` tokens; every head of 128 numbers, unless said otherwise."""

    sequences: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int = 128

    def __str__(self) -> str:
        return f"{self.sequences} x {self.heads}/{self.kv_heads} x {self.length}"


DECODES = [Shape(64, 40, 40, 1024), Shape(64, 32, 8, 1024), Shape(256, 32, 8, 512), Shape(8, 32, 8, 8192)]
PROMPT = Shape(8, 32, 8, 2048)
WIDTHS = (3072, 14336, 151936)  # of two SwiGLUs, of a vocabulary


@dataclass(frozen=True)
class Measured:
    name: str
    shape: str
    variant: str
    us: float
    bytes: int = 0  # read, or read and written, at least
    operations: int = 0
    floor_us: float = 0.0
    error: float | None = None  # of the result, relative, against torch's on the same memory

    def line(self) -> str:
        rate = (
            f"{self.bytes / self.us / 1e6:7.2f} TB/s"
            if self.bytes
            else f"{self.operations / self.us / 1e6:6.0f} TFLOP/s"
        )
        share = f"{self.floor_us / self.us:8.2f}" if self.floor_us else " " * 8
        error = "" if self.error is None else f"{self.error:10.1e}"
        return f"{self.name:18} {self.shape:18} {self.variant:12} {self.us:10.1f} {rate:>14} {share} {error}"


HEADER = f"{'what':18} {'shape':18} {'variant':12} {'us':>10} {'rate':>14} {'of floor':>8} {'error':>10}"


@dataclass(frozen=True)
class Floors:
    read: float  # bytes / us
    copy: float  # bytes / us, read and written counted
    matmul: float  # operations / us


def median_us(call: Callable[[], object], repeats: int = 30, flush_bytes: int = FLUSH_BYTES) -> float:
    """Median over calls that find the L2 cache cold; the flush also lets the host queue the call ahead.

    Of a call shorter than it takes to queue, that holds only while the flush lasts longer: some 0.1 ms per 256 MiB.
    """
    flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(repeats + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        if i >= 5:  # warm by now
            times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in times)


def wall_us(call: Callable[[], object], repeats: int = 7) -> float:
    """Median over calls on a CPU, its caches as warm as they are; the first two do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def measure_floors(
    device: str, size: int = 2**31, side: int = 8192, clock: Clock | None = None
) -> tuple[Floors, list[Measured]]:
    """`clock` is `median_us`, or on a CPU `wall_us`."""
    clock = clock or median_us
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, dtype=DTYPE, device=device)
    read = Measured("read", f"{size >> 20} MiB", "sum", clock(source.sum), bytes=size)
    copy = Measured("copy", f"{size >> 20} MiB", "copy_", clock(lambda: target.copy_(source)), bytes=2 * size)
    product = Measured(
        "matrix product", f"{side}^3", "bfloat16", clock(lambda: square @ square), operations=2 * side**3
    )
    floors = Floors(read.bytes / read.us, copy.bytes / copy.us, product.operations / product.us)
    return floors, [read, copy, product]


def make_cache(shape: Shape, device: str, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    size = (shape.sequences * -(-shape.length // block), block, shape.kv_heads, shape.head_dim)
    return torch.randn(size, dtype=DTYPE, device=device), torch.randn(size, dtype=DTYPE, device=device)


def make_batch(shape: Shape, queries: int, paged: bool, device: str, block: int = BLOCK) -> Ragged:
    """Paged: blocks in random order. Contiguous: one sequence behind the other."""
    per_row = -(-shape.length // block)
    order = torch.randperm(shape.sequences * per_row).tolist() if paged else range(shape.sequences * per_row)
    tables = [order[row * per_row : (row + 1) * per_row] for row in range(shape.sequences)]
    rows = [(queries, shape.length - queries, shape.length, 0, table) for table in tables]
    return Ragged.build(rows, block, paged, device)


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
    """`queries` tokens at the end of every row: 1 for decode, all for a prompt. `clock` as in `measure_floors`."""
    clock = clock or median_us
    k_cache, v_cache = make_cache(shape, device, block)
    q = torch.randn(shape.sequences * queries, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
    scale = shape.head_dim**-0.5
    seen = queries * shape.length - queries * (queries - 1) // 2  # (query, key) pairs of a row and head
    operations = 4 * shape.sequences * shape.heads * shape.head_dim * seen
    stored = shape.sequences * shape.length * shape.kv_heads * shape.head_dim  # not what fills up a last block
    bytes_ = (2 * stored + 2 * q.numel()) * DTYPE.itemsize
    floor_us = max(bytes_ / floors.read, operations / floors.matmul)
    counted = {"operations": operations} if queries > 1 else {"bytes": bytes_}
    batched = (shape.sequences, -1)
    dense = (x.reshape(*batched, *x.shape[-2:])[:, : shape.length].transpose(1, 2) for x in (q, k_cache, v_cache))
    q_dense, k_dense, v_dense = dense  # [sequences, heads, tokens, head_dim]
    grouped = shape.heads != shape.kv_heads

    def with_torch() -> Tensor:
        return scaled_dot_product_attention(q_dense, k_dense, v_dense, is_causal=queries > 1, enable_gqa=grouped)

    expected = with_torch().transpose(1, 2).reshape(q.shape).float()
    attention = for_device(device).attention
    for paged in (True, False):
        batch = make_batch(shape, queries, paged, device, block)

        def ours(batch: Ragged = batch) -> Tensor:
            return attention(q, k_cache, v_cache, batch, scale=scale)

        # Torch's result holds for the blocks in their order, which is how the contiguous batch reads them.
        error = None if paged else float((ours().float() - expected).norm() / expected.norm())
        variant = "paged" if paged else "contiguous"
        yield Measured(name, str(shape), variant, clock(ours), floor_us=floor_us, error=error, **counted)
    for backend, kind in TORCH.items():
        try:
            with sdpa_kernel(kind):
                us = clock(with_torch)
        except RuntimeError:  # this build of torch, or this shape, has no such kernel
            continue
        yield Measured(name, str(shape), f"torch {backend}", us, floor_us=floor_us, **counted)


def bench_moves(shape: Shape, layers: int, floors: Floors, device: str) -> Iterator[Measured]:
    """Storing the tokens of a step in one layer; copying a quarter of the blocks in every layer."""
    ops = for_device(device)
    k_cache, v_cache = make_cache(shape, device)
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


def run(device: str) -> Iterator[Measured]:
    torch.manual_seed(0)
    floors, rows = measure_floors(device)
    yield from rows
    for shape in DECODES:
        yield from bench_attention("decode attention", shape, 1, floors, device)
    yield from bench_attention("prompt attention", PROMPT, PROMPT.length, floors, device)
    for heads in (8, 40):
        yield from bench_moves(Shape(16, heads, heads, 1024), 8, floors, device)
    yield from bench_fused(floors, device)


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
    for row in run("cuda"):
        rows.append(asdict(row))
        lines.append(row.line())
        print(lines[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels.txt").write_text("\n".join(lines) + "\n")
        (options.out / "kernels.json").write_text(json.dumps({"machine": lines[0], "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
