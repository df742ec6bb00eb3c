"""The gap at smoke scale; its arithmetic, claims and refusals on tables made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import gap
from lab.core import InputError
from lab.experiment import main
from lab.harness import Claim
from lab.metrics import CATEGORIES
from lab.options import Options

SYSTEMS = dict(zip(gap.CHAIN, ("orca-oracle", "contiguous-oracle-firstfit", "paged-oracle", "vllm"), strict=True))
STORED = dict(zip(gap.CHAIN, (38.0, 50.0, 59.0, 96.0), strict=True))
SEEDS = {0: 0.0, 1: 1.0, 2: -1.0}  # points that a seed adds to all


def options(out: Path, **given: Any) -> Options:
    changes = {"executor": "simulated", **given.pop("changes", {})}
    unset: dict[str, Any] = {"allocators": None, "schedulers": None, "systems": None, "seeds": None, "quick": False}
    return Options(changes=changes, out=out, **{**unset, **given})


def made(seeds: dict[int, float] = SEEDS, **stored: float) -> pd.DataFrame:
    """A row per system and seed; what is not stored is free. Keywords: another share, by system with _ for -."""
    shares = {a: stored.get(SYSTEMS[a].replace("-", "_"), STORED[a]) for a in gap.CHAIN}
    waits = {"contiguous-oracle": 60.0, "contiguous-oracle-firstfit": 92.0, "paged-oracle": 0.0, "paged": 11.0}
    rest = dict.fromkeys([*CATEGORIES, *gap.SEEN], 0.0)
    return pd.DataFrame(
        {
            **rest,
            "system": SYSTEMS[allocator],
            "allocator": allocator,
            "scheduler": "continuous",
            "seed": seed,
            "paper_model": True,
            "paper_setting": True,
            "stored": share + points,
            "free": 100 - share - points,
            "blocked_enough": waits[allocator],
        }
        for allocator, share in shares.items()
        for seed, points in seeds.items()
    )


def claim(rows: pd.DataFrame, word: str) -> Claim:
    (found,) = (c for c in gap.claims(rows) if word in c.text)
    return found


# -- what it runs


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gap", "--quick", "--executor", "simulated", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "gap"
    for name in ("table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"):
        assert (folder / name).stat().st_size > 0
    rows = pd.read_csv(folder / "rows.csv")
    assert list(rows["allocator"]) == gap.CHAIN
    assert list(rows["seed"]) == [0] * 4
    assert rows[CATEGORIES].sum(axis=1).to_numpy() == pytest.approx(100)
    assert rows["stored"].is_monotonic_increasing
    assert np.isfinite(rows[["batch", "blocked", "blocked_enough", "output_tokens_per_s"]].to_numpy()).all()
    shares = rows.set_index("allocator")
    assert shares.loc["contiguous-oracle", "rounding"] > 10 > 2 > shares.loc["contiguous-oracle-firstfit", "rounding"]
    assert shares.loc["paged-oracle", "blocked_enough"] == 0
    assert shares.loc["paged", "reserved"] == 0
    table = pd.read_csv(folder / "table.csv", index_col=0)
    steps = [name for name in table.index if name.startswith("+")]
    assert steps == ["+ rounding", "+ holes", "+ reservation"]
    whole = table.loc["vllm", "ours"] - table.loc["orca-oracle", "ours"]
    assert table.loc[steps, "ours"].sum() == pytest.approx(whole, abs=0.25)
    claims = json.loads((folder / "summary.json").read_text())["claims"]
    assert {c["holds"] for c in claims} == {None}
    assert "SIMULATED" in capsys.readouterr().out


def test_it_runs_fragmentations_setting_with_three_seeds(tmp_path: Path) -> None:
    runs = gap.runs(options(tmp_path))
    assert [run.allocator for run in runs[::3]] == gap.CHAIN
    assert [run.seed for run in runs[:3]] == [0, 1, 2]
    assert {(r.rate, r.duration_s, r.workload, r.scheduler) for r in runs} == {(4.0, 900.0, "sharegpt", "continuous")}
    real = gap.runs(options(tmp_path, changes={"executor": "torch", "device": "cuda"}, seeds=[0]))
    assert {(r.model, r.pool, r.rate, r.steps) for r in real} == {("random:opt-13b", "15728", 16.0, 6000)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"allocators": ["paged"]}, "'paged' alone: .*name others"),
        ({"systems": ["vllm"]}, "'vllm' alone: .*name others"),
        ({"schedulers": ["static", "continuous"]}, "schedulers static, continuous: .*name one"),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        gap.runs(options(tmp_path, **given))
    assert "\n" not in str(refused.value)


# -- its arithmetic


def test_steps_are_differences_of_the_same_seed() -> None:
    climb, slices, seen = gap.tables(made()).values()
    lines = ["orca-oracle", "+ rounding", SYSTEMS["contiguous-oracle-firstfit"], "+ holes", "paged-oracle"]
    assert list(climb.index) == [*lines, "+ reservation", "vllm"]
    assert climb["ours"].tolist() == [38.0, 12.0, 50.0, 9.0, 59.0, 37.0, 96.0]
    assert climb["+-"].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], "all systems move with the seed, steps do not"
    assert climb["replay"].tolist() == [38.1, 12.3, 50.4, 8.6, 59.0, 37.2, 96.2]
    assert climb["paper"].dropna().to_dict() == {"orca-oracle": 38.2, "vllm": 96.3}
    assert slices.loc["vllm"].tolist() == [96.0, 4.0]
    assert seen.loc["... though enough is free in all", SYSTEMS["contiguous-oracle-firstfit"]] == 92.0


def test_another_chain_has_steps_of_its_own_and_the_papers_values() -> None:
    rows = made()
    climb = next(iter(gap.tables(rows[rows["allocator"].isin(["contiguous-oracle", "paged"])]).values()))
    assert list(climb.index) == ["orca-oracle", "+ to vllm", "vllm"]
    assert climb.loc["+ to vllm"].round(1).tolist() == [58.1, 58.1, 58.0, 0.0]
    other = next(iter(gap.tables(rows.assign(paper_model=False)).values()))
    assert other[["paper", "replay"]].isna().all(axis=None)


# -- its claims


def test_claims_hold_and_fail_as_they_must() -> None:
    assert [c.holds for c in gap.claims(made())] == [True] * 7
    shifted = made(contiguous_oracle_firstfit=53.0)
    assert claim(shifted, "+ rounding").holds is False
    assert claim(shifted, "+ rounding").seen == "15.0"
    assert claim(shifted, "+ holes").holds is False
    assert claim(shifted, "+ reservation").holds is True
    assert claim(made(vllm=93.0), "vllm, token states").holds is False
    rows = made()
    assert claim(rows.assign(blocked_enough=1.0), "first fit").holds is False
    assert claim(rows.assign(blocked_enough=1.0), "pages leave no holes").holds is False


def test_one_seed_is_judged_at_twice_the_tolerance_and_other_settings_not_at_all() -> None:
    assert claim(made({0: 0.0}, vllm=93.0), "vllm, token states").holds is True
    assert claim(made({0: 0.0}, vllm=92.0), "vllm, token states").holds is False
    found = gap.claims(made(vllm=50.0).assign(paper_setting=False))
    assert [c.holds for c in found] == [None] * 6 + [True], "that pages leave no holes is true anywhere"
