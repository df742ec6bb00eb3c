"""How large a pool is, as one says it: in tokens, in bytes, or as a share of what is free."""

from __future__ import annotations

import re
from typing import NamedTuple

from lab.core import InputError

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


class PoolSize(NamedTuple):
    tokens: int  # whole blocks
    left_over: int  # bytes that fill no block


def pool_size(size: str | int, bytes_per_token: int, block: int, free_bytes: int | None = None) -> PoolSize:
    """What a pool of `size` holds, rounded down to whole blocks of `block` tokens.

    `size` is a number of tokens (15728), of bytes ("12GiB", "800 MB"), or a share of `free_bytes` ("90%", "0.9").
    """
    if block < 1:
        raise InputError(f"block size {block}: must be at least 1 token; the paper's is 16")
    text = str(size).strip().lower().replace("_", "")
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?) ?(%|(?:[kmg]i?)?b)?", text)
    if match is None:
        raise InputError(
            f"pool size {size!r}: give tokens (15728), bytes (12GiB, 800MB) or a share of free memory (90%)"
        )
    number, unit = float(match[1]), match[2]
    if number <= 0:
        raise InputError(f"pool size {size!r}: must be above zero; 15728 tokens or 12GiB is the paper's")
    if unit == "%" or (unit is None and "." in match[1]):
        share = number / 100 if unit else number
        if share >= 1:
            raise InputError(f"pool size {size!r}: a share of free memory must be below 1 (100%): try 90%")
        if free_bytes is None:
            raise InputError(f"pool size {size!r}: free memory is not known on this device; give tokens or bytes")
        held = int(share * free_bytes)
    else:
        held = int(number * UNITS[unit[:-1]]) if unit else int(match[1]) * bytes_per_token
    block_bytes = block * bytes_per_token
    blocks, left_over = divmod(held, block_bytes)
    if not blocks:
        fits = f"it holds no block of {block} tokens ({block_bytes} bytes)"
        raise InputError(f"pool size {size!r}: {fits}; enlarge the pool or take smaller blocks")
    return PoolSize(blocks * block, left_over)
