"""What rate a system sustains: the experiment at smoke scale, its arithmetic on curves and records made by hand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import capacity
from experiments._knees import at_least, drain, knee, ratio, ratio_text, spread_of, sustained
from lab.core import InputError
from lab.experiment import main
from lab.options import Options
from lab.record import Record
from lab.run import Run, carry_out
from lab.systems import system

HEADER = {"model": "opt-13b", "workload": "sharegpt", "simulated": True, "hardware": "a100-40gb"}
KNEES = {"vllm": 2.0, "orca-oracle": 1.0, "orca-pow2": 0.8, "orca-max": 0.5, "fastertransformer": 0.2}
BATCHES = {"vllm": 30.42, "orca-oracle": 13.62, "orca-pow2": 9.81, "orca-max": 7.0, "fastertransformer": 3.0}


def options(out: Path, **changes: object) -> Options:
    return Options(changes, None, None, None, None, True, out)


def made(knees: dict[str, float] = KNEES, batches: dict[str, float] = BATCHES, **more: Any) -> pd.DataFrame:
    """Latency is 0.5 s/token at the knee, and doubles with each tenth of it; seed 1 sustains a tenth more."""
    rows = []
    for name, at in knees.items():
        for seed in (0, 1):
            for rate in sorted({*(at * share for share in (0.5, 0.8, 0.9, 1.1, 1.3)), 2.0}):
                seconds = 0.5 * 2 ** (10 * (rate / at / (1 + 0.1 * seed) - 1))
                row = {"system": name, "workload": "sharegpt", "rate": rate, "seed": seed, "trace_s": 600.0}
                row |= {"normalised_s": seconds, "batch": batches[name], "drain_per_s": 0.9 * at, "queued_s": 500.0}
                rows.append(row | {"refused": 0, "paper_setting": True, "paper_clock": True, **more})
    return pd.DataFrame(rows)


def test_whole_at_smoke_scale(tmp_path: Path) -> None:
    assert main(["capacity", "--quick", "--workload", "sharegpt", "--out", str(tmp_path)]) == 0
    place = tmp_path / "capacity"
    assert all((place / name).stat().st_size for name in ("figure.png", "figure.svg", "table.csv", "rows.csv"))
    summary = json.loads((place / "summary.json").read_text())
    assert summary["claims"]
    assert all(claim["holds"] is None for claim in summary["claims"])
    rows = pd.DataFrame(summary["rows"])
    assert set(rows["system"]) == set(capacity.SYSTEMS)
    assert rows["normalised_s"].between(0.02, 10).all()
    assert rows.loc[rows["system"] == "orca-max", "batch"].between(0, 7).all()
    assert (rows["queued_s"] >= 0).all()
    assert rows["paper_setting"].eq(False).all()  # seconds of arrivals are no trace to judge


def test_sustained_is_where_a_curve_crosses_for_good() -> None:
    assert sustained([1, 2, 3], [0.1, 0.1, 0.4], 0.2) == pytest.approx(2.5)  # half of two doublings
    assert sustained([1, 2, 3], [0.3, 0.1, 0.4], 0.2) == pytest.approx(2.5)  # noise below is not the knee
    assert sustained([1, 2], [0.1, 0.2], 0.2) is None
    assert sustained([1, 2], [0.3, 0.4], 0.2) is None
    assert sustained([], [], 0.2) is None


@pytest.mark.parametrize(
    ("rates", "threshold", "words"),
    [
        ([1.0, 2.0], 0.0, "threshold 0"),
        ([1.0, 2.0], -1.0, "threshold -1"),
        ([1.0, 2.0], math.nan, "threshold nan"),
        ([2.0, 1.0], 0.5, "rates 2, 1"),
        ([1.0, 1.0], 0.5, "rates 1, 1"),
        ([0.0, 1.0], 0.5, "rates 0, 1"),
    ],
)
def test_thresholds_of_zero_and_rates_out_of_order_are_refused(
    rates: list[float], threshold: float, words: str
) -> None:
    with pytest.raises(InputError, match=words) as error:
        sustained(rates, [0.1, 1.0], threshold)
    assert "\n" not in str(error.value)


def test_a_knee_and_a_ratio_with_their_spread() -> None:
    rows = made()
    vllm, oracle = (rows[rows["system"] == name] for name in ("vllm", "orca-oracle"))
    one = vllm[vllm["seed"] == 0]
    assert knee(one, 0.5).rate == pytest.approx(2.0)
    assert math.isnan(knee(one, 0.5).spread)
    found = knee(vllm, 0.5)
    assert 2.0 < found.rate < 2.2  # between the seeds
    assert found.spread == pytest.approx(np.std([2.0, 2.2], ddof=1))
    times, spread = ratio(vllm, oracle, 0.5)
    assert times == pytest.approx(2.0, abs=0.03)
    assert spread == pytest.approx(0, abs=1e-9)  # the same in both seeds
    assert knee(vllm, 100.0).text == "> 2.6"
    assert knee(vllm, 1e-3).text == "< 1"
    assert ratio_text(vllm, oracle, 0.5) == spread_of(times, spread)
    below = vllm[vllm["rate"] < 2.0]  # now it sustains all that it was asked for
    most = below["rate"].max()
    assert at_least(below, oracle, 0.5) == pytest.approx(most / knee(oracle, 0.5).rate)
    assert ratio_text(below, oracle, 0.5) == f"> {most / knee(oracle, 0.5).rate:.2f}"
    assert math.isnan(at_least(vllm, oracle, 0.5))
    slow = oracle[oracle["rate"] < 1.0]
    assert math.isnan(at_least(below, slow, 0.5)), "so does the other"


def of_queue(waiting: list[int], ended_s: list[float]) -> Record:
    """Steps of a second each."""
    steps = pd.DataFrame({"waiting": waiting, "start_s": range(len(waiting)), "end_s": range(1, len(waiting) + 1)})
    events = pd.DataFrame({"kind": "ended", "request": range(len(ended_s)), "time_s": ended_s})
    return Record({}, None, {"steps": steps.astype({"start_s": float, "end_s": float}), "events": events})


def test_drain_counts_where_the_queue_is_never_empty() -> None:
    waiting = [0, 1, 1, 0, *[3] * 12, 0, 0, 2]
    per_s, queued_s = drain(of_queue(waiting, [2.0, 5.5, 6.5, 7.0, 9.0, 16.0, 16.5, 18.0]))
    assert queued_s == 12  # from 4 to 16 s, of which the first two are left out: 6.5, 7, 9 and 16 count
    assert per_s == pytest.approx(4 / 10)
    assert drain(of_queue([0, 0], [1.0]))[1] == 0


def test_drain_of_a_server_with_seven_places_is_seven_over_their_time() -> None:
    """Little's law: Orca (Max) runs 7 requests while any waits."""
    run = Run(**{**system("orca-max").settings, "rate": 4.0, "duration_s": 150.0})
    record = carry_out(run, None).record()
    per_s, queued_s = drain(record)
    events = record.events[record.events["time_s"] > 30]
    admitted = events[events["kind"] == "admitted"].set_index("request")["time_s"]
    served_s = (events[events["kind"] == "ended"].set_index("request")["time_s"] - admitted).dropna().mean()
    assert queued_s > 100
    assert per_s == pytest.approx(7 / served_s, rel=0.25)


def test_claims_hold_and_fail() -> None:
    names = ["oracle", "max", "fastertransformer", "vllm", "oracle", "pow2", "max"]
    held = capacity.claims(made())
    assert [claim.holds for claim in held] == [True, True, None, True, True, True, True], held
    assert all(name in claim.text.lower() for name, claim in zip(names, held, strict=True))
    close = capacity.claims(made({**KNEES, "vllm": 1.2}))
    assert [claim.holds for claim in close][:2] == [False, False]
    other = capacity.claims(
        made(batches={**BATCHES, "vllm": 25.0, "orca-oracle": 14.4, "orca-pow2": 9.4, "orca-max": 6.9})
    )
    assert [claim.holds for claim in other][3:] == [False] * 4
    elsewhere = capacity.claims(made(paper_setting=False))
    assert all(claim.holds is None for claim in elsewhere)
    machine = capacity.claims(made(paper_clock=False))
    assert [claim.holds for claim in machine] == [True, True, *[None] * 5]
    far = capacity.claims(made().query("rate < 1.5"))
    assert [claim.holds for claim in far][:2] == [None, None]
    assert "beyond the grid" in far[0].seen


def test_tables_have_the_paper_beside_ours() -> None:
    found = capacity.tables(made())
    first, several, ratios, batches, drains = found.values()
    assert "600 s" in next(iter(found))
    assert first.loc[("sharegpt", "vllm"), "paper"] == "about 1.9"
    assert first.loc[("sharegpt", "vllm"), "ours / paper"] == pytest.approx(2.09 / 1.9, abs=0.05)
    assert first.loc[("sharegpt", "orca-max"), "paper: vllm / it"] == "about 3.80"
    assert several.loc[("sharegpt", "vllm"), "0.5 s/token"].startswith("2.0")
    assert "±0.14" in several.loc[("sharegpt", "vllm"), "0.5 s/token"]
    assert ratios.loc[("sharegpt", "orca-oracle"), "0.5 s/token"].startswith("2.0")
    assert batches.loc[("sharegpt", "vllm"), "off by %"] == 0
    assert drains.loc[("sharegpt", "orca-max"), "ended/s"].startswith("0.450")
    assert drains.loc[("sharegpt", "orca-max"), "vllm / it"] == pytest.approx(4)


def test_one_rate_alone_has_latencies_and_no_knee() -> None:
    one = made().query("rate == 2.0").assign(drain_per_s=math.nan)
    found = capacity.tables(one)
    latencies = list(found.values())[-1]
    assert len(latencies) == len(capacity.SYSTEMS)
    assert "the queue" not in next(iter(found))
    assert found[next(iter(found))]["ours"].str.match("[<>] ").all()
    assert capacity.figure(one, HEADER)


def test_the_figure_has_latencies_and_ratios() -> None:
    both = pd.concat([made(), made().assign(workload="alpaca")])
    grid = capacity.figure(both, HEADER).axes
    assert len(grid) == 4
    assert grid[0].get_ylim() == (0, 1)
    assert any("simulated" in text.get_text() for text in grid[0].texts)
    assert len(grid[2].get_lines()) == len(capacity.SYSTEMS) - 1 + 1  # and the paper's "up to"


def test_rates_are_declared_or_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = replace(options(tmp_path), quick=False)
    found = capacity.runs(full)
    assert {run.seed for run in found} == {0, 1, 2}
    assert all(run.drain and run.duration_s == 600 for run in found)
    at = {(run.workload, run.rate) for run in found}
    assert {("sharegpt", 2.0), ("alpaca", 30.0)} <= at
    for rates in capacity.RATES.values():
        assert all(0 < rate < after for rate, after in itertools.pairwise(rates))
    static = {(run.workload, run.batch) for run in found if run.scheduler == "dynamic"}
    assert static == {("sharegpt", 5), ("alpaca", 14)}
    assert {capacity._name(run) for run in found} == set(capacity.SYSTEMS)
    one = capacity.runs(replace(full, changes={"rate": 1.5, "workload": "sharegpt"}, systems=["vllm"], seeds=[7]))
    assert [(run.rate, run.seed) for run in one] == [(1.5, 7)]
    faster = replace(options(tmp_path, hardware="h100-80gb", workload="sharegpt"), systems=["orca-max"])
    ladder = [run.rate or 0 for run in capacity.runs(faster)]
    assert "at once" in capsys.readouterr().out
    assert ladder == sorted(ladder)
    assert max(ladder) > 0.9  # more than the A100 sustains
    assert [run.rate for run in capacity.runs(faster)] == ladder
    assert "at once" not in capsys.readouterr().out  # the record was kept


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": "all"}, "arrivals 'all'"),
        ({"arrivals": "trace"}, "arrivals 'trace'"),
        ({"steps": 100}, "steps 100"),
        ({"executor": "simulated", "device": "cpu"}, "device 'cpu'"),
        ({"executor": "torch", "hardware": "h100-80gb"}, "hardware 'h100-80gb'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        capacity.runs(options(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_rates_that_are_none_are_refused(rate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capacity", "--quick", "--rate", rate, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rate ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("gpu", "rates"),
    [
        ("NVIDIA H100 80GB HBM3", [4.64, 6.97, 8.51, 2.32, 3.48, 4.26, 1.27, 1.9, 2.32]),
        ("NVIDIA H200", [5.94, 8.91, 10.9, 2.95, 4.42, 5.4, 1.64, 2.47, 3.01]),
    ],
)
def test_a_known_gpu_is_asked_at_its_own_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, rates: list[float]
) -> None:
    class Known:
        @staticmethod
        def device_name(device: str) -> str:
            assert device == "cuda"
            return gpu

    monkeypatch.setattr(capacity, "real", lambda: Known)
    systems = ["vllm", "orca-oracle", "orca-max"]
    asked = replace(options(tmp_path, device="cuda"), systems=systems, seeds=[0], quick=False)
    runs = capacity.runs(asked)
    assert [run.rate for run in runs] == rates
    assert {run.duration_s for run in runs} == {300.0}
