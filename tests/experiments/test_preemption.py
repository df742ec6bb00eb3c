"""`preemption` at smoke scale on the virtual clock, its way of timing on a real cache, its claims on rows by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import preemption
from lab.core import InputError, Move
from lab.executors.cache import KVCache
from lab.experiment import main
from lab.models import KVShape
from lab.options import Options
from lab.run import Run

OPTIONS = Options({}, None, None, None, None, False, Path("out"))
LOAD = "sharegpt, 2.01 requests/s"
BYTES = 256 * 819_200  # K and V of OPT-13B in 256 tokens, half precision


def micro(swap_ms: dict[int, float], recompute_ms: dict[int, float], **changes: Any) -> pd.DataFrame:
    rows = [
        {"part": preemption.MICRO, "system": how, "how": how, "block": block, "seed": 0, "simulated": False}
        | {"ms": value, "out_ms": value / 2, "in_ms": value / 2, "out_gb_per_s": 1.0, "in_gb_per_s": 1.0}
        | {"model": "random:opt-13b", **changes}
        for how, ms in (("recompute", recompute_ms), ("swap", swap_ms))
        for block, value in ms.items()
    ]
    return pd.DataFrame(rows)


def served(ratio: dict[int, float], **changes: Any) -> pd.DataFrame:
    """Recomputing takes 2 s per token; swapping `ratio` of it, by block size."""
    rows = [
        {"part": preemption.SERVED, "system": "vllm", "how": how, "seed": 0, "load": LOAD, "block": block}
        | {"simulated": True, "normalised_s": 2.0 * times, "output_tokens_per_s": 500.0, "preemptions": 4}
        | {"recomputed": 0, "swapped": 0, "model": "opt-13b", **changes}
        for block, share in ratio.items()
        for how, times in (("recompute", 1.0), ("swap", share))
    ]
    return pd.DataFrame(rows)


def held(rows: pd.DataFrame, words: str) -> bool | None:
    (found,) = [claim for claim in preemption.claims(rows) if words in claim.text]
    return found.holds


MEASURED = micro({1: 135.0, 16: 30.0, 256: 18.0}, {1: 20.0, 16: 20.0, 256: 21.0})


def test_it_runs_at_smoke_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preemption", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "PRICES of the virtual clock, in part taken from this figure" in said
    folder = tmp_path / "preemption"
    names = {"table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"}
    assert {path.name for path in folder.iterdir()} == names
    rows = pd.read_csv(folder / "rows.csv")
    own = rows[rows["part"] == preemption.SERVED]
    assert (own["preemptions"] > 10).all()
    recompute, swap = own[own["how"] == "recompute"], own[own["how"] == "swap"]
    assert (recompute["recomputed"] > 0).all()
    assert (recompute["swapped"] == 0).all()
    assert (swap["recomputed"] == 0).all()
    assert (swap["swapped"] > 0).all()
    prices = rows[rows["part"] == preemption.MICRO].set_index(["how", "block"])
    for block in preemption.QUICK_BLOCKS:  # by hand: a transfer per block, layer, K and V; the bytes at 25 GB/s
        one_way_ms = 256 / block * 80 * 2.9e-3 + BYTES / 25e6
        assert prices.loc[("swap", block), "ms"] == pytest.approx(2 * one_way_ms)
        assert prices.loc[("swap", block), "out_gb_per_s"] == pytest.approx(BYTES / one_way_ms / 1e6)
    assert prices.loc["recompute", "ms"].to_numpy() == pytest.approx(54.2137, abs=1e-3)


def test_runs_are_the_same_requests_under_both() -> None:
    found = preemption.runs(OPTIONS)
    assert len(found) == len(set(found)) == 3 * 8 * 2 * 3
    swapped = [replace(run, preemption="swap") for run in found if run.preemption == "recompute"]
    assert set(swapped) == {run for run in found if run.preemption == "swap"}
    assert min(run.rate or 0 for run in found) == 2.01
    alone = preemption.runs(replace(OPTIONS, changes={"preemption": "swap", "block": 16}, seeds=[3]))
    assert {(run.preemption, run.block, run.seed) for run in alone} == {("swap", 16, 3)}
    assert len(alone) == 3


class Clocked:
    """An executor that carries out nothing: every call of a plan takes a second per token moved or computed."""

    now: Any = 0.0

    def __init__(self) -> None:
        self.plans: list[Any] = []

    def launch(self, plan: Any, tables: Any) -> None:
        self.now += sum(move.tokens for move in plan.moves) + sum(plan.work.values())
        self.plans.append((plan, tables))

    def collect(self) -> dict[Any, Any]:
        return {}


def test_what_is_timed_is_256_tokens_out_in_and_computed() -> None:
    executor = Clocked()
    found = dict(preemption._times(executor, Run(block=16), seed=0, warm=1, timed=2))
    assert found["recompute"] == {"ms": 256e3}
    assert found["swap"]["ms"] == found["swap"]["out_ms"] + found["swap"]["in_ms"] == 512e3
    assert found["swap"]["out_gb_per_s"] == pytest.approx(819_200 / 1e9)
    assert len(executor.plans) == 3 * 3
    (out, tables), (back, _), (compute, _) = executor.plans[:3]
    (table,) = tables.values()
    assert len(set(table)) == 16 == len(table)
    assert table != sorted(table)  # scattered
    pairs = [(move.src + i, move.dst + i) for move in out.moves for i in range(-(-move.tokens // 16))]
    assert pairs == [(b, i) for i, b in enumerate(table)]
    mirrored = sorted(Move("in", move.dst, move.src, move.tokens) for move in out.moves)
    assert sorted(back.moves) == mirrored
    assert list(compute.work.values()) == [256]


class Cached(Clocked):
    """A real cache on the CPU: moves are carried out, and nothing is computed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.cache = KVCache(KVShape(3, 2, 8, 4), 16, 32, dtype=torch.float32, device="cpu")
        for tensor in (self.cache.k, self.cache.v):
            tensor.copy_(torch.randn(tensor.shape))

    @property
    def now(self) -> float:  # type: ignore[override]
        return time.perf_counter()

    def launch(self, plan: Any, tables: Any) -> None:
        self.cache.perform(plan.moves)


def test_a_real_cache_is_measured_block_by_block_too_and_comes_back_whole() -> None:
    executor = Cached()
    before = executor.cache.k.clone(), executor.cache.v.clone()
    found = dict(preemption._times(executor, Run(executor="torch", block=32), seed=0, warm=1, timed=2))
    assert list(found) == ["recompute", "swap", preemption.ONE_BY_ONE]
    assert all(value > 0 for times in found.values() for value in times.values())
    assert executor.cache.host_nbytes > 0
    size = 256 * 3 * 2 * (8 + 4) * 4  # bytes: tokens, layers, heads, K and V, numbers of 4 bytes
    for how in ("swap", preemption.ONE_BY_ONE):
        assert found[how]["in_gb_per_s"] == pytest.approx(size / found[how]["in_ms"] / 1e6)
    assert torch.equal(executor.cache.k, before[0])
    assert torch.equal(executor.cache.v, before[1])


def test_measured_times_are_judged() -> None:
    assert [claim.holds for claim in preemption.claims(MEASURED)[:3]] == [True, True, True]
    assert held(micro({1: 135.0}, {1: 20.0, 256: 40.0}), "at any block size") is False
    assert held(micro({1: 30.0}, {1: 20.0}), "far longer") is False
    assert held(micro({1: 135.0, 256: 10.0}, {1: 20.0, 256: 20.0}), "never takes more than 20 %") is False


def test_prices_are_not() -> None:
    prices = MEASURED.assign(simulated=True)
    assert [claim.holds for claim in preemption.claims(prices)] == [None] * 3
    small = MEASURED.assign(model="smollm2")
    assert [claim.holds for claim in preemption.claims(small)] == [None] * 3


def test_serving_is_compared_at_each_block_size() -> None:
    rows = pd.concat([MEASURED, served({1: 1.6, 16: 1.1, 64: 0.9, 256: 0.5})])
    assert held(rows, "swapping serves as well") is True  # 256 is none of the paper's
    assert held(rows, "blocks of 1 swapping serves worse") is True
    worse = pd.concat([MEASURED, served({1: 0.9, 16: 1.3})])
    assert held(worse, "swapping serves as well") is False
    assert held(worse, "blocks of 1 swapping serves worse") is False
    assert held(pd.concat([MEASURED, served({8: 1.1})]), "swapping serves as well") is None
    assert held(served({1: 1.6, 16: 1.1}, preemptions=0), "swapping serves as well") is None  # no choice was made
    assert held(served({1: 1.6, 16: 1.1}, model="smollm2"), "swapping serves as well") is None
    own, compared, _ = preemption.tables(rows).values()
    assert compared.loc[(LOAD, 1), "swap / recompute"] == pytest.approx(1.6)
    assert list(compared["paper"]) == ["", "comparable", "comparable", ""]
    assert own.loc[("swap", 1), "paper (about)"] == "135"
    assert own.loc[("swap", 256), "ms"] == 18.0
    assert preemption.figure(rows, {"model": "opt-13b", "hardware": "x", "workload": "sharegpt"}) is not None


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
        preemption.runs(replace(OPTIONS, changes=changes))
    assert "\n" not in str(error.value)
