"""`replay` on small traces: what it takes, what it counts, and that its claims fail when something got lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import replay
from lab.check import check
from lab.core import InputError
from lab.experiment import main
from lab.metrics import CATEGORIES
from lab.options import Options
from lab.run import Run, carry_out

LENGTHS = [(20, 5), (300, 40), (1999, 49), (7, 1), (90, 12), (90, 30)]  # the third reaches 2048
SYSTEMS = list(replay.SYSTEMS)


def write(tmp_path: Path, timed: bool = True, ids: bool = False) -> str:
    names = ["prompt_tokens", "output_tokens", *(["arrival_s"] * timed), *(["hash_ids_16"] * ids)]
    lines = [",".join(names)]
    for i, (prompt, output) in enumerate(LENGTHS):
        blocks = " ".join(str(b) for b in range(prompt // 16))
        lines.append(",".join([str(prompt), str(output), *([str(3 * i)] * timed), *([blocks] * ids)]))
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def options(tmp_path: Path, quick: bool = False, seeds: list[int] | None = None, **changes: Any) -> Options:
    return Options(changes, None, None, None, seeds, quick, tmp_path)


def rows_of(found: list[Run]) -> pd.DataFrame:
    return pd.DataFrame([replay.row(run, carry_out(run, None).record()) for run in found])


def verdicts(rows: pd.DataFrame) -> list[bool | None]:
    return [claim.holds for claim in replay.claims(rows)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("trace")
    return rows_of(replay.runs(options(folder, workload=write(folder, ids=True))))


# ---- from end to end


def test_quick_run_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "opt13b-256 (built in; name your own with --workload PATH)" in out
    assert "FAILS" not in out
    folder = tmp_path / "replay"
    made = {"table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"}
    assert {path.name for path in folder.iterdir()} == made
    rows = pd.read_csv(folder / "rows.csv")
    assert list(rows["system"]) == SYSTEMS
    assert set(rows["arrived"]) == set(rows["completed"]) == {64}
    assert np.isfinite(rows.select_dtypes("number")).all(axis=None)
    assert json.loads((folder / "summary.json").read_text())["claims"][0]["holds"] is None


def test_a_trace_and_systems_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["replay", "--workload", write(tmp_path), "--system", "vllm,orca-max", "--rate", "2"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "5 requests of" in out
    assert "1 rows left out: they reach 2048 tokens" in out
    assert out.count("holds") == 3
    rows = pd.read_csv(tmp_path / "replay" / "rows.csv")
    assert list(rows["system"]) == ["vllm", "orca-max"]
    assert set(rows["dropped"]) == {1}


# ---- which runs


def test_a_traces_own_times_are_kept_unless_a_rate_stretches_them(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = replay.runs(options(tmp_path, workload=path))
    assert {(run.arrivals, run.rate, run.duration_s, run.drain) for run in found} == {("trace", None, None, True)}
    assert (found[0].allocator, found[0].scheduler) == ("paged", "continuous")
    assert len(found) == len(SYSTEMS)
    stretched = replay.runs(options(tmp_path, workload=path, rate=2.0))
    assert {(run.arrivals, run.rate) for run in stretched} == {("trace", 2.0)}
    drawn = replay.runs(options(tmp_path, workload=path, arrivals="poisson", rate=2.0))
    assert {(run.arrivals, run.rate) for run in drawn} == {("poisson", 2.0)}
    drawn = replay.runs(options(tmp_path, workload=write(tmp_path, timed=False)))
    assert [run.seed for run in drawn] == [0] * 4 + [1] * 4 + [2] * 4
    untimed = replay.runs(options(tmp_path, workload=write(tmp_path, timed=False), seeds=[0, 1]))
    assert {(run.arrivals, run.rate) for run in untimed} == {("poisson", 4.0)}
    assert [run.seed for run in untimed] == [0] * 4 + [1] * 4


def test_quick_takes_no_more_than_there_is(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert {run.count for run in replay.runs(options(tmp_path, quick=True, workload=path))} == {5}
    assert {run.count for run in replay.runs(options(tmp_path, quick=True, workload="sharegpt"))} == {64}
    assert {run.count for run in replay.runs(options(tmp_path, quick=True, workload="sharegpt", count=9))} == {9}
    assert {run.count for run in replay.runs(options(tmp_path, workload=path))} == {None}


def test_a_cache_is_compared_where_prompts_begin_alike(tmp_path: Path) -> None:
    path = write(tmp_path, ids=True)
    assert [run.allocator for run in replay.runs(options(tmp_path, workload=path))][-1] == "paged-prefix"
    named = Options({"workload": path}, ["paged", "contiguous-max"], None, None, None, False, tmp_path)
    assert [run.allocator for run in replay.runs(named)] == ["paged", "contiguous-max"]


def test_real_devices_run_the_same_trace(tmp_path: Path) -> None:
    [gpu, *_] = replay.runs(options(tmp_path, workload=write(tmp_path), executor="torch", device="cuda"))
    assert (gpu.executor, gpu.model, gpu.pool, gpu.arrivals) == ("torch", "random:opt-13b", "15728", "trace")
    [cpu, *_] = replay.runs(options(tmp_path, workload=write(tmp_path), device="cpu", count=3))
    assert (cpu.executor, cpu.model, cpu.count) == ("torch", "smollm2", 3)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"workload": "gone.csv"}, "gone.csv does not exist"),
        ({"workload": "sharegpt"}, "has no end: give a duration or a count"),
        ({"workload": "mine.txt"}, "or a path that ends in .csv"),
        ({"device": "cuda", "executor": "simulated"}, "the virtual clock has none"),
        ({"arrivals": "trace"}, "'opt13b-256' has no arrival times"),
    ],
)
def test_wrong_input(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(InputError) as caught:
        check(replay.runs(options(tmp_path, **changes))[0])
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what is counted


def test_rows_add_up(rows: pd.DataFrame) -> None:
    assert list(rows["system"]) == [*SYSTEMS, "paged-prefix"]
    kept = [LENGTHS[i] for i in (0, 1, 3, 4, 5)]
    assert set(rows["due"]) == set(rows["generated"]) == {sum(output for _, output in kept)}
    assert rows[CATEGORIES].sum(axis=1).to_numpy() == pytest.approx(100)
    assert set(rows["arrived"]) == set(rows["completed"]) == {5}
    assert (rows["ttft_p50"] <= rows["ttft_p90"]).all()
    assert (rows["seconds"] > 15).all()  # the last request came then
    rate = rows["requests_per_s"] * rows["seconds"]
    assert rate.to_numpy() == pytest.approx(5, rel=0.01)
    assert all(len(text.split()) == replay.SLICES for text in rows["queue"])
    prompts = [prompt for prompt, _ in kept]
    blocks = [prompt // 16 for prompt in prompts]
    found = sum(16 * min(b, max(blocks[:i], default=0)) for i, b in enumerate(blocks))
    assert rows["hit"].iloc[-1] == pytest.approx(100 * found / sum(prompts))
    assert not rows["hit"].iloc[:-1].any()


def test_what_cannot_be_served_is_refused_and_counted(tmp_path: Path) -> None:
    found = rows_of(replay.runs(options(tmp_path, workload=write(tmp_path), pool="320")))
    assert set(found["refused"]) >= {1}
    assert (found["completed"] + found["refused"] == found["arrived"]).all()
    assert verdicts(found) == [True, True, True]


def test_claims_hold_and_fail_as_they_must(rows: pd.DataFrame) -> None:
    assert verdicts(rows) == [True, True, True]
    assert verdicts(rows.assign(completed=[5, 5, 4, 5, 5])) == [False, True, True]
    assert verdicts(rows.assign(refused=[0, 0, 0, 0, 1])) == [False, True, True]
    assert verdicts(rows.assign(digest=["a", "a", "b", "a", "a"])) == [True, False, True]
    assert verdicts(rows.assign(arrived=6, completed=[6, 6, 6, 6, 6])) == [True, True, True]
    assert verdicts(rows.assign(generated=rows["generated"] + [0, 0, 0, 0, 1])) == [True, True, False]
    assert verdicts(rows.assign(cut=True, completed=3)) == [None, True, None]
    assert verdicts(rows.assign(due=None)) == [True, True]
    other = rows.assign(seed=1, digest="of another seed")
    assert verdicts(pd.concat([rows, other], ignore_index=True)) == [True, True, True]


def test_tables_show_means_and_the_spread(rows: pd.DataFrame) -> None:
    two = pd.concat([rows.assign(tpot=0.1), rows.assign(seed=1, tpot=0.3)], ignore_index=True)
    speed, memory, fate = replay.tables(two).values()
    assert speed.loc["vllm", "TPOT (s)"] == "0.2 ± 0.141"
    assert memory.loc["vllm", "% of prompt tokens found in memory"] == "0 ± 0"
    assert fate.loc["orca-max", "left out: too long"] == "1 ± 0"
    [speed, memory, _] = replay.tables(rows.assign(tpot=0.1, hit=0.0)).values()
    assert speed.loc["vllm", "TPOT (s)"] == "0.1"
    assert "% of prompt tokens found in memory" not in memory


def test_figure_shows_every_system(rows: pd.DataFrame) -> None:
    header = {"model": "opt-13b", "workload": "mine.csv", "hardware": "a100-40gb", "simulated": True}
    figure = replay.figure(rows, header)
    queue, seconds, memory = figure.axes
    assert [line.get_label() for line in queue.get_lines()] == list(rows["system"])
    assert len(seconds.patches) == len(replay.LATENCIES) * len(rows)
    assert memory.get_xlabel().startswith("share of the KV pool")
    assert any("simulated" in text.get_text() for text in queue.texts)
