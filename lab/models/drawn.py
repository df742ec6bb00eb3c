"""Random weights at a shape: speed does not depend on their values, and there is nothing to fetch or to read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lab.models import KVShape
from lab.models.families import FAMILIES, HEAD, Anatomy, turns
from lab.shapes import ModelShape

SPREAD = 0.02  # of matrices and embeddings, as transformers would start training with
BASE = 10_000.0  # of rotations; what follows are transformers' defaults too
RMS_EPS, LAYER_NORM_EPS = 1e-6, 1e-5


def anatomy_of(shape: ModelShape, device: torch.device) -> Anatomy:
    """What a decoder of this shape is, weights apart."""
    rotation = None
    if not shape.learned_positions:
        pairs = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32)
        rotation = turns(1 / BASE ** (pairs / shape.head_dim), shape.max_length)
    return Anatomy(
        family=FAMILIES[shape.family],
        vocab_size=shape.vocab,
        max_length=shape.max_length,
        kv=KVShape(shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim),
        eps=LAYER_NORM_EPS if shape.biases else RMS_EPS,
        activation="silu" if shape.gated else "relu",
        windows=(None,) * shape.layers,
        rotation=rotation,
    )


def draw(shape: ModelShape, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Weights by transformers' names, made where they stay; the same for a seed, on one kind of device."""
    family, chance = FAMILIES[shape.family], torch.Generator(device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, size in _weights(shape):
        weight = torch.empty(size, device=device, dtype=dtype)
        tensors[f"{name}.weight"] = weight.normal_(0, SPREAD, generator=chance) if len(size) > 1 else weight.fill_(1)
        if shape.biases and name not in (family.embed, family.positions, HEAD):
            tensors[f"{name}.bias"] = torch.zeros(size[0], device=device, dtype=dtype)
    if shape.tied:
        tensors[f"{HEAD}.weight"] = tensors[f"{family.embed}.weight"]
    return tensors


def _weights(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each matrix [out, in] and each norm [size]."""
    family, hidden = FAMILIES[shape.family], shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {family.first_norm: (hidden,), family.second_norm: (hidden,)}
    layer |= zip(family.qkv, ((queries, hidden), (keys, hidden), (keys, hidden)), strict=True)
    layer |= {family.out: (hidden, queries), family.down: (hidden, shape.intermediate)}
    layer |= dict.fromkeys(family.up, (shape.intermediate, hidden))
    if shape.qk_norm:
        layer |= dict.fromkeys((family.q_norm, family.k_norm), (shape.head_dim,))
    yield family.embed, (shape.vocab, hidden)
    if family.positions:
        yield family.positions, (shape.learned_positions, hidden)
    for i in range(shape.layers):
        yield from ((family.layer.format(i) + name, size) for name, size in layer.items())
    yield family.last_norm, (hidden,)
    if not shape.tied:
        yield HEAD, (shape.vocab, hidden)
