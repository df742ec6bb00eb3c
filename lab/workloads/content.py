"""What a run adds to the requests of a workload: outputs or beams for each, a prefix that all share, and content.

Where only the lengths of a workload are known, each prompt gets token ids that no other begins with, so that a prefix
cache finds what is shared on purpose and nothing else. Where a workload knows which parts of prompts are alike, their
ids come to lie beside those of the prefix and within the vocabulary of the model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from lab.core import InputError, Request, SamplingParams
from lab.workloads.describe import Requests
from lab.workloads.pieces import APART, Pieces

STRIDE = 7919  # a prime: within a vocabulary, prompts begin with different tokens until all have been used


def dress(
    requests: Requests,
    n: int = 1,
    beams: int = 0,
    prefix: int = 0,
    max_tokens: int | None = None,
    vocabulary: int | None = None,
) -> Requests:
    """The same requests with `n` outputs (each its own where 1), beams, and `prefix` tokens before every prompt.

    `max_tokens` is what clients ask for who do not know how long the answer will be; longer forced outputs raise it.
    `vocabulary` bounds token ids where a model will read them. Raises InputError where it is too small.
    """
    return requests.map(lambda r: _dressed(r, n, beams, prefix, max_tokens, vocabulary))


def _dressed(
    request: Request, n: int, beams: int, prefix: int, max_tokens: int | None, vocabulary: int | None
) -> Request:
    prompt = request.prompt
    if isinstance(prompt, Pieces):
        prompt = prompt.within(prefix, vocabulary)
    else:
        if isinstance(prompt, range):
            prompt = _content(request.id, prefix, len(prompt), vocabulary)
        if prefix:
            prompt = (*range(prefix), *prompt)
    sampling = request.sampling
    if n > 1 or beams or max_tokens is not None:
        most = sampling.max_tokens if max_tokens is None else max(max_tokens, request.output or 1)
        sampling = _asked(sampling, n, beams, most)
    return Request(request.id, request.arrival_s, prompt, request.output, sampling)


@lru_cache(maxsize=4096)
def _asked(sampling: SamplingParams, n: int, beams: int, max_tokens: int) -> SamplingParams:
    """One object for all that ask for the same."""
    if n > 1 or beams:
        sampling = replace(sampling, n=n, beams=beams)
    return replace(sampling, max_tokens=max_tokens)


def _content(id: int, prefix: int, tokens: int, vocabulary: int | None) -> range:
    """Ids beyond those of the prefix."""
    if vocabulary is None:
        first = prefix + (id + 1) * APART
    else:
        room = vocabulary - prefix - tokens
        if room < 1:
            raise InputError(f"{prefix} + {tokens} tokens of different ids: the vocabulary has only {vocabulary}")
        first = prefix + id * STRIDE % room
    return range(first, first + tokens)
