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
from lab.executors.batch import Batch, build
from lab.executors.cache import KVCache
from lab.executors.sampling import Drawn, draw_of, sample
from lab.models import LanguageModel


class MemorySplit(NamedTuple):
    """Device memory, in bytes."""

    weights: int
    pool: int
    activations: int | None  # highest so far, above weights and pool; None where it is not known (CPU)


class Flight(NamedTuple):
    """A step that was launched and not yet collected."""

    sequences: tuple[Sequence, ...]
    drawn: Drawn | None  # on the device
    host: tuple[Tensor, ...]  # the same, or its copy under way to host memory
    alternatives: tuple[int, ...]  # that each sequence asked for
    arrived: torch.cuda.Event | None


class TorchExecutor:
    """Implements `lab.executors.Executor`. Owns the pool of K and V, whose blocks the allocator's tables name."""

    def __init__(self, model: LanguageModel, pool_tokens: int, block: int = 16, *, poison: bool = False) -> None:
        """A pool of `pool_tokens` tokens, less what fills no block. `poison` fills it with NaN (see KVCache)."""
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
        self._last: Flight | None = None
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
        compilations = self._compiler.count if self._compiler else 0
        self.cache.perform(plan.moves)
        batch = build(plan, tables, self.block, self.device)
        self._last = Flight((), None, (), (), None) if batch is None else self._run(batch)
        self._flights.append(self._last)
        self.compiled = self._compiler is not None and self._compiler.count > compilations

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

    @torch.inference_mode()
    def _run(self, batch: Batch) -> Flight:
        if batch.unknown:
            self._fill(batch)
        logits = self.model.logits(batch.packed, self.cache.k, self.cache.v)  # [S, V]
        if not batch.sampled:
            return Flight((), None, (), (), self._mark())
        draws = [draw_of(s, len(self.model.eos)) for s in batch.sampled]
        drawn = sample(logits, draws)
        host = tuple(column.to("cpu", non_blocking=True) for column in drawn)
        return Flight(batch.sampled, drawn, host, tuple(draw.alternatives for draw in draws), self._mark())

    def _fill(self, batch: Batch) -> None:
        """Token ids that the step before drew, taken where they lie."""
        assert self._last is not None, "no step before this one gives its unknown tokens"
        assert self._last.drawn is not None, "the step before this one sampled nothing"
        row = {s: i for i, s in enumerate(self._last.sequences)}
        places = upload(torch.tensor([place for place, _ in batch.unknown]), self.device)
        rows = upload(torch.tensor([row[s] for _, s in batch.unknown]), self.device)
        batch.packed.token_ids[places] = self._last.drawn.tokens[rows]

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
