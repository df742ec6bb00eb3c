"""What an experiment times itself is found again, and only where it may be; no table is of two machines."""

from __future__ import annotations

import importlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import indirection
from lab import harness, measured
from lab.core import InputError
from lab.measured import Once, Stopped
from lab.options import Options
from lab.record import Record
from lab.run import Run, carry_out

POINTS: list[dict[str, Any]] = [{"block": block, "where": "Some GPU"} for block in (1, 16, 32)]


class Stopwatch:
    """Measures a point in so many milliseconds as calls came before, and is interrupted at the n-th."""

    def __init__(self, breaks_at: int = 99) -> None:
        self.calls = 0
        self.breaks_at = breaks_at

    def __call__(self) -> list[dict[str, Any]]:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise KeyboardInterrupt
        return [{"ms": np.float64(self.calls / 3), "fast": np.bool_(True), "rate": None, "other": math.nan}]


def forbidden(*_: Any) -> Any:
    raise AssertionError("measured again")


# -- point by point


def test_an_interruption_loses_one_point(tmp_path: Path) -> None:
    file, watch = tmp_path / "deep" / "measured.jsonl", Stopwatch(breaks_at=3)
    once = Once(file, indirection)
    first = [once(point, watch) for point in POINTS[:2]]
    with pytest.raises(KeyboardInterrupt):
        once(POINTS[2], watch)
    assert [json.loads(line)["point"] for line in file.read_text().splitlines()] == POINTS[:2]
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing half written"
    again = Once(file, indirection)
    assert repr([again(point, forbidden) for point in POINTS[:2]]) == repr(first), "to the last digit, NaN and None too"
    assert first[0][0]["ms"] == 1 / 3
    later = Stopwatch()
    again(POINTS[2], later)
    assert (later.calls, again.found, again.done) == (1, 2, 3)
    assert len(file.read_text().splitlines()) == 3


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    once, watch = Once(tmp_path / "measured.jsonl", indirection), Stopwatch()
    with pytest.raises(AssertionError):
        once(POINTS[0], forbidden)
    assert once(POINTS[0], watch)[0]["ms"] == 1 / 3


def test_rows_that_somebody_changes_are_found_unchanged(tmp_path: Path) -> None:
    once, watch = Once(tmp_path / "measured.jsonl", indirection), Stopwatch()
    once(POINTS[0], watch)[0]["ms"] = 99
    assert once(POINTS[0], forbidden)[0]["ms"] == 1 / 3


def test_fresh_measures_anew_and_loses_nothing_before_it_has(tmp_path: Path) -> None:
    file, watch = tmp_path / "measured.jsonl", Stopwatch()
    Once(file, indirection)(POINTS[0], watch)
    before = file.read_text()
    fresh = Once(file, indirection, fresh=True)
    assert file.read_text() == before
    fresh(POINTS[0], watch)
    assert watch.calls == 2
    assert len(file.read_text().splitlines()) == 1


def test_no_point_is_begun_too_late_but_all_are_found(tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    Once(file, indirection)(POINTS[0], Stopwatch())
    late = Once(file, indirection, stop_s=time.monotonic() - 1)
    assert late(POINTS[0], forbidden)
    with pytest.raises(Stopped):
        late(POINTS[1], forbidden)
    assert (late.found, late.done) == (1, 1)


def test_another_cpu_other_kernels_or_an_edited_experiment_find_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, file, watch = tmp_path / "timing_of_mine.py", tmp_path / "measured.jsonl", Stopwatch()
    source.write_text("import helper_of_mine\n")
    (tmp_path / "helper_of_mine.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("timing_of_mine")

    def measured_again() -> bool:
        before = watch.calls
        Once(file, mine)(POINTS[0], watch)
        return watch.calls > before

    assert measured_again()
    assert not measured_again()
    source.write_text("import helper_of_mine\nB = 2\n")
    assert measured_again()
    (tmp_path / "helper_of_mine.py").write_text("A = 3\n")
    assert measured_again(), "a file beside it, which it imports"
    tuned = tmp_path / "tuned.json"
    tuned.write_text("{}")
    monkeypatch.setattr(measured, "TUNED", tuned)
    assert measured_again()
    monkeypatch.setattr(measured, "_cpu", lambda: "another")
    assert measured_again()
    assert not measured_again()


def test_kernels_are_among_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def digest(files: set[Path]) -> str:
        seen.extend(files)
        return "x"

    monkeypatch.setattr(measured, "digest", digest)
    Once(tmp_path / "measured.jsonl", indirection)(POINTS[0], Stopwatch())
    names = {"/".join(path.parts[-2:]) for path in seen}
    assert {"kernels/attention.py", "kernels/timing.py", "kernels/tuned.json", "experiments/indirection.py"} <= names
    assert not {"lab/harness.py", "plot/charts.py"} & names, "how it is drawn does not matter"


@pytest.mark.parametrize("content", ["{", '{"key": "a"}\n', "[1]\n", "7\n", b"\xff"])
def test_a_damaged_file_is_named_in_a_line(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "measured.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="remove it, or measure again with --fresh") as error:
        Once(file, indirection)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert Once(file, indirection, fresh=True)(POINTS[0], Stopwatch())


# -- one machine


def placed(out: Path, *machines: str) -> dict[Run, Path]:
    """Records of a run on each of these GPUs, or on a CPU where the name says so, with a seed each."""
    simulated = carry_out(Run(duration_s=2.0), None).record()
    places = {}
    for seed, name in enumerate(machines):
        machine = {"cpu": name, "gpu": "" if "CPU" in name else name, "platform": "x"}
        hardware = "x86_64 CPU, 2 threads" if "CPU" in name else name
        run, place = Run(executor="torch", device="cpu", seed=seed), out / f"run-{seed}"
        header = {**simulated.header, "machine": machine, "hardware": hardware, "simulated": False}
        replace(simulated, header=header, frames={n: simulated.table(n) for n in simulated.frames}).save(place)
        places[run] = place
    return places


def experiment(runs: list[Run], **more: Any) -> Any:
    return SimpleNamespace(runs=lambda options: runs, row=lambda run, record: {"seed": run.seed}, **more)


def options(out: Path) -> Options:
    return Options({}, None, None, None, None, True, out)


def gathered(out: Path, places: dict[Run, Path], **more: Any) -> pd.DataFrame:
    once = Once(out / "measured.jsonl", indirection)
    return harness.gather(experiment([*places], **more), places, once, options(out))[0]


def test_records_of_one_machine_make_a_table(tmp_path: Path) -> None:
    assert list(gathered(tmp_path, placed(tmp_path, "H100", "H100", "H100"))["seed"]) == [0, 1, 2]


@pytest.mark.parametrize("machines", [("H100", "H100", "H200"), ("a CPU", "another CPU"), ("H100", "a CPU")])
def test_records_of_two_machines_are_refused_by_name(machines: tuple[str, ...], tmp_path: Path) -> None:
    places = placed(tmp_path, *machines)
    with pytest.raises(InputError, match="--fresh, or choose another --out") as error:
        gathered(tmp_path, places)
    said = str(error.value)
    assert "\n" not in said
    for word in (machines[0], machines[-1], str(tmp_path / "run-0"), str(places[[*places][-1]])):
        assert word in said


def test_so_is_what_was_measured_beside_records_of_another(tmp_path: Path) -> None:
    def on(gpu: str) -> dict[str, Any]:
        header = {"hardware": gpu, "machine": {"cpu": "x", "gpu": gpu}, "simulated": False}
        return {"measure": lambda options, places, once: ([{"seed": 9}], header)}

    places = placed(tmp_path, "H100")
    assert list(gathered(tmp_path, places, **on("H100"))["seed"]) == [0, 9]
    with pytest.raises(InputError, match="the rest was measured on H200"):
        gathered(tmp_path, places, **on("H200"))


def test_the_pace_of_a_virtual_clock_is_no_machine(tmp_path: Path) -> None:
    places = {}
    for hardware in ("a100-40gb", "h100-80gb"):
        run = Run(duration_s=2.0, hardware=hardware)
        places[run] = tmp_path / hardware
        carry_out(run, places[run])
    assert len(gathered(tmp_path, places)) == 2


def test_it_is_said_before_hours_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = placed(tmp_path, "H100")
    (there, place), missing = places.popitem(), Run(executor="torch", device="cpu", seed=7)
    target = tmp_path / "runs" / there.key()
    Record.load(place).save(target)
    monkeypatch.setattr(harness, "carry_out_all", forbidden)
    work = experiment([there, missing])
    with pytest.raises(InputError, match=r"the rest would be measured on \w+ CPU"):
        harness.perform(work, [there, missing], "x", options(tmp_path), False, "")
    with pytest.raises(AssertionError, match="measured again"):
        harness.perform(work, [there, missing], "x", options(tmp_path), True, "")  # --fresh: all of it here


def test_a_damaged_record_is_still_named_with_its_remedy(tmp_path: Path) -> None:
    places = placed(tmp_path, "H100")
    (place,) = places.values()
    (place / "header.json").write_text("{")
    with pytest.raises(InputError, match="--fresh does, or remove"):
        gathered(tmp_path, places)
