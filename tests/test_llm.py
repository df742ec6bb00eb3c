"""`lab.LLM`: a tiny random Llama against transformers' own `generate`, and a parrot that says what a test wrote."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from talking import END, Parrot, byte_level, sentencepiece, tiny_llama

import lab
from lab import LLM, InputError, SamplingParams, real
from lab.answers import Result
from lab.latency import latencies
from lab.llm import AHEAD

ROOT = Path(__file__).parents[1]
PROMPTS = ["The quick", "A door opens. A", "ça", "def f(x):\n", "Füchse springen über träge Hunde; là-bas", "Nobody"]
CHAT = [{"role": "user", "content": "Who comes in?"}]
MORE = SamplingParams(max_tokens=24)
DRAWN = SamplingParams(max_tokens=24, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return str(folder), tiny_llama(folder)


def make(model: str, **options: Any) -> LLM:
    return LLM(model, **{"device": "cpu", "kv_memory": 2048, "block": 8, **options})


@pytest.fixture(scope="module")
def llm(tiny: tuple[str, Any]) -> LLM:
    return make(tiny[0])


def texts(results: list[Result]) -> list[list[str]]:
    return [[output.text for output in result.outputs] for result in results]


def assert_all_given_back(llm: LLM) -> None:
    idle = llm.scheduler.allocator.idle()
    assert idle.free + idle.cached == llm.scheduler.allocator.capacity
    left = (llm.engine.groups, llm.engine.flights, llm.scheduler.waiting, llm.scheduler.running, llm.answers.jobs)
    assert not any(left)


# ---- the text is right


def ordinary(reference: Any, tokens: list[int], length: int, **options: Any) -> list[list[int]]:
    """transformers' own, without the prompt."""
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "max_new_tokens": length, "pad_token_id": 0, **options}
    return [out[len(tokens) :].tolist() for out in reference.generate(input_ids=ids, attention_mask=mask, **options)]


@pytest.mark.parametrize("depth", [0, 1])
def test_greedy_text_is_that_of_transformers(tiny: tuple[str, Any], depth: int) -> None:
    llm = make(tiny[0], depth=depth)
    tokenizer = byte_level()
    ids = tokenizer.encode("The lazy dog")
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    results = llm.generate([*PROMPTS, ids, CHAT], SamplingParams(max_tokens=40))
    assert [result.index for result in results] == list(range(8))
    for result, tokens in zip(results, [*map(tokenizer.encode, PROMPTS), ids, chat], strict=True):
        (expected,) = ordinary(tiny[1], tokens, 40)
        (output,) = result.outputs
        assert output.tokens == expected
        assert output.finish_reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")
        assert result.prompt_tokens == len(tokens)
        decoded = tokenizer.decode(tokens + expected, skip_special_tokens=True)
        assert decoded == tokenizer.decode(tokens, skip_special_tokens=True) + output.text == decoded
    assert_all_given_back(llm)


def test_one_prompt_of_each_kind(llm: LLM) -> None:
    for one in ("Nobody", [7, 8, 9], CHAT):
        (result,) = llm.generate(one, MORE)  # type: ignore[arg-type]
        assert texts([result]) == texts(llm.generate([one], [MORE]))  # type: ignore[list-item]
    assert llm.generate([]) == []


def test_parameters_for_each_prompt(llm: LLM) -> None:
    results = llm.generate(PROMPTS[:3], [SamplingParams(max_tokens=n) for n in (5, 1, 3)])
    assert [len(result.outputs[0].tokens) for result in results] == [5, 1, 3]


def test_beams_are_those_of_transformers(tiny: tuple[str, Any], llm: LLM) -> None:
    (result,) = llm.generate("A door", SamplingParams(max_tokens=10, n=2, beams=3))
    tokens = byte_level().encode("A door")
    expected = ordinary(tiny[1], tokens, 10, num_beams=3, num_return_sequences=2)
    assert [output.tokens for output in result.outputs] == expected
    assert [output.text for output in result.outputs] == [llm.decode(tokens + b)[len("A door") :] for b in expected]


def test_logprobs_are_the_log_softmax_of_transformers(tiny: tuple[str, Any], llm: LLM) -> None:
    (result,) = llm.generate("The quick", SamplingParams(max_tokens=12, n=2, temperature=0.8, seed=1, logprobs=3))
    prompt = byte_level().encode("The quick")
    for output in result.outputs:
        with torch.no_grad():
            logits = tiny[1](torch.tensor([prompt + output.tokens])).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert output.logprobs is not None
        assert [sampled.token for sampled in output.logprobs] == output.tokens
        chosen = expected.gather(1, torch.tensor(output.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([s.logprob for s in output.logprobs]), chosen, atol=1e-4, rtol=1e-4)
        top = torch.tensor([[logprob for _, logprob in s.top] for s in output.logprobs])
        torch.testing.assert_close(top, expected.topk(3).values, atol=1e-4, rtol=1e-4)
    assert llm.generate("The quick")[0].outputs[0].logprobs is None


# ---- streams


@pytest.mark.parametrize("params", [MORE, DRAWN, SamplingParams(max_tokens=40, temperature=1.5, stop=("e", "é"))])
def test_a_stream_is_what_generate_gives(llm: LLM, params: SamplingParams) -> None:
    """Random weights write many halves of characters."""
    for prompt in PROMPTS:
        (whole,) = llm.generate(prompt, params)
        stream = llm.stream(prompt, params)
        pieces = []
        result: Result | None = None
        while result is None:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                result = end.value
        assert "".join(pieces) == whole.text == result.text
        assert result.outputs == whole.outputs
        assert all(pieces)
    assert_all_given_back(llm)


def parrot(monkeypatch: pytest.MonkeyPatch, script: str, tokenizer: Any = None, **options: Any) -> tuple[LLM, Parrot]:
    tokenizer = tokenizer or byte_level()
    model = Parrot(tokenizer, tokenizer.encode(script))
    monkeypatch.setattr(real, "model", lambda *_: model)
    monkeypatch.setattr(real, "load_tokenizer", lambda _: tokenizer)
    return make("parrot", **options), model


SCRIPT = "Well: Grüße aus Zürich 😀👩‍👩‍👧! ça va, là-bas? 日本 🇨🇭. STOP here. And more, and more."


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()])
@pytest.mark.parametrize("depth", [0, 1])
def test_streams_give_whole_characters(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, depth: int) -> None:
    llm, model = parrot(monkeypatch, SCRIPT, tokenizer, depth=depth)
    params = SamplingParams(max_tokens=len(model.script) - 8, stop=("STOP",))
    pieces = list(llm.stream("Well:", params))
    expected = SCRIPT.removeprefix("Well:").partition("STOP")[0]
    assert "".join(pieces) == expected == llm.generate("Well:", params)[0].text
    assert "\ufffd" not in expected
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 20


# ---- stop strings and stop tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stop_string_across_tokens_ends_the_request_at_once(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    llm, model = parrot(monkeypatch, SCRIPT, depth=depth)
    tokens = model.script.tolist()
    stop = "re. And m"
    own = byte_level()
    needed = next(n for n in range(len(tokens)) if stop in own.decode(tokens[:n]))
    assert stop not in [own.decode([t]) for t in tokens], "it straddles tokens"
    (result,) = llm.generate([tokens[:5]], SamplingParams(max_tokens=len(tokens) - 8, stop=(stop,)))
    assert result.text == own.decode(tokens).partition(stop)[0][len(own.decode(tokens[:5])) :]
    assert result.outputs[0].tokens == tokens[5:needed]
    assert result.outputs[0].finish_reason == "stop"
    steps = llm.record.steps
    assert len(steps) == needed - 5 + depth, "not a step more, but for the one that was on its way"
    assert list(llm.record.events["detail"])[-1] == "stop"
    assert_all_given_back(llm)


def test_a_stop_token_and_an_end_leave_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, model = parrot(monkeypatch, "One two three four" + END + "five")
    start = model.script.tolist()[:2]
    most = SamplingParams(max_tokens=len(model.script) - 4)
    (ended,) = llm.generate([start], most)
    assert ended.outputs[0].finish_reason == "stop"
    assert llm.decode(start) + ended.text == "One two three four"
    assert ended.outputs[0].tokens[-1] == llm.tokenizer.eos_token_id
    tokens = model.script.tolist()
    end, early = next((i, token) for i, token in enumerate(tokens) if i > 4 and token not in tokens[2:i])
    (stopped,) = llm.generate([start], SamplingParams(max_tokens=20, stop=(early,)))
    assert llm.decode(start) + stopped.text == llm.decode(tokens[:end])
    assert stopped.outputs[0].finish_reason == "stop"


def test_a_special_token_can_be_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text leaves special tokens out, so that they would never be found in it."""
    llm, _ = parrot(monkeypatch, "One two<|user|>three four five six")
    (result,) = llm.generate("One", SamplingParams(max_tokens=12, stop=("<|user|>",)))
    assert result.text == " two"


def test_a_stop_string_ends_one_output_of_several(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, n=3, temperature=1.0, seed=5)
    (free,) = llm.generate("A door", params)
    first, *others = [output.text for output in free.outputs]
    stop = next(
        first[i : i + 2] for i in range(4, len(first) - 2) if not any(first[i : i + 2] in other for other in others)
    )
    (result,) = llm.generate("A door", SamplingParams(max_tokens=30, n=3, temperature=1.0, seed=5, stop=(stop,)))
    assert texts([result]) == [[first.partition(stop)[0], *others]]
    assert result.outputs[0].finish_reason == "stop"
    assert_all_given_back(llm)


# ---- several at a time


@pytest.mark.parametrize(
    ("allocator", "scheduler", "preemption"),
    [
        ("paged", "continuous", "recompute"),
        ("paged", "continuous", "swap"),
        ("paged-prefix", "continuous", "recompute"),
        ("contiguous-need", "static", "recompute"),
        ("contiguous-max-firstfit", "dynamic", "recompute"),
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_policies_and_pressure_change_no_answer(
    tiny: tuple[str, Any], llm: LLM, allocator: str, scheduler: str, preemption: str, depth: int
) -> None:
    prompts = [prompt * (1 + i % 3) for i, prompt in enumerate(PROMPTS * 3)]
    params = [SamplingParams(max_tokens=10 + 5 * (i % 7), n=1 + i % 2, temperature=0.9) for i in range(len(prompts))]
    options = {"allocator": allocator, "scheduler": scheduler, "preemption": preemption, "depth": depth}
    pressed = make(tiny[0], kv_memory=288, length=144, **options)
    results = pressed.generate(prompts, params)
    assert [result.index for result in results] == list(range(len(prompts)))
    assert texts(results) == texts(llm.generate(prompts, params))
    if allocator in ("paged", "contiguous-need"):
        assert sum(result.memory.preemptions for result in results) > 0
    assert sum(r.memory.preemptions for r in results) == (pressed.record.events["kind"] == "preempted").sum()
    assert_all_given_back(pressed)


@pytest.mark.parametrize("allocator", ["paged", "contiguous-double"])
def test_timing_and_memory_are_those_of_the_record(tiny: tuple[str, Any], allocator: str) -> None:
    llm = make(tiny[0], kv_memory=320, length=64, allocator=allocator)
    results = llm.generate(PROMPTS * 3, SamplingParams(max_tokens=20))
    rows = latencies(llm.record).sort_values("request")
    for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s"):
        assert [getattr(r.timing, name) for r in results] == pytest.approx(list(rows[name]), nan_ok=True), name
    assert max(r.timing.queue_s for r in results) > 0
    samples = llm.record.samples.assign(wasted=lambda t: t["held"] - t["computed"]).groupby("request")
    assert [8 * r.memory.blocks for r in results] == list(samples["held"].max())
    assert [r.memory.wasted for r in results] == list(samples["wasted"].last())
    assert all(r.memory.shared == 0 for r in results)


def test_outputs_share_their_prompt(llm: LLM) -> None:
    (result,) = llm.generate([list(range(10, 43))], SamplingParams(max_tokens=4, n=3, temperature=1.0))
    assert result.memory.shared == 4  # full blocks of 8; whoever writes into the fifth has its own by then
    assert result.memory.blocks == 4 + 3
    assert result.memory.wasted == 3 * (40 - 36)


def test_requests_share_what_they_begin_with(tiny: tuple[str, Any]) -> None:
    llm = make(tiny[0], allocator="paged-prefix")
    prompt = list(range(10, 43))
    llm.generate([prompt], MORE)
    results = llm.generate([prompt, prompt], [DRAWN, MORE])
    assert [r.memory.shared for r in results] == [4, 4]
    assert texts(results) == texts(make(tiny[0]).generate([prompt, prompt], [DRAWN, MORE]))


def test_streams_by_turns_share_the_engine(llm: LLM) -> None:
    alone = [llm.generate(prompt, DRAWN)[0].text for prompt in PROMPTS]
    streams = [llm.stream(prompt, DRAWN) for prompt in PROMPTS]
    parts = [""] * len(PROMPTS)
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        parts = [part + piece for part, piece in zip(parts, pieces, strict=True)]
    assert parts == alone
    assert llm.record.steps["running"].max() == len(PROMPTS)


def test_a_stream_that_is_given_up_gives_its_memory_back(llm: LLM) -> None:
    stream = llm.stream("The quick", SamplingParams(max_tokens=60))
    next(stream)
    with pytest.raises(InputError, match="record: requests are in flight"):
        _ = llm.record
    assert llm.engine.groups
    stream.close()
    assert_all_given_back(llm)
    assert list(llm.record.events["kind"])[-1] == "cancelled"


def test_a_call_that_is_interrupted_leaves_nothing(llm: LLM) -> None:
    results = llm.serve(llm.requests(PROMPTS * 2, [SamplingParams(max_tokens=3 + i) for i in range(12)]))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert_all_given_back(llm)


@pytest.mark.parametrize("recording", [False, True])
def test_thousands_of_prompts_in_flat_memory(monkeypatch: pytest.MonkeyPatch, recording: bool) -> None:
    """Neither groups nor answers gather, whatever is recorded; and without a record no memory does."""
    llm, _ = parrot(monkeypatch, SCRIPT, recording=recording)
    live = []
    step = llm.engine.step

    def watched(**more: Any) -> bool:
        live.append(len(llm.answers.jobs))
        gc.collect()  # a group and its sequences know each other: what is gone is gone now, not at some time
        return step(**more)

    def peak(count: int) -> int:
        live.clear()
        tracemalloc.start()
        requests = (llm.request(i, [7, 8, 9, 10 + i % 50], SamplingParams(max_tokens=2)) for i in range(count))
        assert sum(1 for _ in llm.serve(requests)) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    monkeypatch.setattr(llm.engine, "step", watched)
    gc.collect()
    gc.freeze()
    try:
        few, many = peak(700), peak(2000)
    finally:
        gc.unfreeze()
    assert max(live) <= AHEAD + 2048 // 8
    if not recording:
        assert many < 1.2 * few
    assert_all_given_back(llm)


# ---- what is said about wrong input, before any work


def wrong(prompt: Any, params: Any = None, said: str = "") -> Any:
    return pytest.param(prompt, params, said, id=said[:40])


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        wrong("", None, "prompt 1: '' is empty: give text"),
        wrong([], None, r"prompt 1: \[\] is empty"),
        wrong(7, None, "prompt 1: '7': must be text, token ids, or messages"),
        wrong([7, "x"], None, "must be text, token ids, or messages"),
        wrong(None, None, "prompt 1: 'None': must be text, token ids, or messages"),
        wrong(b"A door", None, "prompt 1: .*A door.*: must be text, token ids, or messages"),
        wrong({"role": "user", "content": "A"}, None, "prompt 1: .*: must be text, token ids, or messages"),
        wrong("A \ud800", None, r"prompt 1: 'A .ud800' has half of a surrogate pair"),
        wrong([7, 4000], None, "prompt 1: token 4000: the model has 0 to 383: take its own"),
        wrong([-1], None, "prompt 1: token -1"),
        wrong([{"role": "user"}], None, "prompt 1: message .*: must be .*content"),
        wrong([{"role": "clown", "content": "ha"}], None, "chat template refuses it: no clowns"),
        wrong([7] * 300, None, "request 1: 300 prompt and 1 output tokens exceed the limit of 256"),
        wrong([7], SamplingParams(n=40, max_tokens=200), r"request 1: 40 x 201 tokens do not fit .*enlarge it"),
        wrong([7], 5, r"prompt 1: parameters 5: must be SamplingParams\(...\)"),
        wrong([7], SamplingParams(beams=2, stop=("x",)), "stop='x': a beam search cannot"),
        wrong([7], SamplingParams(beams=2, logprobs=2), "logprobs=2: a beam search cannot"),
    ],
)
def test_wrong_input(llm: LLM, monkeypatch: pytest.MonkeyPatch, prompt: Any, params: Any, said: str) -> None:
    monkeypatch.setattr(llm.engine, "step", lambda **_: pytest.fail("it began to work"))
    with pytest.raises(InputError, match=said):
        llm.generate(["A door", prompt], [MORE, params or MORE])


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_tokens": 0}, "max_tokens=0: must be at least 1"),
        ({"max_tokens": "5"}, "max_tokens='5': must be a whole number"),
        ({"max_tokens": 1.5}, "max_tokens=1.5: must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"temperature": float("nan")}, "temperature=nan: must be a finite number"),
        ({"top_p": 0}, "top_p=0: must be in"),
        ({"top_k": 10**30}, "top_k=1000.*: must be 0 .keep all. or more, of 64 bits"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be a number of 64 bits"),
        ({"stop": ("",)}, r"stop=\('',\): must be token ids, and strings that are not empty"),
        ({"stop": 1.5}, r"stop=\(1.5,\): must be token ids, and strings"),
    ],
)
def test_wrong_parameters(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SamplingParams(**params)


def test_a_stop_string_by_itself_or_in_a_list() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", 7]).stop == ("a", 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allocator": "pagd"}, "allocator 'pagd' is unknown: did you mean paged"),
        ({"scheduler": "lucky"}, "scheduler 'lucky' is unknown"),
        ({"kv_memory": "lots"}, "pool size 'lots'"),
        ({"kv_memory": "90%"}, "free memory is not known on this device; give tokens or bytes"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"depth": 2}, "depth 2: must be 0"),
        ({"length": 4000}, "length 4000: the model takes 3 to 256"),
    ],
)
def test_wrong_options(tiny: tuple[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(tiny[0], **options)


def test_other_things_that_are_wrong(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="2 sampling parameters for 3 prompts"):
        llm.generate(PROMPTS[:3], [MORE, MORE])
    for one in (None, 5, 1.5, b"A door", bytearray(b"A door"), {"role": "user", "content": "A"}):
        with pytest.raises(InputError, match=r"prompt 0: .*: must be text, token ids, or messages of a chat"):
            llm.generate(one)  # type: ignore[arg-type]
    for params in (5, {"max_tokens": 3}):
        with pytest.raises(InputError, match=r"prompt 0: parameters .*: must be SamplingParams"):
            llm.generate("A door", params)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n=2, beams=0: one output is streamed"):
        llm.stream("A", SamplingParams(n=2))
    with pytest.raises(InputError, match=r"prompt 0: '' is empty"):
        llm.stream("")
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="the model has no chat template"):
        llm.generate(CHAT)


def test_random_weights_take_and_give_tokens() -> None:
    llm = LLM("random:smollm2-135m", device="cpu", kv_memory=256, recording=False)
    (result,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=3))
    assert len(result.outputs[0].tokens) == 3
    assert result.text == ""
    with pytest.raises(InputError, match="random weights have no tokenizer"):
        llm.generate("Hello")
    with pytest.raises(InputError, match="record: nothing was recorded"):
        _ = llm.record
    real.release()


def test_the_bar_is_for_terminals_and_those_who_ask(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    say: Callable[[bool | None], object] = lambda progress: llm.generate(PROMPTS[:2], MORE, progress=progress)  # noqa: E731
    for progress, shown in ((None, False), (False, False), (True, True)):
        say(progress)
        assert ("2/2" in capsys.readouterr().err) == shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="in bfloat16 a text may differ")
def test_the_readme_prints_what_it_says() -> None:
    """SmolLM2, as a reader would run it."""
    section = (ROOT / "README.md").read_text().partition("<!-- python -->")[2].partition("<!-- end -->")[0]
    code, expected = (section.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "text"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == expected
    assert not done.stderr


def test_the_package_names_nothing_else() -> None:
    assert lab.LLM is LLM
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        _ = lab.LLMM  # type: ignore[attr-defined]
