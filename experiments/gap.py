"""What is the 58-point gap between Orca (Oracle) and vLLM made of?

In figure 2 of the PagedAttention paper (Kwon et al., SOSP'23) token states fill 38.2 % of Orca (Oracle)'s KV memory and
96.3 % of vLLM's. Three things differ between the two. Here they change one at a time, in the setting of
`fragmentation` (OPT-13B, 15,728 tokens, ShareGPT lengths at 4 requests/s, means over iterations between 300 and 900 s):

1. rounding: Orca's allocator is not published, and the authors took a buddy system, which rounds each extent up to a
   power of two. First fit does not.
2. holes: an extent is in one piece, so free memory in small pieces is of no use to a long request. Pages are.
3. reservation: an oracle keeps room for every token to come. Pages on demand are taken when a token needs one.

The systems in between and the split are ours, not the paper's. Beside it stands a replay made for this project, on the
authors' own trace with seed 0: 38.1, 50.4, 59.0, 96.2 %. A step is what token states win while the queue stays full;
it is smaller than the slice of that name in the bar before it, because what rounding no longer takes goes to
reservations and holes as well, in proportion to what then runs.

`--allocator A,B[,...]` or `--system` makes another chain, from left to right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments import fragmentation
from lab.core import InputError
from lab.harness import Claim
from lab.options import Options
from lab.plot import CATEGORIES
from lab.plot.style import BLUE, FONT, INK, entitle, seeds_of
from lab.record import Record
from lab.run import Run
from lab.systems import label

REPLAY = {  # allocator, under continuous batching: token states, per cent of the pool
    "contiguous-oracle": 38.1,
    "contiguous-oracle-firstfit": 50.4,
    "paged-oracle": 59.0,
    "paged": 96.2,
}
CHAIN = list(REPLAY)
STEPS = dict(zip(pairwise(CHAIN), ("rounding", "holes", "reservation"), strict=True))
PAPER = {name: values[0] for name, values in fragmentation.PAPER.items() if values[0] is not None}
POINTS = fragmentation.POINTS
FIRST_FIT = "contiguous-oracle-firstfit"
BLOCKED, NEAR = 90.0, 10.0  # of first fit in the replay: per cent of iterations; our tolerance, in points
SLICES = ["stored", "ended", "reserved", "excess", "rounding", "cached", "free"]
SEEN = {
    "batch": "requests running",
    "index": "1 - largest hole / all free",
    "blocked": "% of steps: queue waits for room",
    "blocked_enough": "... though enough is free in all",
    "preemptions": "preemptions",
    "output_tokens_per_s": "output tokens per s",
}
SMALLEST = 3.0  # per cent: slices below carry no number
SMALL: Any = {"fontsize": 7.5, "color": "white", "ha": "center"}
CENTRED: Any = {"ha": "center", "va": "center_baseline"}


def runs(options: Options) -> list[Run]:
    compared = options.systems or options.allocators or CHAIN
    if len(set(compared)) < 2:
        raise InputError(f"{compared[0]!r} alone: a gap lies between two; name others behind it, in the order of steps")
    if len(options.schedulers or []) > 1:
        rule = "a step must change one thing only; name one of them"
        raise InputError(f"schedulers {', '.join(options.schedulers or [])}: {rule}")
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    return fragmentation.runs(replace(options, allocators=None if options.systems else compared, seeds=seeds))


def row(run: Run, record: Record) -> dict[str, Any]:
    return {"system": label(run), **fragmentation.row(run, record)}


def tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    mean = rows.groupby("system", sort=False).mean(numeric_only=True)
    shown = [name for name in SLICES if mean[name].max() >= 0.05]
    slices = mean[shown].rename(columns={name: CATEGORIES[name][2] for name in shown})
    return {
        "token states, % of the pool, and the steps between: paper, a replay made for this project, ours": _climb(
            rows
        ).round(1),
        "% of the pool": slices.round(1),
        "what else was seen": mean[list(SEEN)].rename(columns=SEEN).T.round(2),
    }


def figure(rows: pd.DataFrame, header: Mapping[str, Any]) -> Figure:
    """A stacked bar per system; between two of them what token states win, and what that step is called."""
    grouped, climb = rows.groupby("system", sort=False), _climb(rows)
    mean, spread = grouped[SLICES].mean(), grouped["stored"].std().fillna(0)
    with mpl.rc_context(FONT):
        figure = Figure(figsize=(1.4 + 2.1 * len(mean), 5.2), layout="constrained")
        axes = figure.subplots()
        for x, (system, _, step) in enumerate(_chain(rows)):
            _bar(axes, x, mean.loc[system], float(spread[system]))
            paper = climb.loc[system, "paper"]
            if pd.notna(paper):
                axes.plot([x - 0.34, x + 0.34], [paper] * 2, color=INK, linewidth=1.4, linestyle=":")
                axes.annotate(f"paper {paper:.1f}", (x, paper), (0, -3), textcoords="offset points", **SMALL, va="top")
            if step:
                won, replay = climb.loc[f"+ {step}", ["ours", "replay"]]
                _arrow(axes, x - 0.5, step, won, replay, mean.loc[system, "stored"])
        names = [[fragmentation.SYSTEMS.get(allocator, system), allocator] for system, allocator, _ in _chain(rows)]
        axes.set_xticks(range(len(mean)), ["\n".join(dict.fromkeys(lines)) for lines in names])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, 101)
        axes.set_ylabel("share of the KV pool (%)")
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure, [name for name in SLICES if mean[name].max() >= 0.05])
        entitle(figure, axes, "What each step wins", header, seeds_of(rows["seed"]))
    return figure


def claims(rows: pd.DataFrame) -> list[Claim]:
    """The paper's two ends, the replay's steps between them, and what holes mean."""
    climb = _climb(rows)
    slack = POINTS if rows["seed"].nunique() > 1 else 2 * POINTS  # a single seed, as in `fragmentation`
    judged = bool(rows["paper_setting"].all())
    found = []
    for line, (paper, replay, ours) in climb[["paper", "replay", "ours"]].iterrows():
        step = str(line).startswith("+")
        theirs, source = (replay, "replay") if step else (paper, "figure 2")
        if pd.notna(theirs):
            text = f"{line}{'' if step else ', token states'}: {theirs:.1f} points ({source}), +-{slack:g}"
            found.append(Claim(text, bool(abs(ours - theirs) <= slack) if judged else None, f"{ours:.1f}"))
    kept_out = rows[rows["scheduler"] == "continuous"].groupby("allocator")["blocked_enough"].mean()
    if FIRST_FIT in kept_out:
        text = f"first fit: in about {BLOCKED:g} % of steps (replay, +-{NEAR:g}) holes alone keep the queue waiting"
        holds = bool(abs(kept_out[FIRST_FIT] - BLOCKED) <= NEAR) if judged else None
        found.append(Claim(text, holds, f"{kept_out[FIRST_FIT]:.1f} %"))
    if "paged-oracle" in kept_out:
        text, seen = "pages leave no holes: with the same reservation they never do", kept_out["paged-oracle"]
        found.append(Claim(text, bool(seen == 0), f"{seen:.1f} %"))
    return found


def _chain(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """Systems with their allocators, from left to right, and what the step to each is called."""
    ends = rows.drop_duplicates("system")[["system", "allocator"]].to_numpy().tolist()
    steps = [STEPS.get((a, b), f"to {system}") for (_, a), (system, b) in pairwise(ends)]
    return [(system, allocator, step) for (system, allocator), step in zip(ends, ["", *steps], strict=True)]


def _climb(rows: pd.DataFrame) -> pd.DataFrame:
    """Token states of each system, and what each step wins: with the same seed, so that its spread is its own."""
    stored = rows.pivot(index="seed", columns="system", values="stored")
    known = bool(rows["paper_model"].all() and (rows["scheduler"] == "continuous").all())
    lines: dict[str, list[float]] = {}
    before: tuple[float, float, pd.Series] | None = None
    for system, allocator, step in _chain(rows):
        paper, replay = (values.get(allocator, np.nan) if known else np.nan for values in (PAPER, REPLAY))
        ours = stored[system]
        if before:
            won = ours - before[2]
            lines[f"+ {step}"] = [paper - before[0], replay - before[1], won.mean(), won.std()]
        lines[system] = [paper, replay, ours.mean(), ours.std()]
        before = paper, replay, ours
    return pd.DataFrame.from_dict(lines, orient="index", columns=["paper", "replay", "ours", "+-"])


def _bar(axes: Axes, x: float, mean: pd.Series, spread: float) -> None:
    bottom = 0.0
    for name in SLICES:
        color, hatch, _ = CATEGORIES[name]
        height = float(mean[name])
        axes.bar(x, height, 0.56, bottom, color=color, hatch=hatch, edgecolor="white", linewidth=0.6)
        if height >= SMALLEST:
            text_color = "white" if name in ("stored", "ended", "excess") else INK
            box = {"boxstyle": "square,pad=0.15", "facecolor": "#EDEDED", "linewidth": 0} if hatch else None
            axes.text(x, bottom + height / 2, f"{height:.1f}", **CENTRED, fontsize=8.5, color=text_color, bbox=box)
        bottom += height
    axes.errorbar(x + 0.22, mean["stored"], spread, color=INK, linewidth=0.9, capsize=2)


def _arrow(axes: Axes, x: float, step: str, won: float, replay: float, top: float) -> None:
    """From the token states of the system on the left to those of the one on the right."""
    axes.annotate("", (x, top), (x, top - won), arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.6})
    words = f"{won:+.1f}\n{step}" + (f"\n(replay {replay:+.1f})" if pd.notna(replay) else "")
    axes.text(x, min(top, top - won) - 1.5, words, ha="center", va="top", fontsize=8.5, color=BLUE)


def _legend(figure: Figure, shown: list[str]) -> None:
    looks = [CATEGORIES[name] for name in shown]
    handles = [Patch(facecolor=color, hatch=hatch, edgecolor="white", label=text) for color, hatch, text in looks]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8.5)
