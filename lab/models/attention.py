"""How attention inside transformers' modules becomes ours: store K and V in the pool, then attend through block tables.

transformers asks its registry for the attention function that the configuration names (`AttentionInterface`). Ours
finds what belongs to the running step through the module that calls it: each attention module of a model points at one
`Door`. Modules that ask no registry but call torch's `scaled_dot_product_attention` are met there (`SdpaDoor`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

import kernels
from kernels.ragged import Ragged
from lab.models import KVShape

NAME = "kvlab"  # in transformers' registry of attention functions


class Attend(Protocol):
    """Attention of one layer over a packed batch: q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, H, Dv]."""

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


class PoolAttention:
    """Attention of one step: K and V of its tokens go to their slots, then every row reads its own context."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, slots: Tensor, ragged: Ragged) -> None:
        """Caches [layers, num_blocks, block, Hk, D]; slots int64 [T]."""
        self.k_cache = k_cache
        self.v_cache = v_cache
        self.slots = slots
        self.ragged = ragged
        self.ops = kernels.for_device(k_cache.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        k_layer, v_layer = self.k_cache[layer], self.v_cache[layer]
        dtype = k_layer.dtype  # some modules rotate in float32 and leave it so
        self.ops.store(k.to(dtype), v.to(dtype), k_layer, v_layer, self.slots)
        return self.ops.attention(q.to(dtype), k_layer, v_layer, self.ragged, **options)


class ShapeProbe:
    """Stands in for attention once, to see what each layer would keep. Attends to nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int]] = []  # layer, Hk, D, Dv

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        self.calls.append((layer, *k.shape[1:], v.shape[2]))
        return q.new_zeros(*q.shape[:2], v.shape[2])

    def shape(self, layers: int) -> KVShape | None:
        """What a model of so many layers keeps; None where its layers are not all alike, or not all were seen once."""
        seen = {call[1:] for call in self.calls}
        if [call[0] for call in self.calls] != list(range(layers)) or len(seen) != 1:
            return None
        return KVShape(layers, *seen.pop())


class Door:
    """The one place where the attention modules of a model find what they attend with in the running step."""

    def __init__(self, model: nn.Module) -> None:
        self.attend: Attend | None = None
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.lab_door = self  # type: ignore[assignment]

    @contextmanager
    def through(self, attend: Attend) -> Iterator[None]:
        self.attend = attend
        try:
            yield
        finally:
            self.attend = None


class SdpaDoor(TorchFunctionMode):
    """For modules that call torch's attention by themselves, once in each layer, in order."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.layer = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        layer, self.layer = self.layer, self.layer + 1
        out = _attend(self.attend, layer, args[0], args[1], args[2], kwargs.get("scale"))
        return out.transpose(1, 2).contiguous()  # [1, H, T, Dv], as torch returns it


def _attend(attend: Attend, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **options: Any) -> Tensor:
    """From transformers' layout, q [1, H, T, D], k [1, Hk, T, D], v [1, Hk, T, Dv], to ours and back: [1, T, H, Dv]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = attend(layer, q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), scale=scale, **options)
    return out[None]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls. Masks are not made (see below): causality and windows are the kernel's."""
    door = module.lab_door
    assert isinstance(door, Door), "a module that was made after its model"
    assert door.attend is not None, "attention outside of a step"
    layer = module.layer_idx
    assert isinstance(layer, int)
    options = {"window": sliding_window, "softcap": softcap, "sinks": s_aux}
    return _attend(door.attend, layer, query, key, value, scaling, **options), None


def no_mask(*_: Any, **__: Any) -> None:
    """A [T, T] mask over a packed batch would be large, and nobody reads it."""


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, no_mask)
