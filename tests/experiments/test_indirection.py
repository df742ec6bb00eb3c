"""`indirection` at smoke scale on the CPU's reference path, and its arithmetic on rows made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import indirection
from lab.core import InputError
from lab.experiment import main
from lab.options import Options

OPTIONS = Options({}, None, None, None, None, True, Path("out"))
POINTS = [(batch, context) for batch in (8, 32) for context in (64, 256, 1024)]


def made(paged_us: float, kernels: bool = True, block: int = 16) -> pd.DataFrame:
    """Contiguous takes 100 us everywhere; 1 GB in 100 us is 10 TB/s, half of what is measured."""
    rows: list[dict[str, Any]] = []
    for seed in (0, 1):
        for batch, context in POINTS:
            own = {"seed": seed, "batch": batch, "context": context, "block": block, "kernels": kernels}
            for system, us in (("paged", paged_us + seed), ("contiguous", 100.0), ("torch flash", 80.0)):
                rows.append(own | {"system": system, "us": us, "gb_per_s": 1e6 / us, "of_bandwidth": 50 / us})
    return pd.DataFrame(indirection._with_overhead(rows))


def held(rows: pd.DataFrame) -> list[bool | None]:
    return [claim.holds for claim in indirection.claims(rows)]


def test_it_runs_at_smoke_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["indirection", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "CPU REFERENCE PATH, not the kernels: the real answer needs a GPU" in said
    assert said.count("not judged") == 2
    folder = tmp_path / "indirection"
    names = {"table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg", "measured.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    rows = pd.read_csv(folder / "rows.csv")
    assert {"paged", "contiguous"} <= set(rows["system"])
    assert (rows[["us", "gb_per_s", "of_bandwidth"]] > 0).all(axis=None)
    rows = rows[(rows["batch"] == 2) & (rows["context"] == 128)]
    point = rows[rows["system"].isin(["paged", "contiguous"])].set_index("system")
    by_hand = 100 * (point.loc["paged", "us"] / point.loc["contiguous", "us"] - 1)
    assert point.loc["paged", "overhead"] == pytest.approx(by_hand)
    bytes_read = 2 * (2 * 128 * 40 * 128 + 2 * 40 * 128) * 2  # K and V, the query and the result, in bfloat16
    assert (rows["gb_per_s"] * rows["us"]).to_numpy() == pytest.approx(bytes_read / 1e3)
    header = json.loads((folder / "header.json").read_text())
    assert not header["simulated"]
    assert "CPU" in header["hardware"]


def test_interrupted_or_stopped_it_goes_on_with_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, timed = indirection._bench(), list[tuple[int, int]]()
    really = bench.bench_attention

    def counted(kind: str, one: Any, *more: Any, **how: Any) -> Any:
        if len(timed) == 2 and not again:
            raise KeyboardInterrupt
        timed.append((one.sequences, one.length))
        return really(kind, one, *more, **how)

    monkeypatch.setattr(bench, "bench_attention", counted)
    again, command = False, ["indirection", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert main([*command, "--stop-after", "1e-9"]) == 3
    assert "0 points are measured, and the same command goes on" in capsys.readouterr().out
    assert not timed
    assert main(command) == 130
    first = [json.loads(line) for line in (tmp_path / "indirection" / "measured.jsonl").read_text().splitlines()]
    again = True
    assert main(command) == 0
    assert "2 points were measured before" in capsys.readouterr().out
    assert len(timed) == len(set(timed)) == len(first) + 2 == 4
    rows = pd.read_csv(tmp_path / "indirection" / "rows.csv")
    kept = [row["us"] for point in first for row in point["rows"]]
    assert list(rows["us"][: len(kept)]) == kept
    assert rows.loc[rows["system"] == "paged", "overhead"].notna().all()
    assert main([*command, "--fresh"]) == 0
    assert len(timed) == 8


def test_overhead_is_paired_and_beside_the_papers() -> None:
    rows = made(102.0)
    of_paged = rows[rows["system"] == "paged"]
    assert of_paged["overhead"].to_numpy() == pytest.approx(2.0 + of_paged["seed"])
    assert rows[rows["system"] != "paged"]["overhead"].isna().all()
    beside, rates = indirection.tables(rows).values()
    assert beside.loc[(32, 256), "paper"] == "20 to 26"
    assert beside.loc[(32, 256), "read off"] == "23"  # 185 us against 150
    assert list(beside.loc[[(8, 256), (32, 1024)], "paper"]) == ["", ""]
    assert beside["block 16"].to_numpy() == pytest.approx(2.5)
    assert rates["share contiguous"].to_numpy() == pytest.approx(0.5)
    assert rates["GB/s contiguous"].to_numpy() == pytest.approx(1e4)


def test_claims_hold_and_fail_as_they_must() -> None:
    assert held(made(102.0)) == [True, True]
    assert held(made(110.0)) == [True, False]
    assert held(made(123.0)) == [False, False]
    late = made(102.0)
    late.loc[(late["context"] == 1024) & (late["system"] == "paged"), "overhead"] = 30.0
    assert held(late) == [True, False]  # the first speaks of 64 to 256 tokens
    assert held(made(102.0, kernels=False)) == [None, None]
    assert held(made(102.0, block=32)) == [True, True]
    assert held(made(102.0).query("batch == 8")) == [None, True]


def test_a_point_that_was_not_measured_leaves_a_gap() -> None:
    rows = made(102.0)
    rows = rows[~((rows["batch"] == 32) & (rows["context"] == 1024) & (rows["system"] == "torch flash"))]
    _, rates = indirection.tables(rows).values()
    assert np.isnan(rates.loc[(32, 1024), "torch flash us"])
    assert indirection.figure(rows, {"model": "opt-13b", "hardware": "x", "workload": "decode attention"}) is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rate": 3.0}, "rate"),
        ({"executor": "simulated"}, "'simulated'"),
        ({"block": 0}, "block size 0"),
        ({"model": "nobody"}, "'nobody'"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_what_a_kernel_does_not_know_is_refused_in_a_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        indirection.runs(replace(OPTIONS, changes={"device": "cpu", **changes}))
    assert "\n" not in str(error.value)


def test_so_is_a_policy() -> None:
    with pytest.raises(InputError, match="allocator"):
        indirection.runs(replace(OPTIONS, allocators=["paged"]))
