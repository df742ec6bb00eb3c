"""A pool, drawn box by box from an allocator's own tables: whose each block is, how full, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from lab.allocators import Allocator
from lab.core import Sequence
from lab.plot.style import COLORS, FONT, GREY, INK, MUTED

EMPTY = "#F4F4F4"
KINDS = {  # of a slot: opacity, hatch, what it is called; colours say whose it is
    "stored": (1.0, "", "written"),
    "reserved": (0.35, "", "asked for, not written yet"),
    "excess": (0.0, "////", "asked for, never written"),
    "rounding": (0.0, "....", "rounded up: nobody asked"),
}
COLUMN, ROW = 0.95, 0.62  # inches of a block


def pool_map(allocator: Allocator, sequences: Mapping[str, Sequence], title: str = "", columns: int = 8) -> Figure:
    """Every block as a box of its slots, from the left; below it its number, in it its holders; tables underneath.

    `sequences` by the names that they get in the drawing; each request has a colour. What will be written is read off
    requests whose output is forced. A block that several hold has all their names, and the first one's colour.
    """
    colors = {name: COLORS[s.group.request.id % len(COLORS)] for name, s in sequences.items()}
    rows = -(-allocator.num_blocks // columns)
    tables = [f"{name}: {_listed(allocator, s)}" for name, s in sequences.items()]
    with mpl.rc_context(FONT):
        high = 0.75 + ROW * rows + 0.21 * len(tables)
        figure = Figure(figsize=(max(6.0, 0.4 + COLUMN * columns), high), layout="constrained")
        axes = figure.subplots()
        for b in range(allocator.num_blocks):
            _block(axes, allocator, b, sequences, colors, (b % columns, rows - 1 - b // columns))
        for i, (name, text) in enumerate(zip(sequences, tables, strict=True)):
            y = -0.16 - 0.21 / ROW * i
            axes.text(0, y, text, fontsize=9, va="top", color=colors[name], fontweight="bold", parse_math=False)
        axes.set_xlim(-0.04, columns)
        axes.set_ylim(-0.1 - 0.21 / ROW * len(tables), rows)
        axes.axis("off")
        patches = [
            Patch(facecolor=(0.2, 0.2, 0.2, alpha), hatch=hatch, edgecolor=GREY, linewidth=0.5, label=text)
            for alpha, hatch, text in (KINDS[kind] for kind in _seen(allocator, sequences))
        ]
        if patches:
            figure.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
        if title:
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def slots(allocator: Allocator, b: int, sequences: Mapping[str, Sequence]) -> tuple[list[str], list[str]]:
    """The names of a block's holders, and of each of its slots what it is ("" where it is free).

    The first that fits of stored, reserved, excess, rounding, as `lab.allocators.account` counts them.
    """
    holders = {name: allocator.tables.get(s, ()) for name, s in sequences.items()}
    starts = {name: list(table).index(b) * allocator.block for name, table in holders.items() if b in table}
    kinds = []
    for offset in range(allocator.block):
        at = {name: start + offset for name, start in starts.items()}
        end = {name: max(sequences[name].computed, sequences[name].end) for name in starts}
        if not starts:
            kinds.append("")
        elif any(at[name] < sequences[name].computed for name in starts):
            kinds.append("stored")
        elif not any(at[name] < allocator.asked[sequences[name]] for name in starts):
            kinds.append("rounding")
        else:
            kinds.append("reserved" if any(at[name] < end[name] for name in starts) else "excess")
    return list(starts), kinds


def _block(
    axes: Axes,
    allocator: Allocator,
    b: int,
    sequences: Mapping[str, Sequence],
    colors: Mapping[str, str],
    corner: tuple[float, float],
) -> None:
    x, y = corner
    wide, high, low = 0.92, 0.62, 0.3
    owners, kinds = slots(allocator, b, sequences)
    axes.add_patch(Rectangle((x, y + low), wide, high, facecolor=EMPTY, edgecolor="none"))
    for i, kind in enumerate(kinds):
        if kind:
            alpha, hatch, _ = KINDS[kind]
            color = colors[owners[0]] if kind != "rounding" else GREY
            place, width = (x + wide * i / len(kinds), y + low), wide / len(kinds)
            axes.add_patch(Rectangle(place, width, high, facecolor=color, alpha=alpha, linewidth=0))
            if hatch:
                axes.add_patch(Rectangle(place, width, high, facecolor="none", edgecolor=color, hatch=hatch, lw=0))
        if i:
            line = x + wide * i / len(kinds)
            axes.plot([line, line], [y + low, y + low + high], color="white", linewidth=0.8)
    axes.add_patch(Rectangle((x, y + low), wide, high, facecolor="none", edgecolor=GREY, linewidth=0.8))
    axes.text(x + wide / 2, y + low - 0.03, str(b), fontsize=7.5, ha="center", va="top", color=MUTED)
    if owners:
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0, "alpha": 0.85}
        text = " + ".join(owners)
        axes.text(x + wide / 2, y + low + high / 2, text, fontsize=9, ha="center", va="center", color=INK, bbox=box)


def _listed(allocator: Allocator, s: Sequence) -> str:
    table = allocator.tables.get(s)
    if table is None:
        return f"holds nothing ({len(s.tokens)} tokens known)"
    count = f"{s.computed} of {len(s.tokens)} tokens computed"
    shown = f"{table[0]} to {table[-1]}" if isinstance(table, range) and len(table) > 2 else list(table)
    return f"blocks {shown}, {count}"


def _seen(allocator: Allocator, sequences: Mapping[str, Sequence]) -> list[str]:
    found = {kind for b in range(allocator.num_blocks) for kind in slots(allocator, b, sequences)[1]}
    return [kind for kind in KINDS if kind in found]
