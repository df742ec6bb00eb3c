"""The experiment on the virtual clock's errors: on a clock whose pace is known, on hand-made rows, and for real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import fidelity
from lab import latency
from lab.core import InputError
from lab.experiment import main
from lab.harness import perform
from lab.options import Options
from lab.run import Run

KNOWN = fidelity.Machine(
    Run(hardware="h100-80gb", duration_s=20.0, drain=True),
    {"paged": 4.0, "oracle": 2.0, "static": 0.5},
    [("paged", 0.5), ("paged", 1.0)],
    [("oracle", 0.8), ("static", 0.5)],
    alpaca=10.0,
    at_once=40,
)


def options(out: Path = Path("results"), quick: bool = False, **given: Any) -> Options:
    lists = {name: given.pop(name, None) for name in ("allocators", "schedulers", "systems", "seeds")}
    return Options(given, **lists, quick=quick, out=out)


def test_a_clock_of_known_pace_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fidelity, "_machine", lambda changes: KNOWN)
    monkeypatch.setattr(fidelity, "AT_ONCE", 100)
    asked = options(tmp_path)
    assert perform(fidelity, fidelity.runs(asked), "fidelity", asked, False, "test") == 0
    said = capsys.readouterr().out
    assert said.count("holds     ") == 3
    rows = pd.DataFrame(json.loads((tmp_path / "fidelity" / "summary.json").read_text())["rows"])
    assert list(rows["clock"]) == ["measured"] * 6 + ["simulated"] * 6
    simulated = rows[rows["clock"] == "simulated"]
    assert list(simulated["part"]) == ["calibration"] * 2 + ["held out"] * 4
    assert list(simulated["system"].iloc[:3]) == ["vllm", "vllm", "orca-oracle"]
    assert list(simulated["rate"].iloc[:5]) == [2.0, 4.0, 1.6, 0.25, 10.0]
    assert simulated["load"].iloc[:5].between(0.05, 0.9).all()
    assert np.isnan(simulated["load"].iloc[5])  # all at once: no rate
    assert rows[list(fidelity.MEASURES)].gt(0).all().all()
    assert rows["waste"].between(0, 100).all()
    assert rows[list(fidelity.SHARES)].sum(axis=1).to_numpy() == pytest.approx(100)
    (pace,) = (tmp_path / "fidelity").glob("step-times-*.json")
    assert json.loads(pace.read_text())["fit"]["steps"] == simulated["fit_steps"].iloc[0]


def test_each_seed_is_a_run_and_one_fit_serves_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_machine", lambda changes: KNOWN)
    runs = fidelity.runs(options(seeds=[3, 4]))
    assert len(runs) == len(set(runs)) == 12
    assert [run.seed for run in runs[:4]] == [3, 4, 3, 4]
    assert {run.rate for run in runs[:4]} == {2.0, 4.0}
    assert all(run.rate is None and run.count == 40 for run in runs[-2:])


def rows_of(**wrong: float) -> pd.DataFrame:
    """Three points of a calibration, below and above the knee; `wrong`: by what the held-out ones are off."""
    values = dict.fromkeys(fidelity.MEASURES, 2.0) | dict.fromkeys(fidelity.SHARES, 10.0) | {"waste": 30.0}
    rows: list[dict[str, Any]] = []
    for point, part, load in (("a", "calibration", 0.4), ("b", "held out", 0.8), ("c", "held out", 1.3)):
        same = {"point": point, "seed": 0, "system": "vllm"}
        off = {key: values[key] * factor for key, factor in wrong.items()} if part == "held out" else {}
        rows.append({"clock": "measured", **same, **values, "compiling_s": 0.0})
        found = {"part": part, "load": load, "fit_steps": 100, "fit_error": 3.0}
        rows.append({"clock": "simulated", **same, **found, **values, **off})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("wrong", "holds", "seen"),
    [
        ({}, [True, True, True], "+0.0 % at b"),
        ({"output_tokens_per_s": 0.949}, [False, True, True], "-5.1 % at b"),
        ({"normalised_s": 1.06}, [True, False, True], "+6.0 % at b"),
        ({"normalised_s": 1.04}, [True, True, True], "+4.0 % at b"),
        ({"ttft_s": 3.0}, [True, True, True], "+0.0 % at b"),
        ({"rounding": 1.11}, [True, True, False], "rounding at b, +1.10"),
        ({"free": 0.95}, [True, True, True], "free at b, -0.50"),
    ],
)
def test_claims_hold_and_fail(wrong: dict[str, float], holds: list[bool], seen: str) -> None:
    claims = fidelity.claims(rows_of(**wrong))
    assert [claim.holds for claim in claims] == holds
    assert any(seen in claim.seen for claim in claims)


def test_claims_speak_of_held_out_points_below_the_knee() -> None:
    rows = rows_of(normalised_s=2.0)
    rows.loc[rows["point"] == "b", "load"] = 0.95
    claims = fidelity.claims(rows)
    assert [claim.holds for claim in claims] == [None, None, True]
    assert "--rate" in claims[0].seen


def test_tables_keep_held_out_points_apart() -> None:
    summary, points, *_, fit = fidelity.tables(rows_of(normalised_s=1.06)).values()
    assert list(summary.loc["normalised latency"]) == pytest.approx([9.0, 6.0, 6.0, 6.0, 0.0])
    assert list(summary.loc["output tokens/s"].iloc[1:]) == [0, 0, 0, 0]
    assert list(points.index) == [("calibration", "a"), ("held out", "b"), ("held out", "c")]
    assert list(points["normalised latency"]) == pytest.approx([0, 6, 6])
    assert fit.to_numpy().tolist() == [[100, 3]]


def test_seconds_of_compilation_are_told() -> None:
    rows = rows_of()
    rows["compiling_s"] *= 1.0
    assert not any("compiled" in title for title in fidelity.tables(rows))
    rows.loc[0, "compiling_s"] = 4.0
    assert any("compiled" in title for title in fidelity.tables(rows))


def test_the_knee_is_the_rate_of_the_middle_half(monkeypatch: pytest.MonkeyPatch) -> None:
    finish_s = np.r_[np.linspace(50, 60, 10), 60 + 2.0 * np.arange(1, 21), np.linspace(200, 300, 10)]
    table = pd.DataFrame({"request": range(40), "finish_s": np.random.default_rng(0).permutation(finish_s)})
    monkeypatch.setattr(latency, "latencies", lambda record: table)
    assert fidelity._knee(None) == pytest.approx(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", fidelity.MACHINES)
def test_no_held_out_point_is_calibrated_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = fidelity.MACHINES[name]
    monkeypatch.setattr(fidelity, "_machine", lambda changes: machine)
    calibration, held_out = fidelity._points(options())
    assert not set(calibration) & set(held_out)
    assert {run.allocator for run in calibration} == {"paged"}
    assert {"contiguous-oracle", "contiguous-max"} <= {run.allocator for run in held_out}
    assert "static" in {run.scheduler for run in held_out}
    assert sum(run.workload == "alpaca" for run in held_out) == 1
    assert sum(run.arrivals == "all" for run in held_out) == 1
    if name != "CPU":
        assert len(calibration + held_out) == 11
        assert {run.model for run in calibration + held_out} == {"random:opt-13b"}


def test_a_rate_is_the_knee_of_paging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_machine", lambda changes: KNOWN)
    as_told, twice = fidelity.runs(options()), fidelity.runs(options(rate=8.0))
    assert [run.rate for run in twice if run.rate] == [2 * run.rate for run in as_told if run.rate]
    assert replace(twice[0], rate=None) == replace(as_told[0], rate=None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"executor": "simulated"}, "executor 'simulated': the points are fixed in the source"),
        ({"hardware": "h200"}, "hardware 'h200': .* leave --hardware out"),
        ({"workload": "alpaca"}, "leave --workload out"),
        ({"arrivals": "all"}, "leave --arrivals out"),
        ({"steps": 10}, "leave --steps out"),
        ({"systems": ["vllm", "orca-max"]}, "system 'vllm,orca-max': .* leave --system out"),
        ({"allocators": ["paged"]}, "leave --allocator out"),
        ({"schedulers": ["static"]}, "leave --scheduler out"),
        ({"device": "cpu", "model": "random:qwen3-0.6b"}, "the knee is known for random:smollm2-135m; .* --rate"),
    ],
)
def test_what_would_change_the_points_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        fidelity.runs(options(**given))
    assert "\n" not in str(caught.value)


def test_the_command_measures_on_this_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real steps of SmolLM2's shape with random weights. How far off the clock is depends on who else computes here."""
    command = ["fidelity", "--quick", "--device", "cpu", "--count", "3", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("not judged") == 3
    for name in ("figure.png", "figure.svg", "table.csv", "rows.csv", "header.json", "summary.json"):
        assert (tmp_path / "fidelity" / name).stat().st_size > 0
    rows = pd.read_csv(tmp_path / "fidelity" / "rows.csv")
    assert list(rows["clock"]) == ["measured"] * 3 + ["simulated"] * 3
    assert list(rows["part"].iloc[3:]) == ["calibration", "held out", "held out"]
    assert np.isfinite(rows[[*fidelity.MEASURES, *fidelity.SHARES, "waste"]]).all().all()
    assert rows[[*fidelity.SHARES, "waste"]].stack().between(0, 100).all()
    assert (rows["fit_steps"].iloc[3:] >= 8).all()  # at least those of one request
