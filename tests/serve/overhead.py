"""What serving over HTTP costs: tokens per second of the server at saturation, over those of `LLM.generate`.

    OMP_NUM_THREADS=1 python tests/serve/overhead.py [--model smollm2] [--requests 48] [--tokens 40] [--rounds 5]

The same requests, greedy and not streamed, all at once, three times as many as memory holds, one thread for each side.
Both take turns in one run, so that what else the machine does falls on both; the claim is about the median of the
rounds' ratios. CPU seconds are those of the engine's process and of this one: what the server's event loop and the load
need is not in them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "serve")]

from running import Running  # noqa: E402

from lab import LLM, SamplingParams  # noqa: E402

SUBJECTS = ("memory", "a block", "the queue", "a prefix", "an answer", "the clock", "a batch", "a door")
PATIENCE_S = 600.0


class Round(NamedTuple):
    tokens: int
    wall_s: float
    cpu_s: float


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        sys.exit("error: OMP_NUM_THREADS must be 1, for both sides")
    parser = argparse.ArgumentParser(description="The server's throughput over that of generate.")
    add = parser.add_argument
    add("--model", default="smollm2")
    for name, default in (("requests", 48), ("tokens", 40), ("rounds", 5), ("kv-memory", 1024)):
        add(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    prompts = [f"{i} things to say about {SUBJECTS[i % len(SUBJECTS)]}, in order:" for i in range(args.requests)]
    llm = LLM(args.model, device="cpu", kv_memory=args.kv_memory)
    options = ("--name", "tiny", "--kv-memory", str(args.kv_memory), "--block", "16", "--length", "512")
    rounds = []
    with tempfile.TemporaryDirectory() as folder, Running(Path(folder), args.model, *options) as server:
        print(f"{args.requests} prompts, {args.tokens} tokens each at most, {args.model}; load average {load()}")
        for i in range(args.rounds + 1):
            mine, theirs = offline(llm, prompts, args.tokens), served(server, prompts, args.tokens)
            assert mine.tokens == theirs.tokens, "not the same answers"
            print(f"generate {told(mine)}   server {told(theirs)}", "" if i else "  (warms up)", flush=True)
            rounds += [(mine, theirs)] if i else []
    wall = statistics.median(mine.wall_s / theirs.wall_s for mine, theirs in rounds)
    cpu = statistics.median(mine.cpu_s / theirs.cpu_s for mine, theirs in rounds)
    print(f"server over generate, median of {args.rounds}: {wall:.3f} in wall time, {cpu:.3f} in CPU time")
    print(f"load average {load()}")


def offline(llm: LLM, prompts: list[str], tokens: int) -> Round:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    results = llm.generate(prompts, SamplingParams(max_tokens=tokens), progress=False)
    count = sum(len(output.tokens) for result in results for output in result.outputs)
    return Round(count, time.perf_counter() - began_s, time.process_time() - cpu_s)


def served(server: Running, prompts: list[str], tokens: int) -> Round:
    engine = engine_of(server)
    began_s, cpu_s = time.perf_counter(), cpu_of(engine)
    count = asyncio.run(ask_all(server.url, prompts, tokens))
    return Round(count, time.perf_counter() - began_s, cpu_of(engine) - cpu_s)


async def ask_all(url: str, prompts: list[str], tokens: int) -> int:
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:

        async def ask(prompt: str) -> int:
            body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()["usage"]["completion_tokens"]

        return sum(await asyncio.gather(*map(ask, prompts)))


def engine_of(server: Running) -> int:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


def cpu_of(pid: int) -> float:
    """Seconds, of the user and the system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def told(one: Round) -> str:
    return f"{one.tokens / one.wall_s:6.1f} tokens/s ({one.wall_s:.1f} s, CPU {one.cpu_s:.1f} s)"


def load() -> str:
    return " ".join(f"{x:.1f}" for x in os.getloadavg())


if __name__ == "__main__":
    main()
