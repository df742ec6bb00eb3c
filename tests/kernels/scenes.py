"""Random steps to try the kernels on, and attention in float64, written a second time and as plainly as possible."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.ragged import Ragged, Row


@dataclass
class Scene:
    """One step over a cache that holds NaN wherever no live position of some row lies."""

    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [num_blocks, block, Hk, D]
    v_cache: Tensor  # [num_blocks, block, Hk, Dv]
    rows: list[Row]
    keys: list[Tensor]  # per row [length, Hk, D]: what its positions hold
    values: list[Tensor]  # per row [length, Hk, Dv]
    block: int
    paged: bool
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self, attention: Any, device: str = "cpu", empty: tuple[int, ...] = ()) -> Tensor:
        """`empty`: rows of which nothing is left but their place, as those that fill up a batch."""
        ragged = Ragged.build(self.rows, self.block, self.paged, device)
        for column in (ragged.firsts, ragged.lengths, ragged.dead):
            column[list(empty)] = 0
        tensors = (tensor.to(device) for tensor in (self.q, self.k_cache, self.v_cache))
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        return attention(*tensors, ragged, scale=self.q.shape[2] ** -0.5, **options).cpu()

    def expected(self) -> Tensor:
        """[T, H, Dv] in float64: one query, one head, one key after the other's dot product; no code shared."""
        start, out = 0, []
        for row, keys, values in zip(self.rows, self.keys, self.values, strict=True):
            for i in range(row.num_queries):
                out.append(self._one_query(self.q[start + i].double(), row.first + i, keys.double(), values.double()))
            start += row.num_queries
        return torch.stack(out)

    def _one_query(self, q: Tensor, position: int, keys: Tensor, values: Tensor) -> Tensor:
        window, cap, sinks = (self.options.get(name) for name in ("window", "softcap", "sinks"))
        seen = [j for j in range(len(keys)) if j <= position and (window is None or position - j < window)]
        group = q.shape[0] // keys.shape[1]
        heads = []
        for head in range(q.shape[0]):
            logits = keys[seen, head // group] @ q[head] * q.shape[1] ** -0.5
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head : head + 1].double()])
            weights = logits.softmax(0)[: len(seen)]
            heads.append(weights @ values[seen, head // group])
        return torch.stack(heads)


def make_scene(
    seed: int,
    rows: list[tuple[int, int, int]],
    *,
    block: int = 16,
    paged: bool = True,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    extra_blocks: int = 3,
    **options: Any,
) -> Scene:
    """rows: (query tokens, tokens before them, dead positions). A row's context ends with its last query token."""
    random.seed(seed)
    torch.manual_seed(seed)
    needed = [-(-(count + before) // block) for count, before, _ in rows]
    tables: list[Sequence[int]]
    if paged:
        ids = random.sample(range(sum(needed) + extra_blocks), sum(needed))
        tables = [[ids.pop() for _ in range(blocks)] for blocks in needed]
    else:
        order = random.sample(range(len(rows)), len(rows))
        bases = {row: 1 + sum(needed[other] for other in order[:place]) for place, row in enumerate(order)}
        tables = [range(bases[row], bases[row] + needed[row]) for row in range(len(rows))]
    num_blocks = sum(needed) + extra_blocks
    k_cache = torch.full((num_blocks, block, heads[1], dims[0]), float("nan"), dtype=dtype)
    v_cache = torch.full((num_blocks, block, heads[1], dims[1]), float("nan"), dtype=dtype)
    keys = [torch.randn(count + before, heads[1], dims[0]).to(dtype) for count, before, _ in rows]
    values = [torch.randn(count + before, heads[1], dims[1]).to(dtype) for count, before, _ in rows]
    for table, k, v in zip(tables, keys, values, strict=True):
        for position in range(len(k)):
            k_cache[table[position // block], position % block] = k[position]
            v_cache[table[position // block], position % block] = v[position]
    full = [
        Row(count, before, count + before, dead, table)
        for (count, before, dead), table in zip(rows, tables, strict=True)
    ]
    q = torch.randn(sum(row.num_queries for row in full), heads[0], dims[0]).to(dtype)
    return Scene(q, k_cache, v_cache, full, keys, values, block, paged, options)


def random_rows(seed: int, longest: int = 40) -> list[tuple[int, int, int]]:
    """A mixture: a prompt, a chunk of one, decodes, some with dead positions, in random order."""
    rng = random.Random(seed)
    prompt = (rng.randint(2, longest), 0, rng.choice((0, rng.randint(1, 9))))
    chunk = (rng.randint(2, 20), rng.randint(1, longest), 0)
    decodes = [(1, rng.randint(0, 2 * longest), rng.choice((0, 0, rng.randint(1, 99)))) for _ in range(3)]
    rows = [prompt, chunk, *decodes]
    rng.shuffle(rows)
    return rows


# (name, options of make_scene): each feature alone and all of them together
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "group of 3 over 2": {"heads": (6, 2)},
    "one KV head for 7": {"heads": (7, 1)},
    "no groups": {"heads": (3, 3)},
    "values narrower than keys": {"dims": (24, 16)},
    "values wider than keys": {"dims": (8, 40)},
    "window of 1": {"window": 1},
    "window of 7": {"window": 7},
    "soft cap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0])},
    "everything": {
        "heads": (6, 2),
        "dims": (24, 16),
        "window": 9,
        "softcap": 2.0,
        "sinks": torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, 9.0]),
    },
}


@contextmanager
def poison() -> Iterator[None]:
    """Memory that torch allocates and nobody wrote holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.zeros(1).new_empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
