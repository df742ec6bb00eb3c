"""Find the fastest configurations of attention for the GPU at hand, and keep them in tuned.json.

Each candidate runs every shape of its kind, paged and contiguous. It is measured as a CUDA graph, so that no launch is
waited for, with a cold L2 cache and blocks in random order; it may win only if its results are torch's. The winner
reads paged memory fastest, each shape counting the same: time over the best time of any candidate, averaged.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.bench import DECODES, PADDED, PROMPT, Problem, Shape
from kernels.ragged import TILE_TOKENS
from kernels.timing import DTYPE, graph_us
from kernels.tuning import TUNED, Tuning, key

MOST_ERROR = 0.01  # relative; bfloat16 rounds by 0.002 to 0.004
DECODE, PROMPTS = TILE_TOKENS[0], TILE_TOKENS[-1]


class Kind(NamedTuple):
    """What one entry of tuned.json is found with."""

    tile: int
    shapes: list[Shape]

    def queries(self, shape: Shape) -> int:
        return 1 if self.tile == DECODE else shape.length

    def group(self) -> int:
        return self.shapes[0].heads // self.shapes[0].kv_heads

    def name(self) -> str:
        return key(self.tile, self.group(), self.shapes[0].head_dim, DTYPE.itemsize)


KINDS = [
    Kind(DECODE, [shape for shape in DECODES if shape.heads != shape.kv_heads]),
    Kind(
        DECODE,
        [shape for shape in DECODES if shape.heads == shape.kv_heads]
        + [Shape(33, 40, 40, 450, spread=1.0), Shape(8, 40, 40, 4096), PADDED],
    ),
    Kind(DECODE, [Shape(256, 16, 8, 512), Shape(64, 16, 8, 1024, spread=1.0), Shape(1, 16, 8, 1024)]),
    Kind(PROMPTS, [PROMPT]),
    Kind(PROMPTS, [Shape(4, 40, 40, 1024)]),
    Kind(PROMPTS, [Shape(16, 16, 8, 512)]),
]


def candidates(kind: Kind) -> list[Tuning]:
    """For heads of 128 numbers in 227 KiB of shared memory; what does not fit elsewhere is left out there."""
    if kind.tile == DECODE:
        tiles = [
            (32, 2, 4),
            (32, 4, 4),
            (32, 4, 6),
            (64, 2, 3),
            (64, 4, 3),
            (64, 4, 4),
            (128, 4, 2),
        ]
        return [Tuning(1, 16, *tile, turns=turns) for tile, turns in itertools.product(tiles, (1, 2, 4))]
    found = []
    for heads in (heads for heads in (2, 1, 4) if kind.group() % heads == 0):
        found += [Tuning(128 // heads, heads, keys, 8, stages) for keys, stages in ((128, 3), (64, 3))]
        found += [Tuning(128 // heads, heads, 32, 8, 3, registers=128)]  # two programs on one processor
        if heads == min(2, kind.group()):
            found += [Tuning(128 // heads, heads, keys, 8, stages) for keys, stages in ((128, 2), (64, 2), (64, 4))]
            found += [Tuning(128 // heads, heads, 32, 8, 4, registers=128)]
            found += [Tuning(64 // heads, heads, 64, 4, stages) for stages in (2, 3)]  # two again
    return found


def compile_one(task: tuple[int, Tuning]) -> None:
    """Into Triton's cache on disk, from a process of its own: one row is enough for that."""
    kind, tuning = KINDS[task[0]], task[1]
    shape = kind.shapes[0]
    tiny = Shape(1, shape.heads, shape.kv_heads, 256, shape.head_dim)
    problem = Problem(tiny, kind.queries(tiny), "cuda")
    for memory in problem.batches:
        try:
            problem.ours(memory, tuning=tuning)
        except Exception:  # the sweep will say what is wrong with it
            return


def try_out(problem: Problem, tuning: Tuning) -> dict[str, float] | str:
    """Microseconds in both kinds of memory, or why it cannot win."""
    try:
        errors = {memory: problem.error(memory, tuning=tuning) for memory in problem.batches}
        if not max(errors.values()) < MOST_ERROR:
            return f"wrong by {max(errors.values()):.1e}"
        return {memory: graph_us(partial(problem.ours, memory, tuning=tuning)) for memory in problem.batches}
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def sweep(kind: Kind) -> Tuning:
    print(f"\n{kind.name()}: us paged / contiguous\n{'tile':44}" + "".join(f"{s!s:>24}" for s in kind.shapes))
    problems = [Problem(shape, kind.queries(shape), "cuda") for shape in kind.shapes]
    tried = {}
    for tuning in candidates(kind):
        results = [try_out(problem, tuning) for problem in problems]
        cells = [r if isinstance(r, str) else f"{r['paged']:.1f} / {r['contiguous']:.1f}" for r in results]
        print(f"{describe(tuning):44}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
        if not any(isinstance(result, str) for result in results):
            tried[tuning] = [result["paged"] for result in results if not isinstance(result, str)]
    best = [min(times) for times in zip(*tried.values(), strict=True)]

    def over_best(tuning: Tuning) -> float:
        return statistics.mean(us / least for us, least in zip(tried[tuning], best, strict=True))

    winner = min(tried, key=over_best)
    print(f"{describe(winner)} wins, {over_best(winner) - 1:.1%} over the best of every shape")
    return winner


def describe(tuning: Tuning) -> str:
    text = f"{tuning.tokens} x {tuning.heads} x {tuning.keys}, {tuning.warps} warps, {tuning.stages} stages"
    text += f", {tuning.turns} turns" if tuning.tokens == 1 else ""
    return text + (f", {tuning.registers} registers" if tuning.registers else "")


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=TUNED, help="a tuned.json to write or extend (default: kernels/)")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has TEXT in its name, for instance decode")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="that compile at a time")
    options = parser.parse_args(arguments)
    kinds = [(i, kind) for i, kind in enumerate(KINDS) if options.only in kind.name()]
    if not kinds:
        names = "; ".join(kind.name() for kind in KINDS)
        print(f"error: --only {options.only!r}: no name has that in it: {names}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: no CUDA GPU here to find configurations for; run this on one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    start = time.perf_counter()
    tasks = dict.fromkeys((i, tuning._replace(turns=0)) for i, kind in kinds for tuning in candidates(kind))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.map(compile_one, tasks, chunksize=1)
    print(f"compiled {len(tasks)} candidates in {time.perf_counter() - start:.0f} s", flush=True)
    found = {kind.name(): sweep(kind)._asdict() for _, kind in kinds}
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    known.setdefault(torch.cuda.get_device_name(), {}).update(found)
    options.out.write_text(json.dumps(known, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
