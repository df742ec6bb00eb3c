"""Draws the figures that are kept again, each from the rows and header beside it: `python papers/figures.py [PART]`.

After a change of how figures look. PART leaves out all whose folder does not contain it, as in gpu/fidelity. Nothing is
run, so what was measured elsewhere is drawn as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where lab and experiments are, installed or not

from lab.experiment import find  # noqa: E402
from lab.plot.style import save  # noqa: E402

KEPT = ROOT / "papers" / "pagedattention" / "results"


def main(part: str = "", kept: Path = KEPT) -> None:
    for file in sorted(kept.glob("*/*/rows.csv")):
        if part in str(file.parent):
            redraw(file.parent)


def redraw(folder: Path) -> None:
    """Each figure in the form that is kept: a drawing, or a picture where that would be large."""
    drawn = find(folder.name).figure(pd.read_csv(folder / "rows.csv"), json.loads((folder / "header.json").read_text()))
    with TemporaryDirectory() as place:
        for stem, figure in (drawn if isinstance(drawn, dict) else {"figure": drawn}).items():
            for made in save(figure, Path(place) / stem):
                if (folder / made.name).exists():
                    (folder / made.name).write_bytes(made.read_bytes())


if __name__ == "__main__":
    main(part=sys.argv[1] if len(sys.argv) > 1 else "")
