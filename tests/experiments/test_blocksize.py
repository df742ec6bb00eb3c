"""`blocksize` at smoke scale on the virtual clock, and its arithmetic and claims on rows made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import blocksize
from lab.core import InputError
from lab.experiment import main
from lab.options import Options

OPTIONS = Options({}, None, None, None, None, False, Path("out"))
SEATED = {1: 4.0, 16: 4.0, 32: 4.1, 64: 4.2, 128: 4.5, 256: 6.2}  # s per token
ALPACA = {1: 1.9, 16: 2.0, 32: 2.0, 64: 2.2, 128: 3.0, 256: 9.0}


def made(load: str, latency_s: dict[int, float], **changes: Any) -> pd.DataFrame:
    rows = [
        {
            "system": "vllm",
            "allocator": "paged",
            "seed": seed,
            "load": load,
            "workload": load.partition(",")[0],
            "block": block,
            "simulated": True,
            "kernels": False,
            "paper_model": True,
            "capacity": 15728 // block * block,
            "normalised_s": value + 0.02 * seed,
            "output_tokens_per_s": 100.0,
            "stored": 98.0 - block / 12.0,
            "rounding": block / 12.0,
            "free": 2.0,
            "rounding_tokens": (block - 1) / 2,
            "most_rounding": block - 1,
            "batch": 30.0,
            "preemptions": 3,
            "recomputed": 300,
            "compiling_s": 1.5,
            **changes,
        }
        for block, value in latency_s.items()
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def held(rows: pd.DataFrame, words: str) -> bool | None:
    (found,) = [claim for claim in blocksize.claims(rows) if words in claim.text]
    return found.holds


def test_it_runs_at_smoke_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blocksize", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "to a virtual clock small blocks cost nothing" in said
    assert said.count("not judged") == 7
    folder = tmp_path / "blocksize"
    names = {"table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"}
    assert {path.name for path in folder.iterdir()} == names
    rows = pd.read_csv(folder / "rows.csv")
    assert list(rows["block"]) == 2 * list(blocksize.QUICK_BLOCKS)
    assert set(rows["load"]) == {"sharegpt, 4 requests/s", "alpaca, 60 requests/s"}
    assert rows.drop(columns=["load", "system", "allocator", "workload"]).notna().all(axis=None)
    assert rows[["stored", "rounding", "free"]].sum(axis=1).to_numpy() == pytest.approx(100)
    assert list(rows["capacity"][:4]) == [15728, 15728, 245 * 64, 61 * 256]
    assert (rows["rounding_tokens"] < rows["block"]).all()
    assert (rows["most_rounding"] == rows["block"] - 1).all()  # some sequence has just begun a block
    states = rows[rows["workload"] == "sharegpt"].set_index("block")["stored"]
    assert states.is_monotonic_decreasing
    assert 70 < states[256] < states[1] < 100


def test_the_default_is_every_load_and_size_and_three_seeds() -> None:
    found = blocksize.runs(OPTIONS)
    assert len(found) == len(set(found)) == 4 * 9 * 3
    assert {(run.workload, run.rate) for run in found} >= {("alpaca", 30.1), ("sharegpt", 4.0)}
    assert all(run.drain and run.simulated and run.allocator == "paged" for run in found)


def test_options_narrow_it() -> None:
    def of(**changes: Any) -> list[Any]:
        return blocksize.runs(replace(OPTIONS, changes=changes, seeds=[7]))

    assert {(run.block, run.seed) for run in of(block=24)} == {(24, 7)}
    assert {blocksize.load_name(run) for run in of(workload="alpaca")} == {
        "alpaca, 30.1 requests/s",
        "alpaca, 60 requests/s",
    }
    assert len(of(rate=3.0)) == 2 * 9  # two loads of each workload became one
    (load,) = {blocksize.load_name(run) for run in of(workload="uniform:prompt=9,output=9")}
    assert load.startswith("uniform")
    on_cpu = of(device="cpu")
    assert {(run.executor, run.model, run.arrivals) for run in on_cpu} == {("torch", "smollm2", "all")}
    on_gpu = of(device="cuda", executor="torch")
    assert {(run.model, run.pool, run.device) for run in on_gpu} == {("random:opt-13b", "15728", "cuda")}


def test_the_best_sizes_are_those_near_the_lowest_latency() -> None:
    rows = pd.concat([made(blocksize.REPLAY_LOAD, SEATED), made("alpaca, 60 requests/s", ALPACA)])
    best, states, everything = blocksize.tables(rows).values()
    ours = best["ours: within 10% of the best"]
    assert list(ours) == ["1 to 64", "1 to 32"]
    assert list(best["paper: best"]) == ["16 to 128", "16 to 32"]
    assert best["s/token, 256"].to_numpy() == pytest.approx([6.21, 9.01])
    assert states.loc[("vllm", 16), "deviation"] == pytest.approx(98 - 16 / 12 - 96.2, abs=0.06)
    assert everything["pool tokens"].iloc[-1] == 15616
    assert "compiling s" not in everything
    _, everything = blocksize.tables(made("alpaca, 1024 at once", ALPACA, simulated=False, kernels=True)).values()
    assert list(everything["compiling s"]) == [1.5] * 6
    assert blocksize.figure(rows, {"model": "opt-13b", "hardware": "x", "simulated": True}) is not None


def test_claims_of_the_right_side_hold_and_fail_as_they_must() -> None:
    load = "alpaca, 60 requests/s"
    assert held(made(load, ALPACA), "blocks of 256 serve much worse") is True
    assert held(made(load, {**ALPACA, 256: 2.9}), "blocks of 256 serve much worse") is False
    assert held(made(load, ALPACA), "no larger block serves better") is True
    assert held(made(load, {**ALPACA, 64: 1.5}), "no larger block serves better") is False
    assert held(made(load, {16: 2.0}), "blocks of 256 serve much worse") is None
    assert held(made(load, ALPACA, paper_model=False), "blocks of 256 serve much worse") is None
    load = "sharegpt, 2.01 requests/s"
    assert held(made(load, {16: 0.06, 128: 0.5}), "128 serve about as well") is True  # 0.44 s: not to be seen there
    assert held(made(load, {16: 0.06, 128: 0.7}), "128 serve about as well") is False
    assert held(made(load, {16: 4.0, 128: 4.9}), "128 serve about as well") is True  # 23 %
    assert held(made(load, {16: 4.0, 128: 5.2}), "128 serve about as well") is False


def test_the_left_side_is_judged_on_a_gpu_only() -> None:
    load = "sharegpt, 256 at once"
    slow = {1: 5.0, 16: 4.0}
    assert held(made(load, slow), "blocks of 1 serve worse") is None
    assert held(made(load, slow, simulated=False), "blocks of 1 serve worse") is None
    assert held(made(load, slow, simulated=False, kernels=True), "blocks of 1 serve worse") is True
    assert held(made(load, {1: 4.2, 16: 4.0}, simulated=False, kernels=True), "blocks of 1 serve worse") is False


def test_token_states_are_judged_against_the_replay() -> None:
    assert held(made(blocksize.REPLAY_LOAD, {1: 4.0, 16: 4.0, 64: 4.2}), "of the replay's") is True
    assert held(made(blocksize.REPLAY_LOAD, {16: 4.0}, stored=93.0), "of the replay's") is False
    assert held(made("sharegpt, 2.01 requests/s", SEATED), "of the replay's") is None


def test_a_block_too_many_is_seen() -> None:
    assert held(made("x", {16: 1.0}), "a block that it did not ask for") is True
    assert held(made("x", {16: 1.0}, most_rounding=16), "a block that it did not ask for") is False
    assert held(made("x", {16: 1.0}, allocator="contiguous-max"), "a block that it did not ask for") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"executor": "simulated", "device": "cuda"}, "device 'cuda'"),
        ({"device": "cpu", "hardware": "h200"}, "hardware 'h200'"),
        ({"rate": 2.0, "arrivals": "all"}, "rate 2.0"),
    ],
)
def test_what_contradicts_itself_is_refused_in_a_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        blocksize.runs(replace(OPTIONS, changes=changes))
    assert "\n" not in str(error.value)


def test_a_block_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blocksize", "--quick", "--block-size", "0", "--out", str(tmp_path)]) == 2
    assert "block size 0" in capsys.readouterr().err
