"""Draws the three ideas of the page: `python papers/pagedattention/draw.py [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lab.plot import CATEGORIES
from lab.plot.style import BLUE, FONT, GREY, INK, MUTED, ORANGE

BLOCK = 4  # tokens, in these drawings
EMPTY, WHITE = "#EDEDED", "#FFFFFF"
SIDE = 0.36  # of a block, high
Slots = Seq[str]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(FONT):
        for stem, draw in (("block-table", block_table), ("fork", fork), ("reservation", reservation)):
            draw().savefig(folder / f"{stem}.svg", metadata={"Date": None})


def block_table() -> Figure:
    """Two sequences, their tables, and one pool in which their blocks lie anywhere."""
    figure, axes = _canvas(9.6, 4.6, "A table per sequence says where each block of it lies")
    pool = {1: (["cats", "sleep", "most", "of"], ORANGE), 2: (["the", "tide", "comes", "in"], BLUE)}
    pool |= {
        4: (["a", "day", "", ""], ORANGE),
        5: (["twice", "a", "day", "and"], BLUE),
        7: (["goes", "", "", ""], BLUE),
    }
    _pool(axes, 4.7, pool)
    for top, name, color, table in ((3.1, "A", BLUE, (2, 5, 7)), (1.1, "B", ORANGE, (1, 4))):
        axes.text(0, top + 0.5, f"sequence {name}: logical blocks", fontsize=9, color=color, fontweight="bold")
        axes.text(3.05, top + 0.5, "table", fontsize=9, color=color, fontweight="bold", ha="center")
        for i, physical in enumerate(table):
            y = top - 0.46 * i
            _block(axes, 0, y, pool[physical][0], color, width=2.5)
            axes.text(-0.1, y + SIDE / 2, str(i), ha="right", va="center_baseline", fontsize=9, color=MUTED)
            _box(axes, 2.85, y, 0.4, str(physical), WHITE, color)
            _arrow(axes, (3.27, y + SIDE / 2), (4.45, _height(physical) + SIDE / 2), color)
    lines = [
        "grey blocks: free, for",
        "whoever needs one next",
        "",
        "lost: at most 3 of 4 slots,",
        "in the last block of each",
    ]
    axes.text(7.4, 2.2, "\n".join(lines), fontsize=9, color=INK, va="center")
    return figure


def fork() -> Figure:
    """Two outputs of one prompt share its blocks until one of them writes."""
    figure, axes = _canvas(9.6, 2.9, "Outputs of one prompt share its blocks; who writes into a shared one gets a copy")
    prompt, shared = (["name", "a", "large", "river"], GREY, "held by 2"), (["in", "Asia", "", ""], GREY, "held by 2")
    first, copy = (["in", "Asia", "the", ""], BLUE, "held by 1"), (["in", "Asia", "a", ""], ORANGE, "held by 1, a copy")
    _shared(axes, 0.0, "after the fork", [prompt, shared], ((0, 1), (0, 1)))
    _shared(axes, 4.8, "after each has written a token", [prompt, first, copy], ((0, 1), (0, 2)))
    return figure


def _shared(axes: Axes, x: float, title: str, blocks: Seq[tuple[Slots, str, str]], tables: Seq[Seq[int]]) -> None:
    """The tables of two outputs on the left, the blocks they lead to on the right."""
    axes.text(x, 2.2, title, fontsize=9, fontweight="bold", color=INK)
    heights = [1.6 - 0.66 * i for i in range(len(blocks))]
    for (words, color, held), y in zip(blocks, heights, strict=True):
        _block(axes, x + 1.9, y, words, color, width=2.2)
        axes.text(x + 3.0, y - 0.17, held, fontsize=8, ha="center", color=MUTED)
    for k, (table, color) in enumerate(zip(tables, (BLUE, ORANGE), strict=True)):
        y = 1.45 - 0.95 * k
        axes.text(x, y + SIDE + 0.07, f"output {k + 1}", fontsize=8.5, color=color)
        for j, i in enumerate(table):
            _box(axes, x + 0.4 * j, y, 0.4, str(i), WHITE, color)
        for j, i in enumerate(table):
            _arrow(axes, (x + 0.85, y + SIDE * (0.7 - 0.4 * j)), (x + 1.87, heights[i] + SIDE / 2), color)


def reservation() -> Figure:
    """Two requests in contiguous memory; every slot is of one of four kinds."""
    figure, axes = _canvas(9.6, 2.4, "Contiguous memory: reserved at the start for the longest that may come")
    stored, reserved, excess = (CATEGORIES[name][0] for name in ("stored", "reserved", "excess"))
    slots = [stored] * 6 + [reserved] * 3 + [excess] * 7 + [EMPTY] * 3 + [stored] * 4 + [reserved] + [excess] * 3
    slots += [EMPTY] * 3
    for i, color in enumerate(slots):
        axes.add_patch(Rectangle((i * 0.3, 0.95), 0.3, 0.45, facecolor=color, edgecolor=WHITE, linewidth=1.2))
    for first, count, text in ((0, 16, "request A: at most 16 tokens"), (19, 8, "request B: at most 8")):
        left, right = first * 0.3 + 0.02, (first + count) * 0.3 - 0.02
        axes.plot([left, left, right, right], [1.47, 1.54, 1.54, 1.47], color=INK, linewidth=0.9)
        axes.text((left + right) / 2, 1.62, text, ha="center", fontsize=9)
    words = {
        stored: "token states: K and V\nof tokens so far",
        reserved: "reservation: empty now,\nwill be written later",
        excess: "internal fragmentation:\nwill never be written",
        EMPTY: "external fragmentation: free,\nin pieces too small for the next",
    }
    for i, (color, text) in enumerate(words.items()):
        axes.add_patch(Rectangle((2.25 * i, 0.3), 0.22, 0.3, facecolor=color, edgecolor=WHITE))
        axes.text(2.25 * i + 0.29, 0.45, text, va="center", fontsize=8)
    return figure


def _canvas(width: float, height: float, title: str, below: float = 0.0) -> tuple[Figure, Axes]:
    """As many units as inches, the lowest at `below`, and a title on top."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.4, width - 0.4)
    axes.set_ylim(below, below + height)
    axes.axis("off")
    axes.text(-0.3, below + height - 0.3, title, fontsize=11, fontweight="bold", color=INK)
    return figure, axes


def _height(physical: int) -> float:
    return 3.55 - 0.46 * physical


def _pool(axes: Axes, x: float, blocks: Mapping[int, tuple[Slots, str]]) -> None:
    axes.text(x, _height(0) + 0.46, "physical blocks", fontsize=9, color=INK, fontweight="bold")
    for physical in range(8):
        words, color = blocks.get(physical, ([""] * BLOCK, EMPTY))
        _block(axes, x, _height(physical), words, color, width=2.5)
        at = (x - 0.1, _height(physical) + SIDE / 2)
        axes.text(*at, str(physical), ha="right", va="center_baseline", fontsize=9, color=INK)


def _block(axes: Axes, x: float, y: float, words: Slots, color: str, width: float) -> None:
    """A slot per token; an empty one is pale."""
    for i, word in enumerate(words):
        _box(axes, x + i * width / BLOCK, y, width / BLOCK, word, color if word else EMPTY, WHITE)
    axes.add_patch(Rectangle((x, y), width, SIDE, fill=False, edgecolor=color if any(words) else GREY, linewidth=1.3))


def _box(axes: Axes, x: float, y: float, width: float, text: str, color: str, edge: str) -> None:
    axes.add_patch(Rectangle((x, y), width, SIDE, facecolor=color, edgecolor=edge, linewidth=1))
    ink = INK if color in (WHITE, EMPTY, ORANGE) else WHITE
    axes.text(x + width / 2, y + SIDE / 2, text, ha="center", va="center_baseline", fontsize=8.5, color=ink)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.1, "shrinkA": 0})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "drawings")
