"""Whole-workload timings need a GPU; their arithmetic, their workloads and the loop they time do not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lab.bench import __main__ as command
from lab.bench import cases
from lab.core import Request
from lab.executors.torch import TorchExecutor
from lab.models.decoder import Decoder
from lab.shapes import shape

torch.set_num_threads(1)


def test_workloads_are_those_that_others_were_measured_with() -> None:
    nano = cases.nano()
    assert len(nano) == 256
    assert sum(len(request.prompt) for request in nano) == 142_827
    assert sum(request.output or 0 for request in nano) == 133_966
    assert {request.sampling.temperature for request in nano} == {0.6}
    assert len(cases.opt13b()) == 256


def test_the_floor_counts_each_byte_and_operation_once() -> None:
    """Two requests by hand: 3 + 2 outputs after prompts of 10 and 4, in 3 steps."""
    model = shape("opt-13b")
    requests = [Request(0, 0.0, range(10), 3), Request(1, 0.0, range(4), 2)]
    positions = (11 + 12) + 5  # what the second output reads, and the third; the first comes with the prompt
    moved = positions * 819_200 + 3 * 2 * model.parameters_read
    pairs = (10 * 11 + 4 * 5) // 2
    operations = 14 * 2 * model.matrix_parameters + 4 * 40 * 40 * 128 * pairs
    seconds = cases.floor_s(model, requests, 3, read=3e12, rate=7e14)
    assert seconds == pytest.approx(moved / 3e12 + operations / 7e14)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_round_serves_everything(depth: int, recorded: bool) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    executor = TorchExecutor(Decoder(AutoModelForCausalLM.from_config(config).eval(), "tiny"), 2048 + 16)
    requests = [Request(i, 0.0, [3] * 5, 4 + i) for i in range(3)]
    case = cases.Case("tiny", lambda: requests, "2064")
    one = cases.serve(case, executor, requests, depth, recorded)
    assert (one.output_tokens, one.steps, one.preemptions) == (4 + 5 + 6, 6, 0)
    assert one.seconds > 0


def test_what_cannot_be_measured_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["throughput"], ["step"], ["startup"], ["kernels"]):
        assert command.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["throughput", "qwen"]) == 2
    assert "case 'qwen' is unknown: did you mean qwen3-0.6b?" in capsys.readouterr().err
