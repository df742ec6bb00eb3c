"""The factorial at smoke scale; its arithmetic, claims and refusals on tables made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import factorial
from lab.core import InputError
from lab.experiment import main
from lab.harness import Claim
from lab.metrics import CATEGORIES
from lab.options import Options

STATIC, CAPPED, FIRST_FIT = "static", "static, 8 at most", "contiguous-oracle-firstfit"
SEEDS = {0: 1.0, 1: 1.1, 2: 0.95}  # the seed's own factor, the same for all pairs
TOKENS_PER_S = {  # by level: contiguous-max, first fit, paged-oracle, paged
    CAPPED: (100.0, 105.0, 105.0, 105.0),
    STATIC: (100.0, 150.0, 150.0, 200.0),
    "continuous": (300.0, 600.0, 700.0, 1200.0),
}
ALLOCATORS = ("contiguous-max", FIRST_FIT, "paged-oracle", "paged")


def options(out: Path, **given: Any) -> Options:
    changes = {"executor": "simulated", **given.pop("changes", {})}
    unset: dict[str, Any] = {"allocators": None, "schedulers": None, "systems": None, "seeds": None, "quick": False}
    return Options(changes=changes, out=out, **{**unset, **given})


def made(seeds: dict[int, float] = SEEDS) -> pd.DataFrame:
    """A row per level, allocator and seed; latency is 100 s over throughput, all memory not stored is free."""
    rows = []
    for level, rates in TOKENS_PER_S.items():
        for allocator, rate in zip(ALLOCATORS, rates, strict=True):
            for seed, factor in seeds.items():
                rows.append(
                    {
                        "level": level,
                        "scheduler": level.split(",")[0],
                        "allocator": allocator,
                        "seed": seed,
                        "capped": level == CAPPED,
                        "closed": True,
                        "paper_model": True,
                        "output_tokens_per_s": rate * factor,
                        "pressed_tokens_per_s": 2 * rate * factor,
                        "normalised_s": 100 / (rate * factor),
                        "waste": 50.0,
                        "queued": 80.0,
                        **dict.fromkeys(("ended", "batch", "dead", "again", "preemptions"), 0.0),
                    }
                )
    return pd.DataFrame(rows)


def change(rows: pd.DataFrame, level: str, allocator: str, column: str, factor: float) -> pd.DataFrame:
    where = (rows["level"] == level) & (rows["allocator"] == allocator)
    return rows.assign(**{column: rows[column].where(~where, rows[column] * factor)})


def claim(rows: pd.DataFrame, word: str) -> Claim:
    (found,) = (c for c in factorial.claims(rows) if word in c.text)
    return found


# -- what it runs


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--executor", "simulated", "--allocator", "contiguous-max,paged", "--count", "48"]
    assert main(["factorial", *arguments, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "factorial"
    for name in ("table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"):
        assert (folder / name).stat().st_size > 0
    rows = pd.read_csv(folder / "rows.csv").set_index(["level", "allocator"])
    assert list(rows.index.unique(0)) == [CAPPED, STATIC, "continuous"]
    assert len(rows) == 6
    numbers = rows[["output_tokens_per_s", "normalised_s", "waste", "batch"]]
    assert np.isfinite(numbers.to_numpy()).all()
    assert (numbers.to_numpy() > 0).all()
    assert rows[CATEGORIES].sum(axis=1).to_numpy() == pytest.approx(100)
    assert rows["waste"].to_numpy() == pytest.approx(100 - rows["stored"].to_numpy())
    assert (rows.loc["continuous", "dead"] == 0).all()
    assert (rows.loc[STATIC, "dead"] > 0).all()
    assert (rows.loc[CAPPED, "batch"] <= 8).all()
    assert rows.loc[(STATIC, "paged"), "batch"] > 8
    assert rows.loc[(STATIC, "paged"), "preemptions"] > 0, "pages on demand, admitted by their prompts alone, run out"
    assert rows["queued"].between(0, 100).all()
    assert rows["pressed_tokens_per_s"].notna().tolist() == (rows["queued"] >= 50).tolist()
    assert (rows["refused"] == 0).all()
    claims = json.loads((folder / "summary.json").read_text())["claims"]
    assert len(claims) == 4
    assert {c["holds"] for c in claims} == {None}
    assert "SIMULATED" in capsys.readouterr().out


def test_all_at_once_memory_limits_static_batches(tmp_path: Path) -> None:
    runs = factorial.runs(options(tmp_path))
    assert len(runs) == len(set(runs)) == 3 * 6 * 3
    assert {(run.scheduler, run.batch) for run in runs} == {("static", 8), ("static", 2048), ("continuous", 8)}
    assert {(r.arrivals, r.rate, r.duration_s, r.count, r.steps, r.drain) for r in runs} == {
        ("all", None, None, 256, None, True)
    }
    assert {run.seed for run in runs} == {0, 1, 2}
    asked = factorial.runs(options(tmp_path, changes={"batch": 20}, schedulers=["static"], seeds=[4]))
    assert {(run.scheduler, run.batch, run.seed) for run in asked} == {("static", 20, 4)}


def test_with_a_rate_dynamic_starts_as_soon_as_something_waits(tmp_path: Path) -> None:
    runs = factorial.runs(options(tmp_path, changes={"rate": 1.0, "count": 40}))
    dynamic = [run for run in runs if run.scheduler == "dynamic"]
    assert {run.scheduler for run in runs} == {"dynamic", "continuous"}
    assert {(run.timeout_s, run.batch) for run in dynamic} == {(0.0, 8), (0.0, 2048)}
    assert {(run.arrivals, run.rate, run.count, run.drain) for run in runs} == {("poisson", 1.0, 40, True)}


def test_on_a_gpu_it_is_the_same_but_for_the_executor(tmp_path: Path) -> None:
    runs = factorial.runs(options(tmp_path, changes={"executor": "torch", "device": "cuda"}, seeds=[0]))
    assert {(r.executor, r.model, r.pool, r.count, r.arrivals) for r in runs} == {
        ("torch", "random:opt-13b", "15728", 256, "all")
    }
    assert len(runs) == 3 * 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"systems": ["vllm"]}, "system 'vllm'.*leave --system out"),
        ({"changes": {"steps": 5}}, "steps 5.*take --count"),
        ({"changes": {"rate": 1.0}, "schedulers": ["static"]}, "scheduler 'static'.*take dynamic, or give --batch"),
        ({"allocators": ["paged"], "schedulers": ["continuous"]}, "allocator 'paged'.*name another"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        factorial.runs(options(tmp_path, **given))
    assert "\n" not in str(refused.value)


# -- its arithmetic


def test_sums_of_squares_by_hand() -> None:
    parts = factorial.decompose(np.array([[[0.0], [1.0]], [[2.0], [5.0]]]))
    expected = {"scheduler": 9.0, "allocator": 4.0, "interaction": 1.0, "seed": 0.0, "rest": 0.0, "total": 14.0}
    assert parts == pytest.approx(expected)
    blocks = factorial.decompose(np.array([[[0.0, 2.0], [0.0, 2.0]]]))
    assert blocks == pytest.approx(dict.fromkeys(expected, 0.0) | {"seed": 4.0, "total": 4.0})


def test_the_parts_sum_to_the_total_and_effects_that_add_do_not_interact() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(3, 4, 5))
    parts = factorial.decompose(values)
    total = parts.pop("total")
    assert total == pytest.approx(((values - values.mean()) ** 2).sum())
    assert sum(parts.values()) == pytest.approx(total)
    assert min(parts.values()) > 0
    added = random.normal(size=(3, 1, 1)) + random.normal(size=(1, 4, 1)) + random.normal(size=(1, 1, 5))
    none = factorial.decompose(added)
    assert none["interaction"] == pytest.approx(0, abs=1e-12)
    assert none["rest"] == pytest.approx(0, abs=1e-12)
    assert none["scheduler"] > 0


def test_factors_are_ratios_without_the_capped_level() -> None:
    factors, due, seen = factorial.tables(made()).values()
    ours = factors["ours"]
    assert ours["continuous / static, under contiguous-max"] == pytest.approx(3.0)
    assert ours["continuous / static, under paged"] == pytest.approx(6.0)
    assert ours["continuous / static: main effect"] == pytest.approx((3 * 4 * 700 / 150 * 6) ** 0.25, abs=0.005)
    assert ours["paged / contiguous-max, under static"] == pytest.approx(2.0)
    assert ours["paged / contiguous-max: main effect"] == pytest.approx(8**0.5, abs=0.005)
    assert ours["continuous, paged / static, contiguous-max"] == pytest.approx(12.0)
    assert factors["queueing"].to_dict() == pytest.approx(ours.to_dict())
    assert factors["+-"].to_numpy() == pytest.approx(0), "a seed moves all pairs alike here"
    assert factors["replay"].dropna().round(2).tolist() == [2.77, 3.36, 9.32]
    assert not any("8 at most" in name for name in factors.index)
    assert due.loc["total"].dropna().tolist() == [100.0, 100.0] * 2
    logs = np.log([TOKENS_PER_S[level] for level in (STATIC, "continuous")])
    between = logs.size / 2 * np.ptp(logs.mean(axis=1)) ** 2 / 2
    whole = ((logs - logs.mean()) ** 2).sum() + logs.size * np.log(list(SEEDS.values())).var()
    assert due.loc["scheduler", ("memory limits the batch", "log throughput")] == pytest.approx(
        100 * between / whole, abs=0.051
    )
    assert len(seen) == 12


# -- its claims


def test_claims_hold_and_fail_as_they_must() -> None:
    rows = made()
    assert [c.holds for c in factorial.claims(rows)] == [True] * 5
    slower = change(rows, "continuous", "contiguous-max", "output_tokens_per_s", 0.33)
    assert claim(slower, "continuous batching beats static").holds is False
    assert claim(slower, "continuous batching beats static").seen.startswith("x0.99")
    one_seed = rows["output_tokens_per_s"].where(
        (rows["level"] != "continuous") | (rows["allocator"] != "paged") | (rows["seed"] != 2), 600.0
    )
    assert claim(rows.assign(output_tokens_per_s=one_seed), "paging on demand").holds is False
    equal = change(rows, "continuous", "paged", "output_tokens_per_s", 0.5)
    assert claim(equal, "interact").holds is False
    assert claim(rows, "interact").seen == "x2.00 there, x4.00 under continuous"
    holes = change(rows, STATIC, "paged-oracle", "output_tokens_per_s", 1.04)
    assert claim(holes, "no holes").holds is False
    apart = change(rows, CAPPED, "paged", "output_tokens_per_s", 1.9)
    assert claim(apart, "the cap hides").holds is False


def test_nothing_is_judged_where_nobody_waits_and_no_spread_from_one_seed() -> None:
    rows = made()
    assert {c.holds for c in factorial.claims(rows.assign(queued=10.0))} == {None}
    assert claim(made({0: 1.0}), "interact").holds is None
    assert claim(made({0: 1.0}), "paging on demand").holds is True


def test_with_a_rate_latency_is_compared() -> None:
    rows = made().assign(closed=False, output_tokens_per_s=500.0)
    factors = next(iter(factorial.tables(rows).values()))
    assert factors.loc["continuous / static, under paged", "ours"] == pytest.approx(6.0)
    assert list(factors.columns) == ["ours", "+-"]
    assert claim(rows, "continuous batching beats static").holds is True


def test_of_other_models_the_replay_says_nothing() -> None:
    factors = next(iter(factorial.tables(made().assign(paper_model=False)).values()))
    assert factors["replay"].isna().all()
