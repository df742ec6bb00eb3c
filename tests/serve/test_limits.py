"""What a server refuses, how it says so, and that nothing stays held: sizes, numbers, room, keys, time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from plugins import STEP_S
from pydantic import ValidationError
from running import Running

from lab.serve.schemas import ChatRequest, CompletionRequest

KEY = "sesame"
SECONDS = 3.0
QUEUE, STREAMS = 4, 3
BODY = 20_000


@pytest.fixture(scope="module")
def small(tiny: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Slow, with little memory and narrow limits."""
    options = f"--allocator plugins:slow --queue {QUEUE} --streams {STREAMS} --body {BODY} --seconds {SECONDS}"
    options += " --length 200 --kv-memory 400 --n 3 --stops 2 --logprobs 4 --prompts 2 --prompt-tokens 60"
    with Running(tmp_path_factory.mktemp("small"), tiny[0], *options.split(), env={"KVLAB_API_KEY": KEY}) as running:
        running.http.headers["authorization"] = f"Bearer {KEY}"
        running.openai.api_key = KEY
        yield running


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    told = response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert "\n" not in told["message"]
    return told


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"n": 4}, "n=4: this server gives at most 3 answers"),
        ({"stop": ["a", "b", "c"]}, "stop='3 strings': this server takes at most 2"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [""]}, "stop.0: String should have at least 1 character"),
        ({"stop": 3}, "stop: Input should be a valid string; or stop: Input should be a valid list"),
        ({"logprobs": 5}, "logprobs=5: this server gives at most 4"),
        ({"prompt": ["a", "b", "c"]}, "prompt='3 prompts': this server takes at most 2 a call"),
        ({"prompt": []}, "prompt='[]': give at least one"),
        ({"prompt": ""}, "prompt 0: '' is empty"),
        ({"prompt": [7] * 61}, "prompt 0: 61 tokens, more than the 60 that this server takes"),
        ({"prompt": [7, 5000]}, "prompt 0: token 5000: the model has 0 to 383"),
        ({"prompt": [7], "max_tokens": 199, "n": 3}, "3 x 200 tokens do not fit an empty pool of 400 tokens"),
        ({"prompt": {"a": 1}}, "prompt: Input should be a valid string; or prompt: Input should be a valid list"),
        ({"prompt": [7, "a"]}, "prompt.1: Input should be a valid integer"),
        ({"prompt": "\ud800"}, "send whole characters"),
        ({"stop": "\udfff"}, "unable to parse raw data as a unicode string"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 10**30}, "n: "),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 10**19}, "seed"),
        ({"best_of": 2}, "best_of=2: answers are not ranked and thrown away here"),
        ({"suffix": "end"}, "suffix='end'"),
        ({"echo": True, "logprobs": 1}, "echo=True: log-probabilities of prompts are not computed"),
        ({"presence_penalty": 1}, "presence_penalty=1"),
        ({"logit_bias": {"7": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options='...': only with stream=true"),
        ({"max_token": 5}, "max_token: this server knows no such parameter"),
        ({"a[0]": 5}, "a[0]: this server knows no such parameter"),
        ({"\ud800": 5}, "unicode"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_is_said_with_its_number(
    small: Running, asked: dict[str, Any], said: str, streamed: bool
) -> None:
    if "stream_options" in asked and streamed:
        return
    body = {"model": "tiny", "prompt": "A door", **({"stream": True} if streamed else {}), **asked}
    response = small.http.post(
        "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert said in error(response, 400)["message"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type: ",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: Input should be a valid string; or"),
        ({"top_logprobs": 2}, "top_logprobs=2: only with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 5}, "at most 4"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_the_same_of_a_chat(small: Running, asked: dict[str, Any], said: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], **asked}
    assert said in error(small.post("chat/completions", **body), 400)["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [True] * 200_000},
        {"prompt": [[-1]] * 200_000},
        {"prompt": "A", "stop": [""] * 200_000},
        {"prompt": "A"} | {f"unknown_{i}": 0 for i in range(80_000)},
        {"messages": [0] * 200_000},
        {"messages": [{"role": "user", "content": [0] * 200_000}]},
    ],
)
def test_a_body_that_is_all_wrong_is_not_told_of_in_full(body: dict[str, Any]) -> None:
    """The event loop would make a list of a million complaints, and serve nobody meanwhile."""
    form = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as wrong:
        form.model_validate({"model": "tiny", **body})
    assert wrong.value.error_count() < 10


@pytest.mark.parametrize(
    "body", [b"{", b"", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 10_000, b'{"model": 1e999}']
)
def test_broken_bodies(small: Running, body: bytes) -> None:
    response = small.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error(response, 400)


def test_a_name_that_is_no_text(small: Running) -> None:
    body = b'{"model": "\\ud800", "prompt": "A"}'
    response = small.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert error(response, 400)["param"] == "model"


def test_other_paths_and_methods(small: Running) -> None:
    error(small.http.get("/v1/nothing"), 404)
    error(small.http.get("/v1/completions"), 405)


def test_a_body_that_is_too_long_is_not_read(small: Running) -> None:
    """Announced, or in chunks without an end to be seen; also where nobody reads the answer before all is written."""
    fine = {"model": "tiny", "prompt": [7], "max_tokens": 1, "user": "x" * (BODY - 200)}
    assert small.http.post("/v1/completions", json=fine).status_code == 200
    long = {"model": "tiny", "prompt": "x" * 20_000_000}
    assert f"at most {BODY}" in error(small.http.post("/v1/completions", json=long), 413)["message"]
    with pytest.raises(openai.APIStatusError, match="413"):
        small.openai.completions.create(model="tiny", prompt="x" * 20_000_000)

    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            yield b" " * 10_000

    error(small.http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"}), 413)


def test_keys(small: Running) -> None:
    for header in ({"authorization": "Bearer wrong"}, {"authorization": ""}, {"authorization": KEY}):
        told = error(httpx.get(f"{small.url}/v1/models", headers=header), 401)
        assert told["code"] == "invalid_api_key"
        assert KEY not in told["message"]
    assert httpx.get(f"{small.url}/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert httpx.get(f"{small.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        small.openai.with_options(api_key="wrong").models.list()


def open_stream(server: Running, length: int = 190) -> Any:
    """One that has begun."""
    body = {"model": "tiny", "prompt": [7], "max_tokens": length, "stream": True, "temperature": 0, "seed": 1}
    request = server.http.build_request("POST", "/v1/completions", json=body)
    response = server.http.send(request, stream=True)
    assert response.status_code == 200, response.read()
    lines = response.iter_lines()
    assert next(lines).startswith("data: {")
    return response, lines


def test_more_streams_than_there_may_be(small: Running) -> None:
    opened = [open_stream(small) for _ in range(STREAMS)]
    with pytest.raises(openai.RateLimitError, match=f"{STREAMS} streams are open, of at most {STREAMS}") as refused:
        small.openai.completions.create(model="tiny", prompt="A", stream=True)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    assert small.post("completions", prompt="A", max_tokens=1).status_code == 200, "which is no stream"
    for response, _ in opened:
        response.close()
    small.until(small.nothing_held, 2)
    response, _ = open_stream(small)
    response.close()
    assert small.metrics()["kvlab:requests_refused_total:streams"] == 1


def test_whoever_goes_gives_memory_back_at_once(small: Running) -> None:
    """In the middle of a stream, and while waiting for a whole answer. The engine's step is slow, but it is one."""
    before = small.metrics()["vllm:request_success_total:abort"]
    response, _ = open_stream(small)
    assert not small.nothing_held()
    response.close()
    small.until(small.nothing_held, 2)
    with pytest.raises(httpx.ReadTimeout):
        small.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": [7], "max_tokens": 190}, timeout=10 * STEP_S
        )
    small.until(small.nothing_held, 2)
    assert small.metrics()["vllm:request_success_total:abort"] == before + 2


def test_time_is_up(small: Running) -> None:
    """190 tokens take longer: the answer says so, or the stream in its middle."""
    told = error(small.post("completions", prompt=[7], max_tokens=190, logprobs=0, seed=1, temperature=0), 504)
    assert (told["message"], told["code"]) == (f"no answer within {SECONDS:g} s", "timeout")
    _, lines = open_stream(small)
    *_, last = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    small.until(small.nothing_held, 2)
    with pytest.raises(openai.APIError, match="no answer within"):
        list(small.openai.completions.create(model="tiny", prompt=[7], max_tokens=190, stream=True, temperature=0))


def test_a_full_queue(small: Running) -> None:
    """Memory for two long requests, and room for four that wait: all others are told when to come back."""
    statuses: list[int] = []
    after: list[str] = []

    def ask() -> None:
        response = small.post("completions", prompt=[7] * 50, max_tokens=140, temperature=0)
        statuses.append(response.status_code)
        if response.status_code == 429:
            assert f"of at most {QUEUE}" in response.json()["error"]["message"]
            after.append(response.headers["retry-after"])

    threads = [threading.Thread(target=ask) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 429, 504}
    assert statuses.count(429) >= 30 - QUEUE - 10
    assert all(1 <= int(seconds) <= 60 for seconds in after)
    assert statuses.count(429) == small.metrics()["kvlab:requests_refused_total:queue"]
    small.until(small.nothing_held, 2)
    assert small.post("completions", prompt="A", max_tokens=1).status_code == 200


def test_no_prompt_is_in_what_it_says(small: Running) -> None:
    small.post("completions", prompt="swordfish", max_tokens=3)
    small.post("completions", prompt="swordfish", max_tokens=0)
    small.post("completions", prompt="swordfish " * 100)
    assert "swordfish" not in small.output
    assert KEY not in small.output
    assert Path(small.said).stat().st_size < 2000
