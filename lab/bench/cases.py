"""Workloads to time, one round of one, and the floor that no engine could pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from random import Random

from lab.allocators import ALLOCATORS
from lab.core import Group, Limits, Request, SamplingParams
from lab.engine import Engine
from lab.executors.cache import free_bytes
from lab.executors.torch import TorchExecutor
from lab.models.loading import load
from lab.pool import pool_size
from lab.record import Recorder
from lab.run import Run, requests_of
from lab.schedulers import SCHEDULERS
from lab.shapes import ModelShape, shape


@dataclass(frozen=True)
class Case:
    """A workload, all of whose requests come at once."""

    model: str  # a shape
    requests: Callable[[], list[Request]]
    pool: str  # as lab.pool reads it
    allocator: str = "paged"
    scheduler: str = "continuous"
    watermark: float | None = None
    tokens: int = Limits().tokens  # of a step
    peers: str = ""  # what others reach on an H100 80GB HBM3 with the same requests


def nano() -> list[Request]:
    """nano-vllm's own benchmark: 256 prompts and answers of 100 to 1024 tokens, at temperature 0.6."""
    random = Random(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    params = [SamplingParams(max_tokens=output, temperature=0.6) for output in outputs]
    return [Request(i, 0.0, *one) for i, one in enumerate(zip(prompts, outputs, params, strict=True))]


def opt13b() -> list[Request]:
    """256 requests of lengths like ShareGPT's, of which the paper's pool holds an eighth at a time."""
    run = Run(workload="opt13b-256", arrivals="all", rate=None, duration_s=None, count=256)  # of no vocabulary
    vocabulary = shape("opt-13b").vocab
    return [replace(r, prompt=[token % vocabulary for token in r.prompt]) for r in requests_of(run)]


def alone() -> list[Request]:
    """One user, who waits for a long answer."""
    return [Request(0, 0.0, [5] * 512, 256)]


OPT = Case("opt-13b", opt13b, "15728")
CASES = {
    "qwen3-0.6b": Case("qwen3-0.6b", nano, "90%", tokens=8192, peers="vLLM 0.24.0: 17,830 to 18,800"),
    "llama-3-8b": Case("llama-3-8b", nano, "90%", tokens=8192, peers="vLLM 0.24.0: 8,080"),
    "qwen3-0.6b-alone": Case("qwen3-0.6b", alone, "20000"),
    "opt-13b": replace(OPT, peers="vLLM 0.24.0: 1,967 to 1,980, 423 preemptions"),
    "opt-13b-eager-admission": replace(OPT, watermark=0.0),
}
STEPS = {"qwen3-0.6b": 2.5, "llama-3-8b": 1.25}  # shape: the bar at batch 1, times the reading of the weights


@dataclass(frozen=True)
class Round:
    """One round of a case."""

    seconds: float
    output_tokens: int
    steps: int
    preemptions: int
    recorded: bool


def serve(
    case: Case,
    executor: TorchExecutor,
    requests: list[Request],
    depth: int,
    recorded: bool,
    after: Callable[[int], bool] = lambda step: True,
) -> Round:
    """All requests of a case, through policies of their own; `after` each step, is it to go on?"""
    limits = Limits(tokens=case.tokens)
    allocator = ALLOCATORS.get(case.allocator)(executor.cache.num_blocks * executor.block, executor.block, limits)
    scheduler = SCHEDULERS.get(case.scheduler)(allocator, limits, batch=8, watermark=case.watermark)
    ended: list[Group] = []
    steps = 0

    def go_on() -> bool:
        nonlocal steps
        steps += 1
        return after(steps)

    executor.reset_clock()
    with Recorder(None, {}) if recorded else nullcontext() as recorder:
        engine = Engine(scheduler, executor, recorder, on_end=ended.append, depth=depth)
        start_s = time.perf_counter()
        engine.run(requests, go_on=go_on)
        seconds = time.perf_counter() - start_s
    tokens = sum(len(output) - len(g.request.prompt) for g in ended for output in g.outputs())
    return Round(seconds, tokens, steps, sum(group.preemptions for group in ended), recorded)


def floor_s(model: ModelShape, requests: list[Request], steps: int, read: float, rate: float) -> float:
    """Seconds at `read` bytes/s and `rate` operations/s. The first output token comes with the prompt."""
    pairs = [(len(r.prompt), r.output or 1) for r in requests]
    positions = sum((prompt + 1) * (n - 1) + (n - 1) * (n - 2) // 2 for prompt, n in pairs)  # that decoding reads
    moved = positions * model.kv_bytes_per_token() + steps * 2 * model.parameters_read
    operations = sum(p * model.linear_flops_per_token + model.attention_flops(p, p) for p, _ in pairs)
    return moved / read + operations / rate


def executor_for(case: Case, device: str) -> TorchExecutor:
    model = load(f"random:{case.model}", device=device)
    size = pool_size(case.pool, model.kv.bytes_per_token(model.dtype.itemsize), 16, free_bytes(model.device))
    return TorchExecutor(model, size.tokens)
