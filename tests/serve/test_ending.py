"""How a server ends, and what it survives: signals, a failing step, an engine that dies, a parent that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from plugins import ALLOCATOR, COLLECT, LAUNCH, UNTOKENISABLE
from running import PATIENCE_S, ROOT, Running, engine_of

from lab.serve.__main__ import main

LONG: Any = {"model": "tiny", "prompt": [7], "max_tokens": 100, "temperature": 0}  # two seconds, where steps are slow


@pytest.fixture
def slow(tiny: tuple[str, Any], tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path, tiny[0], "--allocator", "plugins:slow") as running:
        yield running


def is_gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


class Loading(threading.Thread):
    """Somebody who asks again and again whether a server is ready."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.seen: list[tuple[int, str]] = []
        self.healths: set[int] = set()
        self.start()

    def run(self) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s and not (self.seen and self.seen[-1][0] == 200):
            try:
                ready = httpx.get(f"{self.url}/ready")
                self.healths.add(httpx.get(f"{self.url}/health").status_code)
                self.seen.append((ready.status_code, ready.json().get("error", {}).get("message", "")))
            except httpx.ConnectError:
                pass
            time.sleep(0.2)


class Asking(threading.Thread):
    """A stream that somebody follows to its end."""

    def __init__(self, server: Running) -> None:
        super().__init__()
        self.server = server
        self.began = threading.Event()
        self.text = ""
        self.reason: str | None = None
        self.error: Exception | None = None
        self.start()
        assert self.began.wait(60)

    def run(self) -> None:
        try:
            for chunk in self.server.openai.completions.create(**LONG, stream=True):
                self.text += chunk.choices[0].text
                self.reason = chunk.choices[0].finish_reason
                self.began.set()
        except Exception as error:
            self.error = error


def test_while_it_loads_and_while_it_drains(tiny: tuple[str, Any], tmp_path: Path) -> None:
    """Its address answers before it is ready, and says so. After a signal what is under way comes to its end, whole or
    streamed; nothing new is taken; the exit status is 0."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    loading = Loading(f"http://127.0.0.1:{port}")
    with Running(tmp_path, tiny[0], "--allocator", "plugins:slow", "--port", str(port)) as slow:
        loading.join()
        assert loading.seen[0] == (503, "the model is being loaded")
        assert loading.seen[-1][0] == 200
        assert loading.healths == {200}
        engine = engine_of(slow)
        whole = slow.openai.completions.create(**LONG).choices[0].text
        asking = Asking(slow)
        slow.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises((httpx.ConnectError, httpx.ReadError)):
            httpx.get(f"{slow.url}/ready")
        asking.join()
        assert (asking.text, asking.reason, asking.error) == (whole, "length", None)
        assert slow.process.wait(20) == 0
        assert is_gone(engine)


def begin(folder: Path, model: str, *options: str, port: int = 0) -> subprocess.Popen[str]:
    """A server of which nobody waits until it is ready."""
    command = [sys.executable, "-m", "lab.serve", model, "--device", "cpu", "--kv-memory", "2048", "--port", str(port)]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    told: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *options], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, **told)


def test_a_signal_while_it_loads_ends_it_at_once(tiny: tuple[str, Any], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    server = begin(tmp_path, tiny[0], "--allocator", "plugins:stuck", port=port)
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
            break
        except httpx.ConnectError:
            time.sleep(0.1)
    server.send_signal(signal.SIGTERM)
    start_s = time.monotonic()
    assert (
        server.communicate(timeout=20)[0]
        == f"loading {tiny[0]}; http://127.0.0.1:{port}/ready answers 503 until it is there\n"
    )
    assert time.monotonic() - start_s < 3
    assert server.returncode == 0


def test_a_policy_that_fails_from_the_start(tiny: tuple[str, Any], tmp_path: Path) -> None:
    """What it computes for nobody, before it serves, shows it."""
    server = begin(tmp_path, tiny[0], "--allocator", "plugins:broken")
    said = server.communicate(timeout=PATIENCE_S)[0]
    assert "RuntimeError: planted in every step" in said
    assert said.endswith("the engine cannot go on\n")
    assert "serving" not in said
    assert server.returncode == 1


def test_who_sends_half_a_request_keeps_it_from_ending_for_a_while_only(tiny: tuple[str, Any], tmp_path: Path) -> None:
    with Running(tmp_path, tiny[0], "--seconds", "1") as server:
        address = (server.http.base_url.host, server.http.base_url.port)
        with socket.create_connection(address) as half:  # type: ignore[arg-type]
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
            half.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
            assert server.http.get("/health").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0


def test_a_second_signal_ends_it_at_once(slow: Running) -> None:
    engine = engine_of(slow)
    asking = Asking(slow)
    slow.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert slow.process.poll() is None
    start_s = time.monotonic()
    slow.process.send_signal(signal.SIGINT)
    assert slow.process.wait(20) == 0
    assert time.monotonic() - start_s < 3, "it waited for the engine"
    asking.join()
    assert asking.reason is None
    assert asking.error is not None
    assert is_gone(engine)
    assert "Traceback" not in slow.output


def test_a_failing_step_fails_those_in_it_and_the_server_goes_on(faulty: Running) -> None:
    fine: Any = {"model": "tiny", "prompt": "The quick", "max_tokens": 20, "temperature": 0}
    expected = faulty.openai.completions.create(**fine).choices[0].text
    before = faulty.metrics()

    def grown(name: str) -> float:
        return faulty.metrics()[name] - before[name]

    for times, token in enumerate((ALLOCATOR, LAUNCH, COLLECT), start=1):
        planted = {**fine, "prompt": [token, 5]}  # greedy: a drawn text may end before the third token, which fails
        with pytest.raises(openai.InternalServerError, match="the step it was in failed: RuntimeError"):
            faulty.openai.completions.create(**planted)
        with pytest.raises(openai.APIError, match="the step it was in failed"):
            list(faulty.openai.completions.create(**planted, stream=True))
        assert faulty.http.get("/health").status_code == 200
        assert faulty.openai.completions.create(**fine).choices[0].text == expected
        assert grown("kvlab:failed_steps_total") == 2 * times
        faulty.until(faulty.nothing_held, 2)
    with pytest.raises(openai.InternalServerError, match="could not be prepared: RuntimeError"):
        faulty.openai.completions.create(model="tiny", prompt=UNTOKENISABLE)
    assert grown("vllm:request_success_total:error") == 7
    assert "planted in the executor" in faulty.output
    assert UNTOKENISABLE not in faulty.output


def test_an_engine_that_is_killed(slow: Running) -> None:
    """Whoever waits is told, /health turns red, and the server ends with an exit status that is not 0."""
    asking = Asking(slow)
    waiting: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: waiting.append(slow.http.post("/v1/completions", json=LONG)))
    thread.start()
    slow.until(lambda: slow.metrics()["vllm:num_requests_running"] == 2, 5)
    os.kill(engine_of(slow), signal.SIGKILL)
    asking.join()
    thread.join()
    assert isinstance(asking.error, openai.APIError)
    assert "the engine has died" in str(asking.error)
    assert waiting[0].status_code == 500
    assert waiting[0].json()["error"]["message"] == "the engine has died"
    assert slow.http.get("/health").status_code == 503
    now = slow.metrics()
    assert now["vllm:num_requests_running"] == now["kvlab:kv_stored_tokens"] == now["kvlab:kv_capacity_tokens"] == 0
    assert now["vllm:request_success_total:error"] == 2
    refused = slow.post("completions", prompt="A")
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the engine has died")
    assert slow.process.wait(20) == 1


def test_an_engine_outlives_no_server(slow: Running) -> None:
    engine = engine_of(slow)
    Asking(slow)
    slow.process.kill()
    slow.until(lambda: is_gone(engine), 20)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["random", "--device", "cpu", "--port", "0", "--allocator", "pagd"], "allocator 'pagd' is unknown"),
        (["--port", "99999"], "port 99999"),
        (["--queue", "0"], "--queue 0: must be at least 1"),
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--api-key", " "], "--api-key ' ': must not be empty"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert said in told.err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["--port", str(other.getsockname()[1])]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err


def test_help_teaches() -> None:
    run = [sys.executable, "-m", "lab.serve", "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    for word in ("curl http://127.0.0.1:8000/v1/chat/completions", "OpenAI(base_url=", "/metrics", "429", "SIGTERM"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_it_needs_no_installation() -> None:
    """Out of its folder, with the packages that it wants beside it, as where nothing can be installed."""
    code = "import importlib.metadata as m; found = m.version\n"
    code += "def version(name):\n    if name == 'kvlab': raise m.PackageNotFoundError(name)\n    return found(name)\n"
    code += "m.version = version\nfrom lab.serve.app import VERSION\nprint(VERSION)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "not installed\n"


@pytest.mark.parametrize("missing", ["uvicorn", "fastapi", "prometheus_client"])
def test_without_what_it_needs_it_says_how_to_get_it(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; import runpy; runpy.run_module('lab.serve', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == f"error: {missing} is missing, which the server needs: pip install -e '.[serve]'\n"
