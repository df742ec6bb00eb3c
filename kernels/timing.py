"""Clocks for a call on a GPU or a CPU, and the ceilings of the machine: what bytes and operations cost at least."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPE = torch.bfloat16
FLUSH_BYTES = 2**29  # written before every measured call: more than any L2 cache holds

Clock = Callable[[Callable[[], object]], float]  # microseconds that a call takes


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
    table: float | None = None  # what the block table costs: time over that of contiguous memory, less 1

    def line(self) -> str:
        rate = (
            f"{self.bytes / self.us / 1e6:7.2f} TB/s"
            if self.bytes
            else f"{self.operations / self.us / 1e6:6.0f} TFLOP/s"
        )
        share = f"{self.floor_us / self.us:8.2f}" if self.floor_us else " " * 8
        error = "" if self.error is None else f"{self.error:10.1e}"
        table = "" if self.table is None else f"{self.table:+8.1%}"
        return f"{self.name:18} {self.shape:18} {self.variant:12} {self.us:10.1f} {rate:>14} {share} {error:10} {table}"


HEADER = f"{'what':18} {'shape':18} {'variant':12} {'us':>10} {'rate':>14} {'of floor':>8} {'error':>10} {'table':>8}"


@dataclass(frozen=True)
class Floors:
    read: float  # bytes / us
    copy: float  # bytes / us, read and written counted
    matmul: float  # operations / us


def median_us(call: Callable[[], object], repeats: int = 15, flush_bytes: int = FLUSH_BYTES) -> float:
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


def graph_us(call: Callable[[], object], repeats: int = 11) -> float:
    """The same of a call that is captured as a CUDA graph: without the host, and with launches that may overlap."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_us(graph.replay, repeats)


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
