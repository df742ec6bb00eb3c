"""Where KV memory goes: stacked bars, over time, and on two clocks. A memory category has one colour in all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lab.core import InputError
from lab.plot.style import BAND, BLUE, FONT, GREY, INK, MUTED, ORANGE, PURPLE, VERMILION, entitle, seeds_of, style

CATEGORIES = {  # from the bottom up: colour, hatch, what it is called
    "stored": (BLUE, "", "token states"),
    "ended": (PURPLE, "", "ended, batch still runs"),
    "reserved": (ORANGE, "", "reservation"),
    "excess": (VERMILION, "", "internal fragmentation"),
    "rounding": ("#BDBDBD", "////", "others: rounded up to blocks, extents"),
    "cached": ("#BDBDBD", "xxxx", "others: cached, held by nobody"),
    "free": ("#EDEDED", "", "others: free"),
}
OTHERS = ("rounding", "cached", "free")  # the paper's "external fragmentation & others"
PAPER = ("stored", "reserved", "excess", "others")
SMALLEST = 4.0  # per cent: segments below carry no number


def fragmentation(
    rows: pd.DataFrame,
    header: Mapping[str, Any],
    systems: Mapping[str, str],
    paper: Mapping[str, Seq[float | None]],
) -> Figure:
    """Stacked bars per system, per cent of the pool; beside ours the paper's, where it has them (figure 2).

    `rows`: one per run, with `allocator`, `scheduler`, `seed` and the seven categories. `systems` names allocators as
    the paper does; `paper` has its token states, reservation, internal fragmentation, external fragmentation & others.
    """
    names = rows["allocator"]
    several = rows["scheduler"].nunique() > 1
    labels = names + (" " + rows["scheduler"] if several else "")
    order = list(dict.fromkeys(labels))
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(max(6.4, 0.8 + 1.4 * len(order)), 5.2), layout="constrained")
        axes = figure.subplots()
        for x, label in enumerate(order):
            own = rows[labels == label]
            name = own["allocator"].iloc[0]
            beside = paper.get(name) if own["scheduler"].iloc[0] == "continuous" else None  # the only one in the paper
            _ours(axes, x + 0.21 * (beside is not None), own[list(CATEGORIES)])
            if beside is not None:
                _theirs(axes, x - 0.21, beside)
        axes.set_xticks(range(len(order)), [_tick(label, rows, labels, systems) for label in order])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(order) - 0.4)
        _percent(axes)
        compared = any(name in paper for name in names)
        _legend(figure, [c for c in CATEGORIES if rows[c].max() >= 0.05], compared)
        entitle(figure, axes, "Where KV memory goes", header, seeds_of(rows["seed"]))
    return figure


def agreement(rows: pd.DataFrame, header: Mapping[str, Any], shares: Seq[str], points: float) -> Figure:
    """A mark per run and category: share of the pool on the real clock (x), how far the virtual one is off (y).

    The band is what is claimed: at most `points` percentage points. Pale categories have an edge.
    """
    names = rows["allocator"].unique()
    looks: dict[str, Any] = {
        share: {"facecolor": CATEGORIES[share][0], "edgecolor": INK if share in OTHERS else "none", "linewidth": 0.7}
        for share in shares
    }
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(9.0, 4.4), layout="constrained")
        axes = figure.subplots()
        band = axes.axhspan(-points, points, color=BAND, zorder=0, label=f"±{points:g} point, as claimed")
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        for policy, runs in rows.groupby("allocator", sort=False):
            for share, look in looks.items():
                real, virtual = runs[f"{share}_real"], runs[f"{share}_virtual"]
                axes.scatter(real, virtual - real, marker=style(str(policy))["marker"], s=34, **look)
        marks = [Line2D([], [], ls="", color=INK, marker=style(name)["marker"], label=name) for name in names]
        patches = [Patch(**look, label=CATEGORIES[share][2]) for share, look in looks.items()]
        figure.legend(handles=[*marks, *patches, band], loc="outside right upper", fontsize=8, frameon=False)
        axes.set_xlabel("share of the KV pool on the real clock (%)")
        axes.set_ylabel("virtual clock less real (points)")
        entitle(figure, axes, "How far to trust the virtual clock", header, seeds_of(rows["seed"]))
    return figure


def memory_over_time(
    categories: pd.DataFrame, header: Mapping[str, Any], points: int = 1000, title: str = "KV memory over time"
) -> Figure:
    """The seven categories over time as a stacked area, per cent of the pool, from `metrics.categories`.

    Long runs are drawn as means over `points` equal numbers of steps.
    """
    names = list(CATEGORIES)
    if not len(categories):
        raise InputError("no step lies in the window: nothing to draw over time; take another window")
    share = 100 * categories[names].div(categories[names].sum(axis=1), axis=0)
    group = np.arange(len(share)) * min(points, len(share)) // len(share)
    share, time_s = share.groupby(group).mean(), categories["end_s"].groupby(group).mean()
    shown = [name for name in names if share[name].max() >= 0.05]
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(8.0, 4.2), layout="constrained")
        axes = figure.subplots()
        layers = axes.stackplot(
            time_s, *(share[name] for name in shown), colors=[CATEGORIES[name][0] for name in shown]
        )
        for layer, name in zip(layers, shown, strict=True):
            layer.set(hatch=CATEGORIES[name][1], edgecolor="white", linewidth=0)
        axes.set_xlim(time_s.iloc[0], max(time_s.iloc[-1], time_s.iloc[0] + 1e-9))
        axes.set_xlabel("time (s)")
        _percent(axes)
        axes.set_ylim(0, 100)
        _legend(figure, shown, compared=False)
        entitle(figure, axes, title, header, f"seed {header.get('seed')}")
    return figure


def _ours(axes: Axes, x: float, runs: pd.DataFrame) -> None:
    """A solid bar: means over runs, with the standard deviation over seeds where there are several."""
    mean, spread, bottom = runs.mean(), runs.std(), 0.0
    for name, (color, hatch, _) in CATEGORIES.items():
        height = float(mean[name])
        axes.bar(x, height, 0.38, bottom, color=color, hatch=hatch, edgecolor="white", linewidth=0.6)
        if height >= SMALLEST:
            light = name not in ("reserved", *OTHERS)
            _number(axes, x, bottom + height / 2, height, "white" if light else INK, name == "rounding")
        bottom += height
        if len(runs) > 1 and height >= SMALLEST and name not in OTHERS:
            axes.errorbar(x + 0.15, bottom, spread[name], color=INK, linewidth=0.9, capsize=2)
    others = float(mean[list(OTHERS)].sum())
    if others >= SMALLEST:
        axes.text(x, bottom + 1, f"others {others:.1f}", ha="center", va="bottom", fontsize=7.5, color=INK)


def _theirs(axes: Axes, x: float, shares: Seq[float | None]) -> None:
    """A thin grey outline: what the paper prints, and nothing where it prints nothing."""
    bottom = 0.0
    for name, height in zip(PAPER, shares, strict=True):
        if not height:
            continue
        color = "none" if name == "others" else CATEGORIES[name][0]
        axes.bar(x, height, 0.34, bottom, color=color, alpha=0.16, linewidth=0)
        axes.bar(x, height, 0.34, bottom, color="none", edgecolor=GREY, linewidth=0.8)
        if height >= SMALLEST:
            _number(axes, x, bottom + height / 2, height, MUTED)
        bottom += height


def _number(axes: Axes, x: float, y: float, value: float, color: str, boxed: bool = False) -> None:
    box = {"boxstyle": "square,pad=0.15", "facecolor": "#EDEDED", "linewidth": 0} if boxed else None
    axes.text(x, y, f"{value:.1f}", ha="center", va="center_baseline", fontsize=8.5, color=color, bbox=box)


def _tick(label: str, rows: pd.DataFrame, labels: pd.Series, systems: Mapping[str, str]) -> str:
    name = rows["allocator"][labels == label].iloc[0]
    lines = textwrap.wrap(label, 17)
    return "\n".join([systems[name], *lines] if name in systems else lines)


def _percent(axes: Axes) -> None:
    axes.set_ylabel("share of the KV pool (%)")
    axes.set_ylim(0, 106)
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, shown: list[str], compared: bool) -> None:
    """From the bottom up, as the bars are stacked."""
    handles = []
    for name in shown:
        color, hatch, text = CATEGORIES[name]
        handles.append(Patch(facecolor=color, hatch=hatch, edgecolor="white", label=text))
    if compared:
        handles.append(Patch(facecolor="none", edgecolor=GREY, label="paper, figure 2 (white: external & others)"))
    columns = 3 if figure.get_figwidth() > 7 else 2
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5)
