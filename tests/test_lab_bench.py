"""Whole-workload timings need a GPU; their arithmetic, their workloads and the loop they time do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lab.bench import __main__ as command
from lab.bench import cases, workloads
from lab.bench.profile import Span, Watch, busy_us, by_kind
from lab.core import InputError, Request
from lab.executors.torch import TorchExecutor
from lab.models.checkpoints import fuse
from lab.shapes import shape

torch.set_num_threads(1)


def test_workloads_are_those_that_others_were_measured_with() -> None:
    nano = cases.nano()
    assert len(nano) == 256
    assert sum(len(request.prompt) for request in nano) == 142_827
    assert sum(request.output or 0 for request in nano) == 133_966
    assert {request.sampling.temperature for request in nano} == {0.6}
    opt = cases.opt13b()
    assert len(opt) == 256
    assert 0 <= min(min(r.prompt) for r in opt) <= max(max(r.prompt) for r in opt) < 50272


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


def tiny() -> TorchExecutor:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return TorchExecutor(fuse(AutoModelForCausalLM.from_config(config).eval(), "tiny"), 2048 + 16)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_round_serves_everything(depth: int, recorded: bool) -> None:
    executor = tiny()
    requests = [Request(i, 0.0, [3] * 5, 4 + i) for i in range(3)]
    case = cases.Case("tiny", lambda: requests, "2064")
    one = cases.serve(case, executor, requests, depth, recorded)
    assert (one.output_tokens, one.steps, one.preemptions) == (4 + 5 + 6, 6, 0)
    assert one.seconds > 0


def test_the_same_steps_under_each_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "executor_for", lambda *_: tiny())
    rows = list(workloads.policies(2, "cpu", rows=3, context=7, steps=8))
    assert [row["case"] for row in rows] == [", ".join(policy) for policy in workloads.POLICIES]
    assert all(len(row["step_ms"]) == 2 and min(row["step_ms"]) > 0 for row in rows)
    assert rows[0]["over_paged"] == 0


def test_a_profile_by_kind() -> None:
    spans = [
        Span("attention_kernel", 0, 40),
        Span("nvjet_tst_128x64", 40, 50),
        Span("void gemvx::kernel", 60, 70),
        Span("norm_kernel", 65, 75),
        Span("Memcpy HtoD", 90, 92),
        Span("elementwise", 92, 93),
    ]
    found = by_kind(spans, steps=2)
    assert list(found) == ["attention", "matrix products", "norm", "copies", "others"]
    assert found["attention"] == (0.5, 20.0)
    assert found["matrix products"] == (1.0, 10.0)
    assert found["norm"] == (0.5, 2.5)  # it had started while a product still ran
    assert busy_us(spans) == sum(2 * us for _, us in found.values()) == 50 + 15 + 3


@pytest.mark.parametrize("depth", [0, 1])
def test_watched_steps(depth: int) -> None:
    """The profiler runs over so many steps, the run ends behind them, and the executor is as it was."""
    executor = tiny()
    requests = [Request(i, 0.0, [3] * 5, 40) for i in range(3)]
    watch = Watch(executor, first=4, steps=10)
    one = cases.serve(cases.Case("tiny", lambda: requests, "2064"), executor, requests, depth, False, watch.after)
    assert one.steps == 14
    found = watch.found()
    assert 0 < found["host_us"] < found["step_us"] == pytest.approx(1e5 * watch.seconds)
    assert found["kinds"] == ({} if not torch.cuda.is_available() else found["kinds"])
    assert cases.serve(cases.Case("tiny", lambda: requests, "2064"), executor, requests, depth, False).steps == 40
    assert "collect" not in vars(executor)


def test_what_cannot_be_measured_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["throughput"], ["step"], ["policies"], ["startup"], ["kernels"]):
        assert command.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["throughput", "qwen"]) == 2
    assert "case 'qwen' is unknown: did you mean qwen3-0.6b?" in capsys.readouterr().err


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second case finds no memory: the first has its row and what it printed."""

    def throughput(*_: object) -> Iterator[dict[str, Any]]:
        print("one 100 tok/s")
        yield {"case": "one", "tokens_per_s": 100.0}
        raise InputError("no room: make some")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "throughput", throughput)
    assert command.main(["throughput", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == [{"case": "one", "tokens_per_s": 100.0}]
    assert (tmp_path / "throughput.txt").read_text().endswith("one 100 tok/s\n")
