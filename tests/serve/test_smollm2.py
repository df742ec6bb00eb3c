"""With a real model: the README's server and its curl, as printed, and real prompts, several at a time."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from running import ROOT, Running
from transformers import AutoModelForCausalLM, AutoTokenizer

from lab import LLM, SamplingParams
from lab.models import smollm2

OWN = {"id", "created"}  # of each reply
SECTION = (ROOT / "README.md").read_text().partition("<!-- serve -->")[2].partition("<!-- end -->")[0]
PROMPTS, AT_ONCE = 20, 8
LONGEST = 60  # tokens of a prompt
CLOSE = 1e-4  # two logits that the order of summation may swap


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ("--name", "smollm2", "--block", "16", "--kv-memory", "4096")
    with Running(tmp_path_factory.mktemp("smollm2"), "smollm2", *options) as server:
        yield server


def test_the_example_answers_as_printed(smol: Running) -> None:
    start, curl, printed = (block.partition("\n")[2] for block in SECTION.split("```")[1::2])
    assert start.split()[1:4] == ["-m", "lab.serve", "smollm2"]
    command = curl.replace("http://127.0.0.1:8000", smol.url)
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=300).stdout
    assert shown(told) == shown(printed)


def shown(reply: str) -> Any:
    """What of it is the same each time."""
    told = json.loads(reply)
    assert told["usage"].pop("timing").keys() == {"queue_s", "ttft_s", "tpot_s", "e2e_s"}
    return {key: value for key, value in told.items() if key not in OWN}


@pytest.mark.parametrize("tokens", [8, pytest.param(64, marks=pytest.mark.full)])
def test_streams_of_real_prompts(smol: Running, tokens: int) -> None:
    """Greedy text, as far as the reference hangs on no rounding: `LLM.generate`'s and transformers' own."""
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2.folder())
    chats, ids = real_chats(tokenizer)
    expected = greedy(tokenizer, ids, tokens)
    llm = LLM("smollm2", device="cpu", kv_memory=4096)
    own = [result.text for result in llm.generate(chats, SamplingParams(max_tokens=tokens))]
    del llm

    def ask(chat: Any) -> str:
        create: Any = smol.openai.chat.completions.create
        chunks = create(model="smollm2", messages=chat, max_tokens=tokens, temperature=0, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        streamed = list(pool.map(ask, chats))
    for text, again, (reference, sure) in zip(streamed, own, expected, strict=True):
        assert text[: len(sure)] == again[: len(sure)] == sure
        assert (text == again == reference) or reference != sure
    certain = sum(reference == sure for reference, sure in expected)
    assert certain >= 0.9 * PROMPTS
    assert len(set(streamed)) >= 0.9 * PROMPTS, "they are answers to prompts"
    smol.until(smol.nothing_held)


def real_chats(tokenizer: Any) -> tuple[list[Any], list[list[int]]]:
    """The first that are short enough, and their tokens."""
    chats, ids = [], []
    data = gzip.decompress((ROOT / "lab/workloads/data/prompts_sample.jsonl.gz").read_bytes())
    for line in data.decode().splitlines():
        chat = [{"role": "user", "content": json.loads(line)["prompt"]}]
        tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        if len(tokens) <= LONGEST:
            chats.append(chat)
            ids.append(tokens)
    return chats[:PROMPTS], ids[:PROMPTS]


def greedy(tokenizer: Any, prompts: list[list[int]], tokens: int) -> list[tuple[str, str]]:
    """transformers' text of each prompt, and what of it is before two logits that are too close to tell apart."""
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids(smollm2.END_OF_TURN)
    width = max(map(len, prompts))
    made = model.generate(
        torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=end,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.stack(made.logits, 1).float().topk(2, dim=-1).values  # [prompts, tokens, 2]
    close = top[..., 0] - top[..., 1] <= CLOSE
    found = []
    for row, near in zip(made.sequences[:, width:].tolist(), close.tolist(), strict=True):
        text = row[: row.index(end)] if end in row else row
        sure = text[: near.index(True)] if True in near else text
        found.append((tokenizer.decode(text), tokenizer.decode(sure)))
    return found
