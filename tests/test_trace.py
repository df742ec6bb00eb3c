"""Traces against the rules of the format, hand-written records, metrics of the same record, and Perfetto itself."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import viztracer
from browser import CHROMIUM, Browser
from recording import Shelf, serve, step

from lab import latency, metrics, trace
from lab.core import InputError, Plan
from lab.record import Record, Recorder
from lab.run import Run, carry_out

SMALL: dict[str, Any] = {"workload": "uniform:prompt=5-90,output=1-60", "rate": 30.0, "count": 40, "duration_s": None}
TIGHT = {**SMALL, "pool": "800"}
RUNS = {
    "paged, swapped, forks": Run(preemption="swap", n=3, **TIGHT),
    "recomputed, planned ahead": Run(depth=1, **TIGHT),
    "static": Run(scheduler="static", batch=4, **TIGHT),
    "contiguous, with pauses": Run(allocator="contiguous-max", length=256, pool="4096", **{**SMALL, "rate": 1.0}),
    "beams": Run(beams=4, **TIGHT),
}
TABLES = ("steps", "events", "samples", "tenures", "requests", "tokens")
KINDS = {"X", "C", "i", "M"}


@pytest.fixture(scope="module", params=RUNS)
def record(request: pytest.FixtureRequest) -> Record:
    return carry_out(RUNS[request.param], None).record()


@pytest.fixture(scope="module")
def served() -> Record:
    recorder = Recorder(None, {"model": "m", "hardware": "h", "workload": "w"})
    serve(recorder)
    recorder.close()
    return recorder.record()


@pytest.fixture
def folder(tmp_path: Path, served: Record) -> Path:
    served.save(tmp_path / "runs" / "abc")
    return tmp_path / "runs" / "abc"


def written(tmp_path: Path, *records: Record) -> dict[str, Any]:
    """The file of these records, read by a reader of JSON that knows nothing of ours."""
    places = []
    for i, record in enumerate(records):
        record.save(tmp_path / f"record{i}")
        places.append(str(tmp_path / f"record{i}"))
    assert trace.main([*places, "--out", str(tmp_path / "trace.json")]) == 0
    return json.loads((tmp_path / "trace.json").read_text(), parse_constant=pytest.fail)


def named(events: list[dict[str, Any]], what: str) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == what}


def held_for(events: list[dict[str, Any]], name: str, until: float) -> Iterator[tuple[dict[str, float], float]]:
    """Values of a counter, and for how many seconds each stood."""
    own = [e for e in events if e["ph"] == "C" and e["name"] == name]
    for event, later in pairwise([*own, {"ts": until}]):
        yield event["args"], (later["ts"] - event["ts"]) / 1e6


def test_it_keeps_to_the_format(record: Record, tmp_path: Path) -> None:
    found = written(tmp_path, record)
    assert set(found) == {"displayTimeUnit", "otherData", "traceEvents"}
    events = found["traceEvents"]
    lanes = defaultdict(list)
    for event in events:
        assert event["ph"] in KINDS
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] == "M" or event["ts"] >= 0
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) and value >= 0 for value in event["args"].values())
        if event["ph"] == "i":
            assert event["s"] == "t"
    assert set(named(events, "process_name").values()) == {
        f"{record.header['run']['allocator']}{', static batches' * (record.header['run']['scheduler'] == 'static')}"
        f" (simulated): {what}"
        for what in ("engine", "requests")
    }
    threads = named(events, "thread_name")
    assert set(lanes) <= set(threads)
    assert len({thread for _, thread in threads}) == len(threads), "no number is of two threads"
    for spans in lanes.values():
        assert all(stop >= begin for begin, stop in spans)
        assert all(later >= stop - 1e-3 for (_, stop), (later, _) in pairwise(spans))


def test_steps_are_the_records(record: Record) -> None:
    events = list(trace.events(record))
    (thread,) = [where for where, name in named(events, "thread_name").items() if name == "steps"]
    slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == thread]
    assert [e["ts"] for e in slices] == pytest.approx(record.steps["start_s"] * 1e6, abs=1e-3)
    assert [e["dur"] for e in slices] == pytest.approx(
        (record.steps["end_s"] - record.steps["start_s"]) * 1e6, abs=2e-3
    )
    for name in ("seqs", "tokens", "sampled", "running"):
        assert [e["args"].get(name, 0) for e in slices] == record.steps[name].tolist()
    assert slices[0]["name"] == f"{record.steps['seqs'][0]} sequences, {record.steps['tokens'][0]} tokens"


def test_phases_are_as_long_as_metrics_say(record: Record) -> None:
    events = list(trace.events(record))
    lane = {int(n.split()[1][:-1]): w for w, n in named(events, "thread_name").items() if n.startswith("request ")}
    assert set(lane) == set(record.requests["request"])
    slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["name"], event["ts"] / 1e6, event["dur"] / 1e6))
    first = (
        latency.latencies(record)
        .groupby("request")
        .agg(
            arrival=("arrival_s", "first"),
            queue=("queue_s", "first"),
            ttft=("ttft_s", "min"),
            finish=("finish_s", "max"),
        )
    )
    assert len(first) >= 30
    lost = set(record.events[record.events["kind"] == "preempted"]["request"])
    for request, row in first.iterrows():
        own = slices[lane[int(str(request))]]
        assert own[0][1] == pytest.approx(row["arrival"], abs=1e-6)
        assert sum(dur for name, _, dur in own if name == "waiting") == pytest.approx(row["queue"], abs=1e-6)
        ends = [begin + dur for name, begin, dur in own if name != "ended, memory held"]
        assert max(ends) == pytest.approx(row["finish"], abs=1e-6)
        assert sum(dur for *_, dur in own) == pytest.approx(own[-1][1] + own[-1][2] - own[0][1], abs=1e-5), "no gaps"
        if request not in lost:
            assert sum(dur for name, _, dur in own if name in ("waiting", "prompt")) == pytest.approx(row["ttft"])
        assert (request in lost) == any(name in ("preempted", "swapped") for name, *_ in own)


def test_counters_are_what_metrics_say(record: Record) -> None:
    events = list(trace.events(record))
    until = float(record.steps["end_s"].iloc[-1]) * 1e6
    sums = dict.fromkeys(metrics.CATEGORIES, 0.0)
    total_s = 0.0
    for tokens, seconds in held_for(events, "KV memory (tokens)", until):
        assert set(tokens) == set(sums)
        assert sum(tokens.values()) == record.header["capacity"]
        total_s += seconds
        for name, count in tokens.items():
            sums[name] += count / record.header["capacity"] * seconds
    expected = metrics.shares(record, over="time")
    assert {name: share / total_s for name, share in sums.items()} == pytest.approx(expected.to_dict(), abs=1e-6)
    drawn = sum(rate["drawn"] * seconds for rate, seconds in held_for(events, "output tokens/s", until))
    assert drawn == pytest.approx(len(record.tokens), rel=1e-5)
    assert drawn > 500
    most = {
        "requests": ("waiting", "waiting"),
        "sequences": ("running", "running"),
        "host memory (tokens)": ("swapped", "host"),
    }
    for counter, (name, column) in most.items():
        values = [counts[name] for counts, _ in held_for(events, counter, until)]
        assert max(values, default=0) == record.steps[column].max()


def test_a_hand_written_record(served: Record) -> None:
    events = list(trace.events(served))
    threads = named(events, "thread_name")
    told = [(threads[e["pid"], e["tid"]], e["name"], e["ts"], e.get("dur")) for e in events if e["ph"] in "Xi"]
    assert told == [
        ("steps", "1 sequences, 5 tokens", 250_000, 750_000),
        ("steps", "3 sequences, 6 tokens", 1_000_000, 500_000),
        ("steps", "2 sequences, 4 tokens", 1_500_000, 500_000),
        ("steps", "nothing computed", 2_000_000, 500_000),
        ("request 0: 6 + 3 tokens", "waiting", 0, 250_000),
        ("request 0: 6 + 3 tokens", "prompt", 250_000, 1_250_000),
        ("request 0: 6 + 3 tokens", "decode", 1_500_000, 1_000_000),
        ("request 2: 4 + 1 tokens", "waiting", 250_000, 750_000),
        ("request 2: 4 + 1 tokens", "prompt", 1_000_000, 500_000),
        ("request 2: 4 + 1 tokens", "swapped", 1_500_000, 500_000),
        ("request 2: 4 + 1 tokens", "decode", 2_000_000, 500_000),
        ("request 1: 999 + 3 tokens", "refused", 125_000, None),
        ("request 0: 6 + 3 tokens", "output 1 forked", 1_000_000, None),
        ("request 0: 6 + 3 tokens", "output 1 ended", 2_000_000, None),
        ("request 2: 4 + 1 tokens", "cancelled", 2_500_000, None),
        ("request 0: 6 + 3 tokens", "output 0 ended", 2_500_000, None),
    ]
    memory = [(e["ts"], e["args"]) for e in events if e["name"] == "KV memory (tokens)"]
    seen = [(time, tokens["stored"], tokens["ended"], tokens["free"]) for time, tokens in memory]
    assert seen == [(250_000, 5, 0, 120), (1_000_000, 12, 0, 104), (1_500_000, 12, 0, 112), (2_000_000, 12, 4, 104)]
    rates = [(e["ts"], e["args"]["drawn"]) for e in events if e["name"] == "output tokens/s"]
    assert rates == [(250_000, 0), (1_000_000, 6), (1_500_000, 8), (2_000_000, 0)]
    (refusal,) = [e["args"] for e in events if e["name"] == "refused"]
    assert refusal == {"tokens": 1002, "step": 0, "reason": "too long"}


def test_a_pause_and_steps_that_take_no_time() -> None:
    """Nobody is in memory while a second passes after the second step, which takes none."""
    recorder = Recorder(None, {})
    for start_s, end_s in ((0.0, 1.0), (1.0, 1.0), (2.0, 3.0)):
        step(recorder, start_s, end_s, Plan(), {}, Shelf(), [], [], 1, 0)
    recorder.close()
    frames = {name: recorder.record().table(name) for name in TABLES}
    frames["steps"]["sampled"] = [2, 3, 7]
    frames["steps"]["running"] = [1, 2, 3]
    events = list(trace.events(Record(recorder.record().header, None, frames)))
    assert [(e["ts"], e["args"]["drawn"]) for e in events if e["name"] == "output tokens/s"] == [
        (0, 5),
        (1_000_000, 0),
        (2_000_000, 7),
    ]
    assert [(e["ts"], e["args"]["running"]) for e in events if e["name"] == "sequences"] == [
        (0, 1),
        (1_000_000, 0),
        (2_000_000, 3),
    ]


def test_memory_stands_while_nothing_runs(served: Record) -> None:
    """A quarter of a second between two steps, in which sequences hold memory."""
    frames = {name: served.table(name).copy() for name in TABLES}
    frames["steps"].loc[2, "start_s"] = 1.75
    events = list(trace.events(Record(served.header, None, frames)))
    assert [e["ts"] for e in events if e["name"] == "KV memory (tokens)"] == [250_000, 1_000_000, 1_500_000, 2_000_000]
    assert [e["args"]["drawn"] for e in events if e["name"] == "output tokens/s"] == [0, 6, 8, 0]
    assert [(e["ts"], e["dur"]) for e in events if e["name"] == "2 sequences, 4 tokens"] == [(1_750_000, 250_000)]


def test_two_records_of_different_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = RUNS["beams"], replace(RUNS["beams"], pool="1600", beams=0)
    found = written(tmp_path, *(carry_out(run, None).record() for run in runs))
    said = capsys.readouterr().out
    assert "the pools differ (50 blocks of 16, 100 blocks of 16 tokens): compare shares of memory, not tokens\n" in said
    assert len(set(named(found["traceEvents"], "process_name"))) == 4
    threads = [(e["pid"], e["tid"]) for e in found["traceEvents"] if e["name"] == "thread_name"]
    assert len({thread for _, thread in threads}) == len(threads) == 2 * 41
    assert list(found["otherData"]) == ["1 paged", "2 paged"]


# ---- what is said of records that have no trace


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert trace.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_what_is_not_a_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", folder.parent / "trace.json")
    assert "no such record" in said(capsys, folder / "nowhere", *out)
    assert "holds 1 runs: give the folder of one, as" in said(capsys, folder.parent, *out)
    assert "--help" in said(capsys)
    assert "cannot be written" in said(capsys, folder, "--out", folder / "header.json" / "trace.json")
    (folder / "summary.json").write_text("{}")
    assert "an experiment, which has many runs" in said(capsys, folder, *out)
    assert [file.name for file in folder.parent.iterdir()] == ["abc"], "nothing is left half written"


def test_an_older_a_damaged_and_an_empty_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", folder.parent / "trace.json")
    header = folder / "header.json"
    good = header.read_text()
    header.write_text(good.replace('"format": 1', '"format": 0'))
    assert "record format 0, this version reads 1: run it again" in said(capsys, folder, *out)
    header.write_text(good.replace('"capacity": 128', '"capacity": 132'))
    assert "its tables do not agree" in said(capsys, folder, *out)
    header.write_text(good)
    table = folder / "tenures.parquet"
    table.write_bytes(table.read_bytes()[:-40])
    assert "damaged" in said(capsys, folder, *out)
    table.unlink()
    assert "missing" in said(capsys, folder, *out)
    with Recorder(folder.parent / "empty", {}):
        pass
    assert "nothing happened in this run" in said(capsys, folder.parent / "empty", *out)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["abc", "empty"], "nothing is left half written"


@pytest.mark.parametrize(("column", "value"), [("start_s", 0.9), ("end_s", 0.9), ("end_s", np.nan)])
def test_steps_that_overlap(served: Record, column: str, value: float) -> None:
    frames = {name: served.table(name).copy() for name in TABLES}
    frames["steps"].loc[1, column] = value
    with pytest.raises(InputError, match="its tables do not agree"):
        list(trace.events(Record(served.header, None, frames)))


# ---- Perfetto's own page and trace processor, which the profiler VizTracer carries


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


ASK = """(async sql => {
    const answer = await app.trace.engine.query(sql), rows = [];
    for (const row = answer.iter({}); row.valid(); row.next())
        rows.push(answer.columns().map(c => typeof row.get(c) == 'bigint' ? Number(row.get(c)) : row.get(c)));
    return rows;
})"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")
def test_perfetto_opens_it(tmp_path: Path) -> None:
    record = carry_out(RUNS["paged, swapped, forks"], None).record()
    written(tmp_path, record)
    (tmp_path / "perfetto").symlink_to(Path(viztracer.__file__).parent / "web_dist")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Browser(tmp_path / "profile") as browser:
            browser.call("Network.setBlockedURLs", urls=["https://*"])
            here = f"http://127.0.0.1:{server.server_port}"
            browser.call("Page.navigate", url=f"{here}/perfetto/#!/?url={here}/trace.json")
            browser.wait("globalThis.app && app.trace && app.trace.engine")

            def ask(sql: str) -> list[list[Any]]:
                return browser.evaluate(f"{ASK}({json.dumps(sql)})")

            assert ask("select name from stats where severity in ('error', 'data_loss') and value > 0") == []
            ours = list(trace.events(record))
            tracks = "slice join thread_track on track_id = thread_track.id join thread using (utid)"
            found = ask(f"select thread.name, slice.name, ts, dur from {tracks} join process using (upid)")
            threads = named(ours, "thread_name")
            expected = [
                [threads[e["pid"], e["tid"]], e["name"], round(e["ts"] * 1000), round(e.get("dur", 0) * 1000)]
                for e in ours
                if e["ph"] in "Xi"
            ]
            assert sorted(found) == sorted(expected)
            counted = ask(
                "select t.name, count(*), sum(value) from counter join counter_track t on track_id = t.id group by 1"
            )
            sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
            for event in (e for e in ours if e["ph"] == "C"):
                for name, value in event["args"].items():
                    sums[f"{event['name']} {name}"][0] += 1
                    sums[f"{event['name']} {name}"][1] += value
            assert {name: [count, total] for name, count, total in counted} == {
                name: [count, pytest.approx(total)] for name, (count, total) in sums.items()
            }
    finally:
        server.shutdown()
        server.server_close()
