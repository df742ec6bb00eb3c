"""The experiment that checks the virtual clock, on a record whose step times are known: those of the cost model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments import clock
from lab.core import InputError
from lab.harness import Options
from lab.record import Record
from lab.run import Run, carry_out

RUN = Run(allocator="paged", duration_s=40.0, preemption="swap")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    place = tmp_path_factory.mktemp("results") / "runs" / "key"
    carry_out(RUN, place)
    return Record.load(place)


def test_measured_steps_leave_moves_out(record: Record) -> None:
    steps = record.steps
    moved = steps[["copied", "swapped_out", "swapped_in"]].sum(axis=1) > 0
    rows = clock.measured_steps(record)
    assert moved.any()
    assert len(rows) == len(steps) - moved.sum()
    index = steps.index[~moved][200]
    step = steps.loc[index]
    held = record.samples[record.samples["step"] == index]
    expected = (step["tokens"], held["computed"].sum(), step["seqs"], step["end_s"] - step["start_s"])
    assert rows[200] == pytest.approx(expected)


def test_the_twin_of_a_known_clock_keeps_its_time(record: Record) -> None:
    row = clock.row(RUN, record)
    assert row["fit_error"] < 3
    for share in clock.SHARES:
        assert row[f"{share}_virtual"] == pytest.approx(row[f"{share}_real"], abs=1)
    assert row["output_tokens_per_s_virtual"] == pytest.approx(row["output_tokens_per_s_real"], rel=0.03)
    (claim,) = clock.claims(pd.DataFrame([row]))
    assert claim.holds
    worse = {**row, "stored_virtual": row["stored_real"] - 1.5}
    (claim,) = clock.claims(pd.DataFrame([worse]))
    assert not claim.holds
    assert "stored of paged, -1.50" in claim.seen
    figure = clock.figure(pd.DataFrame([row]), record.header)
    assert "virtual clock less real" in figure.axes[0].get_ylabel()


def test_it_is_about_real_devices() -> None:
    options = Options({"executor": "simulated"}, None, None, [0], False, Path("results"))
    with pytest.raises(InputError, match="checks the virtual clock against torch"):
        clock.runs(options)
