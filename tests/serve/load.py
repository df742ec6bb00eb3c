"""A load generator that none of us wrote, against the server: do its report and `/metrics` say the same?

    python3 -m venv load && load/bin/pip install guidellm==0.8.1
    python tests/serve/load.py load/bin/guidellm

Prints a table; the exit status is 1 where a count differs, or a mean latency by more than 5 %. The model is a tiny
Llama of random weights, a step of which lasts 0.25 s by sleeping: what is measured is the server, not the model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from running import Running  # noqa: E402
from talking import tiny_llama  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

STEP_S = 0.25
SEED = 0
LENGTHS = "prompt_tokens=48,prompt_tokens_stdev=16,prompt_tokens_min=8,prompt_tokens_max=96"
LENGTHS += ",output_tokens=16,output_tokens_stdev=6,output_tokens_min=2,output_tokens_max=32"
PROFILES = {
    "constant, 2/s": ("kind=constant,rate=2", 80),
    "Poisson, 2/s": ("kind=poisson,rate=2", 80),
    "128 at once": ("kind=throughput,max_concurrency=128", 128),  # ten times what memory holds
}
COUNTS = {  # what /metrics counts, and what the report does
    "requests": ("vllm:request_success_total:length", lambda done: len(done)),
    "prompt tokens": ("vllm:prompt_tokens_total", lambda done: sum(r["input_metrics"]["text_tokens"] for r in done)),
    "output tokens": (
        "vllm:generation_tokens_total",
        lambda done: sum(r["info"]["timings"]["token_iterations"] for r in done),  # chunks with text that it saw
    ),
}
TIMES = {
    "TTFT": ("vllm:time_to_first_token_seconds", lambda of: of["time_to_first_token_ms"]["successful"]["mean"] / 1e3),
    "e2e": ("vllm:e2e_request_latency_seconds", lambda of: of["request_latency"]["successful"]["mean"]),
}
TOLERANCE = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guidellm", type=Path, help="the command, installed somewhere")
    command = str(parser.parse_args().guidellm.absolute())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        visible_llama(folder / "model")
        options = ("--allocator", "plugins:slow", "--kv-memory", "1024")
        with Running(folder, str(folder / "model"), *options, env={"KVLAB_TEST_STEP_S": str(STEP_S)}) as server:
            rows = [compared(server, command, folder, name) for name in PROFILES]
            assert server.nothing_held()
    print(f"{machine()}; a tiny Llama of random weights, steps of {STEP_S} s; seed {SEED}; guidellm / server\n")
    names = ["load", *COUNTS, *(f"{name} (s)" for name in TIMES), "agrees"]
    for row in [names, ["---"] * len(names), *rows]:
        print(f"| {' | '.join(row)} |")
    return 0 if all(row[-1] == "yes" for row in rows) else 1


def visible_llama(folder: Path) -> None:
    """Whose likeliest token is always one that can be seen: a client sees no token of half a character."""
    model = tiny_llama(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(model.config.vocab_size)]
    hidden = [i for i, text in enumerate(texts) if not (text.isascii() and text.isprintable() and text.strip())]
    with torch.no_grad():
        model.lm_head.weight[hidden] = 0
    model.save_pretrained(folder)


def compared(server: Running, command: str, folder: Path, name: str) -> list[str]:
    """A row: theirs / ours, for each thing that both tell."""
    before = server.metrics()
    report = generate_load(server, command, folder, *PROFILES[name])
    server.until(server.nothing_held)
    grew = {key: value - before[key] for key, value in server.metrics().items()}
    done = report["requests"]["successful"]
    counts = [(count(done), int(grew[key])) for key, count in COUNTS.values()]
    times = [(mean(report["metrics"]), grew[f"{key}_sum"] / grew[f"{key}_count"]) for key, mean in TIMES.values()]
    agrees = all(theirs == ours for theirs, ours in counts) and len(done) == PROFILES[name][1]
    agrees &= all(abs(theirs - ours) <= TOLERANCE * ours for theirs, ours in times)
    told = [f"{theirs} / {ours}" for theirs, ours in counts]
    told += [f"{theirs:.3f} / {ours:.3f} ({theirs / ours - 1:+.1%})" for theirs, ours in times]
    return [name, *told, "yes" if agrees else "NO"]


def generate_load(server: Running, command: str, folder: Path, profile: str, requests: int) -> dict[str, Any]:
    """One benchmark of its report."""
    body = {"body": {"temperature": 0}}
    backend = {"kind": "openai_http", "target": server.url, "model": "tiny", "request_format": "/v1/completions"}
    arguments = [
        "--backend",
        json.dumps({**backend, "extras": body}),
        "--tokenizer",
        f"kind=hf_auto,model={folder}/model",
    ]
    arguments += [
        "--data",
        f"kind=synthetic_text,{LENGTHS}",
        "--profile",
        profile,
        "--seed",
        f"kind=static,value={SEED}",
    ]
    arguments += [
        "--constraint",
        f"kind=max_requests,count={requests}",
        "--output",
        f"kind=json,path={folder}/report.json",
    ]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
        "GUIDELLM__LOGGING__CONSOLE_LOG_LEVEL": "WARNING",
    }
    subprocess.run([command, "run", *arguments, "--disable-console"], check=True, env=env, timeout=300)
    (found,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    return found


def machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpus.splitlines() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    sys.exit(main())
