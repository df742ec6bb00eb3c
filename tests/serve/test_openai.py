"""The official client, unchanged, against a server: the same text as `LLM.generate`, in OpenAI's two forms."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from running import Running
from talking import byte_level

from lab import LLM, SamplingParams

PROMPTS = ["The quick", "A door opens. A", "ça", "def f(x):\n", "Füchse springen über träge Hunde; là-bas", "Nobody"]
CHAT = [{"role": "user", "content": "Who comes in?"}]
DRAWN = {"temperature": 0.9, "seed": 3, "max_tokens": 24}


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, str]]:
    """Of a completion's stream: texts and reasons by choice."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in reasons, "nothing comes after the reason"
            texts[choice.index] = texts.get(choice.index, "") + (choice.text or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons


def test_completions_are_what_generate_gives(server: Running, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(max_tokens=40))
    made = server.openai.completions.create(model="tiny", prompt=PROMPTS, max_tokens=40, temperature=0)
    assert [choice.text for choice in made.choices] == [result.text for result in expected]
    assert [choice.finish_reason for choice in made.choices] == [r.outputs[0].finish_reason for r in expected]
    assert [choice.index for choice in made.choices] == list(range(len(PROMPTS)))
    assert made.usage is not None
    assert made.usage.prompt_tokens == sum(result.prompt_tokens for result in expected)
    assert made.usage.completion_tokens == sum(len(result.outputs[0].tokens) for result in expected)


def test_streams_side_by_side_are_what_generate_gives(server: Running, llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.9, seed=3)
    expected = [llm.generate(prompt, params)[0] for prompt in PROMPTS]

    def ask(prompt: str) -> tuple[dict[int, str], dict[int, str]]:
        return streamed(server.openai.completions.create(model="tiny", prompt=prompt, stream=True, **DRAWN))

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(ask, PROMPTS))
    assert [texts[0] for texts, _ in found] == [result.text for result in expected]
    assert [reasons[0] for _, reasons in found] == [result.outputs[0].finish_reason for result in expected]


def test_several_prompts_and_answers_in_one_stream(server: Running, llm: LLM) -> None:
    ids = byte_level().encode("The lazy dog")
    for prompts in (PROMPTS[:3], [ids, [7, 8, 9]]):
        results = llm.generate(prompts, SamplingParams(max_tokens=24, n=2, temperature=0.9, seed=3))  # type: ignore
        expected = [output.text for result in results for output in result.outputs]
        call: Any = server.openai.completions.create
        texts, reasons = streamed(call(model="tiny", prompt=prompts, n=2, stream=True, **DRAWN))
        assert [texts[i] for i in range(len(expected))] == expected
        assert sorted(reasons) == list(range(len(expected)))
        whole = call(model="tiny", prompt=prompts, n=2, **DRAWN)
        assert [choice.text for choice in whole.choices] == expected


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_chat(server: Running, llm: LLM, limit: str) -> None:
    expected = llm.generate(CHAT, SamplingParams(max_tokens=24, n=2, temperature=0.9, seed=4))[0]  # type: ignore
    options: Any = {"model": "tiny", "messages": CHAT, "n": 2, "temperature": 0.9, "seed": 4, limit: 24}
    assert min(len(output.text) for output in expected.outputs) > 5
    whole = server.openai.chat.completions.create(**options)
    assert [choice.message.content for choice in whole.choices] == [output.text for output in expected.outputs]
    assert {choice.message.role for choice in whole.choices} == {"assistant"}
    texts = ["", ""]
    usage = None
    for chunk in server.openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage
    assert texts == [output.text for output in expected.outputs]
    assert usage is not None
    assert usage.completion_tokens == sum(len(output.tokens) for output in expected.outputs)
    assert usage.model_extra is not None
    assert usage.model_extra["kv"] == expected.memory._asdict()
    assert 0 < usage.model_extra["timing"]["ttft_s"] <= usage.model_extra["timing"]["e2e_s"]


def test_parts_and_a_developer_are_what_templates_know(server: Running, llm: LLM) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "comes?"}]},
    ]
    plain: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who comes?"}]
    made = server.openai.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)
    assert made.choices[0].message.content == llm.generate(plain, SamplingParams(max_tokens=9))[0].text


def test_a_chat_goes_on_to_the_end_where_nobody_says_how_long(server: Running, llm: LLM) -> None:
    made = server.openai.chat.completions.create(model="tiny", messages=CHAT, seed=5)  # type: ignore[arg-type]
    (expected,) = llm.generate(CHAT, SamplingParams(max_tokens=256, temperature=1.0, seed=5))  # type: ignore
    assert made.choices[0].message.content == expected.text
    many: Any = server.openai.chat.completions.create(model="tiny", messages=CHAT, seed=5, n=16)  # type: ignore
    assert len(many.choices) == 16, "16 times the longest sequence does not fit, half of it does"


def test_an_answer_that_ignores_its_end(server: Running, tiny: tuple[str, Any], llm: LLM) -> None:
    """As transformers goes on where it knows of no end."""
    results = llm.generate([[token] for token in range(7, 300)], SamplingParams(max_tokens=40))
    prompt = [7 + next(r.index for r in results if r.outputs[0].finish_reason == "stop" and len(r.text) > 5)]
    with torch.no_grad():
        made = tiny[1].generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60, eos_token_id=None)
    asked: Any = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 60}
    assert server.openai.completions.create(**asked).choices[0].finish_reason == "stop"
    forced = server.openai.completions.create(**asked, extra_body={"ignore_eos": True})
    assert forced.choices[0].finish_reason == "length"
    assert forced.usage is not None
    assert forced.usage.completion_tokens == 60
    assert forced.choices[0].text == llm.decode(made[0, 1:].tolist())
    with pytest.raises(openai.BadRequestError, match="leave one out"):
        server.openai.completions.create(**asked, stop="x", extra_body={"ignore_eos": True})


def test_usage_in_every_chunk(server: Running) -> None:
    """Tokens so far, also those of half a character, which no text shows; in the end as many as there were."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: Any = {"prompt": ["ça", "The quick"], "n": 2, "seed": 1, "max_tokens": 20, "stream_options": options}
    told = [c.usage for c in server.openai.completions.create(model="tiny", stream=True, **asked)]
    counts = [usage.completion_tokens for usage in told if usage]
    assert len(counts) == len(told) > 10
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == counts[-2]
    assert len({usage.prompt_tokens for usage in told if usage}) == 1


def test_stop_strings(server: Running) -> None:
    free = server.openai.completions.create(model="tiny", prompt="A door", max_tokens=30, temperature=0)
    text = free.choices[0].text
    stop = text[8:11]
    made = server.openai.completions.create(model="tiny", prompt="A door", max_tokens=30, temperature=0, stop=stop)
    assert made.choices[0].text == text.partition(stop)[0]
    assert made.choices[0].finish_reason == "stop"
    asked: Any = {"prompt": "A door", "max_tokens": 30, "temperature": 0, "stop": ["~never~", stop], "stream": True}
    texts, reasons = streamed(server.openai.completions.create(model="tiny", **asked))
    assert (texts[0], reasons[0]) == (text.partition(stop)[0], "stop")


def test_echo(server: Running, llm: LLM) -> None:
    text = llm.generate("The quick", SamplingParams(max_tokens=8))[0].text
    ids = byte_level().encode("The quick")
    for prompt in ("The quick", ids):
        asked: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "echo": True}
        assert server.openai.completions.create(**asked).choices[0].text == "The quick" + text
        assert streamed(server.openai.completions.create(**asked, stream=True))[0][0] == "The quick" + text


def test_without_a_seed_every_call_draws_anew(server: Running) -> None:
    ask = server.openai.completions.create
    drawn = {ask(model="tiny", prompt="A door", max_tokens=20).choices[0].text for _ in range(3)}
    assert len(drawn) == 3


def expected_scores(reference: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]


def drawn_tokens(llm: LLM, seed: int) -> list[int]:
    params = SamplingParams(max_tokens=24, temperature=0.9, seed=seed)
    return llm.generate(CHAT, params)[0].outputs[0].tokens  # type: ignore[arg-type]


def test_chat_logprobs_are_the_log_softmax_of_transformers(server: Running, tiny: tuple[str, Any], llm: LLM) -> None:
    seed, tokens = next(
        (seed, tokens)
        for seed in range(99)
        if 15 < len(tokens := drawn_tokens(llm, seed)) < 24  # it ends by itself
    )
    prompt = llm.encode(CHAT)  # type: ignore[arg-type]
    expected = expected_scores(tiny[1], prompt, tokens)
    asked: Any = {"model": "tiny", "messages": CHAT, "logprobs": True, "top_logprobs": 3, **DRAWN, "seed": seed}
    choice = server.openai.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None
    scores = choice.logprobs.content or []
    assert tokens[-1] in llm.eos
    assert len(scores) == len(tokens) - 1, "the end of the text is not of the text"
    for i, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-4)
        top = [alternative.logprob for alternative in score.top_logprobs]
        assert top == pytest.approx(expected[i].topk(3).values.tolist(), abs=1e-4)
    data = b"".join(bytes(score.bytes or []) for score in scores)
    assert data.decode(errors="replace") == choice.message.content, "bytes, also of half characters"
    parts: list[Any] = []
    for chunk in server.openai.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices:
            parts += piece.logprobs.content if piece.logprobs else []
    assert parts == scores
    asked["top_logprobs"] = 0
    plain = server.openai.chat.completions.create(**asked).choices[0].logprobs
    assert plain is not None
    assert [s.logprob for s in plain.content or []] == [s.logprob for s in scores]
    assert not any(s.top_logprobs for s in plain.content or [])


def test_completion_logprobs(server: Running, tiny: tuple[str, Any], llm: LLM) -> None:
    (result,) = llm.generate("The quick", SamplingParams(max_tokens=12))
    tokens = result.outputs[0].tokens
    expected = expected_scores(tiny[1], llm.encode("The quick"), tokens)
    asked: Any = {"model": "tiny", "prompt": "The quick", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    scores = server.openai.completions.create(**asked).choices[0].logprobs
    assert scores is not None
    chosen = [float(expected[i, token]) for i, token in enumerate(tokens)][: len(scores.token_logprobs or [])]
    assert scores.token_logprobs == pytest.approx(chosen, abs=1e-4)
    assert len(chosen) >= 10
    assert [max(top.values()) for top in scores.top_logprobs or []] == scores.token_logprobs, "greedy"
    assert scores.text_offset == [len("".join((scores.tokens or [])[:i])) for i in range(len(scores.tokens or []))]
    found: list[float] = []
    offsets: list[int] = []
    for chunk in server.openai.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            if choice.logprobs:
                found += choice.logprobs.token_logprobs or []
                offsets += choice.logprobs.text_offset or []
    assert (found, offsets) == (scores.token_logprobs, scores.text_offset)


def test_exceptions_are_the_right_ones(server: Running) -> None:
    ask = server.openai.completions.create
    with pytest.raises(openai.NotFoundError, match="model 'other': this server has 'tiny'"):
        ask(model="other", prompt="A")
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="300 prompt and 1 output tokens exceed the limit of 256 tokens"):
        ask(model="tiny", prompt=[7] * 300)
    with pytest.raises(openai.BadRequestError, match=r"16 x 201 tokens do not fit an empty pool of 2048 tokens"):
        ask(model="tiny", prompt=[7], max_tokens=200, n=16)
    with pytest.raises(openai.BadRequestError, match="300 prompt"):
        list(ask(model="tiny", prompt=["fine", "A" * 300], stream=True))
    with pytest.raises(openai.BadRequestError, match="template refuses it: no clowns"):
        server.openai.chat.completions.create(model="tiny", messages=[{"role": "clown", "content": "x"}])  # type: ignore
    server.until(server.nothing_held)


def test_what_it_tells_of_itself(server: Running) -> None:
    assert [model.id for model in server.openai.models.list()] == ["tiny"]
    assert server.openai.models.retrieve("tiny").model_extra == {"max_model_len": 256}
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").status_code == 200
    told = server.http.get("/version").json()
    assert (told["allocator"], told["scheduler"], told["capacity"], told["block"]) == ("paged", "continuous", 2048, 8)
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/metrics"} <= set(paths)


def test_counts_are_exact(server: Running) -> None:
    before = server.metrics()
    used = [
        server.openai.completions.create(model="tiny", prompt=PROMPTS, n=2, seed=i, max_tokens=5 + i).usage
        for i in range(4)
    ]
    server.until(lambda: server.metrics()["vllm:num_requests_running"] == 0)
    after = server.metrics()
    grew = {name: after[name] - before[name] for name in before}
    requests = 4 * len(PROMPTS)
    tokens = sum(usage.completion_tokens for usage in used if usage)
    assert grew["vllm:prompt_tokens_total"] == sum(usage.prompt_tokens for usage in used if usage)
    assert grew["vllm:generation_tokens_total"] == tokens
    ended = sum(grew[f"vllm:request_success_total:{reason}"] for reason in ("stop", "length"))
    assert ended == requests == grew["vllm:e2e_request_latency_seconds_count"]
    assert grew["vllm:time_to_first_token_seconds_count"] == requests
    assert grew["vllm:inter_token_latency_seconds_count"] == tokens - 2 * requests, "each but an output's first"
    longest = [usage.model_extra["timing"]["e2e_s"] for usage in used if usage and usage.model_extra]
    assert grew["vllm:e2e_request_latency_seconds_sum"] <= math.ceil(sum(longest)) * len(PROMPTS)
    assert server.nothing_held()
