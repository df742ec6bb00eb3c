"""A decoder of our own, fused for speed: one definition, whose families are rows of a table (`families.py`).

It takes weights by transformers' names and computes the same logits in fewer passes over memory: one matrix product for
query, key and value, one for gate and up; the residual sum inside the norm; rotation, query and key norms and the store
of K and V in one kernel. A layer is nine launches, with nothing on the host in between, so that a whole step can be
captured as a CUDA graph. Where a token is alone in its step, reading the weights is all that takes time: norms, SwiGLU
and sums go along with it, and a layer is six launches (`kernels/row.py`). What a row of the table cannot say is left to
`packed.py`.

    x -- norm -- qkv -- rotate and store -- attention -- out --+-- norm -- gate, up -- silu x up -- down --+--
      \\_______________________________________________________/ \\_______________________________________/
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from lab.models import Packed
from lab.models.families import ACTIVATIONS, HEAD, LLAMA, Anatomy, Family


class Weights(NamedTuple):
    """Of a linear layer [out, in] or of a norm [hidden]."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    first_norm: Weights
    qkv: Weights
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Weights
    second_norm: Weights
    up: Weights
    down: Weights
    window: int | None


class Decoder:
    """A `LanguageModel`. It takes `tensors`, weights by name, out of the dictionary, which is empty afterwards."""

    capturable = True

    def __init__(self, anatomy: Anatomy, tensors: dict[str, Tensor], name: str, eos: tuple[int, ...] = ()) -> None:
        family, embed = anatomy.family, tensors[f"{anatomy.family.embed}.weight"]
        self.name = name
        self.eos = eos
        self.vocab_size = anatomy.vocab_size
        self.max_length = anatomy.max_length
        self.dtype: torch.dtype = embed.dtype
        self.device: torch.device = embed.device
        self.kv = anatomy.kv
        self.eps = anatomy.eps
        self._activate = ACTIVATIONS[anatomy.activation] if len(family.up) == 1 else None
        self._rms = family is LLAMA  # norms and gates as `row_product` has them
        self._ops = kernels.for_device(self.device)
        self._rotation = anatomy.rotation
        self._collect(tensors, family, anatomy.windows)

    def logits(self, batch: Packed, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Store K and V of every token in [layers, num_blocks, block, Hk, D]; return logits [S, vocab_size]."""
        with torch.inference_mode():
            residual = F.embedding(batch.token_ids, self._embed)  # [T, hidden]
            if self._positions is not None:
                residual += F.embedding(batch.positions, self._positions)
            if self._rms and len(batch.token_ids) == len(batch.sampled) == 1:
                return self._alone(residual, batch, k_cache, v_cache)
            x: Tensor | None = None
            for i, layer in enumerate(self._layers):
                x = self._layer(layer, x, residual, batch, k_cache[i], v_cache[i])
            assert x is not None
            kept = residual[batch.sampled]
            h = self._ops.norm(x[batch.sampled], *self._last_norm, self.eps, kept)
            return F.linear(h, self._head)

    def _layer(
        self, layer: Layer, x: Tensor | None, residual: Tensor, batch: Packed, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """One layer, whose result is still to be added to `residual` [T, hidden], as is `x`, the last one's."""
        ops, eps = self._ops, self.eps
        h = ops.norm(residual, *layer.first_norm, eps) if x is None else ops.norm(x, *layer.first_norm, eps, residual)
        qkv = F.linear(h, *layer.qkv)  # [T, (H + 2 Hk) D]
        norms = (layer.q_norm, layer.k_norm, eps, self._rotation)
        q = ops.rotate_and_store(qkv, *norms, batch.positions, batch.slots, k_cache, v_cache)  # [T, H, D]
        scale = self.kv.head_dim**-0.5
        attended = ops.attention(q, k_cache, v_cache, batch.ragged, scale=scale, window=layer.window)
        h = ops.norm(F.linear(attended.flatten(1), *layer.out), *layer.second_norm, eps, residual)
        up = F.linear(h, *layer.up)  # [T, intermediate], or twice that
        return F.linear(ops.silu_and_mul(up) if self._activate is None else self._activate(up), *layer.down)

    def _alone(self, residual: Tensor, batch: Packed, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """The same for a single token [1, hidden]: all of a layer but attention goes along with reading its weights."""
        ops, scale = self._ops, self.kv.head_dim**-0.5
        product = partial(ops.row_product, eps=self.eps)
        for layer, k, v in zip(self._layers, k_cache, v_cache, strict=True):
            qkv = product(residual, *layer.qkv, norm=layer.first_norm.weight)
            norms = (layer.q_norm, layer.k_norm, self.eps, self._rotation)
            q = ops.rotate_and_store(qkv, *norms, batch.positions, batch.slots, k, v)
            attended = ops.attention(q, k, v, batch.ragged, scale=scale, window=layer.window)
            product(attended.flatten(1), *layer.out, residual=residual)
            up = product(residual, *layer.up, norm=layer.second_norm.weight, gated=True)
            product(up, *layer.down, residual=residual)
        return product(residual, self._head, norm=self._last_norm.weight)

    def _collect(self, tensors: dict[str, Tensor], family: Family, windows: tuple[int | None, ...]) -> None:
        tied = tensors[f"{HEAD}.weight"] is tensors[f"{family.embed}.weight"]

        def take(name: str, transposed: bool = False) -> Tensor | None:
            """Whoever joins several lets go of them, so that at no time there are two copies of the whole model."""
            tensor = tensors.pop(name, None)
            return tensor.t().contiguous() if transposed and tensor is not None else tensor

        def weights(*names: str, matrix: bool = False) -> Weights:
            found = [take(f"{name}.weight", matrix and family.transposed) for name in names]
            biases = [bias for bias in (take(f"{name}.bias") for name in names) if bias is not None]
            together = [tensor for tensor in found if tensor is not None]
            assert len(together) == len(names), f"{self.name}: no weights called {names}"
            return Weights(_join(together), _join(biases) if biases else None)

        def layer(i: int, window: int | None) -> Layer:
            prefix = family.layer.format(i)
            matrix = partial(weights, matrix=True)
            return Layer(
                first_norm=weights(prefix + family.first_norm),
                qkv=matrix(*(prefix + name for name in family.qkv)),
                q_norm=take(f"{prefix}{family.q_norm}.weight"),
                k_norm=take(f"{prefix}{family.k_norm}.weight"),
                out=matrix(prefix + family.out),
                second_norm=weights(prefix + family.second_norm),
                up=matrix(*(prefix + name for name in family.up)),
                down=matrix(prefix + family.down),
                window=window,
            )

        self._layers = [layer(i, window) for i, window in enumerate(windows)]
        positions = take(f"{family.positions}.weight") if family.positions else None
        self._positions = None if positions is None else positions[family.skipped :]
        embed = take(f"{family.embed}.weight")
        head = take(f"{HEAD}.weight")
        assert embed is not None
        assert head is not None
        self._embed, self._head = embed, head
        self._last_norm = weights(family.last_norm)
        assert not tensors, f"{self.name}: weights that the decoder has no place for: {list(tensors)}"
        kept = [self._embed, self._positions, *self._last_norm, *([] if tied else [self._head])]
        for each in self._layers:
            kept += [each.q_norm, each.k_norm, *chain(*(part for part in each if isinstance(part, Weights)))]
        self.weight_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
