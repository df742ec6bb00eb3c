"""A server as a user starts one: a process, its address from its first line, its metrics over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0
DEVICE = os.environ.get("KVLAB_DEVICE", "cpu")  # in float32 either way: in bfloat16 random weights nearly tie


class Running:
    def __init__(self, folder: Path, model: str, *options: str, env: dict[str, str] | None = None) -> None:
        """`folder`: where its output goes."""
        self.said = folder / "said.txt"
        command = [sys.executable, "-m", "lab.serve", model, "--name", "tiny", "--port", "0"]
        command += ["--device", DEVICE, "--dtype", "float32"]
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self.said.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--kv-memory", "2048", "--block", "8", *options],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(env or {})},
            )
        self.until(lambda: " on http" in self.output or self.process.poll() is not None)
        found = re.search(r"on (http://\S+)/v1: ", self.output)
        assert found, self.output
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_S)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()

    @property
    def output(self) -> str:
        return self.said.read_text(errors="replace")

    def until(self, holds: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
        end_s = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end_s, f"waited {seconds} s in vain; the server said: {self.output}"
            time.sleep(0.005)

    def metrics(self) -> dict[str, float]:
        """By name, those with labels of their own as name:label."""
        found = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                own = [value for key, value in sample.labels.items() if key not in ("model_name", "le")]
                if "le" not in sample.labels:
                    found[":".join([sample.name, *own])] = sample.value
        return found

    def nothing_held(self) -> bool:
        now = self.metrics()
        held = now["kvlab:kv_capacity_tokens"] - now["kvlab:kv_free_tokens"] - now["kvlab:kv_cached_tokens"]
        left = ("vllm:num_requests_running", "vllm:num_requests_waiting", "kvlab:streams_open")
        return not held and not any(now[name] for name in left)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json={"model": "tiny", **body})


def engine_of(server: Running) -> int:
    """The process id of its engine: of its children the one that multiprocessing started for us."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found
