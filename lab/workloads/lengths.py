"""Prompt and output lengths from a distribution: measured ones (figure 11 of Kwon et al.), uniform, lognormal.

Only `Random.random()` is drawn from, the one method whose sequence Python promises to keep from version to version.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from lab.workloads.source import Item, of_lengths


class Curves(NamedTuple):
    """The quantile curves of one bin of prompts: `prompt[i]` tokens and `output[i]` tokens at `quantile[i]`."""

    quantile: list[float]
    prompt: list[float]
    output: list[float]


def quantile_table(path: Path) -> list[Curves]:
    """The equal-count bins of a joint-quantile table (columns prompt_bin, quantile, prompt_tokens, output_tokens)."""
    bins: dict[str, Curves] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            curves = bins.setdefault(row["prompt_bin"], Curves([], [], []))
            curves.quantile.append(float(row["quantile"]))
            curves.prompt.append(float(row["prompt_tokens"]))
            curves.output.append(float(row["output_tokens"]))
    return list(bins.values())


def measured(bins: list[Curves], random: Random) -> Iterator[Item]:
    """A bin, all alike, then prompt and output independently through its two curves: the bins carry the correlation."""
    while True:
        curves = bins[below(random, len(bins))]
        prompt = _interpolate(curves.quantile, curves.prompt, random.random())
        output = _interpolate(curves.quantile, curves.output, random.random())
        yield of_lengths(_tokens(prompt), _tokens(output))


def uniform(prompt: tuple[int, int], output: tuple[int, int], random: Random) -> Iterator[Item]:
    """Whole numbers from lowest to highest, both included."""
    while True:
        yield of_lengths(_between(random, *prompt), _between(random, *output))


def lognormal(prompt: tuple[float, float], output: tuple[float, float], random: Random) -> Iterator[Item]:
    """Prompt and output with the given mean and standard deviation in tokens, before rounding and before the limit."""
    while True:
        yield of_lengths(_tokens(_lognormal(random, *prompt)), _tokens(_lognormal(random, *output)))


def below(random: Random, count: int) -> int:
    """One of 0 .. count - 1, all alike."""
    return int(random.random() * count)


def _between(random: Random, lowest: int, highest: int) -> int:
    return lowest + below(random, highest - lowest + 1)


def _lognormal(random: Random, mean: float, deviation: float) -> float:
    variance = math.log1p((deviation / mean) ** 2)  # of the logarithm
    radius = math.sqrt(-2 * math.log(1 - random.random()))  # Box and Muller
    normal = radius * math.cos(2 * math.pi * random.random())
    return math.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * normal)


def _interpolate(xs: list[float], ys: list[float], x: float) -> float:
    i = min(bisect_right(xs, x), len(xs) - 1)
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def _tokens(length: float) -> int:
    return max(1, math.floor(length + 0.5))
