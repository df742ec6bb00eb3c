"""Whole workloads, single steps, the start, and a model on this CPU beside transformers' own generate."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from kernels.timing import measure_floors
from lab.allocators import ALLOCATORS
from lab.bench.cases import CASES, STEPS, Case, executor_for, floor_s, serve
from lab.core import Limits, Request
from lab.engine import Engine
from lab.executors.torch import TorchExecutor
from lab.models.loading import load, load_tokenizer
from lab.record import Recorder
from lab.run import Run, real, requests_of
from lab.schedulers import SCHEDULERS
from lab.shapes import shape

POLICIES = [
    ("paged", "continuous"),
    ("contiguous-max", "continuous"),
    ("contiguous-oracle", "continuous"),
    ("contiguous-max", "static"),
]
Rows = Iterator[dict[str, Any]]  # as they are measured, so that none is lost


def ceilings(device: str) -> tuple[float, float]:
    """Bytes per second that the device reads, operations per second of a large product: measured now."""
    measured, _ = measure_floors(device)
    read, rate = measured.read * 1e6, measured.matmul * 1e6
    print(f"{torch.cuda.get_device_name()}: reads {read / 1e12:.2f} TB/s, multiplies {rate / 1e12:.0f} TFLOP/s\n")
    return read, rate


def throughput(names: list[str], rounds: int, depth: int, device: str) -> Rows:
    read, rate = ceilings(device)
    heads = f"{'case':26} {'output tok/s':>12} {'spread':>7} {'recorded':>9} {'of floor':>9}"
    print(f"{heads} {'ms/step':>8} {'steps':>6} {'preempted':>9}  others")
    executor, held = None, ""
    for name in names:
        case = CASES[name]
        if held != case.model + case.pool:
            executor = None
            real().release()  # its memory first
            executor, held = executor_for(case, device), case.model + case.pool
        assert executor is not None
        requests = case.requests()
        serve(case, executor, requests, depth, recorded=True)
        seen = [serve(case, executor, requests, depth, recorded=i % 2 == 1) for i in range(rounds)]
        speeds = {r: [one.output_tokens / one.seconds for one in seen if one.recorded == r] for r in (False, True)}
        plain = statistics.median(speeds[False])
        recorded = statistics.median(speeds[True]) if speeds[True] else float("nan")
        floor = floor_s(shape(case.model), requests, seen[0].steps, read, rate)
        tokens, steps = seen[0].output_tokens, seen[0].steps
        spread = 100 * (max(speeds[False]) / min(speeds[False]) - 1)
        line = f"{name:26} {plain:12,.0f} {spread:6.1f}% {recorded:9,.0f} {plain * floor / tokens:9.2f}"
        line += f" {1e3 * tokens / plain / steps:8.2f} {steps:6} {seen[0].preemptions:9}"
        print(f"{line}  {case.peers}", flush=True)
        known = {"tokens_per_s": plain, "recorded_tokens_per_s": recorded, "floor_s": floor, "peers": case.peers}
        yield {"case": name, "depth": depth, **known, "rounds": [asdict(one) for one in seen]}


def step(device: str, context: int = 512, steps: int = 64) -> Rows:
    """Batch 1: what one user alone waits for a token, the host's work in between, and hidden."""
    read, _ = ceilings(device)
    for name, bar in STEPS.items():
        executor = executor_for(Case(name, list, "20000"), device)
        floor_ms = 1e3 * executor.model.weight_bytes / read
        request = Request(0, 0.0, [5] * context, 2 * steps)
        found: list[dict[str, Any]] = []
        for depth in (0, 0, 1):  # the first compiles and captures
            with Recorder(None, {}) as recorder:
                limits = Limits()
                scheduler = SCHEDULERS.get("continuous")(ALLOCATORS.get("paged")(20000, 16, limits), limits)
                Engine(scheduler, executor, recorder, depth=depth).run([request])
            times = recorder.record().steps
            step_ms = 1e3 * float((times["end_s"] - times["start_s"]).iloc[-steps:].median())
            found.append({"case": name, "depth": depth, "step_ms": step_ms, "weights_ms": floor_ms, "bar": bar})
        for row in found[1:]:
            share = f"{row['step_ms'] / floor_ms:.2f} times the reading of its weights (bar: {bar})"
            print(f"{name:14} depth {row['depth']} {row['step_ms']:6.2f} ms a step, {share}", flush=True)
        yield from found[1:]
        del executor


def policies(
    rounds: int, device: str, model: str = "opt-13b", rows: int = 7, context: int = 300, steps: int = 128
) -> Rows:
    """The same decodes under each policy, in turn: who compares memory must not compare kernels."""
    executor = executor_for(Case(model, list, "15728"), device)
    limits = Limits(length=min(2048, executor.model.max_length))
    requests = [Request(i, 0.0, [5] * context, steps) for i in range(rows)]
    found: dict[tuple[str, str], list[float]] = {policy: [] for policy in POLICIES}
    for allocator, scheduler in [*POLICIES, *POLICIES * rounds]:  # the first of each compiles and captures
        with Recorder(None, {}) as recorder:
            memory = ALLOCATORS.get(allocator)(executor.cache.num_blocks * executor.block, executor.block, limits)
            Engine(SCHEDULERS.get(scheduler)(memory, limits, batch=rows), executor, recorder, depth=1).run(requests)
        times = recorder.record().steps
        seconds = (times["end_s"] - times["start_s"]).iloc[-steps // 2 : -1]  # long after the prompts
        found[allocator, scheduler].append(1e3 * float(seconds.median()))
    base = statistics.median(found[POLICIES[0]][1:])
    for (allocator, scheduler), times_ms in found.items():
        step_ms = statistics.median(times_ms[1:])
        name, spread = f"{allocator}, {scheduler}", max(times_ms[1:]) / min(times_ms[1:]) - 1
        print(f"{name:30} {step_ms:7.3f} ms a step of {rows} ({step_ms / base - 1:+.1%}; rounds spread {spread:.1%})")
        yield {
            "case": name,
            "rows": rows,
            "context": context,
            "step_ms": times_ms[1:],
            "over_paged": step_ms / base - 1,
        }


def startup(device: str, model: str = "qwen3-0.6b") -> Rows:
    """A process of its own, first with nothing compiled, then with what the first has left on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            start_s = time.perf_counter()
            command = [sys.executable, "-m", "lab.bench", "first-token", model, "--device", device]
            subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": folder}, check=True)
            seconds = time.perf_counter() - start_s
            print(f"{model}: {seconds:.1f} s from the shell to the end of a request of one token, {kind}")
            yield {"case": f"{model}, {kind}", "seconds": seconds}


def first_token(model: str, device: str) -> None:
    serve(
        Case(model, list, "20000"),
        executor_for(Case(model, list, "20000"), device),
        [Request(0, 0.0, [5] * 100, 1)],
        0,
        False,
    )


def laptop(rounds: int) -> Rows:
    """32 real prompts of mixed length and 64 tokens each, greedy, float32: ours, and generate on one padded batch."""
    run = Run(executor="torch", model="smollm2", dtype="float32", workload="prompts:max_tokens=64", arrivals="all")
    requests = [
        replace(r, output=64) for r in requests_of(replace(run, rate=None, duration_s=None, count=32, length=512))
    ]
    ours = TorchExecutor(load("smollm2", dtype=torch.float32), 32 * 512)
    theirs: Any = load("smollm2", dtype=torch.float32, fused=False)
    module = type(theirs.module)(theirs.module.config).eval()
    module.load_state_dict(theirs.module.state_dict())
    module.set_attn_implementation("sdpa")
    tokenizer = load_tokenizer("smollm2")
    width = max(len(r.prompt) for r in requests)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(r.prompt)) + list(r.prompt) for r in requests])
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": pad}
    case = Case("smollm2-135m", list, "16384")
    found: dict[str, list[float]] = {"ours": [], "generate": []}
    for _ in range(rounds):  # alternately, so that whatever else the machine does meets both
        one = serve(case, ours, requests, 0, False)
        found["ours"].append(one.output_tokens / one.seconds)
        start_s = time.perf_counter()
        module.generate(input_ids=ids, attention_mask=(ids != pad).long(), **options)
        found["generate"].append(64 * len(requests) / (time.perf_counter() - start_s))
    speeds = {name: statistics.median(own) for name, own in found.items()}
    print(", ".join(f"{name} {speed:.0f} tok/s" for name, speed in speeds.items()))
    print(f"ours is {speeds['ours'] / speeds['generate']:.2f} times as fast ({torch.get_num_threads()} threads)")
    yield from ({"case": name, "tokens_per_s": own} for name, own in found.items())
