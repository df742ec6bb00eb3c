"""What does the block table cost a kernel? Paged against contiguous attention for decodes, one constant apart.

Kwon et al., SOSP'23, figure 18 (a): their paged kernel is 20 to 26 % slower than FasterTransformer's, for the block
table, more branches, and variable lengths. Measured again on the figure's curves that holds for a batch of 32 and not
for 8. Two teams' kernels differ in everything; here paged and contiguous are the same kernel in the same configuration
and only the line that turns a position into an address differs, so that what is measured between them is the table. A
table adds 4 bytes per position and head to the 512 of K and V in OPT-13B: 0.8 %, most of it found in the cache.

OPT-13B's heads (40, of 128 numbers, bfloat16), one query per sequence, blocks scattered at random, caches cold; medians
of five rounds in turn, of 12 calls each, the spread over seeds, each with tensors and tables of its own. Beside them
torch's attention (`scaled_dot_product_attention`, cuDNN or flash) on contiguous K and V, and the read bandwidth of the
same minutes. It needs a GPU. Without one the reference path in plain torch is timed at small sizes: it gathers all keys
by index, paged or not, so its numbers say nothing about kernels, and no claim is judged on them.
"""

from __future__ import annotations

import importlib
import itertools
import platform
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lab import plot
from lab.core import InputError
from lab.harness import Claim
from lab.measured import Once, Row
from lab.options import Options
from lab.record import Record, describe
from lab.run import Run
from lab.shapes import ModelShape, shape

BLOCKS = (1, 8, 16, 32, 128)  # tokens
BATCHES = (8, 32)  # sequences
CONTEXTS = tuple(2**power for power in range(6, 16))  # tokens: 64 to 32k
CPU_BLOCKS, CPU_CONTEXTS = (1, 16), (64, 128, 256)
PAPER_BLOCK = 16
PAPER_PERCENT = (20, 26)  # slower than FasterTransformer
PAPER_CONTEXTS = (64, 128, 256)
PAPER_US = {(8, 256): (110, 90), (32, 256): (185, 150)}  # vLLM, FasterTransformer: read off the figure
PERCENT = 5.0  # ours: at most so much slower than contiguous, at any batch and context
USE = ("device", "executor", "model", "block")  # settings of a run that mean something to a kernel
FLUSHES = 4  # times the usual flush: the shortest kernels take less time than it takes to queue them


def runs(options: Options) -> list[Run]:
    """None: kernels are timed, not runs. What cannot be timed is refused here."""
    others = [name for name in options.changes if name not in USE]
    policies = {"system": options.systems, "allocator": options.allocators, "scheduler": options.schedulers}
    others += [name for name, value in policies.items() if value]
    if others:
        raise InputError(f"{others[0]}: a kernel by itself knows of none; leave out all but {', '.join(USE)}")
    if options.changes.get("executor") == "simulated":
        raise InputError("executor 'simulated': a virtual clock has no kernels to time; leave --executor out")
    block = options.changes.get("block", PAPER_BLOCK)
    if block < 1:
        raise InputError(f"block size {block}: must be at least 1 token; the paper's is {PAPER_BLOCK}")
    _heads(options)
    _where(_bench(), _device(options))
    return []


def measure(options: Options, places: Mapping[Run, Path], once: Once) -> tuple[list[Row], dict[str, Any]]:
    """A row for each variant, batch, context, block size and seed."""
    bench, timing, device, heads = _bench(), _bench("timing"), _device(options), _heads(options)
    cuda = device != "cpu"
    flush = FLUSHES * timing.FLUSH_BYTES
    clock = partial(timing.median_us, repeats=12, flush_bytes=flush) if cuda else timing.wall_us
    clock = partial(clock, repeats=3) if options.quick else clock
    size, side = (2**31, 8192) if cuda else (2**28, 256)
    floors = cache(partial(timing.measure_floors, device, 2**24 if options.quick else size, side, clock))
    where = _where(bench, device)

    def timed(own: Row) -> list[Row]:
        bench.torch.manual_seed(own["seed"])
        one = bench.Shape(own["batch"], heads.heads, heads.kv_heads, own["context"], heads.head_dim)
        floor, _ = floors()  # measured in the same minutes
        found = list(bench.bench_attention("decode", one, 1, floor, device, block=own["block"], clock=clock))
        return [own | _row(m, floor.read) for m in found]

    rows = []
    for seed in options.seeds or ([0] if options.quick else [0, 1, 2]):
        for batch, context, block in _points(options, cuda):
            own = {"seed": seed, "batch": batch, "context": context, "block": block, "kernels": cuda}
            try:
                point = own | {"where": where, "model": heads.name, "quick": options.quick}
                rows += once(point, partial(timed, own))
            except bench.torch.OutOfMemoryError:
                print(f"left out: {batch} sequences of {context} tokens do not fit {device}")
    what = "decode attention" if cuda else "CPU reference path"
    named = {"model": heads.name, "workload": what, "hardware": where, "gpu": where if cuda else ""}
    return _with_overhead(rows), describe(**named, seed=0, simulated=False)


def row(run: Run, record: Record) -> dict[str, Any]:
    raise AssertionError("this experiment has no runs")


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    where = "" if _kernels(rows) else "; CPU REFERENCE PATH, not the kernels: the real answer needs a GPU"
    return {
        f"paged over contiguous, per cent more time, beside the paper's vLLM over FasterTransformer{where}": _beside(
            rows
        ),
        f"GB/s of K and V, and share of the read bandwidth measured beside it{where}": _rates(rows),
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    reference = _reference(rows)
    drawn = rows[(rows["system"] == "paged") | (rows["block"] == reference)]
    named = drawn["system"].where(drawn["block"] == reference, drawn["system"] + ", " + drawn["block"].astype(str))
    drawn = drawn.assign(kernel=named, panel="batch " + drawn["batch"].astype(str))
    low, high = PAPER_PERCENT
    return plot.lines(
        drawn,
        header,
        f"Blocks of {reference} unless said otherwise" if _kernels(rows) else "Not the kernels: their specification",
        x="context",
        y={"overhead": "paged over contiguous (% more time)", "gb_per_s": "K and V read (GB/s)"},
        by="kernel",
        panels="panel",
        xlabel="context (tokens)",
        log="x",
        guides={"overhead": {f"paper, batch 32: {low} %": low, f"{high} %": high}},
    )


def claims(rows: pd.DataFrame) -> list[Claim]:
    judged, size = _kernels(rows), _reference(rows)
    mean = rows[rows["block"] == size].groupby(["batch", "context"])["overhead"].mean().dropna()
    theirs = mean[[batch == 32 and context in PAPER_CONTEXTS for batch, context in mean.index]]
    low, high = PAPER_PERCENT
    alone = f"the block table alone costs less than the {low} to {high} % by which their kernel was slower"
    least = f"with blocks of {size} it costs at most {PERCENT:g} % at any batch and context (ours)"
    note = "" if judged else " (CPU reference path)"
    return [
        Claim(
            f"{alone} (figure 18a, batch 32, contexts of 64 to 256)",
            bool(theirs.max() < low) if judged and len(theirs) else None,
            _range(theirs) + note,
        ),
        Claim(least, bool(mean.max() <= PERCENT) if judged and len(mean) else None, _range(mean) + note),
    ]


def _bench(module: str = "bench") -> Any:
    """It brings torch, which takes seconds and which a list of the experiments does not need."""
    return importlib.import_module(f"kernels.{module}")


def _device(options: Options) -> str:
    return str(options.changes.get("device") or ("cuda" if _bench().torch.cuda.is_available() else "cpu"))


def _where(bench: Any, device: str) -> str:
    """The name of the device. Raises InputError where there is none."""
    if device == "cpu":
        return f"{platform.machine()} CPU, {bench.torch.get_num_threads()} threads"
    there = [f"cuda:{i}" for i in range(bench.torch.cuda.device_count())]
    if device not in [*there, *(["cuda"] if there else [])]:
        raise InputError(f"device {device!r}: is not here; give {', '.join(['cpu', *there])}")
    return str(bench.torch.cuda.get_device_name(device))


def _heads(options: Options) -> ModelShape:
    return shape(str(options.changes.get("model", "opt-13b")).removeprefix("random:"))


def _points(options: Options, cuda: bool) -> Iterator[tuple[int, int, int]]:
    """Batch, context and block size of each measurement."""
    contexts, blocks = list(CONTEXTS if cuda else CPU_CONTEXTS), list(BLOCKS if cuda else CPU_BLOCKS)
    batches = BATCHES
    if options.quick:
        batches, contexts, blocks = (8 if cuda else 1, 32 if cuda else 2), contexts[:2], [PAPER_BLOCK]
    if "block" in options.changes:
        blocks = [options.changes["block"]]
    return itertools.product(batches, contexts, blocks)


def _row(measured: Any, read: float) -> dict[str, Any]:
    rate = measured.bytes / measured.us  # bytes per microsecond
    return {"system": measured.variant, "us": measured.us, "gb_per_s": rate / 1e3, "of_bandwidth": rate / read}


def _with_overhead(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Beside each paged measurement, per cent that it took longer than the contiguous one of the same point."""

    def point(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("seed", "batch", "context", "block"))

    contiguous = {point(row): row["us"] for row in rows if row["system"] == "contiguous"}
    nan = float("nan")
    return [
        r | {"overhead": 100 * (r["us"] / contiguous[point(r)] - 1) if r["system"] == "paged" else nan} for r in rows
    ]


def _kernels(rows: pd.DataFrame) -> bool:
    return bool(rows["kernels"].all())


def _reference(rows: pd.DataFrame) -> int:
    """The block size that is compared with the paper's: its own where it was measured."""
    sizes = set(rows["block"])
    return PAPER_BLOCK if PAPER_BLOCK in sizes else min(sizes)


def _range(percent: pd.Series) -> str:
    return f"{percent.min():+.1f} to {percent.max():+.1f} %" if len(percent) else "not measured"


def _beside(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per batch and context: the paper's, and ours by block size."""
    paged = (
        rows[rows["system"] == "paged"]
        .groupby(["batch", "context", "block"])["overhead"]
        .agg(["mean", "std"])
        .unstack("block")
    )
    table = pd.DataFrame(index=paged.index)
    low, high = PAPER_PERCENT
    table["paper"] = [f"{low} to {high}" if b == 32 and c in PAPER_CONTEXTS else "" for b, c in table.index]
    table["read off"] = [f"{100 * (us[0] / us[1] - 1):.0f}" if (us := PAPER_US.get(at)) else "" for at in table.index]
    for block in sorted(set(rows["block"])):
        table[f"block {block}"] = paged["mean", block].round(1)
        table["+-" + " " * list(table).count("+-")] = paged["std", block].round(1)
    return table


def _rates(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per batch and context, in the block size of the paper."""
    own = rows[rows["block"] == _reference(rows)].groupby(["batch", "context", "system"], sort=False)
    mean = own[["us", "gb_per_s", "of_bandwidth"]].mean().unstack("system")
    columns = {}
    for name in dict.fromkeys(rows["system"]):
        columns[f"{name} us"] = mean["us", name].round(1)
        columns["GB/s " + name] = mean["gb_per_s", name].round(0 if _kernels(rows) else 2)
        columns["share " + name] = mean["of_bandwidth", name].round(2)
    return pd.DataFrame(columns)
