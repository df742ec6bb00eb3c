"""`sharing`: the smoke run, what a saving is, claims, and settings that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments import sharing
from lab import metrics
from lab.core import InputError
from lab.experiment import main
from lab.options import Options
from lab.run import Run, carry_out


def options(**changes: object) -> Options:
    return Options(changes, None, None, None, [0], True, Path("results"))


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sharing", "--quick", "--out", str(tmp_path)]) == 0
    assert "not judged beams share more than parallel outputs" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "sharing" / "rows.csv").set_index(["system", "mode", "width"])
    assert (rows.loc["orca-oracle", "saved"] == 0).all(), "contiguous memory shares nothing"
    assert rows.loc["vllm", "saved"].between(1, 70).all()
    for width in (2, 4):
        vllm, orca = (rows.loc[(system, "beams", width)] for system in ("vllm", "orca-oracle"))
        assert vllm["saved"] > rows.loc[("vllm", "parallel", width), "saved"]
        assert orca["copied_per_request"] > 5 * vllm["copied_per_request"], "a beam that moves is a copy of all it has"


def test_a_saving_is_what_the_tables_say(tmp_path: Path) -> None:
    """Two outputs of one request alone: of 2 x 4 blocks of 16 the 2 full ones of the prompt are held once."""
    run = Run(workload="uniform:prompt=48,output=16", arrivals="all", rate=None, duration_s=None, count=1, n=2)
    record = carry_out(run, None).record()
    steps = record.steps[record.steps["seqs"] == 2]["end_s"]
    assert metrics.sharing(record, (float(steps.iloc[1]), float(steps.iloc[-1]))) == pytest.approx(2 / 8)
    alone = carry_out(Run(workload="sharegpt", duration_s=20.0), None).record()
    assert metrics.sharing(alone) == 0


def hand_made(shift: float) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"system": "vllm", "workload": w, "mode": mode, "width": width, "seed": 0, "saved": value + shift}
            for (w, mode), values in sharing.PAPER.items()
            for width, value in values.items()
        ]
    ).assign(simulated=True)


def test_claims_hold_and_fail_as_they_must() -> None:
    near = {claim.text: claim.holds for claim in sharing.claims(hand_made(1.0))}
    assert all(holds for text, holds in near.items() if "parallel: within" in text)
    assert all(holds is None for text, holds in near.items() if "beams: within" in text)
    off = {claim.text: claim.holds for claim in sharing.claims(hand_made(2.5))}
    assert not any(holds for text, holds in off.items() if "parallel: within" in text)
    assert near["beams share more than parallel outputs"]


@pytest.mark.parametrize("changes", [{"n": 3}, {"beams": 2}])
def test_what_it_varies_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="this experiment varies it itself"):
        sharing.runs(options(**changes))


def test_on_a_cpu_the_search_is_the_models_own() -> None:
    found = sharing.runs(replace(options(device="cpu"), quick=False))
    assert all(not run.simulated and run.allocator == "paged" for run in found)
    assert {run.beams for run in found} == {0, 2, 4, 6}
