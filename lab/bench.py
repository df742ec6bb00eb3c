"""How fast is the engine? Whole workloads on the device at hand, against floors that no engine could pass.

    python -m lab.bench throughput [CASE...]    output tokens per second, floor, share of it, what others reach

All requests come at once, output lengths are forced and weights random, of the true shape: speed does not depend on
their values. The floor is bytes / bandwidth + operations / rate: K and V that decoding reads once, all weights once a
step, and the arithmetic of the prompts; both rates are measured on the spot. A first round, in which kernels are
compiled and graphs captured, does not count; of the others the median does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch

from kernels.bench import measure_floors
from lab.allocators import ALLOCATORS
from lab.core import InputError, Limits, Request, SamplingParams, unknown
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
    peers: str = ""  # what others reach on an H100 80GB HBM3: their own command, the same requests


def nano() -> list[Request]:
    """nano-vllm's own benchmark: 256 prompts and answers of 100 to 1024 tokens, at temperature 0.6."""
    random = Random(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    return [
        Request(i, 0.0, prompt, output, SamplingParams(max_tokens=output, temperature=0.6))
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]


def opt13b() -> list[Request]:
    """256 requests of lengths like ShareGPT's, which the paper's pool holds an eighth of at a time."""
    run = Run(workload="opt13b-256", arrivals="all", rate=None, duration_s=None, count=256)
    return [replace(request, prompt=list(request.prompt)) for request in requests_of(run)]


OPT = Case("opt-13b", opt13b, "15728")
CASES = {
    "qwen3-0.6b": Case("qwen3-0.6b", nano, "90%", peers="vLLM 0.24.0: 17,830 to 18,800"),
    "llama-3-8b": Case("llama-3-8b", nano, "90%", peers="vLLM 0.24.0: 8,080"),
    "opt-13b": replace(OPT, peers="vLLM 0.24.0: 1,967 to 1,980"),
    "opt-13b, contiguous-max": replace(OPT, allocator="contiguous-max"),
    "opt-13b, contiguous-oracle": replace(OPT, allocator="contiguous-oracle"),
    "opt-13b, static": replace(OPT, allocator="contiguous-max", scheduler="static"),
}


@dataclass(frozen=True)
class Round:
    """One round of a case."""

    seconds: float
    output_tokens: int
    steps: int
    preemptions: int
    recorded: bool


def serve(case: Case, executor: TorchExecutor, requests: list[Request], recorded: bool) -> Round:
    """All requests of a case, through policies of their own."""
    limits = Limits()
    allocator = ALLOCATORS.get(case.allocator)(executor.cache.num_blocks * executor.block, executor.block, limits)
    scheduler = SCHEDULERS.get(case.scheduler)(allocator, limits, batch=8)
    steps = preemptions = 0
    ended: list[int] = []

    def go_on() -> bool:
        nonlocal steps
        steps += 1
        return True

    def on_end(group: object) -> None:
        nonlocal preemptions
        preemptions += group.preemptions  # type: ignore[attr-defined]
        ended.extend(len(tokens) for tokens in group.outputs())  # type: ignore[attr-defined]

    executor.reset_clock()
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    if recorded:
        with Recorder(None, {}) as recorder:
            Engine(scheduler, executor, recorder, on_end=on_end).run(requests, go_on=go_on)
    else:
        Engine(scheduler, executor, on_end=on_end).run(requests, go_on=go_on)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start_s
    tokens = sum(ended) - sum(len(request.prompt) for request in requests)
    return Round(seconds, tokens, steps, preemptions, recorded)


def floor_s(model: ModelShape, requests: list[Request], steps: int, read: float, rate: float) -> float:
    """Seconds at `read` bytes/s and `rate` operations/s."""
    positions = sum(
        (len(r.prompt) + 1) * (o - 1) + (o - 1) * (o - 2) // 2 for r in requests for o in [r.output or 1]
    )  # read by decoding: the first output token is the prompt's
    moved = positions * model.kv_bytes_per_token() + steps * 2 * model.parameters_read
    prompts = [len(request.prompt) for request in requests]
    operations = sum(prompts) * model.linear_flops_per_token + sum(model.attention_flops(p, p) for p in prompts)
    return moved / read + operations / rate


def throughput(names: list[str], rounds: int, device: str) -> list[dict[str, object]]:
    ceilings, _ = measure_floors(device)
    read, rate = ceilings.read * 1e6, ceilings.matmul * 1e6  # per second
    print(f"{torch.cuda.get_device_name()}: reads {read / 1e12:.2f} TB/s, multiplies {rate / 1e12:.0f} TFLOP/s\n")
    heads = f"{'output tok/s':>13} {'spread':>7} {'of floor':>9} {'ms/step':>8} {'steps':>6} {'preempted':>9}"
    print(f"{'case':28} {heads}  others")
    rows: list[dict[str, object]] = []
    loaded: tuple[str, TorchExecutor] | None = None
    for name in names:
        case = CASES[name]
        if loaded is None or loaded[0] != case.model + case.pool:
            loaded = None  # its memory first
            model = load(f"random:{case.model}", device=device)
            size = pool_size(case.pool, model.kv.bytes_per_token(model.dtype.itemsize), 16, free_bytes(model.device))
            loaded = case.model + case.pool, TorchExecutor(model, size.tokens)
        requests = case.requests()
        serve(case, loaded[1], requests, recorded=False)
        seen = [serve(case, loaded[1], requests, recorded=i % 2 == 1) for i in range(rounds)]
        plain = [one.output_tokens / one.seconds for one in seen if not one.recorded]
        median, one = statistics.median(plain), seen[0]
        floor = floor_s(shape(case.model), requests, one.steps, read, rate)
        share, step_ms = median * floor / one.output_tokens, 1e3 * one.output_tokens / median / one.steps
        spread = 100 * (max(plain) - min(plain)) / median
        line = f"{median:13,.0f} {spread:6.1f}% {share:9.2f} {step_ms:8.2f} {one.steps:6} {one.preemptions:9}"
        print(f"{name:28} {line}  {case.peers}", flush=True)
        rows.append({"case": name, "tokens_per_s": median, "floor_s": floor, "rounds": [asdict(one) for one in seen]})
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=["throughput"])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="of each case; every second one is recorded")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write throughput.json there")
    try:
        args = parser.parse_args(arguments)
        for name in args.cases:
            if name not in CASES:
                raise InputError(unknown("case", name, CASES))
        rows = throughput(args.cases or list(CASES), args.rounds, args.device)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        (args.out / "throughput.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
