"""The roofline: what bytes and operations allow, and where work of a known size lies below (Williams et al., 2009)."""

from __future__ import annotations

import re

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lab.plot.style import COLORS, FONT, GREY, INK, MARKERS, MUTED


def roofline(work: pd.DataFrame, bytes_per_s: float, flops: float, title: str, setting: str) -> Figure:
    """Both axes logarithmic: operations per byte across, operations per second up; the roof is min of both limits.

    `work`: a row per mark, with `kernel` (its name in the legend), `operations`, `bytes` (moved at least), `seconds`;
    where these are NaN the mark is on the roof, as the best there is. A dotted line leads from each mark to its roof.
    """
    intensity = work["operations"] / work["bytes"]
    ridge = flops / bytes_per_s
    low, high = min(intensity.min(), ridge) / 4, max(intensity.max(), ridge) * 6
    x = np.geomspace(low, high, 400)
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(8.4, 5.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, np.minimum(x * bytes_per_s, flops) / 1e12, color=INK, linewidth=1.6)
        axes.axvline(ridge, color=GREY, linewidth=0.8, linestyle="--")
        said = f" ridge: {ridge:.0f} operations per byte"
        axes.annotate(said, (ridge, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color=MUTED)
        axes.text(high / 1.1, flops / 1e12 * 1.1, f"{flops / 1e12:.0f} TFLOP/s", ha="right", va="bottom", fontsize=9)
        slope_at = float(np.sqrt(low * min(ridge, high)))
        axes.text(
            slope_at / 1.1, slope_at * bytes_per_s / 0.8e12, f"{bytes_per_s / 1e12:.2f} TB/s", ha="right", fontsize=9
        )
        for i, (kernel, own) in enumerate(work.groupby("kernel", sort=False)):
            at = own["operations"] / own["bytes"]
            roof = np.minimum(at * bytes_per_s, flops)
            reached = (own["operations"] / own["seconds"]).fillna(roof)
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            axes.vlines(at, reached / 1e12, roof / 1e12, color=color, linewidth=0.8, linestyle=":")
            axes.scatter(at, reached / 1e12, s=42, color=color, marker=marker, label=str(kernel), zorder=3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_xlabel("arithmetic intensity (operations per byte of device memory moved)")
        axes.set_ylabel("operations per second (TFLOP/s)")
        axes.grid(which="major", color="#E8E8E8", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes.set_title(setting, loc="left", fontsize=9, color=INK)
    return figure


def attention_marks(bench: pd.DataFrame) -> pd.DataFrame:
    """Rows for `roofline` of what `kernels.bench` measured of attention: bfloat16, heads of 128 numbers.

    Intensity needs both counts. The bench notes the one that limits; the other follows from the shape, as
    "64 x 32/8 x 1024": rows x query heads / KV heads x keys.
    """
    marks = []
    for row in bench[bench["name"].str.contains("attention")].to_dict("records"):
        shape = re.match(r"(\d+) x (\d+)/(\d+) x [~<]?(\d+)", row["shape"])
        assert shape is not None, row["shape"]
        rows, heads, kv_heads, length = map(int, shape.groups())
        queries = 4 * rows * heads * 128  # bytes of the queries and of the results
        if row["name"] == "decode attention":
            keys = (row["bytes"] - queries) / (4 * kv_heads * 128)  # of all rows together
            counts = {"operations": 4 * heads * 128 * keys, "bytes": row["bytes"]}
        else:
            counts = {"operations": row["operations"], "bytes": length * (queries + 4 * rows * kv_heads * 128)}
        marks.append({"kernel": row["variant"], **counts, "seconds": row["us"] / 1e6})
    return pd.DataFrame(marks)
