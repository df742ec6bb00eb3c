"""Compile every kernel for GPUs that are not there, and show what each takes of the machine.

Compiling ahead of time finds what an interpreter cannot: code that the compiler refuses, registers that do not
suffice (spills), tiles that outgrow shared memory, a product that missed the matrix instructions. It needs no GPU.
It exits with 1 where a kernel would not fit.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, cache, layers, sampling, shares
from kernels.ragged import TILE_TOKENS
from kernels.row import row_kernel, specialise_row
from kernels.tuning import Machine

# KiB of shared memory that one program may use; 227 on Hopper and later
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 120: 99, "gfx942": 64, "gfx950": 160}
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
MATRIX = {"cuda": r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.]*", "hip": r"\bv_mfma_\w+"}

EPILOG = """
columns
  head_dim    0 where a kernel knows no heads.
  memory      paged or contiguous; or paged with all options: dead positions, window, soft cap, sinks.
  tile        attention: query tokens x heads x keys per step of the loop. Others: rows x numbers, or rows of head_dim.
  registers   per thread (VGPRs on AMD). Hopper has 65,536 for all threads of a processor: with 128 each there is room
              for four programs of 128 threads at once, with 255 for two. More at once hide more of memory's latency.
  spills      bytes per thread that did not fit into registers and live in memory instead. Those of float32 are known:
              float32 is there to check the others.
  shared      KiB of on-chip memory per program, where loads in flight wait. A program may use 227 on sm_90, 99 on
              sm_89, 64 on gfx942; what fits twice runs twice.
  matrix      the matrix instruction of attention's products: wgmma (Hopper, tiles of 64 rows and more), mma.sync
              (16 rows), mfma (AMD).

example
  python -m kernels.compile_ahead --target sm_90 --target sm_100 --dtype bfloat16
"""


@dataclass(frozen=True)
class Compiled:
    """One row of the table."""

    target: str
    kernel: str
    dtype: str
    head_dim: int  # 0: it knows no heads
    memory: str  # paged, contiguous, all options (see EPILOG), - where there is no difference
    tile: str
    registers: int  # per thread
    spills: int  # bytes per thread
    shared: int  # bytes per program
    shared_limit: int
    matrix: str
    warps: int
    stages: int


def parse_target(name: str) -> GPUTarget:
    """sm_90 -> NVIDIA, 32 threads per warp; gfx942 -> AMD, 64 threads per wavefront."""
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx9\w+", name):
        return GPUTarget("hip", name, 64)
    raise argparse.ArgumentTypeError(f"{name!r}: name a target as sm_90 (NVIDIA) or gfx942 (AMD)")


def shared_limit(target: GPUTarget) -> int:
    """Bytes of shared memory that one program may use."""
    return SHARED_LIMIT.get(target.arch, 227) * 1024


def sources(target: GPUTarget, dtype: torch.dtype, head_dims: list[int]) -> Iterator[tuple[dict, ASTSource, dict]]:
    """(columns, what to compile, options) in representative configurations: 8 KV heads that serve 4, blocks of 16."""
    element = POINTER[dtype]
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "sinks_ptr", "new_ptr", "cache_ptr"), element)
    types |= dict.fromkeys(("slots_ptr", "pairs_ptr"), "*i64") | {"logit_scale": "fp32", "cap": "fp32"}
    whole_numbers = ("starts", "firsts", "lengths", "dead", "tables", "places", "items", "arrived")
    types |= {f"{name}_ptr": "*i32" for name in whole_numbers} | {"parts_ptr": "*fp32"}
    on = Machine(target.backend == "hip", shared_limit(target))
    cases = itertools.product(head_dims, TILE_TOKENS, ("paged", "contiguous"))
    options_once = itertools.product(head_dims[:1], TILE_TOKENS, ("all options",))
    for head_dim, tokens, memory in itertools.chain(cases, options_once):
        everything = memory == "all options"
        paged = memory != "contiguous"
        tile = attention.specialise(tokens, 4, (head_dim, head_dim), 16, paged, everything, everything, dtype, on)
        size = " x ".join(str(tile.constants[name]) for name in ("TOKENS", "HEADS", "N"))
        absent = [] if everything else ["sinks_ptr", "cap", "window"]
        absent += ["parts_ptr", "arrived_ptr"] if tokens > 1 else []
        row = {"head_dim": head_dim, "memory": memory, "tile": size}
        constants = tile.constants | dict.fromkeys(absent) | {"CHAINED": chained(target)}
        yield row, _source(attention.attention_kernel, types, constants), tile.options
    row = {"head_dim": 0, "memory": "-", "tile": "256 rows"}
    planned = shares.specialise_plan(256, True, 64) | {"window": None}
    yield row, _source(shares.plan_kernel, types, planned), {"num_warps": 4, "num_stages": 1}
    for head_dim, (kernel, rows) in itertools.product(
        head_dims, ((cache.store_kernel, 8), (cache.copy_blocks_kernel, 16 * 8))
    ):
        constants = cache.specialise(8, head_dim, 16, rows)
        row = {"head_dim": head_dim, "memory": "-", "tile": f"{constants['ROWS']} rows"}
        yield row, _source(kernel, types, constants), {"num_warps": 4, "num_stages": 1}


def chained(target: GPUTarget) -> bool:
    """See `kernels.chain`."""
    return target.backend == "cuda" and target.arch >= 90


def fused_sources(
    target: GPUTarget, dtype: torch.dtype, head_dims: list[int]
) -> Iterator[tuple[dict, ASTSource, dict]]:
    """As `sources`: what a decoder computes around attention, at its widest: hidden 5120 and 16384, Qwen3's tokens."""
    others = {"eps": "fp32", "index_ptr": "*i32"}
    others |= {f"{name}_ptr": "*fp32" for name in ("rotation", "temperature", "partial", "logprobs")}
    others |= {f"{name}_ptr": "*i64" for name in ("positions", "slots", "keys", "tokens")}
    tiles, combine = sampling.specialise(151936)
    chain = {"CHAINED": chained(target)}
    cases: list[tuple[int, Any, dict[str, Any], str]] = [
        (0, layers.norm_kernel, layers.specialise_norm(5120) | {"bias_ptr": None}, "1 x {PADDED}"),
        (0, layers.norm_kernel, layers.specialise_norm(16384), "1 x {PADDED}"),
        (0, layers.silu_and_mul_kernel, layers.specialise_silu(14336), "1 x {TILE}"),
        (0, row_kernel, specialise_row(1024, True) | chain | {"bias_ptr": None}, "{ROWS} x {K_PAD}"),
        (0, row_kernel, specialise_row(4096, True) | chain, "{ROWS} x {K_PAD}"),
        (0, row_kernel, specialise_row(14336, False) | chain, "{ROWS} x {K_PAD}"),
        (0, sampling.sample_kernel, tiles, "1 x {TILE}"),
        (0, sampling.choose_kernel, combine, "1 x {PADDED}"),
    ]
    for head_dim in head_dims:
        heads = layers.specialise_rotate(32, 8, head_dim, 16) | chain
        cases.append((head_dim, layers.rotate_and_store_kernel, heads, "{ROWS} rows"))
    for head_dim, kernel, decided, tile in cases:
        types = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), POINTER[dtype]) | others
        constants = {name: value for name, value in decided.items() if name != "num_warps"}
        options = {"num_warps": decided.get("num_warps", 4), "num_stages": 1}
        row = {"head_dim": head_dim, "memory": "-", "tile": tile.format(**constants)}
        yield row, _source(kernel, types, constants), options


def _source(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """Pointers and strides are multiples of 16, as at run time for every model in use: wide loads depend on it."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, (name, type_) in enumerate(signature.items()) if type_[0] == "*" or name.startswith("stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if kernel.arg_names[i] != "stride_table"}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def registers_and_spills(compiled: Any, target: GPUTarget) -> tuple[int, int]:
    """From NVIDIA's cuobjdump, which Triton brings along, or from the AMD assembler's notes."""
    if target.backend == "hip":
        notes = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]))
        return int(notes["vgpr_count"]), int(notes["private_segment_fixed_size"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def compile_all(target: GPUTarget, dtype: torch.dtype, head_dims: list[int]) -> Iterator[Compiled]:
    for row, source, options in itertools.chain(
        sources(target, dtype, head_dims), fused_sources(target, dtype, head_dims)
    ):
        compiled = triton.compile(source, target=target, options=options)
        registers, spills = registers_and_spills(compiled, target)
        matrix = re.search(MATRIX[target.backend], compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"])
        yield Compiled(
            target=f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch),
            kernel=source.fn.__name__,
            dtype=str(dtype).removeprefix("torch."),
            registers=registers,
            spills=spills,
            shared=compiled.metadata.shared,
            shared_limit=shared_limit(target),
            matrix=matrix[0] if matrix else "-",
            warps=options["num_warps"],
            stages=options["num_stages"],
            **row,
        )


def show(rows: list[Compiled]) -> str:
    header = (
        "target",
        "kernel",
        "dtype",
        "head_dim",
        "memory",
        "tile",
        "registers",
        "spills",
        "shared",
        "warps",
        "matrix",
    )
    cells = [[str(getattr(row, name)) for name in header] for row in rows]
    for line, row in zip(cells, rows, strict=True):
        line[header.index("shared")] = f"{row.shared / 1024:.1f}"
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in [header, *cells])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile_ahead",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in POINTER}
    many = "; may be repeated (default: {})".format
    parser.add_argument("--target", action="append", type=parse_target, help="sm_NN, gfx9NN" + many("sm_90, gfx942"))
    parser.add_argument("--dtype", action="append", choices=dtypes, help="of K and V" + many("all three"))
    parser.add_argument("--head-dim", action="append", type=int, help="64" + many("64, 128, 256"))
    parser.add_argument("--json", action="store_true", help="print a list of objects, in place of the table")
    options = parser.parse_args(arguments)
    if not isinstance(attention.attention_kernel, triton.JITFunction):
        parser.error(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled in the same process; unset it"
        )
    rows = [
        compiled
        for target in options.target or [parse_target("sm_90"), parse_target("gfx942")]
        for dtype in options.dtype or dtypes
        for compiled in compile_all(target, dtypes[dtype], options.head_dim or [64, 128, 256])
    ]
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else show(rows))
    return 0 if all(row.shared <= row.shared_limit for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
