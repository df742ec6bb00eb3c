"""What all figures share: a policy has one colour and marker, every figure says its setting, and is saved twice."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from lab.core import InputError

# Okabe and Ito's palette, which the colour-blind can tell apart
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, INK, MUTED = "#767676", "#222222", "#6E6E6E"  # all dark enough for small print
BAND = "#E8E8E8"  # behind everything: what is claimed

HALO = [withStroke(linewidth=2.5, foreground="white")]  # of text that a line may cross

POLICIES = {  # the systems that meet in most figures; any other policy gets the style that its name hashes to
    "paged": (BLUE, "o"),
    "contiguous-max": (VERMILION, "s"),
    "contiguous-pow2": (ORANGE, "^"),
    "contiguous-oracle": (GREEN, "D"),
    "contiguous-oracle-firstfit": (PURPLE, "v"),
    "paged-oracle": (SKY, "P"),
    "vllm": (BLUE, "o"),
    "orca-max": (VERMILION, "s"),
    "orca-pow2": (ORANGE, "^"),
    "orca-oracle": (GREEN, "D"),
    "fastertransformer": (BLACK, "X"),
    "hf-generate": (GREY, "h"),
    "tgi": (SKY, "P"),
    "tensorrt-llm": (PURPLE, "v"),
    "tensorrt-llm-utilisation": (PURPLE, "<"),
    "llama.cpp": (ORANGE, "p"),
    "paged, reserved prefix": (PURPLE, "d"),
}
COLORS = [BLUE, VERMILION, ORANGE, GREEN, PURPLE, SKY, BLACK]
MARKERS = ["X", "*", "<", ">", "p", "h", "d"]  # none of POLICIES, so that a stranger is never taken for one of them

FONT: Any = {
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "kvlab",
}


def style(policy: str) -> dict[str, str]:
    """Colour and marker of a policy, from its name alone: the same in every figure."""
    if policy in POLICIES:
        color, marker = POLICIES[policy]
    else:
        code = zlib.crc32(policy.encode())
        color, marker = COLORS[code % len(COLORS)], MARKERS[code // len(COLORS) % len(MARKERS)]
    return {"color": color, "marker": marker}


def setting(header: Mapping[str, Any]) -> str:
    """Model, workload, and whether a clock was real: what a reader must know before believing a number."""
    clock = "simulated (virtual clock, {})" if header.get("simulated") else "measured on {}"
    hardware = Path(str(header.get("hardware"))).stem  # a name, or a file of fitted step times
    workload = Path(str(header.get("workload"))).name  # a name, or a file
    return f"{header.get('model')}, {workload}, {clock.format(hardware)}"


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg; returns both paths."""
    paths = [stem.parent / f"{stem.name}.{kind}" for kind in ("png", "svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(FONT):
            figure.savefig(paths[0], dpi=200)
            figure.savefig(paths[1], metadata={"Date": None})  # the same figure is the same file
    except OSError as error:
        raise InputError(
            f"{stem}: the figure cannot be written ({error.strerror}): free some space or give --out"
        ) from None
    return paths


def seeds_of(seeds: pd.Series, counts: pd.Series | None = None) -> str:
    """`counts`: of the seeds behind each number that is drawn, where these may differ."""
    known = sorted(seeds.unique())
    if len(known) == 1:
        return f"seed {known[0]}"
    whole = known == list(range(known[0], known[-1] + 1))
    listed = f"{known[0]} to {known[-1]}" if whole else ", ".join(map(str, known))
    if counts is not None and counts.min() < len(known):
        listed += f", at least {counts.min()} of them"
    return f"means over seeds {listed} (±\u00a0standard\u00a0deviation)"  # in one line


def entitle(figure: Figure, axes: Axes, text: str, header: Mapping[str, Any], drawn: str) -> None:
    """The title, and below it in what setting all of it was seen."""
    room = int(14.5 * (figure.get_figwidth() - 0.2))  # letters
    said = textwrap.wrap(f"{setting(header)}, {drawn}", room)
    title = figure.suptitle(text + "\n" * len(said), x=0.01, ha="left", fontsize=12, fontweight="bold", linespacing=1.1)
    where: Any = ("figure fraction", title)  # its height is kept free by the lines of the title, its width by nothing
    axes.annotate("\n".join(said), (0.01, 0), xycoords=where, va="bottom", fontsize=9, color=INK, in_layout=False)


def legend(figure: Figure, handles: Seq[Any], labels: Seq[str]) -> None:
    """Below everything, in as many columns as the figure is wide enough for."""
    widest = 0.6 + 0.075 * max(map(len, labels), default=0)  # inches, of small print and what stands before it
    columns = max(1, int(figure.get_figwidth() / widest))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5)
