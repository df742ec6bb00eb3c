"""Figures of plain rows: curves over a setting, bars beside the paper's, a map of two settings. All show the spread."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lab.plot.style import FONT, GREY, HALO, INK, MUTED, POLICIES, entitle, legend, seeds_of, style


def lines(
    rows: pd.DataFrame,
    header: Mapping[str, Any],
    title: str,
    *,
    x: str,
    y: Mapping[str, str],
    by: str = "system",
    panels: str | None = None,
    xlabel: str = "",
    log: str = "",
    limits: Mapping[str, tuple[float, float]] | None = None,
    guides: Mapping[str, Mapping[str, float]] | None = None,
    policies: Mapping[str, str] | None = None,
    also: Seq[Artist] = (),
) -> Figure:
    """A curve per value of `by`: means over seeds, in a band of one standard deviation.

    `y` maps columns of `rows` to axis labels, a row of panels each; `panels` is a column whose every value gets a
    panel of its own. `log` holds "x", "y" or both; `limits` a y range by column; `guides` horizontal lines, by column
    and label; `policies` the policy behind a value of `by` that is not called like it, whose look it has;
    `also` what the legend must explain besides.
    """
    columns = list(dict.fromkeys(rows[panels])) if panels else [None]
    with mpl.rc_context(FONT):
        few = len(columns) < 3
        wide, high = (4.4, 3.2) if few else (2.2, 2.5)  # many shrink less on paper where each is small
        size = ((1.6 if few else 1.2) + wide * len(columns), 1.2 + high * len(y))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(y), len(columns), squeeze=False)
        for i, (column, label) in enumerate(y.items()):
            for j, value in enumerate(columns):
                axes = grid[i][j]
                _curves(axes, rows if value is None else rows[rows[panels] == value], x, column, by, policies or {})
                axes.set_ylabel(label if j == 0 else "")
                axes.set_xlabel(xlabel or x if i == len(y) - 1 else "")
                _scales(axes, log, (limits or {}).get(column))
                _guide(axes, (guides or {}).get(column, {}))
                if value is not None and i == 0:
                    look: dict[str, Any] = {"ha": "right", "va": "top", "color": INK, "path_effects": HALO}
                    axes.annotate(str(value), (0.98, 0.97), xycoords="axes fraction", **look)
        handles, labels = _labelled(grid)
        legend(figure, [*handles, *also], [*labels, *(str(artist.get_label()) for artist in also)])
        entitle(figure, grid[0][0], title, header, seeds_of(rows["seed"]))
    return figure


def bars(
    rows: pd.DataFrame,
    header: Mapping[str, Any],
    title: str,
    *,
    groups: str,
    y: str,
    ylabel: str,
    by: str = "system",
    paper: Mapping[tuple[Any, Any], float] | None = None,
    paper_is: str = "paper",
    policies: Mapping[str, str] | None = None,
    number: str = "{:.1f}",
) -> Figure:
    """Bars side by side: a group per value of `groups`, in it a bar per value of `by`, with the deviation over seeds.

    `paper` has the paper's value by (group, by), drawn as a grey outline, and `paper_is` what it is called. `policies`
    is as in `lines`.
    """
    places, kinds = (list(dict.fromkeys(rows[column])) for column in (groups, by))
    width = 0.8 / len(kinds)
    named = [(policies or {}).get(kind, kind) for kind in kinds]
    known = bool(policies) or all(name in POLICIES for name in named)
    shades = mpl.colormaps["Blues"](np.linspace(0.4, 0.9, len(kinds)))  # the palette is the policies' own
    looks = [style(str(name))["color"] if known else shade for name, shade in zip(named, shades, strict=True)]
    colors = dict(zip(kinds, looks, strict=True))
    mean, spread = (rows.groupby([groups, by])[y].agg(kind) for kind in ("mean", "std"))
    with mpl.rc_context(FONT):
        size = (max(5.6, 1.2 + 0.55 * len(places) * (len(kinds) + 0.6)), 4.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for k, kind in enumerate(kinds):
            for g, place in enumerate(places):
                at, theirs = g - 0.4 + width * (k + 0.5), (paper or {}).get((place, kind))
                if (place, kind) in mean.index:
                    height, error = mean[place, kind], np.nan_to_num(spread[place, kind])
                    label = str(kind) if place == places[0] else None
                    axes.bar(at, height, 0.9 * width, color=colors[kind], label=label, alpha=0.9)
                    axes.errorbar(at, height, error, color=INK, linewidth=0.9, capsize=2)
                    text = number.format(height)
                    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # of the paper's outline
                    look: dict[str, Any] = {"fontsize": 7.5, "color": INK, "bbox": clear, "zorder": 5}
                    place_at: Any = {"xytext": (0, 2.5), "textcoords": "offset points", "ha": "center", "va": "bottom"}
                    axes.annotate(text, (at, height + error), **place_at, **look)
                if theirs is not None:
                    axes.bar(at, theirs, width, color="none", edgecolor=GREY, linewidth=1.1, linestyle="--")
        handles, labels = axes.get_legend_handles_labels()
        if paper:
            handles.append(Patch(facecolor="none", edgecolor=GREY, linestyle="--", label=paper_is))
            labels.append(paper_is)
        axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.set_ylabel(ylabel)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        legend(figure, handles, labels)
        entitle(figure, axes, title, header, seeds_of(rows["seed"], rows.groupby([groups, by])["seed"].nunique()))
    return figure


def _number(value: float) -> str:
    """Three digits, but no power of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def heat(
    tables: Mapping[str, pd.DataFrame],
    header: Mapping[str, Any],
    title: str,
    *,
    spread: Mapping[str, pd.DataFrame] | None = None,
    seeds: Seq[int] = (0,),
    number: Callable[[float], str] = _number,
) -> Figure:
    """Each table as a map, one beside the other: its index down, its columns across, `spread` below each number."""
    with mpl.rc_context(FONT):
        height = 1.6 + 0.42 * max(len(table) for table in tables.values())
        width = 2.2 + sum(max(2.2, 0.25 + 0.8 * len(table.columns)) for table in tables.values())
        figure = Figure(figsize=(width, height), layout="constrained")
        row = figure.subplots(1, len(tables), squeeze=False)[0]
        for axes, (name, table) in zip(row, tables.items(), strict=True):
            values = table.to_numpy(dtype=float)
            image = axes.imshow(values, cmap="cividis", aspect="auto")
            for i, j in np.ndindex(values.shape):
                if not np.isnan(values[i, j]):
                    text = number(values[i, j])
                    if spread is not None and name in spread:
                        text += f"\n±{number(float(spread[name].iat[i, j]))}"
                    light = image.norm(values[i, j]) < 0.5
                    axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if light else INK)
            axes.set_xticks(range(len(table.columns)), [textwrap.fill(str(c), 12) for c in table.columns], fontsize=8)
            axes.set_yticks(range(len(table)), [str(i) for i in table.index] if axes is row[0] else [""] * len(table))
            axes.set_xlabel(name)
            axes.tick_params(length=0)
        entitle(figure, row[0], title, header, seeds_of(pd.Series(list(seeds))))
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, x: str, y: str, by: str, policies: Mapping[str, str]) -> None:
    for name, own in rows.groupby(by, sort=False):
        points = own.groupby(x)[y].agg(["mean", "std"]).dropna(subset="mean")
        look: dict[str, Any] = {**style(policies.get(str(name), str(name))), "markersize": 5, "linewidth": 1.4}
        axes.plot(points.index, points["mean"], label=str(name), **look)
        low, high = (points["mean"] + sign * points["std"].fillna(0) for sign in (-1, 1))
        axes.fill_between(points.index, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _guide(axes: Axes, guides: Mapping[str, float]) -> None:
    """Horizontal lines; the highest has its name above it, the others below, so that close ones do not meet."""
    for i, (text, height) in enumerate(sorted(guides.items(), key=lambda guide: -guide[1])):
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        side = {"xytext": (2, 2), "va": "bottom"} if i == 0 else {"xytext": (2, -2), "va": "top"}
        look: dict[str, Any] = {"fontsize": 7.5, "color": MUTED, "path_effects": HALO, "textcoords": "offset points"}
        axes.annotate(text, (0.01, height), xycoords=("axes fraction", "data"), **look, **side)


def _scales(axes: Axes, log: str, limits: tuple[float, float] | None) -> None:
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if "y" in log:
        axes.set_yscale("log")
    if limits:
        axes.set_ylim(*limits)
    axes.spines[["top", "right"]].set_visible(False)


def _labelled(grid: np.ndarray) -> tuple[list[Any], list[str]]:
    """Each curve once, whichever panel it is in."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
