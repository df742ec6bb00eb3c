"""The workloads that have a name, each a function from what was asked to a source of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from lab.core import InputError
from lab.workloads.adversarial import adversarial
from lab.workloads.conversations import conversations
from lab.workloads.lengths import lognormal, measured, quantile_table, uniform
from lab.workloads.paper import shuffle
from lab.workloads.prompts import MAX_TOKENS, Encode, read_prompts
from lab.workloads.source import Item, Source, drawn, recycled
from lab.workloads.spec import mean_deviation, parameters, span, whole
from lab.workloads.traces import read_trace

DATA = Path(__file__).parent / "data"
SHORT_TURN = 64  # tokens of question and answer below which ShareGPT has few


class Asked(NamedTuple):
    """What a named workload is made from."""

    spec: str
    seed: int
    limit: int  # tokens; prompt and output stay below
    encode: Encode | None


def _sharegpt(asked: Asked) -> Source:
    return _measured(asked, DATA / "sharegpt_joint_quantiles.csv")


def _alpaca(asked: Asked) -> Source:
    return _measured(asked, DATA / "alpaca_joint_quantiles.csv")


def _measured(asked: Asked, table: Path) -> Source:
    parameters(asked.spec, ())
    bins = quantile_table(table)
    return drawn(lambda random: measured(bins, random), asked.seed, asked.spec, asked.limit)


def _opt13b_256(asked: Asked) -> Source:
    parameters(asked.spec, ())
    return recycled(lambda: read_trace(DATA / "opt13b_256_lengths.csv"), asked.spec, asked.limit)


def _uniform(asked: Asked) -> Source:
    values = parameters(asked.spec, ("prompt", "output"))
    prompt, output = (span(asked.spec, values, key) for key in ("prompt", "output"))
    return drawn(lambda random: uniform(prompt, output, random), asked.seed, asked.spec, asked.limit)


def _lognormal(asked: Asked) -> Source:
    values = parameters(asked.spec, ("prompt", "output"))
    prompt, output = (mean_deviation(asked.spec, values, key) for key in ("prompt", "output"))
    return drawn(lambda random: lognormal(prompt, output, random), asked.seed, asked.spec, asked.limit)


def _adversarial(asked: Asked) -> Source:
    values = parameters(asked.spec, ("block", "blocks", "n", "vocabulary"))
    block, blocks, n = (
        whole(asked.spec, values, key, default) for key, default in (("block", 16), ("blocks", 5), ("n", 1))
    )
    vocabulary = whole(asked.spec, values, "vocabulary", 256, least=2)
    longest = (blocks + 2) * block + 1
    if longest >= asked.limit:
        raise InputError(
            f"workload {asked.spec!r}: its longest request has {longest} tokens, which reaches the limit of "
            f"{asked.limit}: take smaller or fewer blocks"
        )

    def draw(random: Random) -> Iterator[Item]:
        return adversarial(random, block=block, blocks=blocks, n=n, vocabulary=vocabulary)

    return drawn(draw, asked.seed, asked.spec, asked.limit)


def _prompts(asked: Asked) -> Source:
    values = parameters(asked.spec, ("max_tokens",))
    max_tokens = whole(asked.spec, values, "max_tokens", MAX_TOKENS)
    items = read_prompts(DATA / "prompts_sample.jsonl.gz", asked.encode, max_tokens)
    shuffle(items, Random(asked.seed))
    return recycled(lambda: items, asked.spec, asked.limit)


def _conversations(asked: Asked) -> Source:
    values = parameters(asked.spec, ("turns", "system", "users"))
    turns, users = (whole(asked.spec, values, key, default) for key, default in (("turns", 5), ("users", 16)))
    system = whole(asked.spec, values, "system", 80, least=0)
    if system > asked.limit - SHORT_TURN:
        raise InputError(
            f"workload {asked.spec!r}: system={system}: must leave {SHORT_TURN} of the {asked.limit} tokens of a "
            "request for question and answer"
        )
    bins = quantile_table(DATA / "sharegpt_joint_quantiles.csv")

    def draw(random: Random) -> Iterator[Item]:
        lengths = measured(bins, random)
        return conversations(random, lengths, asked.spec, asked.limit, users=users, turns=turns, system=system)

    return drawn(draw, asked.seed, asked.spec, asked.limit)


WORKLOADS: dict[str, Callable[[Asked], Source]] = {
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "opt13b-256": _opt13b_256,
    "uniform": _uniform,
    "lognormal": _lognormal,
    "adversarial": _adversarial,
    "prompts": _prompts,
    "conversations": _conversations,
}
