"""Requests from a distribution, a trace or a file of prompts, in order of arrival and repeatable from a seed.

    sharegpt                                    lengths with the paper's joint quantiles (Kwon et al., figure 11)
    alpaca                                      the same, of its short instructions
    opt13b-256                                  256 fixed lengths like ShareGPT's, in their order
    uniform:prompt=1-100,output=10-50           lengths from LO to HI tokens, both included; one number for both
    lognormal:prompt=161+-299,output=338+-284   lengths of a mean and a standard deviation in tokens
    adversarial:block=16,blocks=5,n=1,vocabulary=256   made to catch an allocator (these values are the defaults)
    prompts:max_tokens=64                       491 real short prompts, shuffled by the seed
    paper:PATH                                  the authors' own trace, from their file of lengths
    PATH                                        a trace (.csv, .csv.gz, .parquet) or prompts (.jsonl, .jsonl.gz)

A file is read in its order, and again from its start when it runs out. Where prompt and output reach the limit (the
paper's 2048), lengths are drawn again and rows of a file left out. Importing this package needs numpy and no torch.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from lab.core import InputError, Request, SamplingParams, unknown
from lab.workloads.arrivals import ARRIVALS
from lab.workloads.builtin import WORKLOADS, Asked
from lab.workloads.describe import Requests, describe, digest
from lab.workloads.paper import paper
from lab.workloads.prompts import Encode, read_prompts
from lab.workloads.source import Item, Source, recycled
from lab.workloads.timing import Timing
from lab.workloads.traces import read_trace

__all__ = ["ARRIVALS", "WORKLOADS", "Requests", "describe", "digest", "workload"]

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
    source = _source(Asked(spec, Random(seed), limit, encode))
    times_s = timing.times_s(spec, source)
    items = source.take(len(times_s))
    return Requests(
        (_request(i, time_s, item) for i, (time_s, item) in enumerate(zip(times_s, items, strict=True))), source.dropped
    )


def _request(id: int, arrival_s: float, item: Item) -> Request:
    return Request(id, arrival_s, item.prompt, item.output, SamplingParams(max_tokens=item.max_tokens, n=item.n))


def _source(asked: Asked) -> Source:
    name, _, rest = asked.spec.partition(":")
    if name in WORKLOADS:
        return WORKLOADS[name](asked)
    if name == "paper" and rest:
        return paper(Path(rest), asked.spec, asked.random, asked.limit)
    if asked.spec.endswith(PROMPTS):
        return recycled(read_prompts(Path(asked.spec), asked.encode), asked.spec, asked.limit)
    if asked.spec.endswith(TRACES):
        trace = read_trace(Path(asked.spec))
        return recycled(trace.items, asked.spec, asked.limit, trace.arrivals_s)
    known = unknown("workload", name, (*WORKLOADS, "paper:PATH"))
    raise InputError(f"{known}, or a path that ends in {', '.join((*TRACES, *PROMPTS))}")
