"""What stands before the application, and the event loop's side of the engine, without a server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from lab.core import SamplingParams
from lab.serve import guard
from lab.serve.app import application
from lab.serve.client import Client, Limits
from lab.serve.messages import Ready, Stop, Submit
from lab.serve.metrics import Metrics
from lab.serve.worker import Options


@pytest.fixture
def client() -> Client:
    """As if its engine served."""
    client = Client(Options({}), Limits(), Metrics("tiny"))
    client.ready = Ready(2048, 8, 256, "cpu")
    return client


def ask(app: Any, path: str, body: Any = None, headers: Any = None) -> httpx.Response:
    async def asking() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tiny") as http:
            if body is None:
                return await http.get(path, headers=headers)
            given = {"json": body} if isinstance(body, dict) else {"content": body}
            return await asyncio.wait_for(http.post(path, headers=headers, **given), 10)

    return asyncio.run(asking())


def test_what_nobody_foresaw_quotes_no_prompt(
    client: Client, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(prompts: list[Any], *_: Any, **__: Any) -> None:
        raise RuntimeError(f"planted: {prompts}")

    monkeypatch.setattr(client, "submit", failing)
    response = ask(application(client, "tiny", {}), "/v1/completions", {"model": "tiny", "prompt": "swordfish"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed: RuntimeError"
    said = capfd.readouterr().err
    assert "RuntimeError in POST /v1/completions" in said
    assert "swordfish" not in said


@pytest.mark.parametrize("key", ["sesame", "sésame", "開け"])
def test_a_key_of_any_characters(client: Client, key: str) -> None:
    app = application(client, "tiny", {}, key)
    for given, status in ((key, 200), (key + "x", 401), (key[:-1], 401), ("", 401)):
        assert ask(app, "/v1/models", headers={b"authorization": f"Bearer {given}".encode()}).status_code == status


def test_a_body_that_does_not_come(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """By and by, and never whole: who sends it is not waited for for ever."""
    monkeypatch.setattr(guard, "PATIENCE_S", 0.05)

    async def drops() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.02)
            yield b" "

    response = ask(application(client, "tiny", {}), "/v1/completions", drops())
    assert response.status_code == 408
    assert response.json()["error"]["message"] == "the body did not come within 0.05 s: send it again"
    assert response.headers["connection"] == "close"


def test_what_was_given_up_before_it_was_sent_is_not_sent(client: Client) -> None:
    sent: list[Any] = []
    pipe: Any = SimpleNamespace(send=sent.append)
    kept, left = (client.submit([prompt], SamplingParams(), 0.0) for prompt in ("kept", "left"))
    client.leave(left)
    client.stop()
    writing = threading.Thread(target=client._write, args=(pipe,))
    writing.start()
    writing.join(5)
    assert [message.key for message in sent if isinstance(message, Submit)] == list(kept.keys)
    assert isinstance(sent[-1], Stop)
