"""Runs of several experiments carried out together: each once, the longest first, found again by the experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import experiment
from lab.experiment import main
from lab.run import Run
from papers.pagedattention import together


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> str:
    """The options of two experiments, so that they end in a second."""
    options = "--executor simulated --quick --duration 20"
    monkeypatch.setattr(together, "OPTIONS", {"fragmentation": options, "gap": options})
    return options


def test_each_run_once_and_then_found(short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert together.main(["fragmentation", "gap", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("6 runs, 6 to carry out")  # all of gap's are among fragmentation's
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    for name in ("fragmentation", "gap"):
        assert main([name, *short.split(), "--out", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == kept
    assert together.main(["gap", "--out", str(tmp_path)]) == 0
    assert "4 runs, 0 to carry out" in capsys.readouterr().out


def test_what_is_left_is_said(short: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert together.main(["gap", "--out", str(tmp_path), "--stop-after", "1e-9"]) == 3
    assert "4 runs are left" in capsys.readouterr().out


def test_what_is_named_first_begins_first(short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time runs out, whole experiments are there, and not half of each."""
    begun: list[Run] = []
    monkeypatch.setattr(together, "carry_out_all", lambda places, _stop_s: begun.extend(places))
    assert together.main(["gap", "fragmentation", "--out", str(tmp_path)]) == 3
    keys = {run.key() for run in experiment.runs_of(["gap", *short.split()], tmp_path)}
    assert {run.key() for run in begun[: len(keys)]} == keys
    assert len(begun) > len(keys)


def test_the_longest_begin_first() -> None:
    at_once = Run(arrivals="all", rate=None, duration_s=None, count=256)
    static = Run(**{**vars(at_once), "scheduler": "static", "allocator": "contiguous-max"})
    trace = Run(rate=2.0, duration_s=300.0)
    assert together.longest_first([at_once, trace, static, at_once]) == [static, trace, at_once]


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert together.main(["capacities"]) == 2
    assert capsys.readouterr().err.startswith("error: experiment 'capacities' is unknown: ")


@pytest.mark.parametrize("name", together.OPTIONS)
def test_options_are_the_commands_own(name: str) -> None:
    arguments = [name, *together.OPTIONS[name].split()]
    assert experiment._options(experiment._parser().parse_args(arguments)).quick is False
