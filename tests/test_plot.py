"""Figures: what they must say, and that they are written."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from lab import plot
from lab.core import InputError

HEADER: dict[str, Any] = {
    "model": "opt-13b",
    "workload": "sharegpt",
    "hardware": "a100-40gb",
    "simulated": True,
    "seed": 4,
}
SYSTEMS = {"contiguous-max": "Orca (Max)", "paged": "vLLM"}
PAPER = {"contiguous-max": (20.4, 13.3, 57.3, 8.9), "paged": (96.3, None, None, None)}


def rows(seeds: int = 1, scheduler: str = "continuous", ended: float = 0.0) -> pd.DataFrame:
    shares = {
        "contiguous-max": (21.0, ended, 13.0, 57.0 - ended, 0.0, 0.0, 9.0),
        "paged": (95.0, 0.0, 0.0, 0.0, 2.0, 0.0, 3.0),
        "mine": (50.0, 0.0, 20.0, 0.0, 12.0, 7.0, 11.0),
    }
    return pd.DataFrame(
        [
            {"allocator": name, "scheduler": scheduler, "seed": seed, **dict(zip(plot.CATEGORIES, share, strict=True))}
            for name, share in shares.items()
            for seed in range(seeds)
        ]
    )


def words(figure: Figure) -> list[str]:
    return [text for artist in figure.findobj(Text) if (text := artist.get_text())]


def test_fragmentation_says_what_it_shows(tmp_path: Path) -> None:
    figure = plot.fragmentation(rows(), HEADER, SYSTEMS, PAPER)
    said = words(figure)
    assert "opt-13b, sharegpt, simulated (virtual clock, a100-40gb), seed 0" in [" ".join(t.split()) for t in said]
    assert "share of the KV pool (%)" in said
    assert {"Orca (Max)\ncontiguous-max", "vLLM\npaged", "mine"} <= set(said)
    assert {"21.0", "13.0", "57.0", "9.0"} <= set(said), "ours"
    assert {"20.4", "13.3", "57.3", "8.9", "96.3"} <= set(said), "the paper's"
    assert {"12.0", "7.0", "11.0", "others 30.0"} <= set(said)
    assert not {"2.0", "3.0", "0.0"} & set(said), "segments below 4 % carry no number"
    assert "paper, figure 2 (white: external & others)" in said
    assert plot.CATEGORIES["ended"][2] not in said
    paths = plot.save(figure, tmp_path / "deep" / "figure.v1")
    assert [p.name for p in paths] == ["figure.v1.png", "figure.v1.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in paths[1].read_text()[:1000]


def test_bars_are_as_high_as_the_shares() -> None:
    axes = plot.fragmentation(rows(), HEADER, SYSTEMS, PAPER).axes[0]
    bars = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_width() == pytest.approx(0.38)]
    assert [round(b.get_height(), 1) for b in bars[:7]] == [21.0, 0.0, 13.0, 57.0, 0.0, 0.0, 9.0]
    tops = [b.get_y() + b.get_height() for b in bars]
    assert tops[6::7] == pytest.approx([100.0] * 3)
    assert bars[5].get_hatch() != bars[4].get_hatch() != bars[6].get_hatch()


def test_several_seeds_have_error_bars() -> None:
    several = rows(3)
    several.loc[several["seed"] == 1, "stored"] += 3.0
    figure = plot.fragmentation(several, HEADER, SYSTEMS, PAPER)
    assert "means over seeds 0 to 2" in " ".join("".join(words(figure)).split())
    assert "22.0" in words(figure)
    assert len(figure.axes[0].collections) > 0
    assert len(plot.fragmentation(rows(), HEADER, SYSTEMS, PAPER).axes[0].collections) == 0


def test_what_is_not_in_the_paper_stands_alone() -> None:
    measured = {**HEADER, "simulated": False, "hardware": "Some GPU"}
    figure = plot.fragmentation(rows(scheduler="static", ended=10.0), measured, SYSTEMS, PAPER)
    said = words(figure)
    assert "20.4" not in said
    assert "opt-13b, sharegpt, measured on Some GPU, seed 0" in said
    assert plot.CATEGORIES["ended"][2] in said


def test_both_schedulers() -> None:
    both = pd.concat([rows(), rows(scheduler="static")], ignore_index=True)
    said = words(plot.fragmentation(both, HEADER, SYSTEMS, PAPER))
    assert {"vLLM\npaged continuous", "vLLM\npaged static"} <= set(said)
    assert said.count("96.3") == 1


def test_memory_over_time(tmp_path: Path) -> None:
    table = pd.DataFrame([[20, 0, 10, 0, 5, 0, 65]] * 30, columns=list(plot.CATEGORIES)).assign(end_s=range(30))
    figure = plot.memory_over_time(table, HEADER, points=10)
    assert {"time (s)", "share of the KV pool (%)", "token states", "others: free"} <= set(words(figure))
    areas = figure.axes[0].collections
    assert len(areas) == 4
    assert areas[0].get_paths()[0].get_extents().y1 == pytest.approx(20.0)
    assert all(path.exists() for path in plot.save(figure, tmp_path / "time"))
    with pytest.raises(InputError, match="take another window"):
        plot.memory_over_time(table[:0], HEADER)


def test_saved_twice_is_the_same_file(tmp_path: Path) -> None:
    first, second = (plot.save(plot.fragmentation(rows(), HEADER, SYSTEMS, PAPER), tmp_path / name) for name in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_no_place_for_a_figure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the figure cannot be written"):
        plot.save(Figure(), tmp_path / "file" / "figure")


def test_a_policy_looks_the_same_everywhere() -> None:
    known = [plot.style(name) for name in plot.POLICIES]
    allocators, systems = known[:6], known[6:]
    for together in (allocators, systems):
        assert len({tuple(s.values()) for s in together}) == len({s["marker"] for s in together}) == len(together)
    assert plot.style("vllm") == plot.style("paged"), "a system looks like the allocator that makes it"
    assert plot.style("my_module:Mine") == plot.style("my_module:Mine")
    assert plot.style("my_module:Mine") not in known
    assert len({tuple(plot.style(f"policy-{i}").values()) for i in range(200)}) > 40


LONG = {"model": "llama-3-8b", "workload": "conversations:users=200,turns=8,system=200", "hardware": "h" * 30}


def drawn_outside(figure: Figure) -> list[str]:
    """Texts that the edge of the figure cuts."""
    FigureCanvasAgg(figure).draw()
    edge = figure.bbox.padded(1)
    ticks = {text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in ticks]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 8
    return [
        words for words, box in boxes if box.x0 < edge.x0 or box.x1 > edge.x1 or box.y0 < edge.y0 or box.y1 > edge.y1
    ]


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_no_edge_cuts_a_word(panels: int) -> None:
    systems = [f"a system of a rather long name, {i}" for i in range(5)]
    points = [(s, p, x, seed) for s in systems for p in range(panels) for x in (1024, 2048) for seed in (0, 2, 5)]
    table = pd.DataFrame(points, columns=["system", "panel", "pool", "seed"]).assign(y=lambda t: t["pool"] + t["seed"])
    guides = {"y": {"paper, batch 32: 20 %": 1100.0, "26 %": 1110.0}}
    many = plot.lines(table, HEADER | LONG, "title", x="pool", y={"y": "y (s)"}, panels="panel", log="x", guides=guides)
    assert drawn_outside(many) == []
    assert {"1,024", "2,048"} <= set(words(many))
    names = [text.get_window_extent() for text in many.findobj(Text) if text.get_text() in guides["y"]]
    assert len(names) == 2 * panels
    assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i]), (
        "lines that are close have names apart"
    )
    beside = plot.bars(
        table, HEADER | LONG, "title", groups="panel", y="y", ylabel="y (s)", paper={(0, systems[0]): 900.0}
    )
    assert drawn_outside(beside) == []
    assert "paper" in words(beside)


def test_the_setting_takes_no_room_from_the_panels() -> None:
    table = pd.DataFrame([(p, x, 0, 1.0) for p in range(4) for x in (1, 2)], columns=["panel", "x", "seed", "y"])
    figure = plot.lines(table.assign(system="vllm"), HEADER | LONG, "title", x="x", y={"y": "y (s)"}, panels="panel")
    FigureCanvasAgg(figure).draw()
    lefts = [axes.get_position().x0 for axes in figure.axes]
    steps = [after - before for before, after in pairwise(lefts)]
    assert max(steps) == pytest.approx(min(steps), rel=0.01)
