"""Regressions: judged on runs written by hand, and one planted in an allocator and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.bench import regress
from lab.bench.__main__ import main
from lab.bench.ratios import Known, Taken, Timing, baseline_of, judge, write_baseline
from lab.plot.history import history

FORK, ADMIT = (f"tests/benchmarks/bench_allocators.py::test_{name}[paged]" for name in ("fork", "admit"))
HERE = "an abacus, Python 3.11.1"
BASE = {FORK: Known(2.0, 0.01, 10, HERE, "b"), ADMIT: Known(0.5, 0.2, 10, HERE, "b")}


def run_file(path: Path, ratios: Mapping[str, float], commit: str = "a" * 40, when: str = "2026-01-01") -> Path:
    """What pytest-benchmark would write."""
    extra = {"unit": "sequences", "seconds": 1e-6, "best_s": 9e-7, "bar_s": None}
    content: dict[str, Any] = {
        "machine_info": {"cpu": {"brand_raw": "an abacus"}, "machine": "wood", "python_version": "3.11.1"},
        "commit_info": {"id": commit, "dirty": False, "time": when},
        "benchmarks": [{"fullname": name, "extra_info": {**extra, "ratio": ratio}} for name, ratio in ratios.items()],
    }
    path.write_text(json.dumps(content))
    return path


def taken(*ratios: float) -> list[Taken]:
    return [Taken("a", "", {FORK: Timing(FORK, r, r, "sequences", HERE)}) for r in ratios]


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit status, output, complaint of a comparison with BASE."""
    write_baseline(BASE, tmp_path / "baseline.json")

    def go(*arguments: object) -> tuple[int, str, str]:
        where = ["--baseline", str(tmp_path / "baseline.json"), "--store", str(tmp_path / "store")]
        status = main(["compare", *map(str, arguments), *where])
        said = capsys.readouterr()
        return status, said.out, said.err

    return go


@pytest.mark.parametrize(
    ("ratios", "slower", "words"),
    [
        ({FORK: 2.0, ADMIT: 0.5}, 0, []),
        ({FORK: 2.49, ADMIT: 0.69}, 0, []),
        ({FORK: 2.51, ADMIT: 0.69}, 1, ["allocators fork[paged] takes 1.25 times as long as it did"]),
        ({FORK: 3.0, ADMIT: 0.75}, 2, ["fork[paged] takes 1.50 times", "admit[paged] takes 1.50 times"]),
        ({FORK: 1.5, ADMIT: 0.3}, 0, ["faster"]),
        ({FORK: 2.0, FORK.replace("fork", "knife"): 9.0}, 0, ["new"]),
    ],
)
def test_a_quarter_or_twice_the_spread(
    compare: Any, tmp_path: Path, ratios: dict[str, float], slower: int, words: list[str]
) -> None:
    status, said, _ = compare(run_file(tmp_path / "run.json", ratios))
    assert status == bool(slower)
    assert f"{slower} of 2 benchmarks got slower" in said
    assert said.count("SLOWER") == slower
    assert all(word in said for word in words)
    assert ("faster" in said, " new" in said) == ("faster" in words, "new" in words)


def test_another_machine_is_named(compare: Any, tmp_path: Path) -> None:
    file = run_file(tmp_path / "run.json", {FORK: 2.0})
    assert "the baseline is of" not in compare(file)[1]
    file.write_text(file.read_text().replace("an abacus", "a slide rule"))
    assert f"the baseline is of {HERE}, this of a slide rule, Python 3.11.1" in compare(file)[1]


def test_medians_and_spreads() -> None:
    """Of five runs one may be off by any amount."""
    old = {FORK: Known(7.0, 0.5, 3, HERE, "b"), ADMIT: Known(3.0, 0.1, 4, "a slide rule", "b")}
    made = baseline_of(taken(1.0, 1.9, 0.95, 1.02, 0.99), old)
    assert made == {FORK: Known(1.0, 0.05, 5, HERE, "a"), ADMIT: old[ADMIT]}


def test_what_seems_slower_is_measured_again(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbance goes away, a regression stays: of four times, two were enough to clear it, and one is not."""
    timings = {name: Timing(name, 2 * BASE[name].ratio, 1.0, "calls", HERE) for name in (FORK, ADMIT)}
    asked = []

    def again(names: list[str]) -> Taken:
        asked.append(names)
        ratios = {FORK: 2.1 if len(asked) < 3 else 4.5, ADMIT: 0.5 if len(asked) == 3 else 1.1}
        return Taken("a", "", {name: Timing(name, ratios[name], 1.0, "calls", HERE) for name in names})

    monkeypatch.setattr(regress, "measure", lambda only, store: Taken("a", "", timings))
    monkeypatch.setattr(regress, "measure_these", again)
    status, said, _ = compare()
    assert asked == 3 * [[FORK, ADMIT]]
    assert status == 1
    assert "1 of 2 benchmarks got slower" in said
    assert "admit[paged] takes 2.00 times" in said


def test_wrong_input_is_one_line(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = run_file(tmp_path / "good.json", {FORK: 2.0})
    bad = {"text": "no JSON", "list": "[]", "else": '{"benchmarks": []}', "none": run_file(good, {}).read_text()}
    for name, content in bad.items():
        (tmp_path / name).write_text(content)
    run_file(good, {FORK: 2.0})
    stranger = run_file(tmp_path / "stranger.json", {FORK.replace("fork", "knife"): 9.0})
    files = [[tmp_path / name] for name in (*bad, "missing")]
    wrong: list[list[Any]] = [*files, [good, good], [stranger], ["--what"]]
    for arguments in wrong:
        status, _, complaint = compare(*arguments)
        assert status == 2, arguments
        assert complaint.count("\n") == 1
        assert complaint.startswith("error: ")
    assert main(["baseline", str(good), str(good), "--baseline", str(tmp_path / "other.json")]) == 2
    assert compare(good)[0] == 0
    monkeypatch.setattr(regress, "BENCHMARKS", tmp_path)
    (tmp_path / "bench_it.py").write_text("import pytest\n@pytest.mark.benchmark\ndef test_it(): assert 0\n")
    status, _, complaint = compare()
    assert (status, complaint.count("\n")) == (2, 1)
    assert "the benchmarks failed (FAILED " in complaint


def test_history_is_drawn_in_order_of_commits(compare: Any, tmp_path: Path) -> None:
    folder = tmp_path / "store" / "machine"
    folder.mkdir(parents=True)
    (folder / "strange.json").write_text("{}")
    for i, (commit, when, ratio) in enumerate(
        [("c", "2026-02-02", 3.0), ("d", "2026-01-02", 2.0), ("c", "2026-02-02", 4)]
    ):
        run_file(folder / f"{i}.json", {FORK: ratio}, 40 * commit, when)
    _, said, _ = compare(run_file(tmp_path / "run.json", {FORK: 2.2}, when="2026-03-02"))
    assert "left out of the history" in said
    assert f"history of 4 runs of 3 commits: {tmp_path}/store/history.svg" in said
    assert (tmp_path / "store" / "history.svg").stat().st_size
    figure = history({"fork": {"paged": [("c", 1.5), ("d", 1.0), ("c", 2.0)]}}, ["d", "c"])
    (curve,) = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == "paged"]
    assert np.asarray(curve.get_xydata()).tolist() == [[0, 1], [1, 1.75]]
    (low, high) = figure.axes[0].get_ylim()
    named = [text.get_text() for text in figure.axes[0].get_yticklabels() if low <= text.get_position()[1] <= high]
    assert named == ["0.8", "1", "1.25", "1.6", "2"]
    assert low < 1 < 2 < high


def test_a_planted_regression_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as long again for one operation of one allocator, beside a baseline measured on the spot.

    Alone, also where this test is one of many processes, and whatever pytest is told to do by default."""
    name = FORK.replace("fork", "extend")
    baseline = baseline_of([regress.measure_these([name]) for _ in range(3)], {})

    def verdict() -> str:
        return judge(regress.measure_these([name]).timings.values(), baseline)[0].word

    assert "" in (verdict() for _ in range(1 + regress.AGAIN))  # measured again where it seems slower
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p tests.benchmarks.slow -n 2")
    assert verdict() == "SLOWER"


def test_the_baseline_of_the_repository_covers_what_there_is() -> None:
    known = regress.read_baseline(regress.BASELINE)
    assert len({name.split("::")[0] for name in known}) == len(list(regress.BENCHMARKS.glob("bench_*.py")))
    for name, one in known.items():
        assert one.ratio > 0
        assert one.runs >= (4 if name.endswith("cuda]") else 10), "a GPU's time is dear: tests/benchmarks/README.md"
