"""`prefix`: the smoke run, ratios worked out by hand, and settings that are refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments import prefix
from lab.core import InputError
from lab.experiment import main
from lab.options import Options


def options(**changes: object) -> Options:
    return Options(changes, None, None, None, [0], True, Path("results"))


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefix", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "not judged prefix of 341 tokens: 3.58x Orca (Oracle)" in out
    folder = tmp_path / "prefix"
    assert f"figure   {folder / 'figure.png'}\n         {folder / 'cache.png'}\ntable    {folder / 'table.csv'}" in out
    assert {"figure.png", "cache.png", "rows.csv", "table.csv", "summary.json"} <= {p.name for p in folder.iterdir()}
    rows = pd.read_csv(folder / "rows.csv")
    reserved = rows[rows["prefix"] > 0].set_index(["prefix", "system"])
    assert set(reserved.index.get_level_values(1)) == set(prefix.WAYS)
    for tokens in prefix.PAPER:
        hit = reserved.loc[tokens, "paged, reserved prefix"]
        assert hit["hit_requests"] == 100
        assert 100 * (tokens // 16 * 16) / (tokens + 60) < hit["hit_tokens"] < 100 * tokens / (tokens + 10)
        assert reserved.loc[tokens, "paged, no sharing"]["hit_tokens"] == 0
        assert reserved.loc[tokens, "Orca (Oracle)"]["hit_tokens"] == 0
        assert hit["requests_per_s"] > reserved.loc[tokens, "paged, no sharing"]["requests_per_s"]
    chat = rows[rows["prefix"] == 0]
    assert set(chat["system"]) == {"prefix cache", "no sharing"}
    assert (chat.loc[chat["system"] == "no sharing", "hit_tokens"] == 0).all()
    assert chat.loc[chat["system"] == "prefix cache", "hit_tokens"].between(10, 100).all()


def hand_made(ratio: float, cache: float, hits: list[float]) -> pd.DataFrame:
    rows = [
        {"prefix": tokens, "system": system, "seed": 0, "requests_per_s": 2.0 * factor * paper, "part": str(tokens)}
        for tokens, paper in prefix.PAPER.items()
        for system, factor in (
            ("Orca (Oracle)", 1 / paper),
            ("paged, reserved prefix", ratio),
            ("paged, prefix cache", cache),
        )
    ]
    rows += [{"prefix": 0, "system": "prefix cache", "seed": 0, "pool": i, "hit_tokens": h} for i, h in enumerate(hits)]
    return pd.DataFrame(rows)


def test_claims_hold_and_fail_as_they_must() -> None:
    assert all(claim.holds for claim in prefix.claims(hand_made(1.0, 1.0, [10, 20, 30])))
    assert [c.holds for c in prefix.claims(hand_made(1.3, 1.3, [30, 20]))] == [False, True, False, True, False]
    assert [c.holds for c in prefix.claims(hand_made(1.0, 0.9, [10]))] == [True, False, True, False, True]


@pytest.mark.parametrize("changes", [{"prefix": 80}, {"pool": "1000"}, {"reserve_prefix": True}])
def test_what_it_varies_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="varies prefix, pool and allocator itself"):
        prefix.runs(options(**changes))


def test_a_trace_of_ones_own_takes_the_place_of_the_conversations() -> None:
    found = prefix.runs(options(workload="mine.csv"))
    assert {run.workload for run in found} == {"mine.csv"}
    assert not any(run.prefix for run in found)
    assert {run.allocator for run in found} == {"paged", "paged-prefix"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fragmentation --prefix 2046", "prefix of 2046 tokens: must leave room for 3 of the 2048"),
        ("fragmentation --prefix -1", "prefix of -1 tokens"),
        ("fragmentation --reserve-prefix", "there is no prefix to reserve"),
        ("fragmentation --beams 5", "only searches of 2, 4, 6 beams were measured"),
        ("fragmentation --beams 2 --n 3", "n=3: must be at most the 2 beams"),
        ("fragmentation --n 0", "n=0: must be at least 1"),
        ("fragmentation --max-tokens 0", "max_tokens=0: must be at least 1"),
        ("capacity --rates 2,1", "rates '2,1': give numbers above zero in ascending order"),
        ("capacity --rates 1,x", "rates '1,x': give numbers"),
        ("capacity --thresholds 0", "thresholds '0': give numbers above zero"),
        ("gap --thresholds 0.5", "gap looks for no sustained rate"),
        ("fragmentation --n 3000", "3000 sequences exceed the 2048 of a step"),
        ("fragmentation --system nginx", "system 'nginx' is unknown"),
        ("fragmentation --system vllm --allocator paged", "leave --allocator, --scheduler out"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments.split(), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not any((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True
