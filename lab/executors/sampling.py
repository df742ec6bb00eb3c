"""From logits to tokens: greedy or drawn, with log-probabilities, all rows of a step at once.

The noise of a draw is a function of (seed, request, output index, position) and of nothing else, so sampled text is the
same under every policy. A token is drawn as the winner of a race (Gumbel-max): token i arrives at E_i / p_i, with E_i
exponential, and is first with probability p_i. Each vocabulary entry has a hash of its own; so logits that differ in
the last bit, as those of batches of other sizes do, change the winner only in a photo finish. With one number for the
whole row and the inverse of the cumulated distribution, each of its steps, one per token, would be such a place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.reference import exponential
from kernels.upload import upload
from lab.core import SamplingParams, Sequence


class Draw(NamedTuple):
    """What a row is drawn by."""

    params: SamplingParams
    key: int  # of its noise
    alternatives: int  # the likeliest tokens, reported with their log-probabilities


class Drawn(NamedTuple):
    tokens: Tensor  # int64 [S]
    logprobs: Tensor  # float32 [S]; before temperature, top-k and top-p
    top_tokens: Tensor  # int64 [S, n], n the most alternatives that any row asks for
    top_logprobs: Tensor  # float32 [S, n]


def draw_of(s: Sequence, ends: int = 1) -> Draw:
    """How the next token of `s` is drawn; `ends` is the number of tokens that end a text.

    A beam needs as many candidates as there are beams, besides those with which all of them might end.
    """
    params = s.group.request.sampling
    alternatives = max(params.logprobs, params.beams * (1 + max(1, ends + len(params.stop))))
    request = s.group.request
    noise = request.id if request.noise is None else request.noise
    key = noise_key(params.seed, noise, s.index, len(s.tokens)) if params.temperature else 0
    return Draw(params, key, alternatives)


def noise_key(seed: int, request: int, output: int, position: int) -> int:
    """64 bits, signed, that differ wherever one of the four does."""
    digest = blake2b(struct.pack("<4q", seed, request, output, position), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def plain(draws: Iterable[Draw]) -> bool:
    """Does one pass over the logits answer all that is asked?"""
    return not any(draw.alternatives or draw.params.top_k or draw.params.top_p < 1 for draw in draws)


def sample(logits: Tensor, draws: Seq[Draw]) -> Drawn:
    """One token for each row of logits [S, V]."""
    if plain(draws):
        temperature = torch.tensor([draw.params.temperature for draw in draws], dtype=torch.float32)
        keys = torch.tensor([draw.key for draw in draws], dtype=torch.int64)
        temperature, keys = upload(temperature, logits.device), upload(keys, logits.device)
        tokens, chosen = kernels.for_device(logits.device).sample(logits, temperature, keys)
        return Drawn(tokens, chosen, tokens.new_empty(len(draws), 0), chosen.new_empty(len(draws), 0))
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    tokens = logits.argmax(-1)
    noisy = [i for i, draw in enumerate(draws) if draw.params.temperature]
    if noisy:
        rows = upload(torch.tensor(noisy), logits.device)
        tokens = tokens.index_copy(0, rows, _race(logits[rows], [draws[i] for i in noisy]))
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    most = min(max((draw.alternatives for draw in draws), default=0), logits.shape[1])
    top = logprobs.topk(most, dim=-1)
    return Drawn(tokens, chosen, top.indices, top.values)


def _race(logits: Tensor, draws: Seq[Draw]) -> Tensor:
    """Draw from logits [S, V] -> [S]."""
    device = logits.device
    temperature = upload(torch.tensor([draw.params.temperature for draw in draws]), device)
    tiny = torch.finfo(torch.float32).tiny
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=tiny)[:, None]  # at most 0: no overflow
    if any(draw.params.top_k or draw.params.top_p < 1 for draw in draws):
        logits = _keep_likely(logits, draws)
    keys = upload(torch.tensor([draw.key for draw in draws]), device)
    return (logits - exponential(keys, logits.shape[1]).log()).argmax(-1)


def _keep_likely(logits: Tensor, draws: Seq[Draw]) -> Tensor:
    """-inf for what top-k leaves out, then for all of the rest but the fewest tokens that reach `top_p`."""
    size = logits.shape[1]
    top_k = upload(torch.tensor([draw.params.top_k or size for draw in draws]), logits.device)
    top_p = upload(torch.tensor([draw.params.top_p for draw in draws]), logits.device)
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(size, device=logits.device) >= top_k[:, None]
    probabilities = sorted_logits.masked_fill(beyond, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all tokens that are likelier
    beyond |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
