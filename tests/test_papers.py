"""The pages of papers/ say what the results beside them say, and all that they name is there."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lab.experiment import names
from papers import pages
from papers.pagedattention import draw

ROOT = Path(__file__).parents[1]
PAPERS = ROOT / "papers"
PAGES = sorted(PAPERS.rglob("*.md"))
LISTS = sorted(PAPERS.rglob("claims.toml"))
REPRODUCE = PAPERS / "pagedattention" / "reproduce.sh"
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def rows_of(path: Path) -> list[pages.Row]:
    return [pages.Row.read(entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["claim"]]


# ---- as committed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_made_again_a_page_is_as_committed(page: Path) -> None:
    assert pages.filled(page) == page.read_text(encoding="utf-8"), "python papers/pages.py writes it"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if not target.startswith(("http", "#"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("path", LISTS, ids=name_of)
def test_what_claims_name_is_there(path: Path) -> None:
    rows = rows_of(path)
    assert {row.experiment for row in rows if row.experiment} <= set(names())
    for row in rows:
        file, _, function = row.test.partition("::")
        assert not file or f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), row.test


@pytest.mark.parametrize("path", LISTS, ids=name_of)
def test_every_match_finds_a_claim_where_there_are_results(path: Path) -> None:
    results = path.parent / tomllib.loads(path.read_text(encoding="utf-8"))["results"]
    for row in rows_of(path):
        summary = results / row.kinds[0] / row.experiment / "summary.json"
        if row.experiment and summary.exists():
            texts = [claim["text"] for claim in json.loads(summary.read_text())["claims"]]
            for pattern in row.match:
                assert any(re.search(pattern, text) for text in texts), (row.claim, pattern, texts)


def test_no_result_is_of_a_smoke_run() -> None:
    kept = sorted(PAPERS.rglob("results/*/*/summary.json"))
    assert kept, "results lie in results/KIND/EXPERIMENT"
    for path in kept:
        assert path.parts[-3] in pages.KINDS
        assert path.parts[-2] in names()
        assert "--quick" not in json.loads(path.read_text())["command"], path
        header = json.loads((path.parent / "header.json").read_text())
        assert bool(header.get("simulated")) == (path.parts[-3] in ("simulated", "hour")), path


def test_reproduce_runs_experiments_that_exist_and_refuses_what_it_does_not_know() -> None:
    script = REPRODUCE.read_text()
    run = (
        re.findall(r"^ +run \w+ (\w+)", script, re.MULTILINE)
        + " ".join(re.findall(r"for name in ([\w ]+);", script)).split()
    )
    assert set(run) == set(names()) - {"indirection"}, "which needs a GPU"
    for arguments in (["--gpu"], ["--keep", "tpu", "results"]):
        done = subprocess.run(["bash", REPRODUCE, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "unknown" in done.stdout


def test_drawings_are_drawn(tmp_path: Path) -> None:
    draw.main(tmp_path)
    committed = {path.name for path in (PAPERS / "pagedattention" / "drawings").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == committed
    for path in tmp_path.iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


# ---- on results made up here

CLAIMS = """
results = "results"

[[claim]]
claim = "one thing"
where = "figure 1"
theirs = "5"
experiment = "gap"
match = {match}
note = "A note"

[[claim]]
claim = "another"
where = "section 2"
untested = "no GPU | no result"
"""
PAGE = "# Title\n\n<!-- claims -->\nold\n<!-- end -->\n\nA sentence.\n"
LINE = re.compile(r"^\| one thing .*$", re.MULTILINE)


def a_page(folder: Path, match: str = '["^first"]', text: str = PAGE) -> Path:
    (folder / "claims.toml").write_text(CLAIMS.replace("{match}", match), encoding="utf-8")
    page = folder / "README.md"
    page.write_text(text, encoding="utf-8")
    return page


def a_result(folder: Path, kind: str, *claims: tuple[str, bool | None, str], simulated: bool = True) -> Path:
    place = folder / "results" / kind / "gap"
    place.mkdir(parents=True)
    listed = [dict(zip(("text", "holds", "seen"), claim, strict=True)) for claim in claims]
    header = {"simulated": simulated, "hardware": "a machine", "command": "a command"}
    (place / "summary.json").write_text(json.dumps({"command": "a command", "claims": listed}))
    (place / "header.json").write_text(json.dumps(header))
    (place / "rows.csv").write_text("system,seed,value\na,0,1\na,1,2\n")
    return place


def cells(page: Path) -> list[str]:
    """Of the first claim: ours simulated, ours on a GPU, the verdict."""
    found = LINE.search(pages.filled(page))
    assert found
    return [cell.strip() for cell in found[0].strip("|").split("|")][4:]


def test_without_results_nothing_is_said_to_hold(tmp_path: Path) -> None:
    page = a_page(tmp_path)
    assert cells(page) == ["not run yet", "not run yet", "not run yet. A note"]
    text = pages.filled(page)
    assert "| another | section 2 | – |  | – | – | not tested: no GPU / no result |" in text
    assert text.startswith("# Title\n")
    assert text.endswith("<!-- end -->\n\nA sentence.\n")
    assert "old" not in text


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        ([True], "holds, simulated. A note"),
        ([True, True], "holds, simulated. A note"),
        ([True, False], "holds in part, simulated. A note"),
        ([False], "does not hold, simulated. A note"),
        ([None], "not judged. A note"),
        ([True, None], "holds, where judged, simulated. A note"),
        ([False, None], "does not hold, where judged, simulated. A note"),
    ],
)
def test_verdict(tmp_path: Path, holds: list[bool | None], expected: str) -> None:
    a_result(tmp_path, "simulated", *(("first", one, f"{i}") for i, one in enumerate(holds)), ("second", False, "9"))
    assert cells(a_page(tmp_path))[1:] == ["not run yet", expected]


def test_both_clocks_judge_and_the_head_says_which(tmp_path: Path) -> None:
    a_result(tmp_path, "simulated", ("first: a", True, "1 | 2"), ("other: b", True, "3"))
    a_result(tmp_path, "gpu", ("first: a", False, "4"), simulated=False)
    page = a_page(tmp_path, '["^first", "^other"]')
    assert cells(page) == ["first: 1 / 2; other: 3", "4 (fails)", "holds in part. A note"]
    assert "ours, **simulated** (a machine; seeds 0 to 1)" in pages.filled(page)
    assert "ours, **measured on a GPU** (a machine; seeds 0 to 1)" in pages.filled(page)


def test_a_match_that_finds_nothing_stops_and_leaves_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_result(tmp_path, "simulated", ("first", True, "1"))
    page = a_page(tmp_path, '["^first", "^third"]')
    assert pages.main([page]) == 1
    assert "'one thing': no claim of simulated/gap matches '^third'" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert pages.main([a_page(tmp_path)]) == 0
    assert pages.filled(page) == page.read_text(), "a second time changes nothing"


@pytest.mark.parametrize(
    "entry",
    [
        {"claim": "x", "where": "y"},
        {"claim": "x", "where": "y", "experiment": "gap"},
        {"claim": "x", "where": "y", "untested": "z", "test": "tests/test_papers.py"},
        {"claim": "x", "where": "y", "untested": "z", "verdict": "holds"},
        {"claim": "x", "where": "y", "experiment": "gap", "match": "a", "kinds": ["b300"]},
    ],
)
def test_a_claim_that_says_too_little_or_too_much(entry: dict[str, Any]) -> None:
    with pytest.raises(pages.Stale, match="claim 'x'"):
        pages.Row.read(entry)


def test_tables_of_one_head_and_of_several() -> None:
    assert pages.parsed("system,a\nx,1\n") == ([["system", "a"]], [["x", "1"]])
    several = ",share,share,b\n,paper,ours,\nx,1,2,3\n"
    heads, lines = pages.parsed(several)
    assert pages.markdown(heads, lines).splitlines()[0] == "|  | share: paper | share: ours | b |"
    assert lines == [["x", "1", "2", "3"]]
    heads, lines = pages.parsed(",,share,share\n,,paper,ours\nsystem,seed,,\nx,0,1,2\n")
    assert pages.markdown(heads, lines).splitlines()[0] == "| system | seed | share: paper | share: ours |"
    assert lines == [["x", "0", "1", "2"]]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("-0.0", "0.0"), ("0.30000000000000004", "0.3"), ("12.345", "12.345"), ("1,412", "1,412"), ("", ""), ("x", "x")],
)
def test_numbers_are_shown_as_far_as_they_can_be_read(cell: str, expected: str) -> None:
    assert pages.shown(cell) == expected


def test_tables_figures_and_claims_of_a_folder(tmp_path: Path) -> None:
    marks = (
        "<!-- table: results/simulated/gap/table.csv -->\n<!-- end -->\n"
        "<!-- figure: results/simulated/gap/figure | a figure -->\n<!-- end -->\n"
        "<!-- claims: results/simulated/gap -->\n<!-- end -->\n"
        "<!-- table: results/cpu/gap/table.csv -->\n<!-- end -->\n"
    )
    page = a_page(tmp_path, text=marks)
    assert pages.filled(page).count("*Not run yet: `python -m lab.experiment gap`*") == 3
    assert "*Not run yet: `python -m lab.experiment gap --device cpu`*" in pages.filled(page)
    place = a_result(tmp_path, "simulated", ("first", False, "1"))
    (place / "table.csv").write_text("system,a\nx,1.50\n")
    (place / "figure.png").touch()
    text = pages.filled(page)
    assert "| system | a |\n| --- | --- |\n| x | 1.50 |" in text
    assert "**Simulated** on a virtual clock (a machine), seeds 0 to 1: `a command`" in text
    assert "![a figure](results/simulated/gap/figure.png)" in text
    assert "| first | 1 | does not hold |" in text


def test_a_table_that_an_experiment_does_not_have() -> None:
    page = PAPERS / "pagedattention" / "README.md"
    with pytest.raises(pages.Stale, match="0 of fragmentation are called so"):
        pages.table(page, "results/simulated/fragmentation", "no such title")
