"""`python -m lab.experiment` from end to end on tiny runs: what it prints, writes, finds again and takes in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import lab.experiment
import lab.processes
from experiments import fragmentation
from lab.core import InputError
from lab.experiment import main, names
from lab.record import Record
from lab.run import Run, carry_out

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`fragmentation` for 20 s of paged on the virtual clock, into tmp_path, with these arguments added."""

    def call(*arguments: str) -> int:
        return main(
            ["fragmentation", "--executor", "simulated", "--duration", "20", "--out", str(tmp_path), *arguments]
        )

    return call


def rows(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "fragmentation" / "rows.csv")


def forbidden(*_: Any) -> None:
    raise AssertionError("a finished run was run again")


# -- what it prints and writes


def test_without_a_name_it_lists_the_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(names())]] == names()
    assert all("?" in line for line in lines[: len(names())])
    assert "--help" in lines[-1]


def test_help_names_everything_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for word in ("paged-oracle", "continuous", "a100-40gb", "opt-13b", "smollm2", "sharegpt", "my_module:", "--fresh"):
        assert word in said


def test_a_run_writes_and_prints_its_results(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--allocator", "paged,contiguous-oracle", "--seeds", "0,1") == 0
    out, _ = capsys.readouterr()
    folder = tmp_path / "fragmentation"
    made = {"table.csv", "rows.csv", "summary.json", "header.json", "figure.png", "figure.svg"}
    assert {path.name for path in folder.iterdir()} == made
    records = [Record.load(path) for path in (tmp_path / "runs").iterdir()]
    assert {(r.header["run"]["allocator"], r.header["seed"]) for r in records} == {
        (allocator, seed) for allocator in ("paged", "contiguous-oracle") for seed in (0, 1)
    }
    assert list(rows(tmp_path)["allocator"]) == ["paged", "paged", "contiguous-oracle", "contiguous-oracle"]
    shares = rows(tmp_path)[["stored", "ended", "reserved", "excess", "rounding", "cached", "free"]].sum(axis=1)
    assert shares.to_numpy() == pytest.approx(100)
    header = json.loads((folder / "header.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    for told in (header["command"], summary["command"]):
        assert told.startswith("python -m lab.experiment fragmentation --executor simulated")
    assert header["simulated"]
    assert header["run"]["duration_s"] == 20
    assert "SIMULATED" in out
    assert "a100-40gb" in out
    for word in ("paper", "ours", "dev.", "token states", "96.3", "38.2", "queue waits for room"):
        assert word in out
    table = pd.read_csv(folder / "table.csv", header=[0, 1], index_col=0)
    mean = rows(tmp_path).groupby("allocator")["stored"].mean()
    assert table["token states", "ours"].to_dict() == pytest.approx(mean.to_dict(), abs=0.051)
    assert table["token states", "paper"].to_dict() == {"paged": 96.3, "contiguous-oracle": 38.2}


def test_each_claim_is_judged_and_a_false_one_is_status_1(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--allocator", "paged,contiguous-max") == 0
    out = capsys.readouterr().out
    assert "not judged vLLM: every share within 4 points of figure 2" in out, "20 s are not the paper's setting"
    assert "holds      paging wastes less than a block per sequence" in out
    assert "FAILS" not in out
    monkeypatch.setattr(fragmentation, "_paper_setting", lambda run: True)
    monkeypatch.setattr(fragmentation, "PAPER", {"paged": (5.0, None, None, None)})
    assert command("--allocator", "paged,contiguous-max") == 1
    assert "FAILS      vLLM: every share within 4 points" in capsys.readouterr().out
    claims = json.loads((tmp_path / "fragmentation" / "summary.json").read_text())["claims"]
    assert [claim["holds"] for claim in claims].count(False) == 1


@pytest.mark.parametrize(
    ("run", "judged"),
    [
        (Run(), True),
        (Run(seed=3, rate=5.0), True),
        (Run(workload="paper:sharegpt.csv"), True),
        (Run(steps=5), False),
        (Run(count=5), False),
        (Run(duration_s=90), False),
        (Run(rate=1.0), False),
        (Run(arrivals="all"), False),
        (Run(block=32), False),
        (Run(scheduler="static"), False),
        (Run(workload="alpaca"), False),
        (fragmentation.GPU, True),
        (fragmentation.LAPTOP, False),
    ],
)
def test_only_the_papers_setting_is_judged_by_its_numbers(run: Run, judged: bool) -> None:
    assert fragmentation._paper_setting(run) == judged


def test_order_is_claimed_only_under_pressure() -> None:
    def claim(stored: list[float], blocked: float) -> bool | None:
        index = ["contiguous-max", "paged"]
        return fragmentation._order(pd.DataFrame({"stored": stored, "blocked": blocked}, index=index)).holds

    assert claim([20.0, 96.0], 90.0) is True
    assert claim([96.0, 96.0], 90.0) is False
    assert claim([20.0, 96.0], 10.0) is None


def test_a_run_that_ends_at_once_has_a_table_too(command: Command, tmp_path: Path) -> None:
    assert command("--allocator", "paged", "--steps", "1") == 0
    assert command("--allocator", "paged", "--count", "1") == 0
    assert rows(tmp_path)["iterations"].item() > 1


# -- variations


def test_schedulers_side_by_side(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--quick", "--allocator", "paged", "--scheduler", "static,dynamic,continuous") == 0
    ended = rows(tmp_path).set_index("scheduler")["ended"]
    assert ended["static"] > 1
    assert ended["dynamic"] > 1
    assert ended["continuous"] == 0
    out = capsys.readouterr().out
    assert "paged static" in out
    assert "of rows that ended" in out
    columns = pd.read_csv(tmp_path / "fragmentation" / "table.csv", header=[0, 1], index_col=0)["token states", "paper"]
    assert columns.to_dict() == {
        "paged static": pytest.approx(float("nan"), nan_ok=True),
        "paged dynamic": pytest.approx(float("nan"), nan_ok=True),
        "paged": 96.3,
    }, "the paper's value stands beside the paper's scheduler alone"


def test_swapping(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--allocator", "paged", "--preemption", "swap", "--pool", "6000") == 0
    row = rows(tmp_path).iloc[0]
    assert row["swapped"] > 0
    assert row["recomputed"] == 0
    assert row["preemptions"] > 0
    assert "tokens swapped out and in" in capsys.readouterr().out


@pytest.mark.parametrize("block", [1, 256])
def test_block_sizes(block: int, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--allocator", "paged,contiguous-pow2", "--block-size", str(block)) == 0
    assert (rows(tmp_path).set_index("allocator").loc["paged", "rounding"] == 0) == (block == 1)
    assert ("rounded down" in capsys.readouterr().out) == (block == 256), "15728 is no multiple of 256"


def test_a_trace_at_its_own_times(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n3,10,5\n7.5,2000,100\n")
    assert command("--allocator", "paged", "--workload", str(trace), "--arrivals", "trace") == 0
    (record,) = (Record.load(path) for path in (tmp_path / "runs").iterdir())
    assert list(record.requests["arrival_s"]) == [0, 3]
    assert "at its own times (1 rows left out: they reach 2048 tokens)" in capsys.readouterr().out


def test_the_virtual_clock_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from lab.experiment import main\n"
        "status = main(sys.argv[1:]); print('HEAVY', {'torch', 'transformers', 'triton'} & set(sys.modules))"
    )
    arguments = ["fragmentation", "--hardware", "a100-40gb", "--duration", "5", "--allocator", "paged"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
    )
    assert "HEAVY set()" in done.stdout
    assert "\r" not in done.stderr, "no bar where there is no terminal"
    assert done.stderr.splitlines() == ["done: vllm, sharegpt, 4 requests/s, seed 0"]


def test_on_a_terminal_there_is_a_bar(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert command("--allocator", "paged") == 0
    shown = capsys.readouterr().err
    assert "\r" in shown
    assert "1.0 of 1 runs" in shown
    assert "done:" not in shown


# -- found again, interrupted, run again


def test_records_are_drawn_where_their_device_is_not(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is of what a GPU left, carried to a laptop: only what is still to be run is checked."""
    assert command("--allocator", "paged") == 0
    checked: list[str] = []

    def refuse(run: Run) -> None:
        checked.append(run.allocator)
        raise InputError("device 'cuda': this machine has none: give cpu")

    monkeypatch.setattr(lab.experiment, "check", refuse)
    assert command("--allocator", "paged") == 0
    assert not checked
    assert command("--allocator", "paged", "--fresh") == 2
    assert command("--allocator", "paged,paged-max") == 2
    assert checked == ["paged", "paged-max"]


def test_finished_runs_are_found_again(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--allocator", "paged,paged-max") == 0
    first = rows(tmp_path)
    shutil.rmtree(tmp_path / "fragmentation")
    monkeypatch.setattr(lab.processes, "carry_out", forbidden)
    start = time.perf_counter()
    assert command("--allocator", "paged,paged-max") == 0
    assert time.perf_counter() - start < 5, "redrawing takes about a second on a fast core"
    pd.testing.assert_frame_equal(rows(tmp_path), first)
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="run again"):
        command("--allocator", "paged,paged-max,paged-pow2")


def test_fresh_runs_again_and_replaces(command: Command, tmp_path: Path) -> None:
    assert command("--allocator", "paged") == 0
    (record,) = (tmp_path / "runs").iterdir()
    before = (record / "header.json").stat().st_mtime_ns
    assert command("--allocator", "paged", "--fresh") == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [record.name]
    assert (record / "header.json").stat().st_mtime_ns > before


def interrupted(*victims: str) -> Callable[..., Any]:
    """carry_out, except that Ctrl-C comes in the midst of the victims."""

    def call(run: Run, place: Path | None, tell: Callable[[float], None] = lambda share: None) -> Any:
        def told(share: float) -> None:
            tell(share)
            if run.allocator in victims and share > 0.3:
                raise KeyboardInterrupt

        return carry_out(run, place, told)

    return call


def test_an_interrupted_command_goes_on(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = ("--allocator", "paged,paged-max,paged-pow2")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(lab.processes, "carry_out", interrupted("paged-max", "paged-pow2"))
    assert command(*three) == 130
    assert "finished runs are kept" in capsys.readouterr().err
    kept = list((tmp_path / "runs").iterdir())
    assert [Record.load(path).header["run"]["allocator"] for path in kept] == ["paged"], "and no temporary folder"
    monkeypatch.setattr(lab.processes, "carry_out", interrupted("paged"))  # which must not be run again
    assert command(*three) == 0
    assert "1 of 3 runs are there already" in capsys.readouterr().out


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(kill: signal.Signals, tmp_path: Path) -> None:
    """To the parent alone, which takes its workers with it; they would run for minutes."""
    arguments = ["fragmentation", "--hardware", "a100-40gb", "--duration", "4000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.experiment", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,  # nohup has it ignored
    )
    runs = tmp_path / "runs"
    until = time.monotonic() + 30
    while not (runs.is_dir() and any(runs.iterdir())) and time.monotonic() < until:
        time.sleep(0.05)
    assert any(runs.iterdir()), "runs have begun"
    process.send_signal(kill)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "finished runs are kept" in error
    assert not list(runs.iterdir()), "neither half a record nor a temporary folder"


# -- policies of somebody else's

MINE = """
from lab.allocators.paged import Paged
from lab.schedulers.continuous import Continuous

class Mine(Paged):
    "Paging that asks for 100 tokens more."
    def wants(self, s):
        return super().wants(s) + 100

class Patient(Continuous):
    "Plans nothing that the paper's scheduler would not."
"""


def test_ones_own_policies_appear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}"}
    arguments = ["--hardware", "a100-40gb", "--duration", "20", "--allocator", "mine:Mine,paged"]
    arguments += ["--scheduler", "mine:Patient,continuous", "--out", "results"]
    done = subprocess.run(
        [sys.executable, "-m", "lab.experiment", "fragmentation", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # `python -m` finds modules where it is called
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "done: mine:Mine mine:Patient, sharegpt, 4 requests/s, seed 0" in done.stderr
    table = pd.read_csv(tmp_path / "results" / "fragmentation" / "table.csv", header=[0, 1], index_col=0)
    assert list(table.index) == ["mine:Mine mine:Patient", "mine:Mine", "paged mine:Patient", "paged"]
    seen = rows(tmp_path / "results").set_index(["allocator", "scheduler"])["excess"]
    assert seen["mine:Mine", "continuous"] > seen["paged", "continuous"]
    figure = (tmp_path / "results" / "fragmentation" / "figure.svg").read_text()
    assert "Mine" in figure
    assert "Patient" in figure


def test_a_file_in_the_folder_registers_itself(tmp_path: Path) -> None:
    for package in ("lab", "experiments"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = """
        from functools import partial
        from lab.allocators import ALLOCATORS
        from lab.allocators.paged import Paged
        ALLOCATORS.register("half")(partial(Paged, reserve="max"))
    """
    (tmp_path / "lab" / "allocators" / "dropped.py").write_text(textwrap.dedent(text))
    arguments = ["--hardware", "h200", "--duration", "5", "--allocator", "half"]
    done = subprocess.run(
        [sys.executable, "-m", "lab.experiment", "fragmentation", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(rows(tmp_path / "results")["allocator"]) == ["half"]


def test_stopped_after_some_time_it_goes_on_with_the_others(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = ("--allocator", "paged,paged-max,paged-oracle")
    assert command(*three, "--stop-after", "1e-9") == 3
    assert "0 of 3 runs are there, and the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "fragmentation").exists()

    def slowly(*run: Any) -> None:
        carry_out(*run)
        time.sleep(1.5)

    with monkeypatch.context() as patch:
        patch.setattr(lab.processes.os, "cpu_count", lambda: 1)
        patch.setattr(lab.processes, "carry_out", slowly)
        assert command(*three, "--stop-after", "1.5") == 3
    assert "1 of 3 runs are there" in capsys.readouterr().out
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert command(*three) == 0
    assert "1 of 3 runs are there already" in capsys.readouterr().out
    assert command("--stop-after", "0") == 2


def test_with_several_gpus_each_process_sees_one(tmp_path: Path) -> None:
    """The processes start afresh: they find plug-ins by import path, and each other's runs are not theirs."""
    text = """
        import os
        from pathlib import Path
        from lab.allocators.paged import Paged

        class Telling(Paged):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                with open(Path(__file__).with_name("seen.txt"), "a") as file:
                    file.write(os.environ["CUDA_VISIBLE_DEVICES"] + chr(10))
    """
    (tmp_path / "telling.py").write_text(textwrap.dedent(text))
    main_text = """
        from pathlib import Path
        from lab.processes import in_processes
        from lab.run import Run

        if __name__ == "__main__":
            runs = [Run(allocator="telling:Telling", duration_s=20, seed=seed) for seed in range(4)]
            places = {run: Path("runs") / str(run.seed) for run in runs}
            done, shares = [], []
            in_processes(places, shares.append, done.append, gpus=["3", "5"])
            assert sorted(run.seed for run in done) == [0, 1, 2, 3]
            assert max(shares) > 3
    """
    (tmp_path / "spread.py").write_text(textwrap.dedent(main_text))
    done = subprocess.run(
        [sys.executable, "spread.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set((tmp_path / "seen.txt").read_text().split()) == {"3", "5"}
    for seed in range(4):
        alone = carry_out(Run(duration_s=20, seed=seed), None).record()
        assert Record.load(tmp_path / "runs" / str(seed)).steps.equals(alone.steps)


def test_runs_on_a_gpu_are_warmed_up_once_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unrecorded, with few of the same requests; elsewhere nothing is compiled, and nothing warmed up."""
    served: list[tuple[Run, Path | None]] = []
    monkeypatch.setattr(lab.processes, "carry_out", lambda run, path: served.append((run, path)))
    monkeypatch.setattr(lab.processes, "_warm", set())
    gpu = Run(executor="torch", model="random:opt-13b", device="cuda", workload="sharegpt", rate=4.0, duration_s=300.0)
    for run in (gpu, replace(gpu, rate=8.0, seed=1), replace(gpu, block=1), replace(gpu, device="cpu"), Run()):
        lab.processes.warm_up(run)
    assert [(run.block, run.count, run.arrivals, path) for run, path in served] == [
        (16, lab.processes.WARM_REQUESTS, "all", None),
        (1, lab.processes.WARM_REQUESTS, "all", None),
    ]
    twin = replace(served[0][0], executor="simulated", model="opt-13b", device="cpu")
    steps = carry_out(twin, None).record().steps
    assert len(steps) == lab.processes.WARM_STEPS
