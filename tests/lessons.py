"""Execute notebooks and keep their outputs: `python -m tests.lessons [NOTEBOOK ...]`, all where none is named."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_S = 120  # that a cell may take
MADE_FROM = "outputs_made_from"  # in a notebook's metadata: the digest of its cells when they were executed


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run in a fresh kernel, from its own folder; raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=MOST_S,
        record_timing=False,  # the same outputs are the same file,
        coalesce_streams=True,  # in however many pieces a text came
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata[MADE_FROM] = digest(notebook)
    return notebook


def digest(notebook: NotebookNode) -> str:
    """Of the source of its code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n\0".join(sources).encode()).hexdigest()[:16]


def main(names: list[str]) -> None:
    for path in map(Path, names or NOTEBOOKS):
        nbformat.write(executed(path), path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
