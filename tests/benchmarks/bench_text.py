"""End to end: requests in, tokens out, through engine, model and kernels."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from lab.bench.cases import Case, executor_for, serve
from lab.core import Request
from lab.executors.torch import TorchExecutor
from lab.models.checkpoints import fuse

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
QWEN = Case("qwen3-0.6b", list, "65536")
SIZES = {"cpu": (8, 32, 12), "cuda": (64, 128, 64)}  # requests, prompt, output


@pytest.mark.parametrize("device", SIZES)
def test_output(timed: Any, device: str) -> None:
    """A tiny Llama on a CPU, where most is overhead; Qwen3-0.6B's shape on a GPU. Random weights."""
    count, prompt, output = SIZES[device]
    if device == "cpu":
        executor = TorchExecutor(fuse(AutoModelForCausalLM.from_config(TINY).eval(), "tiny"), 2048)
    else:
        executor = executor_for(QWEN, device)
    requests = [Request(i, 0.0, [5 + i] * prompt, output) for i in range(count)]

    def work() -> None:
        assert serve(QWEN, executor, requests, depth=0, recorded=True).output_tokens == count * output

    timed(work, beside=device, count=count * output, unit="tokens")
