"""The experiment that checks the virtual clock, on a record whose step times are known: those of the cost model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments import clock
from lab.core import InputError, Request
from lab.engine import Engine
from lab.executors.simulated import SimulatedExecutor
from lab.hardware import hardware
from lab.options import Options
from lab.record import Record, Recorder
from lab.run import Run, carry_out, pool_of, requests_of, scheduler_of
from lab.shapes import shape

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
    assert len(rows) == (~moved & (steps["tokens"] > 0)).sum()
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


@pytest.mark.parametrize("scheduler", ["static", "dynamic"])
def test_padding_counts_as_it_is_computed(scheduler: str, tmp_path: Path) -> None:
    """What the fit is given is what the virtual clock asks of it."""
    asked: list[tuple[float, ...]] = []
    run = Run(allocator="contiguous-max", scheduler=scheduler, duration_s=60.0, rate=1.0)
    requests, pool = requests_of(run), pool_of(run).tokens

    def step_times(tokens: int, positions: int, sequences: int) -> float:
        asked.append((tokens, positions, sequences))
        return 0.02

    executor = SimulatedExecutor(shape("opt-13b"), hardware("a100-40gb"), step_times=step_times)
    recorder = Recorder(None, {})
    Engine(scheduler_of(run, pool), executor, recorder).run(requests)
    recorder.close()
    given = [row[:3] for row in clock.measured_steps(recorder.record())]
    padded = recorder.record().steps["dead_tokens"] > 0
    assert padded.any()
    decodes = [(g, a) for g, a, p in zip(given, asked, padded, strict=True) if p and g[0] == a[2]]
    assert len(decodes) > 100
    assert all(g == a for g, a in decodes)


def test_the_host_s_work_between_steps_counts_and_waiting_for_requests_does_not() -> None:
    step_s, host_s, pause_s = 0.02, 0.003, 5.0
    run = Run(duration_s=60.0)
    executor = SimulatedExecutor(shape("opt-13b"), hardware("a100-40gb"), step_times=lambda *sizes: step_s)
    recorder = Recorder(None, {})
    engine = Engine(scheduler_of(run, pool_of(run).tokens), executor, recorder)
    first, second = (Request(i, i * pause_s, range(20), output=30) for i in range(2))

    def go_on() -> bool:
        executor.now += host_s
        return True

    engine.run([first, second], go_on=go_on)
    recorder.close()
    seconds = [row[3] for row in clock.measured_steps(recorder.record())]
    assert len(seconds) == 60
    assert [s for s in seconds if s != pytest.approx(step_s + host_s)] == pytest.approx([step_s, step_s])


def test_it_is_about_real_devices() -> None:
    options = Options({"executor": "simulated"}, None, None, None, [0], False, Path("results"))
    with pytest.raises(InputError, match="checks the virtual clock against torch"):
        clock.runs(options)
