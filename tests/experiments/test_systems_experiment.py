"""`systems` at smoke scale, and its claims on rows made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import systems
from lab.core import InputError
from lab.experiment import main
from lab.options import Options
from lab.plot import CATEGORIES
from lab.systems import SYSTEMS

OPTIONS = Options({}, None, None, None, None, False, Path("out"))
SPEED = {  # output tokens per second, in an order in which every claim holds
    "fastertransformer": 50.0,
    "hf-generate": 60.0,
    "orca-max": 200.0,
    "llama.cpp": 200.0,
    "orca-pow2": 300.0,
    "orca-oracle": 400.0,
    "tgi": 310.0,
    "tensorrt-llm": 305.0,
    "tensorrt-llm-utilisation": 600.0,
    "vllm": 620.0,
}
HOLD = (True,) * 6


def made(speed: dict[str, float] | None = None, queued: float = 0.9, asked: bool = True) -> pd.DataFrame:
    """Two seeds, 1 % apart, that every claim holds of unless `speed` says otherwise."""
    rows: list[dict[str, Any]] = []
    for seed, factor in ((0, 0.99), (1, 1.01)):
        for name, rate in (SPEED | (speed or {})).items():
            preemptions = 30 * (name in ("vllm", "tensorrt-llm-utilisation"))
            pool = dict.fromkeys(CATEGORIES, 0.0) | {"stored": 40.0, "free": 60.0}
            own = {"system": name, "seed": seed, "max_tokens": 1024, "outputs": 1, "queued": queued, **pool}
            own |= {
                "batch": 7.0,
                "preemptions": preemptions,
                "dead": 0,
                "compiling_s": 0.0,
                "refused": 0,
                "normalised_s": 10 * factor / rate,
            }
            own |= {"tokens_per_s": rate * factor, "queued_tokens_per_s": rate * factor}
            own |= {"ttft_p50_s": 0.1, "ttft_p90_s": 0.2}
            rows += [own | {"load": "saturated"}, own | {"load": "moderate", "preemptions": 0}]
            if asked and name == "tgi":
                steps = {0: 480.0, 256: 450.0, 2048: 200.0}
                more = [{"max_tokens": tokens, "tokens_per_s": rate * factor} for tokens, rate in steps.items()]
                rows += [own | {"load": "saturated"} | changed for changed in more]
    return pd.DataFrame(rows)


def held(rows: pd.DataFrame) -> tuple[bool | None, ...]:
    return tuple(claim.holds for claim in systems.claims(rows))


def test_it_runs_at_smoke_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["systems", "--quick", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "SIMULATED" in said
    assert said.count("not judged") == 5
    assert "620 useful output tokens/s" in said
    folder = tmp_path / "systems"
    names = {"table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"}
    assert {path.name for path in folder.iterdir()} == names
    rows = pd.read_csv(folder / "rows.csv")
    assert set(rows["system"]) == set(SYSTEMS)
    assert len(rows) == 2 * len(SYSTEMS)
    assert rows.notna().all(axis=None)
    assert (rows[["tokens_per_s", "normalised_s", "ttft_p50_s", "batch"]] > 0).all(axis=None)
    assert rows[list(CATEGORIES)].sum(axis=1).to_numpy() == pytest.approx(100)
    assert all(claim["holds"] is None for claim in json.loads((folder / "summary.json").read_text())["claims"])


def test_every_system_meets_both_loads_with_each_seed() -> None:
    found = systems.runs(OPTIONS)
    main_runs = [run for run in found if run.max_tokens == 1024]
    assert len(main_runs) == len(set(main_runs)) == 2 * 3 * len(SYSTEMS)
    assert {run.seed for run in found} == {0, 1, 2}
    swept = [run for run in found if run.max_tokens != 1024]
    assert {run.allocator for run in swept} == {"paged-max-tokens"}
    assert {run.max_tokens for run in swept} == {None, 256, 512, 2048}
    assert {run.arrivals for run in swept} == {"all"}


def test_options_reach_the_runs_they_speak_of() -> None:
    changes = {"rate": 2.0, "max_tokens": 300, "pool": "8000"}
    found = systems.runs(replace(OPTIONS, changes=changes, systems=["vllm", "tgi"], seeds=[5]))
    assert [(run.arrivals, run.rate) for run in found] == [("all", None)] * 2 + [("poisson", 2.0)] * 2
    assert {(run.max_tokens, run.pool, run.seed) for run in found} == {(300, "8000", 5)}
    closed = systems.runs(replace(OPTIONS, changes={"arrivals": "all"}, systems=["vllm"], seeds=[0]))
    assert [run.arrivals for run in closed] == ["all"]
    slots = ["slots", "lab.allocators.slots:four"]
    assert [run.allocator for run in systems.runs(replace(OPTIONS, allocators=slots, seeds=[0]))] == slots * 2


def test_the_same_experiment_runs_on_real_devices() -> None:
    gpu = systems.runs(replace(OPTIONS, changes={"device": "cuda"}, systems=["vllm"], seeds=[0]))
    assert {(run.executor, run.model, run.pool) for run in gpu} == {("torch", "random:opt-13b", "15728")}
    laptop = systems.runs(replace(OPTIONS, changes={"device": "cpu"}, systems=["vllm"], seeds=[0]))
    assert {(run.executor, run.model, run.count) for run in laptop} == {("torch", "smollm2", 24)}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"block": 16}, "system 'tgi': two of the systems are called that"),
        ({"executor": "simulated", "device": "cuda"}, "device 'cuda': the virtual clock has none"),
        ({"executor": "torch", "hardware": "h100-80gb"}, "hardware 'h100-80gb': a real device keeps its own pace"),
        ({"rate": 2.0, "arrivals": "all"}, "rate 2.0: requests that come all at once have none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as error:
        systems.runs(replace(OPTIONS, changes=changes))
    assert "\n" not in str(error.value)


def test_claims_hold_of_rows_that_they_describe() -> None:
    assert held(made()) == HOLD


@pytest.mark.parametrize(
    ("wrong", "which"),
    [
        ({"vllm": 350.0}, 0),
        ({"orca-pow2": 190.0}, 0),
        ({"hf-generate": 220.0}, 1),
        ({"tensorrt-llm-utilisation": 290.0}, 2),
        ({"tgi": 470.0}, 3),  # with 1024 more than with 256
        ({"llama.cpp": 220.0}, 5),
    ],
)
def test_each_claim_fails_where_it_must(wrong: dict[str, float], which: int) -> None:
    expected = list(HOLD)
    expected[which] = False
    assert list(held(made(wrong))) == expected


def test_a_preemption_of_what_was_assured_fails_and_n_outputs_are_not_spoken_of() -> None:
    rows = made()
    rows.loc[rows["system"] == "tgi", "preemptions"] = 1
    assert held(rows)[4] is False
    rows["outputs"] = 2
    assert held(rows)[4] is None


def test_without_a_queue_speed_is_not_judged() -> None:
    assert held(made(queued=0.1)) == (None, None, None, None, True, None)


def test_systems_that_are_not_there_are_not_spoken_of() -> None:
    rows = made(asked=False)
    assert held(rows[rows["system"].isin(["vllm", "tgi"])]) == (True,)
    assert len(systems.claims(rows[rows["system"] == "hf-generate"])) == 0


def test_tables_are_means_and_deviations_over_seeds() -> None:
    table, asked, reached = systems.tables(made()).values()
    assert table.loc["vllm", "tok/s"] == pytest.approx(620.0)
    assert table.loc["vllm", "+-"] == pytest.approx(8.8)  # of 613.8 and 626.2, one degree of freedom
    assert table.loc["vllm", "s/token"] == pytest.approx(10 / 620, abs=5e-4)
    assert table.loc["tgi", "preempt."] == 0
    assert "compiling s" not in table, "on a virtual clock nothing is compiled"
    compiled = next(iter(systems.tables(made().assign(compiling_s=1.25)).values()))
    assert compiled.loc["vllm", "compiling s"] == pytest.approx(1.2)
    assert list(asked.columns) == ["true length", 256, 1024, 2048]
    assert asked.loc["tgi", 1024] == pytest.approx(310.0)
    text = " ".join(reached[""].str.strip())
    assert "620 useful output tokens/s" in text
    assert "a knee at about 0.3 requests/s" in text
    assert reached.index[0] == "fastertransformer"


@pytest.mark.parametrize("asked", [True, False])
def test_the_figure_has_a_panel_per_question(asked: bool) -> None:
    figure = systems.figure(made(asked=asked), {"simulated": True, "hardware": "a100-40gb"})
    assert len(figure.axes) == 3 + asked
    closed = made(asked=asked)
    closed = closed[closed["load"] == "saturated"]
    assert len(systems.figure(closed, {}).axes) == 2 + asked
