"""Films against hand-written records, and against an account kept beside the recorder; the page in a browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from recording import Shelf, serve, step

from lab import experiment, view
from lab import film as films
from lab.allocators import _category
from lab.core import InputError, Plan, Sequence
from lab.engine import Engine
from lab.events import Launched
from lab.record import Record, Recorder
from lab.run import Run, carry_out, executor_of, requests_of, scheduler_of

Block = tuple[list[list[int]], dict[str, int]]  # its holders (request, output), and its slots by category
State = dict[int, Block]
KINDS = ("stored", "ended", "reserved", "excess", "rounding")


class Witness(Recorder):
    """Also keeps, of every step, who holds which block and where each of its slots is, from the definition."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, {"simulated": True})
        self.states: list[State] = []

    def launched(self, step: Launched) -> None:
        allocator, live, ended = step.allocator, step.live, step.ended
        held: dict[int, list[tuple[Sequence, int, bool]]] = {}
        for s in live + ended:
            for i, b in enumerate(allocator.tables.get(s, ())):
                held.setdefault(b, []).append((s, i * allocator.block, s in ended))
        state: State = {}
        for b, holders in held.items():
            counts = dict.fromkeys(KINDS, 0)
            for offset in range(allocator.block):
                counts[_category(allocator.asked, holders, offset)] += 1
            state[b] = (sorted([s.group.request.id, s.index] for s, _, _ in holders), counts)
        self.states.append(state)
        super().launched(step)


class Case(NamedTuple):
    run: Run
    seen: set[str]  # events and categories without which the case shows nothing


WORKLOAD = "uniform:prompt=5-90,output=1-60"
SMALL: dict[str, Any] = {"workload": WORKLOAD, "rate": 30.0, "count": 40, "pool": "800", "duration_s": None}
TABLES = ("steps", "events", "samples", "tenures", "requests", "tokens")
CASES = {
    "paged, recomputed": Case(Run(allocator="paged", **SMALL), {"preempted", "stored", "rounding"}),
    "paged, swapped, forks": Case(Run(allocator="paged", preemption="swap", n=3, **SMALL), {"preempted", "forked"}),
    "contiguous, oracle": Case(Run(allocator="contiguous-oracle", n=2, **SMALL), {"reserved", "excess", "stored"}),
    "contiguous, max": Case(Run(allocator="contiguous-max", length=256, **SMALL), {"excess"}),
    "contiguous, doubling": Case(Run(allocator="contiguous-double-firstfit", **SMALL), {"excess"}),
    "static": Case(Run(allocator="paged", scheduler="static", batch=4, **SMALL), {"ended"}),
    "planned ahead": Case(Run(allocator="paged", depth=1, preemption="swap", **SMALL), {"preempted"}),
    "beams": Case(Run(allocator="paged", beams=4, **SMALL), {"forked", "preempted"}),
    "prefix cache": Case(Run(allocator="paged-prefix", prefix=40, preemption="swap", n=2, **SMALL), {"stored"}),
}


def carried_out(run: Run, path: Path | None = None) -> tuple[Record, list[State]]:
    witness = Witness(path)
    tokens = int(run.pool or 0)
    with witness:
        engine = Engine(scheduler_of(run, tokens), executor_of(run, tokens), witness, depth=run.depth)
        engine.run(requests_of(run))
    return witness.record(), witness.states


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Case, Record, list[State]]:
    wanted = CASES[request.param]
    return wanted, *carried_out(wanted.run)


class Player:
    """A film, unpacked and played the slow way: every frame from nothing."""

    def __init__(self, film: films.Film) -> None:
        self.block = film.about["block"]
        numbers = np.frombuffer(gzip.decompress(base64.b64decode(view.encode(film))), "<i4")
        self.columns: dict[str, np.ndarray] = {}
        for name, length in json.loads(json.dumps(film.about["columns"])):
            self.columns[name], numbers = numbers[:length].cumsum(), numbers[length:]
        assert not len(numbers)
        self.ids = film.about["ids"]

    def rows(self, prefix: str, *names: str) -> Iterator[tuple[int, ...]]:
        return zip(*(self.columns[f"{prefix}_{name}"].tolist() for name in names), strict=True)

    def counts(self, sequence: int, step: int) -> tuple[int, int, int]:
        """Computed, asked, ended."""
        names = ("sequence", "begin", "stop", "computed", "grown", "asked", "more", "ended")
        found = [row for row in self.rows("seg", *names) if row[0] == sequence and row[1] <= step < row[2]]
        assert len(found) == 1
        _, begin, _, computed, grown, asked, more, ended = found[0]
        return computed + (step - begin) * grown, asked + (step - begin) * more, ended

    def state(self, frame: int) -> State:
        step = int(self.columns["frame_step"][frame])
        held: dict[int, list[tuple[int, int]]] = {}
        for first, count, at, sequence, begin, stop in self.rows(
            "ten", "first", "count", "at", "sequence", "begin", "stop"
        ):
            if begin <= frame < stop:
                for i in range(count):
                    held.setdefault(first + i, []).append((sequence, (at + i) * self.block))
        known = {s: self.counts(s, step) for holders in held.values() for s, _ in holders}
        return {b: self.slots(holders, known) for b, holders in held.items()}

    def slots(self, holders: list[tuple[int, int]], known: dict[int, tuple[int, int, int]]) -> Block:
        counts = dict.fromkeys(KINDS, 0)
        for offset in range(self.block):
            written = {known[s][2] for s, base in holders if known[s][0] > base + offset}
            asked = any(known[s][1] > base + offset for s, base in holders)
            will = any(self.columns["seq_end"][s] > base + offset for s, base in holders if not known[s][2])
            kind = ("stored" if 0 in written else "ended") if written else "rounding"
            if asked and not written:
                kind = "reserved" if will else "excess"
            counts[kind] += 1
        names = ((self.columns["seq_request"][s], self.columns["seq_output"][s]) for s, _ in holders)
        return sorted([self.ids[request], int(output)] for request, output in names), counts


def test_every_block_of_every_frame_is_the_accounts(case: tuple[Case, Record, list[State]]) -> None:
    wanted, record, states = case
    film = films.film(record)
    player = Player(film)
    totals = {name: player.columns[f"frame_{name}"] for name in KINDS}
    assert film.about["frames"] == len(states) == len(record.steps)
    assert film.about["most_steps"] == 1
    for frame, state in enumerate(states):
        assert player.state(frame) == state, frame
        for name in KINDS:
            assert totals[name][frame] == sum(counts[name] for _, counts in state.values())
    happened = set(record.events["kind"]) | {name for name in KINDS if totals[name].any()}
    assert wanted.seen <= happened


def test_a_thinned_film_keeps_what_happened(case: tuple[Case, Record, list[State]]) -> None:
    _, record, states = case
    film = films.film(record, frames=8)
    player = Player(film)
    steps = player.columns["frame_step"].tolist()
    assert len(steps) < len(states)
    assert film.about["most_steps"] == np.diff([-1, *steps]).max() <= -(-len(states) // 8)
    assert steps[-1] == len(states) - 1
    for kind in ("admitted", "resumed", "preempted", "ended"):
        assert set(record.events[record.events["kind"] == kind]["step"]) <= {*steps, len(states)}
    for frame in {*range(0, len(steps), 5), len(steps) - 1}:
        assert player.state(frame) == states[steps[frame]]
    for name in ("sampled", "preempted"):
        assert player.columns[f"frame_{name}"].sum() == record.steps[name].sum()
    whole = Player(films.film(record)).columns
    assert all(
        (player.columns[name] == whole[name]).all() for name in whole if name.startswith(("spell", "req", "seq"))
    )


@pytest.fixture(scope="module")
def served() -> Record:
    recorder = Recorder(None, {"model": "m", "hardware": "h", "workload": "w"})
    serve(recorder)
    recorder.close()
    return recorder.record()


def test_a_hand_written_record(served: Record) -> None:
    player = Player(films.film(served))
    full = {"stored": 4, "ended": 0, "reserved": 0, "excess": 0, "rounding": 0}
    assert player.state(0) == {3: ([[0, 0]], full), 4: ([[0, 0]], full | {"stored": 1, "rounding": 3})}
    assert player.state(1) == {
        3: ([[0, 0], [0, 1]], full),
        4: ([[0, 0]], full | {"stored": 2, "reserved": 2}),
        5: ([[0, 0]], full | {"stored": 0, "excess": 1, "rounding": 3}),
        7: ([[0, 1]], full | {"stored": 2, "rounding": 2}),
        10: ([[2, 0]], full),
        11: ([[2, 0]], full | {"stored": 0, "excess": 4}),
    }
    assert sorted(player.state(2)) == [3, 4, 5, 7]
    assert player.state(3)[7] == ([[0, 1]], full | {"stored": 0, "ended": 4})
    assert player.columns["frame_begin"].tolist() == [250_000, 1_000_000, 1_500_000, 2_000_000]
    assert player.columns["frame_sampled"].tolist() == [0, 3, 4, 0]


def test_what_requests_are_doing(served: Record) -> None:
    film = films.film(served)
    player = Player(film)
    assert player.ids == [0, 1, 2]
    milliseconds = [
        (r, kind, a // 1000, b // 1000) for r, kind, a, b in player.rows("spell", "request", "kind", "begin", "stop")
    ]
    assert milliseconds == [
        (0, films.WAITING, 0, 250),
        (0, films.PROMPT, 250, 1500),
        (0, films.DECODING, 1500, 2500),
        (1, films.WAITING, 125, 125),  # refused
        (2, films.WAITING, 250, 1000),
        (2, films.PROMPT, 1000, 1500),
        (2, films.SWAPPED, 1500, 2000),
        (2, films.DECODING, 2000, 2500),
    ]
    assert player.columns["req_lane"].tolist() == [0, -1, 1]


def test_a_film_begins_with_the_second_in_which_its_clock_does(served: Record) -> None:
    late = {name: served.table(name).copy() for name in TABLES}
    for table, column in (("steps", "start_s"), ("steps", "end_s"), ("events", "time_s"), ("requests", "arrival_s")):
        late[table][column] += 1e9
    film = films.film(Record(served.header, None, late))
    assert film.about["origin_s"] == 1e9
    assert Player(film).columns["frame_end"].tolist() == [1_000_000, 1_500_000, 2_000_000, 2_500_000]


def test_steps_that_take_no_time_are_frames_all_the_same(served: Record) -> None:
    frames = {name: served.table(name).copy() for name in TABLES}
    frames["steps"]["end_s"] = [1.0, 1.0, 1.0, 2.5]
    columns = Player(films.film(Record(served.header, None, frames))).columns
    assert columns["frame_end"].tolist() == [1_000_000, 1_000_001, 1_000_002, 2_500_000]
    assert (np.diff(columns["frame_begin"]) > 0).all()


def test_a_record_in_which_nobody_gets_memory(tmp_path: Path) -> None:
    recorder = Recorder(None, {})
    step(recorder, 0.0, 1.0, Plan(), {}, Shelf(), [], [], 1, 0)
    recorder.close()
    player = Player(films.film(recorder.record()))
    assert player.state(0) == {}
    assert player.ids == []


def test_moments_of_a_record_without_events() -> None:
    recorder = Recorder(None, {})
    for i in range(8):
        step(recorder, i, i + 1, Plan(), {}, Shelf(), [], [], 1, 0)
    recorder.close()
    assert films.moments(recorder.record(), 3).tolist() == [2, 5, 7]  # every third, and the last


def test_a_pause_is_between_two_frames() -> None:
    """Nobody is in memory while a second passes between step 1 and step 2."""
    recorder = Recorder(None, {})
    for i, start_s in enumerate((0.0, 1.0, 3.0, 4.0)):
        step(recorder, start_s, start_s + 1, Plan(), {}, Shelf(), [], [], i, 0)
    recorder.close()
    film = films.film(recorder.record(), frames=1)
    assert Player(film).columns["frame_step"].tolist() == [1, 2, 3]
    assert Player(film).columns["frame_begin"].tolist() == [0, 3_000_000, 4_000_000]
    assert Player(film).columns["frame_end"].tolist() == [2_000_000, 4_000_000, 5_000_000]


# ---- what is said of records that cannot be shown


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert view.main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def folder(tmp_path: Path, served: Record) -> Path:
    served.save(tmp_path / "runs" / "abc")
    return tmp_path / "runs" / "abc"


def test_a_record_that_is_not_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", folder.parent / "film.html")
    assert "no such record" in said(capsys, folder / "nowhere", *out)
    assert "holds 1 runs: give the folder of one, as" in said(capsys, folder.parent, *out)
    assert "holds 1 runs: give the folder of one, as" in said(capsys, folder.parent.parent, *out)
    assert "3 records: a page shows one, or two" in said(capsys, folder, folder, folder, *out)
    assert "--frames 0" in said(capsys, folder, "--frames", "0", *out)
    assert "--help" in said(capsys)
    assert "cannot be written" in said(capsys, folder, "--out", folder / "header.json" / "film.html")
    (folder / "summary.json").write_text("{}")
    assert "an experiment, which has many runs" in said(capsys, folder, *out)
    assert not (folder.parent / "film.html").exists()


def test_a_damaged_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = folder / "header.json"
    good = header.read_text()
    header.write_text(good.replace('"format": 1', '"format": 0'))
    assert "format 0" in said(capsys, folder)
    header.write_text(good.replace('"capacity": 128', '"capacity": 132'))
    assert "its tables do not agree" in said(capsys, folder)
    header.write_text(good.replace('"capacity": 128', '"capacity": 0'))
    assert "nothing happened" in said(capsys, folder)
    header.write_text(good)
    table = folder / "tenures.parquet"
    table.write_bytes(table.read_bytes()[:-40])
    assert "damaged" in said(capsys, folder)
    table.unlink()
    assert "missing" in said(capsys, folder)


def test_a_record_in_which_nothing_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Recorder(tmp_path / "empty", {}):
        pass
    assert "nothing happened in this run" in said(capsys, tmp_path / "empty")


def test_a_tenure_out_of_place(served: Record) -> None:
    frames = {name: served.table(name).copy() for name in TABLES}
    frames["tenures"].loc[0, "first"] = 31
    with pytest.raises(InputError, match="outside the pool"):
        films.film(Record(served.header, None, frames))


@pytest.mark.parametrize(
    ("options", "kind", "shown"),
    [
        (["--allocator", "paged-oracle,contiguous-max,paged"], "allocator", ["contiguous-max", "paged"]),
        (["--allocator", "paged", "--scheduler", "continuous,static"], "scheduler", ["static", "continuous"]),
        (["--allocator", "paged"], "allocator", ["paged"]),
    ],
)
def test_an_experiment_ends_with_the_command_for_its_film(
    options: list[str], kind: str, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment.main(["fragmentation", "--quick", *options, "--out", str(tmp_path)]) == 0
    *_, command = capsys.readouterr().out.splitlines()
    assert command.startswith("film     python -m lab.view ")
    records = shlex.split(command)[4:]
    assert [Record.load(Path(place)).header["run"][kind] for place in records] == shown
    assert view.main([*records, "--out", str(tmp_path / "film.html")]) == 0


def test_pools_of_different_size(folder: Path, served: Record, capsys: pytest.CaptureFixture[str]) -> None:
    frames = {name: served.table(name).copy() for name in TABLES}
    frames["steps"]["free"] += 32
    Record({**served.header, "capacity": 160}, None, frames).save(folder.parent / "larger")
    out = ("--out", str(folder.parent / "film.html"))
    assert view.main([str(folder), str(folder.parent / "larger"), *out]) == 0
    line = "the pools differ (32 blocks of 4, 40 blocks of 4 tokens): compare shares of memory, not tokens\n"
    assert line in capsys.readouterr().out
    assert view.main([str(folder), str(folder), *out]) == 0
    assert "the pools differ" not in capsys.readouterr().out


# ---- the page


def test_the_page_asks_for_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "film.html"
    assert view.main([str(folder), "--out", str(out)]) == 0
    assert "4 steps in 4 frames" in capsys.readouterr().out
    text = out.read_text()
    assert not re.search(r"""(src|href)=|url\(|https?:|import\(""", text)
    assert text.count('class="about"') == 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[State]]]:
    """A page of two records, whose pools differ."""
    where = tmp_path_factory.mktemp("pair")
    runs = replace(CASES["contiguous, max"].run, pool="1024"), CASES["paged, swapped, forks"].run
    records = [carried_out(run, where / str(i)) for i, run in enumerate(runs)]
    assert view.main([str(where / "0"), str(where / "1"), "--out", str(where / "film.html")]) == 0
    return where / "film.html", [states for _, states in records]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")


@needs_chromium
def test_the_browser_shows_the_same_blocks(browser: Browser, pair: tuple[Path, list[list[State]]]) -> None:
    page, both = pair
    browser.open(page)
    browser.evaluate("blocks = (f, to) => (f.seek(to), f.holders.map((h, b) => h.length ? f.block_at(b) : null)), 0")
    for i, states in enumerate(both):
        ways = [*range(0, len(states), 7), len(states) - 1, 3, *range(60, 0, -1), len(states) // 2, -1, 5]
        for frame in ways:
            blocks = browser.evaluate(f"blocks(player.views[{i}].film, {frame})")
            shown = {b: (is_.pop("holders"), is_) for b, is_ in enumerate(blocks) if is_}
            assert shown == (states[frame] if frame >= 0 else {})
    assert browser.complaints == []
    assert browser.requested[-1:] == [page.as_uri()]


@needs_chromium
def test_it_plays_and_scrubs_and_steps(browser: Browser, pair: tuple[Path, list[list[State]]]) -> None:
    browser.open(pair[0])
    browser.evaluate("show(0), player.speed = 1")
    browser.key(" ")
    browser.wait("player.playing && player.t > 0.1")
    browser.key(" ")
    assert not browser.evaluate("player.playing")
    stopped = browser.evaluate("player.t")
    browser.key("ArrowRight")
    later = browser.evaluate("player.t")
    assert later > stopped
    browser.key("ArrowLeft")
    assert browser.evaluate("player.t") < later
    browser.key("+")
    assert browser.evaluate("[player.speed, document.getElementById('speed').textContent]") == [2, "2 x"]
    browser.key("End")
    assert browser.evaluate("player.t == player.end")
    ends, frames, lasts = browser.evaluate("['end_s', 'frame', 'frames'].map(k => player.views.map(v => v.film[k]))")
    assert frames == [count - 1 if end == max(ends) else -1 for end, count in zip(ends, lasts, strict=True)]
    browser.key("Home")
    assert browser.evaluate("player.t") == 0
    for share in (0.25, 0.9, 0.5):
        browser.evaluate(f"page('scrub').value = {10000 * share}; page('scrub').dispatchEvent(new Event('input'))")
        assert browser.evaluate("player.t / player.end") == pytest.approx(share)
        assert browser.evaluate("player.views.every(v => v.film.frame == v.film.at(player.t))")
    assert browser.complaints == []


@needs_chromium
def test_it_counts_the_tokens_that_were_written(browser: Browser, pair: tuple[Path, list[list[State]]]) -> None:
    browser.open(pair[0])
    for share in (0.0, 0.4, 1.0):
        t = browser.evaluate(f"show({share} * player.end), player.t")
        said = browser.evaluate("page('compare').textContent")
        for i in range(2):
            steps = Record.load(pair[0].parent / str(i)).steps
            written = int(steps["sampled"][steps["end_s"] <= t + 1e-6].sum())
            assert f"; {written:,} tokens written so far" in said.split("so far")[i] + "so far"


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the same twelve requests in static batches of four, and in continuous batches."""
    where = tmp_path_factory.mktemp("race")
    for scheduler in ("static", "continuous"):
        run = Run(arrivals="all", rate=None, duration_s=None, count=12, batch=4, scheduler=scheduler)
        carry_out(run, where / scheduler)
        assert view.main([str(where / scheduler), "--out", str(where / f"{scheduler}.html")]) == 0
    assert view.main([str(where / "static"), str(where / "continuous"), "--out", str(where / "film.html")]) == 0
    return where


@needs_chromium
def test_grey_is_explained_where_there_is_any(browser: Browser, race: Path) -> None:
    for scheduler in ("static", "continuous"):
        browser.open(race / f"{scheduler}.html")
        assert browser.evaluate("page('grey').hidden") is (scheduler == "continuous")


@needs_chromium
def test_it_counts_and_marks_the_answers_that_ended_and_are_held(browser: Browser, race: Path) -> None:
    browser.open(race / "film.html")
    record = Record.load(race / "static")
    samples, starts = record.samples, record.steps["start_s"].to_numpy()
    over = {i: set(rows["request"]) for i, rows in samples[samples["ended"] == 1].groupby("step")}
    seen = set()
    for i in (1, *sorted(over)[:: len(over) // 8]):
        held = sorted(over.get(i, ()))
        browser.evaluate(f"show({starts[i]} + 2e-6)")
        grey, said, now = browser.evaluate(
            "(v => [[...Array(v.film.blocks).keys()].filter(b => v.seen[9 * b + 8] & OVER).map(b => v.seen[9 * b])"
            ".map(s => v.film.ids[v.film.seq_request[s]]), page('compare').firstChild.textContent,"
            "v.part('.now').textContent])(player.views[0])"
        )
        assert sorted(set(grey)) == held
        for text in (said, now):
            assert f"{len(held)} ended and still held" in text if held else "still held" not in text
        seen.add(len(held))
    assert {0, 3} <= seen


@needs_chromium
def test_who_is_done_is_said_to_be_done(browser: Browser, race: Path) -> None:
    browser.open(race / "film.html")
    end_s = Record.load(race / "continuous").steps["end_s"].iloc[-1]
    browser.evaluate(f"show({end_s} + 0.001)")
    done = f"all served after {end_s:.1f} s"
    assert f"{done}; " in browser.evaluate("page('compare').lastChild.textContent")
    assert browser.evaluate("player.views[1].part('.now').textContent") == f"{done.capitalize()}: nothing is in memory."
    assert browser.evaluate("player.views[0].film.frame") >= 0


@needs_chromium
def test_who_still_waits_at_the_end_is_in_the_queue(browser: Browser, tmp_path: Path) -> None:
    carry_out(Run(rate=8.0, duration_s=20.0), tmp_path / "cut")
    assert view.main([str(tmp_path / "cut"), "--out", str(tmp_path / "film.html")]) == 0
    browser.open(tmp_path / "film.html")
    browser.key("End")
    record = Record.load(tmp_path / "cut")
    waiting = record.steps["waiting"].iloc[-1]
    assert waiting > 0
    assert browser.evaluate("player.views[0].film.queued(player.t).length") == waiting
    assert not browser.evaluate("player.views[0].film.done")
    (running, *_) = record.samples.loc[record.samples["step"] == len(record.steps) - 1, "request"]
    browser.evaluate(f"light({running})")
    assert "is decoding" in browser.evaluate("player.views[0].part('.now').textContent")


@needs_chromium
def test_each_name_stands_in_its_band(browser: Browser, race: Path) -> None:
    """Over the whole length of the name."""
    browser.open(race / "film.html")
    names = browser.evaluate(
        "player.views.map(v => { const g = v.charts.getContext('2d'), draw = g.fillText, said = [];"
        "g.fillText = (text, x, y) => said.push([text, x, y, g.measureText(text).width]); v.drawCharts();"
        "delete g.fillText; const sums = v.binned(v.width - LEFT), pool = v.film.blocks * v.film.block;"
        "return said.filter(([text]) => Object.values(SAID).includes(text)).map(([text, x, y, w]) => {"
        "const c = CATEGORIES.findIndex(name => SAID[name] == text), below = i => sums.of.slice(0, c)"
        ".reduce((a, of) => a + of[i], 0), top = (i, more) => 130 - 130 * (below(i) + more) / pool / sums.weight[i];"
        "return [text, [...Array(Math.floor(w)).keys()].map(k => Math.round(x - LEFT) + k)"
        ".filter(i => sums.weight[i]).every(i => top(i, sums.of[c][i]) < y - 4 && y - 4 < top(i, 0))] }) })"
    )
    assert all(names)
    assert all(fits for film in names for _, fits in film), names


@needs_chromium
def test_every_step_is_a_stop(browser: Browser, pair: tuple[Path, list[list[State]]]) -> None:
    browser.open(pair[0])
    stops = browser.evaluate(
        "(() => { show(0); const seen = player.views.map(() => new Set()); let before = -1;"
        "for (; player.t > before; step(true)) {"
        "player.views.forEach((v, i) => seen[i].add(v.film.frame)); before = player.t; }"
        "return seen.map(s => [...s].filter(f => f >= 0).length) })()"
    )
    assert stops == [len(states) for states in pair[1]]


@needs_chromium
def test_it_says_whose_a_block_is(browser: Browser, pair: tuple[Path, list[list[State]]]) -> None:
    page, both = pair
    browser.open(page)
    step = next(i for i, state in enumerate(both[1]) if any(len(holders) > 1 for holders, _ in state.values()))
    block, (holders, counts) = next((b, found) for b, found in both[1][step].items() if len(found[0]) > 1)
    browser.evaluate(f"(f => show(f.frame_begin[{step}] * f.tick_s))(player.views[1].film)")
    x, y = browser.evaluate(
        "(v => { const box = v.map.getBoundingClientRect(), [w, h] = v.cell.map(c => c / ink.scale);"
        f"const row = Math.floor({block} / v.cols);"
        f"return [box.left + ({block} % v.cols + 0.5) * w, box.top + (row + 0.5) * h] }})(player.views[1])"
    )
    browser.mouse(x, y)
    tip = browser.evaluate("player.views[1].part('.tip').textContent")
    assert f"block {block}: request {holders[0][0]}, output 0" in tip
    assert f"{counts['stored']} of 16: written" in tip
    assert f"shared by {len(holders)}" in tip
    browser.mouse(x, y, click=True)
    assert browser.evaluate("[player.chosen, page('light').value]") == [holders[0][0], str(holders[0][0])]
    assert f"Request {holders[0][0]} (prompt of" in browser.evaluate("player.views[1].part('.now').textContent")
    browser.key("Escape")
    assert browser.evaluate("player.chosen") is None
    browser.evaluate("player.views[1].map.focus()")
    browser.key("]")
    assert f"block {block + 1}: " in browser.evaluate("player.views[1].part('.tip').textContent")
    assert browser.complaints == []


@needs_chromium
def test_both_pools_and_both_colour_schemes(browser: Browser, pair: tuple[Path, list[list[State]]]) -> None:
    browser.open(pair[0])
    notes = browser.evaluate("page('notes').textContent")
    assert "The pools differ (64 blocks of 16 and 50 of 16 tokens)" in notes
    assert "They served different requests" not in notes  # they differ in what they ask for, not in what is served
    assert "Both play on one clock" in notes
    backs = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.wait(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        browser.evaluate("layout()")
        backs.append(browser.evaluate("ink.back"))
    assert backs == ["#fff", "#14161a"]
    unnamed = (
        "[...document.querySelectorAll('button, input, canvas[role]')].filter(e => !e.ariaLabel && !e.labels?.length)"
    )
    assert browser.evaluate(f"{unnamed}.map(e => e.outerHTML)") == []
    assert browser.complaints == []


@needs_chromium
@pytest.mark.full
def test_a_long_record_opens_and_plays(browser: Browser, tmp_path: Path) -> None:
    """100,000 steps and 983 blocks: open in 3 s, 30 frames a second at any speed."""
    carry_out(Run(rate=2.0, duration_s=None, count=10**6, steps=100_000), tmp_path / "long")
    assert view.main([str(tmp_path / "long"), "--out", str(tmp_path / "film.html")]) == 0
    browser.open(tmp_path / "film.html")
    assert int(browser.evaluate("document.body.dataset.ready")) < 3000
    for speed in (1, 16, 256):
        browser.evaluate(f"show(player.end / 2), player.speed = {speed}, play(true)")
        frames, since_ms = browser.evaluate("[player.frames, performance.now()]")
        time.sleep(3)
        more, until_ms = browser.evaluate("[player.frames, performance.now()]")
        browser.evaluate("play(false)")
        assert (more - frames) / (until_ms - since_ms) * 1000 > 30
