"""Figures of experiments, drawn from the rows that papers/ keeps: units, the paper's values, words apart from lines."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from lab import plot
from lab.experiment import find
from lab.plot.style import POLICIES
from papers.figures import main

KEPT = Path(__file__).parents[2] / "papers" / "pagedattention" / "results"
PAGE = 7.0  # inches across a printed page


@cache
def kept(place: str) -> tuple[pd.DataFrame, Figure]:
    """Rows of an experiment, and what is drawn of them today; the first figure where there are several."""
    rows, header = pd.read_csv(KEPT / place / "rows.csv"), json.loads((KEPT / place / "header.json").read_text())
    drawn = find(Path(place).name).figure(rows, header)
    figure = next(iter(drawn.values())) if isinstance(drawn, dict) else drawn
    FigureCanvasAgg(figure).draw()
    return rows, figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def crossed(axes: Axes) -> list[str]:
    """Words in a panel that one of its lines runs through."""
    found = []
    for text in [text for text in axes.texts if text.get_text()]:
        box = text.get_window_extent()
        for line in axes.lines:
            x, y = line.get_transform().transform(line.get_xydata()).T
            if len(x) < 2:
                continue  # a mark
            across = np.linspace(max(x.min(), box.x0), min(x.max(), box.x1), 50)
            at = np.interp(across, x, y)
            if (box.x0 <= x.max()) and (x.min() <= box.x1) and ((box.y0 < at) & (at < box.y1)).any():
                found.append(text.get_text())
    return found


def test_lines_through_words_are_seen() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.axhline(0.5)
    axes.text(0.1, 0.45, "struck through", fontsize=20)
    axes.text(0.1, 0.6, "above")
    FigureCanvasAgg(figure).draw()
    assert crossed(axes) == ["struck through"]


@pytest.mark.parametrize("place", ["simulated/growth", "simulated/blocksize", "simulated/preemption", "cpu/fidelity"])
def test_no_line_runs_through_words(place: str) -> None:
    assert [words for axes in kept(place)[1].axes for words in crossed(axes)] == []


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_legend_is_no_wider_than_the_figure(count: int) -> None:
    rows, _ = kept("simulated/fragmentation")
    header = json.loads((KEPT / "simulated/fragmentation" / "header.json").read_text())
    few = rows[rows["allocator"].isin(rows["allocator"].unique()[:count])]
    figure = find("fragmentation").figure(few, header)
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure).draw()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    "place", ["systems", "factorial", "blocksize", "capacity", "replay", "sharing", "../gpu/fidelity", "../cpu/clock"]
)
def test_small_print_is_five_points_on_a_page(place: str) -> None:
    _, figure = kept(f"simulated/{place}")
    words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert min(float(text.get_fontsize()) for text in words) * PAGE / figure.get_figwidth() >= 5


def test_sharing_says_how_many_seeds_stand_behind_its_bars_and_borrows_no_policys_colour() -> None:
    rows, figure = kept("simulated/sharing")
    assert rows.groupby(["workload", "mode", "width"])["seed"].nunique().min() == 3, "of ten"
    assert any("seeds 0 to 9, at least 3 of them" in text.get_text() for text in figure.findobj(Text))
    handles: list[Any] = figure.legends[0].legend_handles
    taken = {color.upper() for color, _ in POLICIES.values()}
    assert taken.isdisjoint(to_hex(handle.get_facecolor()).upper() for handle in handles[:3])


def test_kept_figures_are_drawn_again_in_their_places(tmp_path: Path) -> None:
    folder = tmp_path / "simulated" / "gap"
    shutil.copytree(KEPT / "simulated" / "gap", folder)
    there = sorted(folder.iterdir())
    (folder / "figure.svg").write_text("")
    main(kept=tmp_path, part="growth")
    assert (folder / "figure.svg").read_text() == ""
    main(kept=tmp_path)
    assert "</svg>" in (folder / "figure.svg").read_text()
    assert sorted(folder.iterdir()) == there


def test_prefix_shows_the_papers_ratios_in_the_colours_of_the_systems() -> None:
    rows, figure = kept("simulated/prefix")
    bars: list[Any] = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    orca = rows[rows["system"] == "Orca (Oracle)"].groupby("prefix")["requests_per_s"].mean()
    theirs = [bar.get_height() for bar in bars if bar.get_facecolor()[3] == 0]
    assert theirs == pytest.approx([1.67 * orca[80], 3.58 * orca[341]])
    ticks = " ".join(label.get_text() for label in figure.axes[0].get_xticklabels())
    assert "paper 1.67x" in ticks
    assert "paper 3.58x" in ticks
    assert "paper, over our Orca (Oracle)" in legend(figure)
    handles: list[Any] = figure.legends[0].legend_handles
    drawn = dict(zip(legend(figure), (to_hex(handle.get_facecolor()).upper() for handle in handles), strict=True))
    assert drawn["Orca (Oracle)"] == plot.style("orca-oracle")["color"]
    assert drawn["paged, no sharing"] == plot.style("vllm")["color"]
    assert len({drawn[name] for name in rows[rows["prefix"] > 0]["system"]}) == 4


def test_preemption_has_two_panels_beside_each_other_and_says_what_is_timed() -> None:
    _, figure = kept("simulated/preemption")
    first, second, third, last = figure.axes
    assert first.get_position().y0 == pytest.approx(second.get_position().y0)
    assert first.get_position().x0 == pytest.approx(third.get_position().x0)
    assert third.get_position().y1 < first.get_position().y0
    assert figure.get_figwidth() < 9
    assert first.get_ylabel() == "time (ms): swapped out and in,\nor recomputed"
    assert last.get_ylabel() == "latency (s per output token)"


def test_the_legend_explains_marks_and_bands() -> None:
    assert {"rounding: the rest of the last block of each", "replay of the authors' trace"} <= set(
        legend(kept("simulated/blocksize")[1])
    )
    assert "±5 %, as claimed" in legend(kept("cpu/fidelity")[1])
    assert "±1 point, as claimed" in legend(kept("cpu/clock")[1])


def test_replay_names_what_it_measures_in_seconds() -> None:
    named = [axes.get_ylabel() for axes in kept("simulated/replay")[1].axes]
    assert "latency (s)" in named
    assert "seconds" not in named


def test_a_category_has_one_colour_on_both_clocks_too() -> None:
    rows, figure = kept("cpu/clock")
    marks: list[Any] = [*figure.axes[0].collections]
    shares = ["stored", "reserved", "excess", "rounding", "free"] * rows["allocator"].nunique()
    colors = [to_hex(mark.get_facecolor()[0]).upper() for mark in marks]
    assert colors == [plot.CATEGORIES[name][0] for name in shares]
    pale = [mark.get_edgecolor() for mark, name in zip(marks, shares, strict=True) if name == "free"]
    assert all(len(edge) and edge[0][3] == 1 for edge in pale), "or nobody sees it on the band"


def test_lines_explain_what_else_is_drawn_and_take_the_look_of_a_policy() -> None:
    rows = pd.DataFrame([("ours", x, 0, float(x)) for x in (1, 2)], columns=["system", "x", "seed", "y"])
    header = {"model": "m", "workload": "w", "hardware": "h", "simulated": True}
    also = [Line2D([], [], label="dotted: something")]
    figure = plot.lines(rows, header, "title", x="x", y={"y": "y (s)"}, policies={"ours": "orca-max"}, also=also)
    assert legend(figure) == ["ours", "dotted: something"]
    assert figure.axes[0].lines[0].get_color() == plot.style("orca-max")["color"]
    assert [text.get_text() for text in figure.findobj(Text)].count("ours") == 1
