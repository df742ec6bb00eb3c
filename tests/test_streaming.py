"""Requests are made when they are gone through: the same each time, and never many in memory."""

from __future__ import annotations

import gc
import gzip
import math
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import lab.check
from lab.check import check
from lab.core import InputError, Request, SamplingParams
from lab.engine import Engine
from lab.record import Recorder
from lab.run import Run, carry_out, executor_of, pool_of, requests_of, scheduler_of
from lab.workloads import Requests, describe, digest, workload
from lab.workloads.content import dress

SPECS = [
    "sharegpt",
    "opt13b-256",
    "uniform:prompt=1-100,output=10-50",
    "adversarial:n=3",
    "prompts",
    "conversations",
]
ROWS = 6_000
CHUNK = 64  # rows of a table of the record in memory


def write(path: Path, rows: int, rate_per_s: float = 400.0) -> str:
    """A trace of short requests: they end sooner than others come, so that no queue grows."""
    lines = (f"{i / rate_per_s:.4f},{5 + i % 7},{2 + i % 3}\n" for i in range(rows))
    text = "arrival_s,prompt_tokens,output_tokens\n" + "".join(lines)
    path.write_bytes(gzip.compress(text.encode(), 1) if path.suffix == ".gz" else text.encode())
    return str(path)


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python held at most during this, beyond what it held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- the same each time


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "all"])
def test_every_pass_gives_the_same(spec: str, arrivals: str) -> None:
    asked: dict[str, Any] = {"count": 300, "arrivals": arrivals, "encode": lambda text: list(text.encode())}
    requests = workload(spec, rate_per_s=None if arrivals == "all" else 5.0, **asked)
    first = list(requests)
    assert list(requests) == first
    assert len(requests) == len(first) == 300
    assert all(a == b for a, b in zip(requests, requests, strict=True))  # two passes at once
    next(iter(requests))  # one given up
    assert digest(requests) == digest(first)


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_every_pass_reads_the_trace_anew(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, 50)
    for asked in ({"arrivals": "trace"}, {"arrivals": "trace", "duration_s": 0.06}, {"rate_per_s": 3.0, "count": 120}):
        requests = workload(path, **asked)
        first = list(requests)
        assert list(requests) == first
        assert len(requests) == len(first)
    recycled = [(len(r.prompt), r.output) for r in workload(path, arrivals="all", count=120)]
    assert recycled == [(5 + i % 7, 2 + i % 3) for i in [*range(50), *range(50), *range(20)]]


def test_papers_order_is_the_same_each_time(tmp_path: Path) -> None:
    requests = workload(f"paper:{write(tmp_path / 't.csv', 50)}", rate_per_s=4.0, duration_s=30, seed=2)
    first = list(requests)
    assert list(requests) == first
    assert len(first) == len(requests) > 50


def test_what_a_run_adds_is_added_in_every_pass() -> None:
    plain = workload("uniform:prompt=3-9,output=4", count=20, arrivals="all")
    dressed = dress(plain, n=2, prefix=5, max_tokens=7)
    first = list(dressed)
    assert list(dressed) == first
    assert len(dressed) == 20
    for r, before in zip(first, plain, strict=True):
        assert (r.id, r.output, r.sampling) == (before.id, 4, SamplingParams(max_tokens=7, n=2))
        assert list(r.prompt[:5]) == list(range(5))
        assert len(r.prompt) == 5 + len(before.prompt)
    assert len({tuple(r.prompt)[5] for r in first}) == 20  # nothing else is shared
    assert [r.sampling.max_tokens for r in dress(plain, max_tokens=2)] == [4] * 20  # a forced output is let happen


def test_a_vocabulary_too_small_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = workload("uniform:prompt=30,output=4", count=20, arrivals="all")
    with pytest.raises(InputError, match="vocabulary has only 32"):
        list(dress(plain, prefix=5, vocabulary=32))
    monkeypatch.setattr(lab.check, "requests_of", lambda run: dress(plain, prefix=5, vocabulary=32))
    with pytest.raises(InputError, match="vocabulary has only 32"):
        check(Run(count=20))


# ---- described in one pass


def spread(values: list[int]) -> list[float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return [sum(values), sum(values) / len(values), min(values), p50, p90, p99, max(values)]


@pytest.mark.parametrize("seed", range(12))
def test_description_is_what_numpy_says_of_all_lengths(seed: int) -> None:
    draw = Random(seed)
    lengths = [(1 + int(draw.random() * 40), 1 + int(draw.random() ** 4 * 900)) for _ in range(1 + seed * seed)]
    requests = [Request(i, 0.5 * i, range(p), o) for i, (p, o) in enumerate(lengths)]
    found = describe(requests)
    assert list(found["prompt_tokens"].values()) == spread([p for p, _ in lengths])
    assert list(found["output_tokens"].values()) == spread([o for _, o in lengths])
    assert found["digest"] == digest(requests)
    assert found["last_arrival_s"] == 0.5 * (len(lengths) - 1)


def test_description_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0

    def read() -> Iterable[Request]:
        nonlocal passes
        passes += 1
        yield Request(0, 0.0, range(3), 2)

    requests = Requests(read, 1, dropped=4)  # type: ignore[arg-type]
    assert describe(requests) == describe(requests)
    assert describe(requests)["dropped"] == 4
    assert passes == 1


# ---- a bad row far down is found before any work


def test_the_whole_file_is_read_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path / "t.csv", 20_000))
    path.write_text(path.read_text() + "60,0,3\n")
    with pytest.raises(InputError, match=r"t\.csv line 20002, column prompt_tokens: '0'"):
        workload(str(path), arrivals="trace")
    monkeypatch.setattr(lab.run, "Recorder", None)  # nothing is carried out
    with pytest.raises(InputError, match="line 20002"):
        check(Run(workload=str(path), arrivals="trace", rate=None, duration_s=None))


def test_bytes_that_are_no_text_are_placed_wherever_they_are(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "t.csv", 20_000))
    good = path.read_bytes()
    path.write_bytes(good + b"\xe9,1,2\n")
    with pytest.raises(InputError, match=rf"t\.csv is not UTF-8 text \(byte {len(good)}\)"):
        workload(str(path), arrivals="trace")
    packed = tmp_path / "cut.csv.gz"
    packed.write_bytes(gzip.compress(good)[:-20])
    with pytest.raises(InputError, match="no complete gzip file"):
        workload(str(packed), arrivals="trace")


# ---- memory


def passes(spec: str, **asked: Any) -> None:
    requests = dress(workload(spec, **asked), n=1, prefix=3)
    assert describe(requests)["requests"] == len(requests)


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz", "trace.parquet"])
def test_memory_of_a_pass_does_not_grow_with_the_trace(tmp_path: Path, name: str) -> None:
    """Held in a list, a request takes some 300 bytes. The growth allowed is 5."""
    most = []
    for rows in (ROWS // 6, ROWS):
        path = write(tmp_path / f"{rows}{name.removesuffix('.parquet')}", rows)
        if name.endswith(".parquet"):
            path = to_parquet(Path(path), rows)
        most.append(peak(lambda path=path: passes(path, arrivals="trace")))  # type: ignore[misc]
    assert most[1] < most[0] + 5 * ROWS, most


def to_parquet(path: Path, rows: int) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = np.genfromtxt(path, delimiter=",", names=True)
    columns = {"arrival_s": table["arrival_s"]}
    columns |= {name: table[name].astype(int) for name in ("prompt_tokens", "output_tokens")}
    parquet.write_table(pyarrow.table(columns), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


@pytest.mark.parametrize("spec", ["uniform:prompt=1-50,output=1-50", "conversations:turns=2,users=3"])
def test_memory_of_drawn_requests_does_not_grow_with_their_number(spec: str) -> None:
    most = [peak(lambda n=n: passes(spec, rate_per_s=4.0, count=n)) for n in (ROWS // 6, ROWS // 2)]  # type: ignore[misc]
    assert most[1] < most[0] + 12 * ROWS, most  # a request takes some 300 bytes


def test_memory_of_a_replay_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    """As `carry_out` does it, but with less of the record in memory, so that a short run shows what a long one does.

    What is held after the last steps of 4,000 requests, and after those of the first third. A list of their ids alone
    would make 90 kB of difference, of the requests 800 kB.
    """
    path = write(tmp_path / "trace.csv", 4_000)
    run = Run(workload=path, arrivals="trace", rate=None, duration_s=None, drain=True)
    requests, pool = requests_of(run), pool_of(run).tokens
    held: list[int] = []

    def measure() -> bool:
        if recorder.next_step % 12 == 0:
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        return True

    gc.freeze()  # so that collecting takes no time
    tracemalloc.start()
    try:
        with Recorder(tmp_path / "record", {}, chunk_rows=CHUNK) as recorder:
            Engine(scheduler_of(run, pool), executor_of(run, pool), recorder).run(requests, go_on=measure)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert len(recorder.record().requests) == len(requests) == 4_000
    third = len(held) // 3
    assert third >= 8
    assert max(held[-third:]) < max(held[:third]) + 40_000, held


def test_a_run_counts_its_requests_and_keeps_none(tmp_path: Path) -> None:
    told: list[float] = []
    path = write(tmp_path / "t.csv", 3_000)
    run = Run(workload=path, arrivals="trace", rate=None, duration_s=None, drain=True)
    record = carry_out(run, None, told.append).record()
    assert told == sorted(told)
    assert 0.5 < told[-1] <= 1
    assert record.header["requests"]["requests"] == 3_000 == (record.events["kind"] == "ended").sum()
    assert not math.isnan(record.header["requests"]["rate_per_s"])
