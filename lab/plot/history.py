"""Times over commits: a panel per benchmark, a curve per case, 1 where the baseline is."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from lab.plot.style import COLORS, FONT, GREY, INK, MARKERS

COLUMNS = 4
LABELS = 8  # commits that are named, at most
BAND = (0.8, 1.25)  # a quarter slower, or faster
TICKS = (0.25, 0.5, 0.8, 1, 1.25, 1.6, 2, 3, 4, 8, 16)
SHOWN = (0.7, 2.2)  # of all panels, or more where something lies outside: what is above the band is room for the legend

Points = Seq[tuple[str, float]]  # commit, time over the baseline's; several of a commit are runs


def history(ratios: Mapping[str, Mapping[str, Points]], commits: Seq[str]) -> Figure:
    """`ratios`: benchmark -> case -> points; `commits` in order of time. Dots are runs, curves their medians."""
    rows = -(-len(ratios) // COLUMNS)
    places = {commit: i for i, commit in enumerate(commits)}
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(3.4 * COLUMNS, 1.0 + 2.3 * rows), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("times the baseline")
        for axes in grid.flat[len(ratios) :]:
            axes.set_visible(False)
        for axes, (name, cases) in zip(grid.flat, ratios.items(), strict=False):
            axes.axhspan(*BAND, color=GREY, alpha=0.2, linewidth=0)
            axes.set_title(name, loc="left", fontsize=9, color=INK)
            for i, (case, points) in enumerate(cases.items()):
                color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
                axes.plot([places[c] for c, _ in points], [y for _, y in points], ".", color=color, markersize=2)
                measured = [commit for commit in commits if any(c == commit for c, _ in points)]
                middle = [float(np.median([y for c, y in points if c == commit])) for commit in measured]
                where = [places[commit] for commit in measured]
                axes.plot(where, middle, color=color, marker=marker, markersize=4, linewidth=1, label=case or None)
            axes.set_yscale("log", base=2)
            axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.minorticks_off()
            named = range(0, len(commits), -(-len(commits) // LABELS))
            axes.set_xticks(named, [commits[i] for i in named], rotation=60, fontsize=7)
            axes.tick_params(labelbottom=True)
            axes.spines[["top", "right"]].set_visible(False)
            if any(cases):
                axes.legend(fontsize=6, frameon=False)
        seen = [y for cases in ratios.values() for points in cases.values() for _, y in points]
        grid[0, 0].set_ylim(min(SHOWN[0], 0.9 * min(seen, default=1)), max(SHOWN[1], 1.1 * max(seen, default=1)))
        text = (
            "Time of each benchmark beside its calibration, over the baseline's, by commit; grey: up to a quarter more"
        )
        figure.suptitle(text, x=0.01, ha="left")
    return figure
