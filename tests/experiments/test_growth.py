"""How memory and throughput grow with the batch: the experiment at smoke scale, its arithmetic on rows made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from experiments import growth
from lab.core import InputError
from lab.experiment import main
from lab.metrics import categories
from lab.options import Options
from lab.run import Run, carry_out
from lab.systems import system

HEADER = {"model": "opt-13b", "workload": "sharegpt", "simulated": True, "hardware": "a100-40gb"}
PER_SEQUENCE = {"vllm": 0.3, "orca-oracle": 0.8, "orca-pow2": 1.1, "orca-max": 1.68}  # GB


def options(out: Path, **changes: object) -> Options:
    return Options(changes, None, None, None, None, True, out)


def made(per_sequence: dict[str, float] = PER_SEQUENCE, most_tokens: float = 60.0) -> pd.DataFrame:
    """100 iterations of 0.1 s at each batch that fits 12 GB, in two seeds; a sequence alone gets `most_tokens`/s."""
    rows = []
    for name, gb in per_sequence.items():
        for seed in (0, 1):
            row: dict[str, object] = {"system": name, "seed": seed, "rate": 4.0, "paper_setting": True}
            row |= {"weights_gb": 26.0, "pool_gb": 12.0, "longest_gb": 1.68}
            for batch in growth.BINS:
                n = 100.0 if batch * gb <= 12 else 0.0
                tokens = n * batch * most_tokens / 10 / (1 + batch / 40)
                sums = (n, n * batch, n * batch * gb, tokens, n / 10)
                row |= {f"{s}_{batch}": value for s, value in zip(growth.SUMS, sums, strict=True)}
            end = 12 / gb + seed
            row |= dict(zip((f"{s}_full" for s in growth.SUMS), (50, 50 * end, 600, 50 * end, 5), strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def test_whole_at_smoke_scale(tmp_path: Path) -> None:
    assert main(["growth", "--quick", "--out", str(tmp_path)]) == 0
    place = tmp_path / "growth"
    assert all((place / name).stat().st_size for name in ("figure.png", "figure.svg", "table.csv", "rows.csv"))
    summary = json.loads((place / "summary.json").read_text())
    assert all(claim["holds"] is None for claim in summary["claims"])
    rows = pd.DataFrame(summary["rows"])
    assert set(rows["system"]) == set(growth.SYSTEMS)
    points = growth.curves(rows)
    assert np.isfinite(points.drop(columns="system").astype(float)).all(axis=None)
    assert points["gb"].between(rows["weights_gb"].max(), rows["weights_gb"].max() + rows["pool_gb"].max()).all()
    assert points["tokens_per_s"].between(10, 2000).all()
    top = points[points["system"] == "orca-max"]
    assert top["gb"].to_numpy() == pytest.approx(25.7 + top["batch"].to_numpy() * 2048 * 819_200 / 1e9, abs=0.05)


def test_a_row_sums_what_the_record_says() -> None:
    """Against the seven categories, which are computed in another way, and a count by hand."""
    run = Run(**{**system("orca-oracle").settings, "duration_s": 120.0, "rate": 1.1, "seed": 2})
    record = carry_out(run, None).record()
    row = growth.row(run, record)
    steps = record.steps[record.steps["end_s"].between(40, 120) & (record.steps["running"] > 0)]
    out = (steps["blocked"] > 0) | (steps["preempted"] > 0)
    assert 0 < out.sum() < len(out) / 2
    assert row["n_full"] == out.sum()
    assert sum(row[f"n_{b}"] for b in growth.BINS) == len(out) - out.sum()
    start, after = max(zip(growth.BINS, growth.BINS[1:], strict=False), key=lambda bounds: row[f"n_{bounds[0]}"])
    at = steps[~out & (steps["running"] >= start) & (steps["running"] < after)]
    assert len(at) == row[f"n_{start}"] > 0
    table = categories(record).loc[at.index]
    held = table[["stored", "ended", "reserved", "excess", "rounding"]].sum(axis=1)
    assert row[f"held_{start}"] == pytest.approx(held.sum() * 819_200 / 1e9)
    assert row[f"sampled_{start}"] == at["sampled"].sum()
    assert row[f"seconds_{start}"] == pytest.approx((at["end_s"] - at["start_s"]).sum())
    assert row["weights_gb"] == pytest.approx(25.7, abs=0.1)
    assert row["pool_gb"] == pytest.approx(12 * 2**30 / 1e9, rel=0.001)


def test_an_iteration_in_which_a_kernel_was_compiled_is_no_sample() -> None:
    run = Run(**{**system("orca-max").settings, "arrivals": "all", "rate": None, "duration_s": None, "count": 8})
    record = carry_out(run, None).record()
    before = growth.row(run, record)
    record.steps.loc[record.steps.index[-1], "compiled"] = True  # the last: one sequence runs
    after = growth.row(run, record)
    assert (before["n_1"] - after["n_1"], before["n_2"]) == (1, after["n_2"])


def test_an_overload_is_no_part_of_the_curve() -> None:
    run = Run(**{**system("orca-max").settings, "duration_s": 60.0, "rate": 4.0})
    row = growth.row(run, carry_out(run, None).record())
    assert row["n_full"] > 100
    assert sum(row[f"n_{b}"] for b in growth.BINS) == 0
    assert row["running_full"] == 7 * row["n_full"]


def test_of_requests_that_come_at_once_the_curve_is_the_end_of_the_queue() -> None:
    run = Run(**{**system("orca-max").settings, "arrivals": "all", "rate": None, "duration_s": None, "count": 24})
    record = carry_out(run, None).record()
    row = growth.row(run, record)
    last = record.steps.index[record.steps["blocked"] > 0][-1]
    assert 0 < sum(row[f"n_{b}"] for b in growth.BINS) == len(record.steps) - 1 - last
    assert all(row[f"n_{b}"] > 0 for b in (1, 2, 3))


def test_means_and_batches_at_equal_memory() -> None:
    rows = made()
    points = growth.curves(rows).set_index(["system", "bin"])
    assert points.loc[("vllm", 10), "gb"] == pytest.approx(26 + 3)
    assert points.loc[("vllm", 10), "tokens_per_s"] == pytest.approx(10 * 60 / 1.25)
    assert ("orca-max", 8) not in points.index
    found = growth.tables(rows)
    equal = next(table for title, table in found.items() if "equal memory" in title)
    assert equal.loc["vllm", "29.0 GB"] == pytest.approx(10)
    assert equal.loc["orca-max", "29.0 GB"] == pytest.approx(3 / 1.68, abs=0.05)
    assert np.isnan(equal.loc["orca-pow2", "35.0 GB"]) or equal.loc["orca-pow2", "35.0 GB"] < 9
    first = next(iter(found.values()))
    assert first.loc["orca-max", "ours"] == pytest.approx(12 / 1.68 + 0.5, abs=0.01)
    assert first.loc["vllm", "paper (figure 13a)"] == 30.42


def test_claims_hold_and_fail() -> None:
    assert [claim.holds for claim in growth.claims(made())] == [True] * 8
    swapped = made({**PER_SEQUENCE, "vllm": 1.0, "orca-oracle": 0.9})
    assert [claim.holds for claim in growth.claims(swapped)][:3] == [False, False, False]
    shrunk = made({**PER_SEQUENCE, "orca-max": 1.5})
    assert growth.claims(shrunk)[3].holds is False
    falling = made(most_tokens=-60.0)
    assert [claim.holds for claim in growth.claims(falling)][4:] == [False] * 4
    elsewhere = made().assign(paper_setting=False)
    assert [claim.holds for claim in growth.claims(elsewhere)][:4] == [None] * 4


def test_the_figure_has_both_axes_and_the_paper() -> None:
    with mpl.rc_context():
        figure = growth.figure(made(), HEADER)
    above, below = figure.axes
    assert "GB" in above.get_ylabel()
    assert "tokens/s" in below.get_ylabel()
    assert any("paper" in text.get_text() for text in above.texts)
    assert any("simulated" in text.get_text() for text in above.texts)


def test_few_iterations_and_no_overload_are_said(tmp_path: Path) -> None:
    quiet = made().assign(**{f"{name}_full": 0.0 for name in growth.SUMS})
    assert growth.full(quiet).empty
    assert growth.claims(quiet)[1].holds is None
    assert growth.tables(quiet)
    assert growth.figure(quiet, HEADER)
    few = made().assign(**{f"n_{batch}": 1.0 for batch in growth.BINS})
    assert growth.curves(few).empty
    assert all(claim.holds is None for claim in growth.claims(few)[4:])
    assert growth.figure(few, HEADER)


def test_options(tmp_path: Path) -> None:
    asked = replace(options(tmp_path, rate=2.0), systems=["vllm"], seeds=[3, 4], quick=False)
    assert {(run.rate, run.seed) for run in growth.runs(asked)} == {(2.0, 3), (2.0, 4)}
    at_once = growth.runs(options(tmp_path, arrivals="all"))
    assert {(run.arrivals, run.rate, run.count, run.duration_s) for run in at_once} == {("all", None, 256, None)}
    gpu = growth.runs(replace(options(tmp_path, device="cuda", executor="torch"), quick=False))
    assert {(run.model, run.pool, run.arrivals, run.seed) for run in gpu} == {("random:opt-13b", "15728", "all", 0)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": "trace"}, "arrivals 'trace'"),
        ({"executor": "simulated", "device": "cpu"}, "device 'cpu'"),
        ({"executor": "torch", "hardware": "h100-80gb"}, "hardware 'h100-80gb'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as error:
        growth.runs(options(tmp_path, **changes))
    assert "\n" not in str(error.value)
