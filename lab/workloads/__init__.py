"""Requests from a distribution, a trace or a file of prompts, in order of arrival and repeatable from a seed.

    sharegpt                                    lengths with the paper's joint quantiles (Kwon et al., figure 11)
    alpaca                                      the same, of its short instructions
    opt13b-256                                  256 fixed lengths like ShareGPT's, in their order
    uniform:prompt=1-100,output=10-50           lengths from LO to HI tokens, both included; one number for both
    lognormal:prompt=161+-299,output=338+-284   lengths of a mean and a standard deviation in tokens
    adversarial:block=16,blocks=5,n=1,vocabulary=256   made to catch an allocator (these values are the defaults)
    prompts:max_tokens=64                       491 real short prompts, shuffled by the seed
    conversations:turns=5,system=80,users=16    synthetic chats over ShareGPT's lengths, whose prompts share prefixes
    paper:PATH                                  the authors' own trace, from their file of lengths
    PATH                                        a trace (.csv, .csv.gz, .parquet) or prompts (.jsonl, .jsonl.gz)

Requests are made one by one whenever somebody goes through them, so a trace of millions takes no memory: lengths are
drawn anew, a trace is read anew. (Texts of prompts are kept: a file of them is tokenised once.)

A file is read in its order, and again from its start when it runs out. Where prompt and output reach the limit (the
paper's 2048), lengths are drawn again and rows of a file left out. What a trace may say beyond lengths: `traces`.
Importing this package needs numpy and no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lab.core import InputError, Request, SamplingParams, unknown
from lab.workloads.arrivals import ARRIVALS
from lab.workloads.builtin import WORKLOADS, Asked
from lab.workloads.describe import Requests, describe, digest
from lab.workloads.paper import paper
from lab.workloads.pieces import Pieces
from lab.workloads.prompts import Encode, read_prompts
from lab.workloads.source import Item, Source, recycled
from lab.workloads.timing import Timing
from lab.workloads.traces import read_trace, timed

__all__ = ["ARRIVALS", "WORKLOADS", "Requests", "alike", "describe", "digest", "has_times", "workload"]

TRACES = (".csv", ".csv.gz", ".parquet")
PROMPTS = (".jsonl", ".jsonl.gz")


def workload(
    spec: str,
    *,
    rate_per_s: float | None = None,
    duration_s: float | None = None,
    count: int | None = None,
    seed: int = 0,
    arrivals: str = "poisson",
    burstiness: float = 1.0,
    limit: int = 2048,
    encode: Encode | None = None,
) -> Requests:
    """The requests of `spec` (its grammar is the module's text), numbered from 0 in order of arrival.

    `poisson` and `gamma` arrivals need `rate_per_s` and end with `duration_s` or `count`, whichever comes first, or
    with the file; `all` at time 0 takes `count` or the whole file; `trace` takes the file's own times, scaled to
    `rate_per_s` where that is given, and ends like the first two. `burstiness` is gamma's shape. Prompt and output
    together stay below `limit` tokens. `encode` turns text into token ids (and applies the chat template); only real
    prompts need it. What clients ask for (`max_tokens`) is the forced output unless the file says more. Raises
    InputError.
    """
    timing = Timing(arrivals, rate_per_s, duration_s, count, seed, burstiness)
    if limit < 3:
        raise InputError(
            f"limit {limit}: must be at least 3 tokens, for a prompt and an output of one token stay below it"
        )
    source = _source(Asked(spec, seed, limit, encode))
    number, timed_items = timing.schedule(spec, source)

    def read() -> Iterator[Request]:
        return (_request(id, time_s, item) for id, (time_s, item) in enumerate(timed_items()))

    return Requests(read, number, source.dropped)


def has_times(spec: str) -> bool:
    """Is it a trace with arrival times? Reads its first row only."""
    return spec.endswith(TRACES) and not spec.startswith("paper:") and timed(Path(spec))


def alike(spec: str) -> bool:
    """Does the workload say which prompts begin alike? Reads a trace's first row only."""
    if spec.endswith(TRACES) and not spec.startswith("paper:"):
        return any(isinstance(item.prompt, Pieces) for item in itertools.islice(read_trace(Path(spec)), 1))
    return spec.partition(":")[0] == "conversations"


def _request(id: int, arrival_s: float, item: Item) -> Request:
    prompt = item.prompt.of(id) if isinstance(item.prompt, Pieces) else item.prompt
    return Request(id, arrival_s, prompt, item.output, _sampling(item.max_tokens, item.n))


@lru_cache(maxsize=4096)
def _sampling(max_tokens: int, n: int) -> SamplingParams:
    """One object for all that ask for the same."""
    return SamplingParams(max_tokens=max_tokens, n=n)


def _source(asked: Asked) -> Source:
    name, _, rest = asked.spec.partition(":")
    if name in WORKLOADS:
        return WORKLOADS[name](asked)
    if name == "paper" and rest:
        return paper(Path(rest), asked.spec, asked.seed, asked.limit)
    if asked.spec.endswith(PROMPTS):
        prompts = read_prompts(Path(asked.spec), asked.encode)
        return recycled(lambda: prompts, asked.spec, asked.limit)
    if asked.spec.endswith(TRACES):
        return recycled(lambda: read_trace(Path(asked.spec)), asked.spec, asked.limit)
    known = unknown("workload", name, (*WORKLOADS, "paper:PATH"))
    raise InputError(f"{known}, or a path that ends in {', '.join((*TRACES, *PROMPTS))}")
