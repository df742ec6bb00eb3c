"""The workloads that have a name, each a function from what was asked to a source of requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from lab.core import InputError
from lab.workloads.adversarial import adversarial
from lab.workloads.lengths import lognormal, measured, quantile_table, uniform
from lab.workloads.paper import shuffle
from lab.workloads.prompts import MAX_TOKENS, Encode, read_prompts
from lab.workloads.source import Source, drawn, recycled
from lab.workloads.spec import mean_deviation, parameters, span, whole
from lab.workloads.traces import read_trace

DATA = Path(__file__).parent / "data"


class Asked(NamedTuple):
    """What a named workload is made from."""

    spec: str
    random: Random
    limit: int  # tokens; prompt and output stay below
    encode: Encode | None


def _sharegpt(asked: Asked) -> Source:
    return _measured(asked, DATA / "sharegpt_joint_quantiles.csv")


def _alpaca(asked: Asked) -> Source:
    return _measured(asked, DATA / "alpaca_joint_quantiles.csv")


def _measured(asked: Asked, table: Path) -> Source:
    parameters(asked.spec, ())
    return drawn(measured(quantile_table(table), asked.random), asked.spec, asked.limit)


def _opt13b_256(asked: Asked) -> Source:
    parameters(asked.spec, ())
    return recycled(read_trace(DATA / "opt13b_256_lengths.csv").items, asked.spec, asked.limit)


def _uniform(asked: Asked) -> Source:
    values = parameters(asked.spec, ("prompt", "output"))
    prompt, output = (span(asked.spec, values, key) for key in ("prompt", "output"))
    return drawn(uniform(prompt, output, asked.random), asked.spec, asked.limit)


def _lognormal(asked: Asked) -> Source:
    values = parameters(asked.spec, ("prompt", "output"))
    prompt, output = (mean_deviation(asked.spec, values, key) for key in ("prompt", "output"))
    return drawn(lognormal(prompt, output, asked.random), asked.spec, asked.limit)


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
    requests = adversarial(asked.random, block=block, blocks=blocks, n=n, vocabulary=vocabulary)
    return drawn(requests, asked.spec, asked.limit)


def _prompts(asked: Asked) -> Source:
    values = parameters(asked.spec, ("max_tokens",))
    max_tokens = whole(asked.spec, values, "max_tokens", MAX_TOKENS)
    items = read_prompts(DATA / "prompts_sample.jsonl.gz", asked.encode, max_tokens)
    shuffle(items, asked.random)
    return recycled(items, asked.spec, asked.limit)


WORKLOADS: dict[str, Callable[[Asked], Source]] = {
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "opt13b-256": _opt13b_256,
    "uniform": _uniform,
    "lognormal": _lognormal,
    "adversarial": _adversarial,
    "prompts": _prompts,
}
