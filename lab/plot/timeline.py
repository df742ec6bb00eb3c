"""The batch over time, a row per place in it: the still picture of a film."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lab.film import DECODING, HOLDING, PROMPT, Film
from lab.plot.style import COLORS, FONT, INK, entitle

PALE = "#BDBDBD"
READABLE = 0.025  # share of the whole time from which a bar is long enough for its number


def timeline(films: Mapping[str, Film], header: Mapping[str, Any], title: str) -> Figure:
    """One panel per film, all on one clock: requests as bars, in the lane that each has from admission to its end.

    Black: its prompt; its colour: decoding; grey: it has ended, and what it held is not given back yet.
    """
    end_s = max(_seconds(film, film.columns["frame_end"][-1:])[0] for film in films.values())
    lanes = [int(film.columns["req_lane"].max()) + 1 for film in films.values()]
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(9.0, 1.3 + sum(0.6 + 0.2 * count for count in lanes)), layout="constrained")
        grid = figure.subplots(len(films), 1, squeeze=False, sharex=True, height_ratios=[3 + n for n in lanes])[:, 0]
        for axes, (name, film) in zip(grid, films.items(), strict=True):
            _bars(axes, film, end_s)
            last_s = _seconds(film, film.columns["frame_end"][-1:])[0]
            axes.axvline(last_s, color=INK, linewidth=1)
            text = f"all served after {last_s:.1f} s"
            axes.annotate(text, (last_s, 1.0), xycoords=("data", "axes fraction"), ha="right", va="bottom", fontsize=9)
            axes.set_ylabel(name)
        grid[-1].set_xlabel("time (s)")
        shades = (
            (INK, "computes its prompt"),
            (COLORS[0], "decodes (a colour per request)"),
            (PALE, "ended, still held"),
        )
        patches = [Patch(color=color, label=text) for color, text in shades]
        figure.legend(handles=patches, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
        entitle(figure, grid[0], title, header, f"seed {header.get('seed')}")
    return figure


def _bars(axes: Axes, film: Film, end_s: float) -> None:
    columns = film.columns
    times = (_seconds(film, columns[name]) for name in ("spell_begin", "spell_stop"))
    for request, kind, begin, stop in zip(columns["spell_request"], columns["spell_kind"], *times, strict=True):
        if kind not in (PROMPT, DECODING, HOLDING):
            continue
        lane = columns["req_lane"][request]
        color = {PROMPT: INK, HOLDING: PALE}.get(kind, COLORS[request % (len(COLORS) - 1)])  # the last one is black
        width = max(stop - begin, 0.003 * end_s if kind == PROMPT else 0.0)
        axes.barh(lane, width, 0.88, begin, color=color, linewidth=0)
        if kind == DECODING and stop - begin > READABLE * end_s:
            name = str(film.about["ids"][request])
            axes.text(begin + 0.006 * end_s, lane, name, color="white", fontsize=7.5, va="center", fontweight="bold")
    axes.set_ylim(columns["req_lane"].max() + 0.6, -0.6)
    axes.set_xlim(0, 1.01 * end_s)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _seconds(film: Film, ticks: np.ndarray) -> np.ndarray:
    return np.asarray(ticks, float) * film.about["tick_s"]
