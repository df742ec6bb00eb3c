"""How attention is cut into programs on which GPU: measured where `kernels.tune` has been, a rule of thumb elsewhere.

`tuned.json` keeps what `python -m kernels.tune` found: {name of the GPU: {`key` of a shape: Tuning}}. Paged and
contiguous memory share an entry, so that what is measured between them is the block table and nothing else.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.ragged import TILE_TOKENS

TUNED = Path(__file__).with_name("tuned.json")
AMPLE_SHARED_BYTES = 163 * 1024  # the A100's
HOPPER_SHARED_BYTES = 227 * 1024
OTHER_SHARED_BYTES = 6 * 1024  # that a program uses besides what it loads ahead
MOST_RESIDENT = 8  # on a processor: registers suffice for so many of 4 warps
FEWEST_KEYS = 128  # of a share (see kernels.shares): with fewer, starting it and combining cost more than it saves
MAX_HEAD_DIM = 256


class Machine(NamedTuple):
    """What a configuration depends on besides the shape."""

    amd: bool
    shared_bytes: int  # on-chip memory that one program may use
    processors: int = 0
    name: str = ""


@functools.cache
def machine(device: torch.device) -> Machine:
    """The GPU at hand; a processor that is not asked for anything in the interpreter."""
    if device.type != "cuda":
        return Machine(False, 0)
    found = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    shared = 0 if amd else found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Machine(amd, shared, found.multi_processor_count, found.name)


class Tuning(NamedTuple):
    """A program's tile: `tokens` x `heads` rows that read `keys` at a time."""

    tokens: int  # 1 in a decode, else a divisor of the batch's tile
    heads: int  # of one group
    keys: int
    warps: int
    stages: int  # how far ahead the loop loads, plus one
    turns: int = 2  # a decode's: shares that each place for a program has one after the other, where rows are many
    registers: int | None = None  # most per thread: with 128, two programs of 8 warps fit on a processor of NVIDIA's


def key(tile: int, group: int, head_dim: int, itemsize: int) -> str:
    """What a measured configuration holds for: "decode, groups of 4, head_dim 128, 2 bytes"."""
    kind = dict(zip(TILE_TOKENS, ("decode", "chunk", "prompt"), strict=True))[tile]
    return f"{kind}, groups of {group}, head_dim {head_dim}, {itemsize} bytes"


@functools.cache
def tuned(path: Path = TUNED) -> dict[str, dict[str, Tuning]]:
    entries = json.loads(path.read_text())
    return {gpu: {name: Tuning(**found) for name, found in shapes.items()} for gpu, shapes in entries.items()}


def best(tile: int, group: int, head_dim: int, itemsize: int, on: Machine) -> Tuning:
    """`head_dim`: the larger of the two, padded to a power of two."""
    found = tuned().get(on.name, {}).get(key(tile, group, head_dim, itemsize))
    return found or rule_of_thumb(tile, group, head_dim, itemsize, on)


def resident(tuning: Tuning, head_dims: Sequence[int], itemsize: int, on: Machine) -> int:
    """Programs that all processors work on at a time: on each as many as hold what they load ahead."""
    ahead = (tuning.stages - 1) * tuning.keys * sum(head_dims) * itemsize
    return on.processors * max(1, min(MOST_RESIDENT, on.shared_bytes // (ahead + OTHER_SHARED_BYTES)))


def rule_of_thumb(tile: int, group: int, head_dim: int, itemsize: int, on: Machine) -> Tuning:
    """Good where nothing was measured, from what compiling ahead of time tells.

    head_dim  bytes   decode (1 token)              chunk (16 tokens)               prompt
    up to 64      2   16 rows, 64 keys, 4 warps     64 rows,  64 keys, 4 warps      128 rows, 128 keys, 8 warps
         128      2   16 rows, 64 keys, 4 warps     64 rows,  64 keys, 4 warps      128 rows, 128 keys, 8 warps
         256      2   16 rows, 32 keys, 4 warps     64 rows,  32 keys, 8 warps       64 rows,  32 keys, 8 warps

    Prompts read 128 keys at a time where 3 stages of them fit (Hopper and later), elsewhere, and in float32, 64.
    float32 has half as many keys from 128 on, and 64 rows shared by 8 warps from 65 on. Loads run one step less ahead
    on GPUs with less shared memory than an A100 (sm_86, sm_89, sm_120); there prompts in float32 fit up to head_dim 64.
    """
    row_bytes = head_dim * itemsize
    wide = row_bytes > 256  # a row of the result takes so many registers that 8 warps must share 64 rows
    small = on.shared_bytes < AMPLE_SHARED_BYTES
    keys = min(64, max(16, 16384 // row_bytes))  # 16 KiB of K per step, and as much of V
    heads = 1 << (group - 1).bit_length()
    if tile == 1:
        return Tuning(1, min(max(heads, 16), 128), keys, 4, 2 if on.amd else 4 - small)
    if tile == TILE_TOKENS[1]:
        heads = min(heads, 4)
        return Tuning(tile, heads, keys, 8 if wide and heads > 2 else 4, 2 if on.amd else 3 - small)
    heads = min(heads, 2)
    if itemsize == 2 and not wide and on.shared_bytes >= HOPPER_SHARED_BYTES:
        keys *= 2
    return Tuning((64 if wide else 128) // heads, heads, keys, 8, 2 if on.amd else 3 - small)
