"""The report against the files that it shows, read by other means; what is damaged is named; the page in a browser."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from recording import serve

from lab import experiment, report, results
from lab.record import Recorder

KEPT = Path(__file__).parents[1] / "papers" / "pagedattention" / "results"
QUICK = ["fragmentation", "--quick", "--allocator", "contiguous-max,paged", "--duration", "30"]


class Page(HTMLParser):
    """Its text, its sections by title, and in each the rows of its tables and the content of its images."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = ""
        self.clocks: dict[str, str] = {}
        self.sections: dict[str, list[list[str]]] = {}
        self.images: dict[str, list[bytes]] = {}
        self.inside: list[str] = []
        self.title = ""
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.inside, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("meta", "link", "img"):
            if tag == "img":
                kind, _, content = str(dict(attrs)["src"]).partition(";base64,")
                assert kind in ("data:image/svg+xml", "data:image/png")
                self.images[self.title].append(base64.b64decode(content))
            return
        self.inside.append(tag)
        if tag == "h2":
            self.title = ""
        elif tag == "tr" and self.title:
            self.sections[self.title].append([])
        elif tag in ("td", "th") and self.title:
            self.sections[self.title][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag
        if tag == "h2":
            self.sections[self.title], self.images[self.title] = [], []

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.inside):
            self.text += data
        if self.inside[-1:] == ["h2"]:
            self.title += data
        elif self.inside[-2:] == ["h2", "span"]:
            self.clocks[self.title] = data
        elif {"td", "th"} & set(self.inside) and self.title:
            self.sections[self.title][-1][-1] += data


def shown(capsys: pytest.CaptureFixture[str], out: Path, *places: Path, expected: int = 0) -> tuple[Page, str, str]:
    """The page, and what was said."""
    assert report.main([*map(str, places), "--out", str(out)]) == expected
    said, complained = capsys.readouterr()
    return Page(out), said, complained


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment as the command leaves it, among its records."""
    out = tmp_path_factory.mktemp("made") / "results"
    assert experiment.main([*QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Two experiments that may be spoilt."""
    for name in ("gap", "fragmentation"):
        shutil.copytree(KEPT / "simulated" / name, tmp_path / "results" / name)
    return tmp_path / "results"


def test_an_experiment_as_the_command_leaves_it(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    page, said, complained = shown(capsys, tmp_path / "report.html", made)
    assert not complained
    assert said.startswith("1 experiment; ")
    assert list(page.sections) == ["results/fragmentation"]
    lines = page.sections["results/fragmentation"]
    folder = made / "fragmentation"
    for line in list(csv.reader((folder / "table.csv").open()))[3:]:
        assert [cell.removeprefix("-") if cell == "-0.0" else cell for cell in line] in lines
    summary = json.loads((folder / "summary.json").read_text())
    for claim in summary["claims"]:
        (found,) = [line for line in lines if line[0] == claim["text"]]
        assert found[2:] == [claim["seen"], "not judged"]
    assert page.images["results/fragmentation"] == [(folder / "figure.svg").read_bytes()]
    for text in (
        "Where does KV memory go?",
        summary["command"],
        "15,728 tokens in blocks of 16",
        "simulated, at the pace",
    ):
        assert text in page.text
    assert "per cent of the pool: paper, ours, deviation" in page.text.lower(), (
        "a table has its title, and with it units"
    )
    assert "What else was seen" in page.text


def test_all_results_that_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("simulated", "hour", "gpu", "cpu")
    page, said, complained = shown(capsys, tmp_path / "report.html", *(KEPT / kind for kind in kinds))
    there = {file.parent for file in KEPT.rglob("summary.json")}
    assert len(there) >= 16
    titles = {f"{folder.parent.name}/{folder.name}": folder for folder in there}
    assert set(page.sections) == set(titles)
    judged = [claim for folder in there for claim in json.loads((folder / "summary.json").read_text())["claims"]]
    holding = sum(claim["holds"] is True for claim in judged)
    assert f"{len(there)} experiments; {len(judged)} claims: {holding} hold, " in said
    for title, lines in page.sections.items():
        folder = titles[title]
        simulated = json.loads((folder / "header.json").read_text())["simulated"]
        assert page.clocks[title] == ("simulated" if simulated else "measured")
        verdicts = [line[3] for line in lines if line[3:] and line[3] in ("holds", "fails", "not judged")]
        words = {True: "holds", False: "fails", None: "not judged"}
        assert verdicts == [words[c["holds"]] for c in json.loads((folder / "summary.json").read_text())["claims"]]
        drawings = {file.read_bytes() for file in folder.glob("*.svg")}
        assert set(page.images[title]) == drawings
    assert "<h3>Table</h3>" not in (tmp_path / "report.html").read_text(), "today's experiments know all titles"
    pools = "fragmentation: its 3 results have pools of different size (15,728 in blocks of 16, 1,200 in blocks of 16"
    assert pools in complained
    assert pools in page.text


def test_the_papers_value_beside_ours() -> None:
    said = results.theirs("fragmentation", "Orca (Max): every share within 2 points of figure 2")
    assert "20.4, 26.8, 38.2: pagedattention, sections 1 and 3.1" in said
    assert results.theirs("fragmentation", "nothing that any paper says") == ""
    assert results.theirs("factorial", "continuous batching beats static under every allocator, with every seed") == (
        "no such number: always together with kernels: orca, sections 3 and 6"
    )
    assert results.theirs("no such experiment", "Orca (Max): every share within 2 points of figure 2") == ""


def test_the_page_asks_for_nothing(kept: Path, tmp_path: Path) -> None:
    assert report.main([str(kept), "--out", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]{5})', text).count("data:") == 3
    assert not re.search(r"""(src|href)=(?!"data:|"#)|url\(|@import|<script|<iframe""", text)


# ---- what is damaged, and what is not there

DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "no header": ("header.json", lambda _: None, "missing"),
    "half a header": ("header.json", lambda old: old[: len(old) // 2], "damaged"),
    "a header of another kind": ("header.json", lambda _: b'{"run": 3}', "damaged (run is 3)"),
    "a list": ("header.json", lambda _: b"[]", "damaged"),
    "no summary": ("summary.json", lambda _: None, "missing"),
    "a summary without claims": ("summary.json", lambda _: b"{}", "damaged ('claims')"),
    "a verdict that is none": ("summary.json", lambda old: old.replace(b'"holds": true', b'"holds": "yes"'), "damaged"),
    "no table": ("table.csv", lambda _: None, "missing"),
    "an empty table": ("table.csv", lambda _: b"", "damaged (an empty file)"),
    "a torn table": ("table.csv", lambda old: old.rstrip()[:-30], "damaged (not a table"),
    "no rows": ("rows.csv", lambda _: None, "missing"),
    "rows that are no text": ("rows.csv", lambda _: b"\xff\xfe\x00", "damaged"),
    "no figure": ("figure.svg", lambda _: None, "missing"),
    "half a figure": ("figure.svg", lambda old: old[: len(old) // 2], "damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_named_and_the_rest_is_shown(
    case: str, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, problem = DAMAGE[case]
    file = kept / "gap" / name
    whole, _, _ = shown(capsys, tmp_path / "whole.html", kept)
    content = change(file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    page, _, complained = shown(capsys, tmp_path / "report.html", kept, expected=1)
    assert complained.startswith(f"error: {file}: {problem}")
    assert complained.count("\n") == 1
    assert "run it again (python -m lab.experiment gap" in complained
    assert complained.removeprefix("error: ").strip() in page.text
    assert "Not all could be read of results/gap." in page.text
    assert page.sections["results/fragmentation"] == whole.sections["results/fragmentation"]
    assert "results/gap" in page.sections
    if name != "summary.json":
        claims = json.loads((kept / "gap" / "summary.json").read_text())["claims"]
        assert all(claim["seen"] in page.text for claim in claims)
    if name != "figure.svg":
        assert (kept / "gap" / "figure.svg").read_bytes() in [i for own in page.images.values() for i in own]


def test_results_of_an_older_format(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = kept / "gap" / "header.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 0'))
    page, _, complained = shown(capsys, tmp_path / "report.html", kept)
    said = f"{kept / 'gap'}: of records in format 0, this version writes 1: shown as it was"
    assert complained == f"note: {said}\n"
    assert said in page.text


def test_an_experiment_that_this_version_does_not_have(
    kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (kept / "gap").rename(kept / "mine")
    (kept / "fragmentation" / "rows.csv").write_text("system,seed\nx,3\nx,1\n")  # of which today's makes no table
    page, _, complained = shown(capsys, tmp_path / "report.html", kept)
    assert not complained
    assert "No experiment of this name is in this version." in page.text
    for name in ("mine", "fragmentation"):
        lines = list(csv.reader((kept / name / "table.csv").open()))
        assert lines[-1][0] in {line[0] for line in page.sections[f"results/{name}"]}
    assert (tmp_path / "report.html").read_text().count("<h3>Table</h3>") == 2
    assert "seeds1, 3" in page.text.replace("\n", "")


def test_a_table_that_would_be_another_today(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of rows that have lost a system: what was kept is shown, and no table that was not printed then."""
    rows = kept / "fragmentation" / "rows.csv"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(line for line in lines if not line.startswith("contiguous-max,")))
    page, _, complained = shown(capsys, tmp_path / "report.html", kept)
    assert not complained
    for line in list(csv.reader((kept / "fragmentation" / "table.csv").open()))[3:]:
        assert line[:3] in [found[:3] for found in page.sections["results/fragmentation"]]
    assert "requests running" not in [line[0] for line in page.sections["results/fragmentation"]]


def test_where_there_is_nothing_to_show(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    recorder = Recorder(tmp_path / "old", {})
    serve(recorder)
    recorder.close()
    header = tmp_path / "old" / "header.json"
    header.write_text(header.read_text().replace('"format": 1', '"format": 0'))
    (tmp_path / "torn").mkdir()
    shutil.copy(header, tmp_path / "torn")
    a_run = next(iter((made / "runs").iterdir()))
    out = tmp_path / "out" / "report.html"
    for place, rule in {
        tmp_path / "nowhere": "no such folder: give the one that python -m lab.experiment wrote",
        header: "no such folder",
        tmp_path / "empty": "holds nothing that an experiment has written: run one with python -m lab.experiment",
        made / "runs": "holds 2 records and no experiment: run one",
        a_run: "the record of one run: python -m lab.view plays it",
        tmp_path / "old": "the record of one run",
        tmp_path / "torn": "the record of one run",
    }.items():
        assert report.main([str(made), str(place), "--out", str(out)]) == 2
        said, complained = capsys.readouterr()
        assert not said
        assert complained.startswith(f"error: {place}: {rule}")
        assert complained.count("\n") == 1
    assert not out.parent.exists()
    assert report.main([str(made), "--out", str(header / "report.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def luminance(color: str) -> float:
    """Relative, of an rgb(...): the W3C's definition."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: apt-get install chromium")
def test_it_is_readable_in_light_and_dark(browser: Browser, kept: Path, tmp_path: Path) -> None:
    summary = kept / "gap" / "summary.json"
    content: dict[str, Any] = json.loads(summary.read_text())
    content["claims"][0] |= {"text": "<script>document.title='run'</script>", "holds": False}
    content["claims"][1]["holds"] = None
    summary.write_text(json.dumps(content))
    drawing = kept / "gap" / "figure.svg"
    drawing.write_text(drawing.read_text().replace("</svg>", "<script>parent.document.title='run'</script></svg>"))
    page = tmp_path / "report.html"
    assert report.main([str(kept), "--out", str(page)]) == 0
    contrasts = (
        "[...document.querySelectorAll('p, td, th, h1, h2, dt, dd, code, a, .clock')].map(e => { let back = e, paint;"
        "do paint = getComputedStyle(back).backgroundColor;"
        "while (paint == 'rgba(0, 0, 0, 0)' && (back = back.parentElement));"
        "return [getComputedStyle(e).color, paint] })"
    )
    backs = set()
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(page)
        browser.wait("[...document.images].every(i => i.complete && i.naturalWidth > 100)")
        assert browser.evaluate("document.images.length") == 2
        assert browser.evaluate("document.title") == "Results", "nothing of what is shown is run"
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "only wide tables scroll"
        backs.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        pairs = {tuple(pair) for pair in browser.evaluate(contrasts)}
        for ink, paper in pairs:
            dark, light = sorted((luminance(ink), luminance(paper)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, ink, paper)
    assert len(backs) == 2
    targets = browser.evaluate("[...document.querySelectorAll('a')].map(a => !!document.querySelector(a.hash))")
    assert len(targets) == 2
    assert all(targets)
    assert browser.complaints == []
    assert {url.partition(":")[0] for url in browser.requested} <= {"file", "data"}
    assert browser.call("Page.printToPDF", printBackground=True)["data"]
