"""The notebooks run from top to bottom, and what is kept of them is what they give."""

from __future__ import annotations

import re
import resource
from itertools import zip_longest
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from tests.lessons import MADE_FROM, NOTEBOOKS, ROOT, digest, executed

AGAIN = "execute it anew: python -m tests.lessons"
MOST_BYTES = 1_500_000
MOST_CPU_S = 240  # of all notebooks together
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def words(cell: NotebookNode) -> str:
    """What a cell prints and shows, as text; of a picture its size, of a warning nothing."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def kinds(cell: NotebookNode) -> list[list[str]]:
    return [sorted(output["data"]) for output in cell.outputs if "data" in output]


def differs(kept: str, found: str) -> str:
    """Where two texts are not the same, but for the last digit of a number that was rounded; empty if nowhere."""
    texts = [re.sub(r"\s+", " ", NUMBER.sub("#", text)) for text in (kept, found)]
    if texts[0] != texts[1]:
        return f"{kept!r} is kept, {found!r} was found"
    numbers = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (kept, found))
    for a, b in zip_longest(*numbers):
        if a != pytest.approx(b, rel=0.005, abs=0.11):
            return f"{a} is kept, {b} was found"
    return ""


cpu_s: dict[str, float] = {}


@each
def test_it_runs_and_gives_what_is_kept(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = executed(path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s[path.name] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for number, (kept, cell) in enumerate(zip(read(path).cells, found.cells, strict=True), 1):
        if cell.cell_type == "code":
            assert kinds(kept) == kinds(cell), f"cell {number}: {AGAIN}"
            assert not differs(words(kept), words(cell)), f"cell {number}: {AGAIN}"


def test_all_of_them_take_four_minutes_at_most() -> None:
    if set(cpu_s) < {path.name for path in NOTEBOOKS}:
        for path in NOTEBOOKS:
            test_it_runs_and_gives_what_is_kept(path)
    assert sum(cpu_s.values()) < MOST_CPU_S, cpu_s


@each
def test_outputs_are_kept_and_belong_to_the_cells(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.metadata.get(MADE_FROM) == digest(notebook), f"its cells have changed since: {AGAIN}"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), AGAIN
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2, "nothing to look at"
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert path.stat().st_size < MOST_BYTES
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert not re.search(r"/(home|tmp|root|Users)/", text), "an absolute path"


@each
def test_it_ends_with_exercises_and_a_hint_for_each(path: Path) -> None:
    last = read(path).cells[-1]
    assert last.cell_type == "markdown"
    exercises = last.source.partition("## Exercises")[2]
    count = len(re.findall(r"^\d\. ", exercises, re.MULTILINE))
    assert count >= 3
    assert re.findall(r"<details><summary>Hint (\d)</summary>", exercises) == [str(i + 1) for i in range(count)]


def test_they_are_in_order_and_the_readme_names_them() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i}-" for i in range(1, 7)]
    text = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(([^)]*\.ipynb)\)", text) == [path.name for path in NOTEBOOKS]
    for path in NOTEBOOKS:
        title = read(path).cells[0].source.splitlines()[0]
        assert title.startswith(f"# {path.name[0]}. ")
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"


# ---- that these tests can fail


def notebook_of(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_an_error_in_a_cell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="no such thing"):
        executed(notebook_of(tmp_path / "a.ipynb", "print(1)", "raise ValueError('no such thing')"))


def test_a_changed_cell_and_a_changed_output_are_noticed(tmp_path: Path) -> None:
    found = executed(notebook_of(tmp_path / "a.ipynb", "print('share', 21.8)"))
    assert found.metadata[MADE_FROM] == digest(found)
    found.cells[0].source = "print('share', 30.0)"
    assert found.metadata[MADE_FROM] != digest(found)
    assert words(found.cells[0]) == "share 21.8\n"


@pytest.mark.parametrize(
    ("kept", "found", "same"),
    [
        ("a  21.8", "a 21.8", True),
        ("a 21.8", "a 21.9", True),  # rounded the other way
        ("a 21.8", "a 23.8", False),
        ("1,545 tokens/s", "1,546 tokens/s", True),
        ("1,545 tokens/s", "1,645 tokens/s", False),
        ("fails", "holds", False),
        ("a 1 2", "a 1", False),
        ("-0.8", "+0.8", False),
    ],
)
def test_texts_are_compared_to_the_last_digit_but_one(kept: str, found: str, same: bool) -> None:
    assert (differs(kept, found) == "") is same
