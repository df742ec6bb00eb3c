"""Drawings for lessons, against cases made by hand: a pool block by block, a batch over time, the roofline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from lab import plot
from lab.allocators import Allocator, Usage, account
from lab.allocators.contiguous import Contiguous
from lab.allocators.paged import Paged
from lab.core import Group, Limits, Request, SamplingParams, Sequence
from lab.film import HOLDING, film
from lab.plot.blocks import slots
from lab.plot.style import INK
from lab.run import Run, carry_out
from papers.performance import draw

ROOT = Path(__file__).parents[1]
LIMITS = Limits(length=32)


def words(figure: Figure) -> list[str]:
    return [text for artist in figure.findobj(Text) if (text := artist.get_text())]


def filled(allocator: Allocator, *sizes: tuple[int, int]) -> dict[str, Sequence]:
    """Requests of so many prompt and output tokens, their prompts computed, named A, B, ..."""
    found = {}
    for i, (prompt, output) in enumerate(sizes):
        group = Group(Request(i, 0.0, range(prompt), output, SamplingParams(max_tokens=output, n=1)))
        assert allocator.admit(group) == 0
        s = found["ABC"[i]] = group.live[0]
        assert allocator.extend(s, prompt)
        s.computed = prompt
    return found


@pytest.mark.parametrize("reserve", ["need", "max", "pow2", "oracle"])
@pytest.mark.parametrize("kind", [Contiguous, Paged])
def test_slots_are_counted_as_the_account_does(kind: type[Contiguous] | type[Paged], reserve: str) -> None:
    allocator = kind(96, 4, LIMITS, reserve=reserve)
    sequences = filled(allocator, (6, 3), (9, 8), (3, 4))
    kinds = [kind for b in range(allocator.num_blocks) for kind in slots(allocator, b, sequences)[1]]
    counted = Usage(*(kinds.count(name) for name in Usage._fields))
    assert counted._replace(free=kinds.count("")) == account(allocator, sequences.values())


def test_a_shared_block_has_both_names() -> None:
    allocator = Paged(32, 4, LIMITS)
    group = Group(Request(0, 0.0, range(6), 4, SamplingParams(n=2, max_tokens=4)))
    parent, child = group.live
    allocator.admit(group)
    allocator.extend(parent, 5)
    parent.computed = 5
    allocator.fork(parent, child, 5)
    child.computed = 5
    pair = {"A": parent, "B": child}
    assert slots(allocator, 0, pair) == (["A", "B"], ["stored"] * 4)
    assert slots(allocator, 1, pair) == (["A", "B"], ["stored", "reserved", "rounding", "rounding"])
    assert slots(allocator, 2, pair) == ([], [""] * 4)
    said = words(plot.pool_map(allocator, pair, "a title"))
    assert said.count("A + B") == 2
    assert {"a title", "written", "A: blocks [0, 1], 5 of 6 tokens computed"} <= set(said)
    assert "asked for, never written" not in said


def test_a_sequence_out_of_memory_says_so() -> None:
    allocator = Paged(32, 4, LIMITS)
    sequences = filled(allocator, (6, 3))
    allocator.release(sequences["A"])
    sequences["A"].computed = 0
    assert "A: holds nothing (6 tokens known)" in words(plot.pool_map(allocator, sequences))


def bars_of(figure: Figure) -> list[list[Rectangle]]:
    return [[p for p in axes.patches if isinstance(p, Rectangle)] for axes in figure.axes]


def test_a_timeline_has_a_bar_for_each_spell() -> None:
    settings: dict[str, Any] = {"arrivals": "all", "rate": None, "duration_s": None, "count": 10, "batch": 4}
    runs = {
        name: Run(allocator="paged", scheduler=name, workload="opt13b-256", **settings)
        for name in ("static", "continuous")
    }
    records = {name: carry_out(run, None).record() for name, run in runs.items()}
    films = {name: film(record) for name, record in records.items()}
    figure = plot.timeline(films, records["static"].header, "a race")
    end_s = max(record.steps["end_s"].iloc[-1] for record in records.values())
    for (name, shown), bars in zip(films.items(), bars_of(figure), strict=True):
        columns = shown.columns
        held = columns["spell_kind"] == HOLDING
        assert held.any() == (name == "static")
        seconds = (columns["spell_stop"] - columns["spell_begin"])[held].sum() * shown.about["tick_s"]
        grey = [bar for bar in bars if bar.get_facecolor()[:3] == pytest.approx((0.741, 0.741, 0.741), abs=0.01)]
        assert sum(bar.get_width() for bar in grey) == pytest.approx(seconds)
        assert max(bar.get_x() + bar.get_width() for bar in bars) <= end_s + 1e-6
        assert f"all served after {records[name].steps['end_s'].iloc[-1]:.1f} s" in words(figure)
    assert {"static", "continuous", "time (s)", "ended, still held"} <= set(words(figure))


def test_the_roof_is_the_lower_of_two_limits() -> None:
    work = pd.DataFrame(
        [
            {"kernel": "decode", "operations": 4e9, "bytes": 1e9, "seconds": 1e-3},
            {"kernel": "prompt", "operations": 1e12, "bytes": 1e9, "seconds": np.nan},
        ]
    )
    figure = plot.roofline(work, bytes_per_s=2e12, flops=4e14, title="a roof", setting="some GPU")
    (axes,) = figure.axes
    (roof,) = [line for line in axes.lines if line.get_color() == INK]
    x, y = (np.asarray(values, float) for values in roof.get_data())
    assert y == pytest.approx(np.minimum(2 * x, 400))
    marks = [tuple(map(float, at)) for collection in axes.collections for at in np.asarray(collection.get_offsets())]
    assert (4.0, 4.0) in marks, "4 operations a byte, 4 TFLOP/s"
    assert (1000.0, 400.0) in marks, "what was not timed lies on the roof"
    said = set(words(figure))
    assert {"400 TFLOP/s", "2.00 TB/s", " ridge: 200 operations per byte", "decode", "prompt", "a roof"} <= said
    assert "operations per second (TFLOP/s)" in said


def test_the_roofline_of_what_was_measured(tmp_path: Path) -> None:
    """Every mark lies below the roof that was measured beside it, within what two measurements of one rate differ."""
    kept = ROOT / "papers" / "performance" / "results" / "h100"
    shutil.copy(kept / "kernels.json", tmp_path)
    draw.main(tmp_path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["kernels.json", "roofline.svg"]
    marks = plot.attention_marks(pd.DataFrame(json.loads((kept / "kernels.json").read_text())["rows"]))
    assert len(marks) == 24
    decodes = marks[marks["operations"] / marks["bytes"] < 10]
    assert (decodes["bytes"] / decodes["seconds"] < 1.01 * 3.07e12).all()
    assert (marks["operations"] / marks["seconds"] < 797e12).all()
