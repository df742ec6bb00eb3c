"""Beams are transformers' own: the n best outputs of its `generate`, under every policy, ends and all.

Both sides compute in float32 but not in the same order. Where an output differs, both are scored again by the
reference, in one pass and in float64: a difference of at most 1e-4 is a tie that rounding decided, and how many there
are is asserted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from test_text import Served, serve
from test_text import smol as smol
from test_text import tiny as tiny
from transformers import AutoModelForCausalLM

from lab.allocators import ALLOCATORS
from lab.core import Request, SamplingParams
from lab.models import LanguageModel, smollm2
from lab.real import encoder
from lab.schedulers import PREEMPTION, SCHEDULERS
from lab.workloads import workload

CLOSE = 1e-4  # of two scores
ENDS = (5, 17, 40)
Outputs = list[list[list[int]]]  # [requests, outputs, tokens]


def generate(reference: Any, prompts: Seq[Seq[int]], tokens: int, width: int, n: int, ends: Seq[int]) -> Outputs:
    """transformers' n best outputs of each prompt, one prompt at a time, so that nothing is padded."""
    texts = []
    for prompt in prompts:
        out = reference.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            num_beams=width,
            num_return_sequences=n,
            max_new_tokens=tokens,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
        )
        texts.append([until_end(row[len(prompt) :].tolist(), ends) for row in out])
    return texts


def until_end(tokens: list[int], ends: Seq[int]) -> list[int]:
    """Without the padding behind the first token that ends a text."""
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


@torch.inference_mode()
def score(reference: Any, prompt: Seq[int], output: Seq[int]) -> float:
    """Mean log-probability of an output's tokens."""
    ids = torch.tensor([[*prompt, *output]])
    logprobs = reference.double()(input_ids=ids).logits[0].log_softmax(-1)
    reference.float()
    places = range(len(prompt) - 1, len(prompt) + len(output) - 1)
    return float(sum(logprobs[p, t] for p, t in zip(places, output, strict=True))) / len(output)


def ties(reference: Any, prompts: Seq[Seq[int]], served: Served, expected: Outputs) -> int:
    """Assert that outputs are the same or equally good; returns how many are only that."""
    found = 0
    for i, prompt in enumerate(prompts):
        assert len(served.texts[i]) == len(expected[i])
        for ours, theirs in zip(served.texts[i], expected[i], strict=True):
            if ours != theirs:
                difference = score(reference, prompt, ours) - score(reference, prompt, theirs)
                assert abs(difference) <= CLOSE, f"request {i}: {ours} is no tie with {theirs}: {difference:+.5f}"
                found += 1
    return found


def requests_for(prompts: Seq[Seq[int]], tokens: int, width: int, n: int, ends: Seq[int]) -> list[Request]:
    sampling = SamplingParams(max_tokens=tokens, n=n, beams=width, stop=tuple(ends))
    return [Request(i, 0.0, prompt, None if ends else tokens, sampling) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 8, 9, 16, 3, 23, 12, 31]
    return [tuple(torch.randint(0, 101, (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def by_width(tiny: Any, prompts: Any) -> dict[int, Outputs]:
    return {width: generate(tiny[1], prompts, 16, width, width, ENDS) for width in (2, 3, 4)}


PRODUCT = [
    (allocator, scheduler, preemption)
    for allocator, scheduler, preemption in itertools.product(ALLOCATORS.names(), SCHEDULERS.names(), PREEMPTION)
    if not (allocator.startswith("contiguous") or allocator == "slots") or scheduler == "continuous"
]


@pytest.mark.parametrize(("allocator", "scheduler", "preemption"), PRODUCT)
def test_tiny_llama_that_may_end_early(
    tiny: Any, prompts: Any, by_width: Any, allocator: str, scheduler: str, preemption: str
) -> None:
    """Each policy at one of three widths. Oracles cannot know when beams end: they are told how long they run."""
    width = 2 + PRODUCT.index((allocator, scheduler, preemption)) % 3
    knows = any(word in allocator for word in ("oracle", "pow2"))
    requests = requests_for(prompts, 16, width, width, () if knows else ENDS)
    expected = generate(tiny[1], prompts, 16, width, width, ()) if knows else by_width[width]
    wide = "-max" in allocator and "tokens" not in allocator
    served = serve(tiny[0], requests, allocator, scheduler, preemption, 64 * width * (2 if wide else 1), length=64)
    assert ties(tiny[1], prompts, served, expected) <= 1
    if allocator in ("paged", "paged-prefix", "contiguous-need"):
        assert served.preemptions > 0
    if not knows:
        assert len({len(output) for outputs in served.texts.values() for output in outputs}) > 3, "some end early"


@pytest.fixture(scope="module")
def real_prompts() -> list[tuple[int, ...]]:
    return [
        tuple(r.prompt) for r in workload("prompts", count=10, arrivals="all", limit=128, encode=encoder("smollm2"))
    ]


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def real_expected(smol: LanguageModel, reference: Any, real_prompts: Any) -> dict[int, Outputs]:
    return {width: generate(reference, real_prompts, 16, width, width, smol.eos) for width in (2, 4)}


QUICK = (("paged", 4), ("paged-prefix", 2), ("contiguous-need", 2))
REAL = list(itertools.product(ALLOCATORS.names(), (2, 4)))


@pytest.mark.parametrize(
    ("allocator", "width"), [x if x in QUICK else pytest.param(*x, marks=pytest.mark.full) for x in REAL]
)
def test_smollm2(smol: Any, reference: Any, real_prompts: Any, real_expected: Any, allocator: str, width: int) -> None:
    """Ten real prompts, 16 new tokens at most, in a pool that presses where memory can."""
    forced = any(word in allocator for word in ("oracle", "pow2"))
    ends = () if forced else smol.eos
    requests = requests_for(real_prompts, 16, width, width, ends)
    expected = generate(reference, real_prompts, 16, width, width, ()) if forced else real_expected[width]
    wide = "-max" in allocator and "tokens" not in allocator
    pool = 160 * width * (3 if wide else 2)
    served = serve(smol, requests, allocator, "continuous", "swap", pool, length=160)
    assert ties(reference, real_prompts, served, expected) <= 1
