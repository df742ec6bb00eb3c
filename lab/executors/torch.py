"""The real executor, CPU or GPU, on the wall clock: performs Moves, runs the model over one ragged batch, samples."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.upload import upload
from lab.core import InputError, Plan, Sampled, Sequence
from lab.executors.batch import Rows, lay_out
from lab.executors.cache import KVCache
from lab.executors.replay import Replay
from lab.executors.sampling import Drawn, draw_of, sample
from lab.models import LanguageModel

MOST_ROWS = 2**14  # sequences in one step


class MemorySplit(NamedTuple):
    """Device memory, in bytes."""

    weights: int
    pool: int
    activations: int | None  # highest so far, above weights and pool; None where it is not known (CPU)


class Flight(NamedTuple):
    """A step that was launched and not yet collected."""

    sequences: tuple[Sequence, ...] = ()
    host: tuple[Tensor, ...] = ()  # what was drawn, or its copy under way to host memory
    alternatives: tuple[int, ...] = ()  # that each sequence asked for
    arrived: torch.cuda.Event | None = None


class TorchExecutor:
    """Implements `lab.executors.Executor`. Owns the pool of K and V, whose blocks the allocator's tables name."""

    def __init__(
        self,
        model: LanguageModel,
        pool_tokens: int,
        block: int = 16,
        *,
        poison: bool = False,
        replays: bool | None = None,
    ) -> None:
        """A pool of `pool_tokens` tokens, less what fills no block. `poison` fills it with NaN (see KVCache).

        `replays`: are steps of decodes prepared once and replayed; None: where it pays, on a GPU, if the model can.
        """
        if pool_tokens < block:
            rule = f"smaller than one block of {block}"
            raise InputError(f"a pool of {pool_tokens} tokens is {rule}: enlarge it or take smaller blocks")
        self.model = model
        self.device = model.device
        self.block = block
        num_blocks = pool_tokens // block
        try:
            self.cache = KVCache(model.kv, num_blocks, block, dtype=model.dtype, device=self.device, poison=poison)
        except RuntimeError as error:  # out of memory, on either kind of device
            asked = num_blocks * block * model.kv.bytes_per_token(model.dtype.itemsize)
            rule = f"takes {asked} bytes, more than {self.device} has free"
            raise InputError(f"a pool of {pool_tokens} tokens {rule}: make it smaller") from error
        self.compiled = False  # was a kernel compiled in the step launched last
        self._compiler = compile_counter() if self.device.type == "cuda" else None
        self._flights: deque[Flight] = deque()
        self._last = Flight()
        self._drawn = torch.zeros(MOST_ROWS, dtype=torch.int64, device=self.device)  # the last step's tokens
        replays = self.device.type == "cuda" and model.capturable if replays is None else replays
        self._replay = Replay(model, self.cache, self._drawn) if replays else None
        self._woken = threading.Event()
        self._base = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.reset_clock()

    @property
    def now(self) -> float:
        """Seconds since construction or `reset_clock()`."""
        return time.perf_counter() - self._start

    def reset_clock(self) -> None:
        """The run begins now: at 0 s, with no peak of activations."""
        self._start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def launch(self, plan: Plan, tables: Mapping[Sequence, Seq[int]]) -> None:
        """Queue a step. Tables are read here only. A token id of -1 stands for what the step before will draw."""
        before = self._prepared
        rows = lay_out(plan, tables, self.block)
        try:
            self.cache.perform(plan.moves)
            self._last = self._run(rows) if rows.rows else Flight()
        except torch.OutOfMemoryError as error:
            uses = f"weights {self.model.weight_bytes / 1e9:.1f} GB, pool {self.cache.nbytes / 1e9:.1f} GB"
            step = f"a step of {len(rows.token_ids)} tokens in {len(rows.rows)} rows"
            rule = f"{self.device} has no memory left for it beside {uses}"
            raise InputError(f"{step}: {rule}: make the pool smaller (--pool or --kv-memory)") from error
        self._flights.append(self._last)
        self.compiled = self._prepared > before

    def collect(self) -> dict[Sequence, list[Sampled]]:
        """Sampled tokens of the oldest launch; waits for it."""
        flight = self._flights.popleft()
        if flight.arrived is not None:
            flight.arrived.synchronize()
        if not flight.sequences:
            return {}
        tokens, logprobs, top_tokens, top_logprobs = (column.tolist() for column in flight.host)
        sampled = {}
        for i, s in enumerate(flight.sequences):
            top = tuple(zip(top_tokens[i], top_logprobs[i], strict=True))[: flight.alternatives[i]]
            sampled[s] = [Sampled(tokens[i], logprobs[i], top)]
        return sampled

    def wait(self, until_s: float) -> None:
        """Sleep until `until_s` on this clock, or until `wake()`."""
        left = until_s - self.now
        if left > 0:
            self._woken.wait(min(left, threading.TIMEOUT_MAX))
        self._woken.clear()

    def wake(self) -> None:
        """End a `wait`, from any thread; without one, the next returns at once."""
        self._woken.set()

    @property
    def memory(self) -> MemorySplit:
        activations = None
        if self.device.type == "cuda":
            activations = torch.cuda.max_memory_allocated(self.device) - self._base
        return MemorySplit(self.model.weight_bytes, self.cache.nbytes, activations)

    @property
    def _prepared(self) -> int:
        """Kernels that were compiled, and steps that were captured, so far."""
        compiled = self._compiler.count if self._compiler else 0
        return compiled + (self._replay.captured if self._replay else 0)

    @torch.inference_mode()
    def _run(self, rows: Rows) -> Flight:
        before = {s: i for i, s in enumerate(self._last.sequences)} if rows.unknown else {}
        assert all(s in before for _, s in rows.unknown), "unknown tokens are those that the step before draws"
        draws = [draw_of(s, len(self.model.eos)) for s in rows.sampled]
        if self._replay is not None and self._replay.takes(rows, draws):
            tokens, logprobs = self._replay.run(rows, draws, before)
            nothing = torch.empty(len(draws), 0)
            drawn = Drawn(tokens, logprobs, nothing, nothing)
        else:
            batch = rows.on(self.device)
            if rows.unknown:
                places = upload(torch.tensor([place for place, _ in rows.unknown]), self.device)
                sources = upload(torch.tensor([before[s] for _, s in rows.unknown]), self.device)
                batch.token_ids[places] = self._drawn[sources]
            logits = self.model.logits(batch, self.cache.k, self.cache.v)  # [S, V]
            if not draws:
                return Flight(arrived=self._mark())
            drawn = sample(logits, draws)
            self._drawn[: len(draws)].copy_(drawn.tokens)
        host = tuple(column.to("cpu", non_blocking=True, copy=True) for column in drawn)
        return Flight(tuple(rows.sampled), host, tuple(draw.alternatives for draw in draws), self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))  # not that of the current device, which may be another
        return event


class CompileCounter:
    """Counts the kernels that Triton makes ready in this process: compiled, or found compiled on disk."""

    def __init__(self) -> None:
        from triton import knobs  # optional: absent where there is no GPU

        self.count = 0
        self._before = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = self._compiled

    def _compiled(self, **event: object) -> object:
        self.count += 1
        return self._before(**event) if self._before else None


@cache
def compile_counter() -> CompileCounter:
    """The one of this process: Triton has one hook for all executors."""
    return CompileCounter()
