"""Steps in which every row computes one token: prepared once for each size of batch, then replayed.

A step of decodes differs from the last only in numbers: tokens, positions, slots, lengths, block tables. They are
written into buffers that stay where they are, and the whole step (model, sampling, the tokens handed to the next step)
is replayed behind them; on a GPU as a CUDA graph, whose hundreds of launches cost the host one. Batches are filled up
to the next size with rows of length 0, which attend to nothing, store nowhere (slot -1), and are cut off.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.ragged import Ragged, Tiles
from lab.core import Sequence
from lab.executors.batch import Rows
from lab.executors.cache import KVCache
from lab.executors.sampling import Draw, plain
from lab.models import LanguageModel, Packed

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, 513, 32))  # rows of a batch
# token, position, slot, noise key, temperature, row of the step before; then first, length, dead, rows longest first
COLUMNS = 10
LONGEST = 1024  # positions; contexts are told apart by powers of four beyond
NOWHERE = -1
ALIGNED = 4  # int32 entries: Triton compiles anew for a pointer that is aligned less


class Key(NamedTuple):
    """What a prepared step depends on."""

    size: int  # rows
    longest: int  # no row reads more positions: long ones are split over several programs
    paged: bool
    dead: bool


@dataclass(eq=False)
class Step:
    """One prepared step."""

    key: Key
    columns: Tensor  # int64 [COLUMNS, pitch], on the device; the first `size` of each are in use
    starts: Tensor  # int32 [size + 1]
    all_rows: Tensor  # int64 [size]
    graph: torch.cuda.CUDAGraph | None = None


class Replay:
    """The prepared steps of one model and one pool."""

    def __init__(self, model: LanguageModel, cache: KVCache, drawn: Tensor) -> None:
        """`drawn` int64 [rows]: where each step, replayed or not, leaves its tokens for the next one."""
        self.model = model
        self.cache = cache
        self.drawn = drawn
        self.captures = model.device.type == "cuda"  # without graphs it does the same, launch by launch
        self.captured = 0  # graphs, so far
        width = -(-min(model.max_length, cache.num_blocks * cache.block) // cache.block)
        self._logprobs = torch.zeros(SIZES[-1], dtype=torch.float32, device=model.device)
        self._tables = torch.zeros((SIZES[-1], width), dtype=torch.int32, device=model.device)
        self._steps: dict[Key, Step] = {}
        self._pool: Any = None  # memory that all graphs share: only one runs at a time
        self._sample = kernels.for_device(model.device).sample

    def takes(self, rows: Rows, draws: list[Draw]) -> bool:
        """Is this a step of decodes alone, each of which is sampled, as one pass over the logits can?"""
        count, live = len(rows.rows), len(draws)
        decodes = len(rows.token_ids) == count <= SIZES[-1] and rows.last == list(range(live))
        return live > 0 and decodes and plain(draws)

    @torch.inference_mode()
    def run(self, rows: Rows, draws: list[Draw], before: Mapping[Sequence, int]) -> tuple[Tensor, Tensor]:
        """Launch the step -> tokens [S], log-probabilities [S], valid until the next one.

        `before` says in which row the step before drew for a sequence.
        """
        size = next(size for size in SIZES if size >= len(rows.rows))
        reads, longest = max(row.length + row.dead for row in rows.rows), LONGEST
        while longest < reads:
            longest *= 4
        step = self._step(Key(size, longest, rows.paged, any(row.dead for row in rows.rows)))
        self._fill(step, rows, draws, before)
        if step.graph is not None:
            step.graph.replay()
        else:
            self._body(step)
            if self.captures:
                self._capture(step)
        return self.drawn[: len(draws)], self._logprobs[: len(draws)]

    def _step(self, key: Key) -> Step:
        if key not in self._steps:
            device = self.model.device
            pitch = -(-key.size // ALIGNED) * ALIGNED
            columns = torch.zeros((COLUMNS, pitch), dtype=torch.int64, device=device)
            starts = torch.arange(key.size + 1, dtype=torch.int32, device=device)
            self._steps[key] = Step(key, columns, starts, torch.arange(key.size, device=device))
        return self._steps[key]

    def _fill(self, step: Step, rows: Rows, draws: list[Draw], before: Mapping[Sequence, int]) -> None:
        """Numbers of this step into the buffers: a copy of the columns, and one of the tables."""
        count, live = len(rows.rows), len(draws)
        pinned = self.model.device.type == "cuda"
        host = torch.zeros(step.columns.shape, dtype=torch.int64, pin_memory=pinned)
        columns = host.numpy()
        lengths = [row.length for row in rows.rows]
        columns[0, :count] = rows.token_ids
        columns[1, :count] = rows.positions
        columns[2] = NOWHERE
        columns[2, :count] = rows.slots
        columns[3, :live] = [draw.key for draw in draws]
        columns[4].view(np.float64)[:live] = [draw.params.temperature for draw in draws]
        columns[5] = NOWHERE
        for place, s in rows.unknown:
            columns[5, place] = before[s]
        columns[6, :count] = [row.first for row in rows.rows]
        columns[7, :count] = lengths
        columns[8, :count] = [row.dead for row in rows.rows]
        columns[9, : step.key.size] = np.argsort(-columns[7, : step.key.size], kind="stable")
        step.columns.copy_(host, non_blocking=True)
        needed = [-(-length // rows.block) for length in lengths] if step.key.paged else [1] * count
        tables = torch.zeros((count, max(needed)), dtype=torch.int32, pin_memory=pinned)
        filled = tables.numpy()
        for i, (row, blocks) in enumerate(zip(rows.rows, needed, strict=True)):
            filled[i, :blocks] = row.table[:blocks]
        self._tables[:count, : max(needed)].copy_(tables, non_blocking=True)

    def _body(self, step: Step) -> None:
        """What is captured: from the columns to tokens and log-probabilities."""
        size = step.key.size
        tokens, positions, slots, keys, temperature, before = step.columns[:6, :size]
        firsts, lengths, dead, order = step.columns[6:].int()[:, :size]
        token_ids = torch.where(before >= 0, self.drawn[before.clamp(min=0)], tokens)
        places = torch.stack([order, torch.zeros_like(order)], dim=1)
        ragged = Ragged(
            starts=step.starts,
            firsts=firsts,
            lengths=lengths,
            dead=dead,
            tables=self._tables[:size],
            tiles=(Tiles(1, places),),
            num_tokens=size,
            num_blocks=0,  # the host has looked at them
            block=self.cache.block,
            paged=step.key.paged,
            any_dead=step.key.dead,
            longest=step.key.longest,
        )
        batch = Packed(token_ids, positions, slots, step.all_rows, ragged)
        logits = self.model.logits(batch, self.cache.k, self.cache.v)
        drawn, logprobs = self._sample(logits, temperature.view(torch.float64).float(), keys)
        self.drawn[:size].copy_(drawn)
        self._logprobs[:size].copy_(logprobs)

    def _capture(self, step: Step) -> None:
        """Has run once, launch by launch, so that all kernels are there. Capturing computes nothing."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._body(step)
        except RuntimeError as error:
            self.captures = False
            print(f"steps are not captured as CUDA graphs, and so are slower: {error}", file=sys.stderr)
            return
        step.graph = graph
        self._pool = graph.pool()
        self.captured += 1
