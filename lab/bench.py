"""How fast is the engine? Whole workloads, single steps and the start, against floors that no engine could pass.

    python -m lab.bench throughput [CASE...]   output tokens per second of whole workloads
    python -m lab.bench step                   the time of one step at batch 1, against that of reading the weights
    python -m lab.bench startup                from the shell to the first token, with nothing compiled and with all
    python -m lab.bench laptop                 SmolLM2 on this CPU, beside transformers' own generate
    python -m lab.bench kernels                the kernels alone: python -m kernels.bench

All requests come at once, output lengths are forced and weights random, of the true shape: speed does not depend on
their values. The floor is bytes / bandwidth + operations / rate: K and V that decoding reads once, all weights once a
step, and the arithmetic of the prompts; both rates are measured on the spot. A first round, in which kernels are
compiled and graphs captured, does not count; of the others the median does.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import torch

import kernels.bench
from kernels.timing import measure_floors
from lab.allocators import ALLOCATORS
from lab.command import Parser, status
from lab.core import Group, InputError, Limits, Request, SamplingParams, unknown
from lab.engine import Engine
from lab.executors.cache import free_bytes
from lab.executors.torch import TorchExecutor
from lab.models.loading import load, load_tokenizer
from lab.pool import pool_size
from lab.record import Recorder, describe
from lab.run import Run, real, requests_of
from lab.schedulers import SCHEDULERS
from lab.shapes import ModelShape, shape

Rows = list[dict[str, Any]]


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
    run = Run(workload="opt13b-256", arrivals="all", rate=None, duration_s=None, count=256)
    return [replace(request, prompt=list(request.prompt)) for request in requests_of(run)]


OPT = Case("opt-13b", opt13b, "15728")
CASES = {
    "qwen3-0.6b": Case("qwen3-0.6b", nano, "90%", tokens=8192, peers="vLLM 0.24.0: 17,830 to 18,800"),
    "llama-3-8b": Case("llama-3-8b", nano, "90%", tokens=8192, peers="vLLM 0.24.0: 8,080"),
    "opt-13b": replace(OPT, peers="vLLM 0.24.0: 1,967 to 1,980, 423 preemptions"),
    "opt-13b-eager-admission": replace(OPT, watermark=0.0),
    "opt-13b-contiguous-max": replace(OPT, allocator="contiguous-max"),
    "opt-13b-contiguous-oracle": replace(OPT, allocator="contiguous-oracle"),
    "opt-13b-static": replace(OPT, allocator="contiguous-max", scheduler="static"),
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


def serve(case: Case, executor: TorchExecutor, requests: list[Request], depth: int, recorded: bool) -> Round:
    """All requests of a case, through policies of their own."""
    limits = Limits(tokens=case.tokens)
    allocator = ALLOCATORS.get(case.allocator)(executor.cache.num_blocks * executor.block, executor.block, limits)
    scheduler = SCHEDULERS.get(case.scheduler)(allocator, limits, batch=8, watermark=case.watermark)
    ended: list[Group] = []
    steps = 0

    def go_on() -> bool:
        nonlocal steps
        steps += 1
        return True

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


def throughput(names: list[str], rounds: int, depth: int, device: str) -> Rows:
    read, rate = ceilings(device)
    heads = f"{'case':26} {'output tok/s':>12} {'spread':>7} {'recorded':>9} {'of floor':>9}"
    print(f"{heads} {'ms/step':>8} {'steps':>6} {'preempted':>9}  others")
    rows: Rows = []
    executor, held = None, ""
    for name in names:
        case = CASES[name]
        if held != case.model + case.pool:
            executor = None  # its memory first
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
        rows.append({"case": name, "depth": depth, **known, "rounds": [asdict(one) for one in seen]})
    return rows


def step(device: str, context: int = 512, steps: int = 64) -> Rows:
    """Batch 1: what one user alone waits for a token, the host's work in between, and hidden."""
    read, _ = ceilings(device)
    rows: Rows = []
    for name, bar in STEPS.items():
        executor = executor_for(Case(name, list, "20000"), device)
        floor_ms = 1e3 * executor.model.weight_bytes / read
        request = Request(0, 0.0, [5] * context, 2 * steps)
        for depth in (0, 0, 1):  # the first compiles and captures
            with Recorder(None, {}) as recorder:
                limits = Limits()
                scheduler = SCHEDULERS.get("continuous")(ALLOCATORS.get("paged")(20000, 16, limits), limits)
                Engine(scheduler, executor, recorder, depth=depth).run([request])
            times = recorder.record().steps
            step_ms = 1e3 * float((times["end_s"] - times["start_s"]).iloc[-steps:].median())
            rows.append({"case": name, "depth": depth, "step_ms": step_ms, "weights_ms": floor_ms, "bar": bar})
        for row in rows[-2:]:
            share = f"{row['step_ms'] / floor_ms:.2f} times the reading of its weights (bar: {bar})"
            print(f"{name:14} depth {row['depth']} {row['step_ms']:6.2f} ms a step, {share}", flush=True)
        del rows[-3]
        del executor
    return rows


def startup(device: str, model: str = "qwen3-0.6b") -> Rows:
    """A process of its own, first with nothing compiled, then with what the first has left on disk."""
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            start_s = time.perf_counter()
            command = [sys.executable, "-m", "lab.bench", "first-token", model, "--device", device]
            subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": folder}, check=True)
            rows.append({"case": f"{model}, {kind}", "seconds": time.perf_counter() - start_s})
            print(f"{model}: {rows[-1]['seconds']:.1f} s from the shell to the end of a request of one token, {kind}")
    return rows


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
    return [{"case": name, "tokens_per_s": own} for name, own in found.items()]


def ceilings(device: str) -> tuple[float, float]:
    """Bytes per second that the device reads, operations per second of a large product: measured now."""
    measured, _ = measure_floors(device)
    read, rate = measured.read * 1e6, measured.matmul * 1e6
    print(f"{torch.cuda.get_device_name()}: reads {read / 1e12:.2f} TB/s, multiplies {rate / 1e12:.0f} TFLOP/s\n")
    return read, rate


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "nothing was kept")


def _main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m lab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["throughput", "step", "startup", "laptop", "kernels", "first-token"])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="of throughput: " + ", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="of each case; every second one is recorded")
    parser.add_argument("--depth", type=int, choices=(0, 1), default=1, help="steps that run while the next is planned")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write what was measured there, as JSON")
    args = parser.parse_args(arguments)
    if args.what == "kernels":
        return kernels.bench.main(["--out", str(args.out)] if args.out else [])
    said = Said()
    with redirect_stdout(said):
        rows = _measure(args)
    if args.out:
        command = shlex.join(["python", "-m", "lab.bench", *arguments])
        machine = real().device_name("cpu" if args.what == "laptop" else args.device)
        header = describe(model="", workload="", seed=0, simulated=False, hardware=machine, gpu=machine)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.what}.txt").write_text(f"$ {command}\n\n{said.getvalue()}")
        (args.out / f"{args.what}.json").write_text(json.dumps({**header, "command": command, "rows": rows}, indent=1))
    return 0


class Said(StringIO):
    """What is printed, kept besides."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text) if sys.__stdout__ else None
        return super().write(text)

    def flush(self) -> None:
        sys.__stdout__.flush() if sys.__stdout__ else None


def _measure(args: argparse.Namespace) -> Rows:
    if args.what == "laptop":
        return laptop(args.rounds)
    if not torch.cuda.is_available():
        raise InputError(f"{args.what} is measured on a GPU, and there is none: take laptop for this CPU")
    if args.what == "first-token":
        first_token(args.cases[0], args.device)
        return []
    for name in args.cases:
        if name not in CASES:
            raise InputError(unknown("case", name, CASES))
    if args.what == "throughput":
        return throughput(args.cases or list(CASES), args.rounds, args.depth, args.device)
    return step(args.device) if args.what == "step" else startup(args.device)


if __name__ == "__main__":
    sys.exit(main())
