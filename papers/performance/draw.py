"""Draws the kernels below their roof: `python papers/performance/draw.py [FOLDER]`, from FOLDER/kernels.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # where lab is, installed or not

from lab import plot  # noqa: E402


def main(folder: Path) -> None:
    measured = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    bench = pd.DataFrame(measured["rows"]).set_index("name", drop=False)
    read = bench.loc["read", "bytes"] / bench.loc["read", "us"] * 1e6  # bytes per second
    rate = bench.loc["matrix product", "operations"] / bench.loc["matrix product", "us"] * 1e6
    marks = plot.attention_marks(bench)
    title = "Attention below its roof: decodes on the left, prompts on the right"
    plot.save(
        plot.roofline(marks, read, rate, title, f"measured on {measured['machine']}; bfloat16"), folder / "roofline"
    )
    (folder / "roofline.png").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "h100")
