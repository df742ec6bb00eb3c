"""A model made of transformers' own modules, which computes one packed batch on a pool of K and V that it is given."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lab.core import InputError
from lab.models import Packed
from lab.models.architectures import THROUGH_SDPA, check_architecture
from lab.models.attention import NAME, Attend, Door, PoolAttention, SdpaDoor, ShapeProbe

UNBOUNDED = 2**31 - 1  # max_length where the configuration states none


def implementation(config: Any) -> str:
    """What to pass as `attn_implementation` when the module is built."""
    return "sdpa" if config.model_type in THROUGH_SDPA else NAME


class PackedModel:
    """A `LanguageModel` out of a transformers module in evaluation mode, built with `implementation(config)`."""

    capturable = False  # what its modules do on the host is theirs

    def __init__(self, module: Any, name: str, eos: tuple[int, ...] = ()) -> None:
        config = module.config
        check_architecture(config, name)
        self.module = module.eval().requires_grad_(False)
        self.name = name
        self.eos = eos
        self.vocab_size: int = config.vocab_size
        self.max_length: int = getattr(config, "max_position_embeddings", None) or UNBOUNDED
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = module.device
        tensors = chain(module.parameters(), module.buffers())  # each shared one comes once
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        self._sdpa = config.model_type in THROUGH_SDPA
        took = config._attn_implementation
        assert took == implementation(config), f"{name}: transformers kept the attention {took!r}"
        self._door = Door(module)
        self.kv = self._probe()

    def logits(self, batch: Packed, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Store K and V of every token in [layers, num_blocks, block, Hk, D]; return float32 logits [S, vocab_size]."""
        attend = PoolAttention(k_cache, v_cache, batch.slots, batch.ragged)
        return self._forward(batch.token_ids, batch.positions, batch.sampled, attend)

    @torch.inference_mode()
    def _forward(self, token_ids: Tensor, positions: Tensor, sampled: Tensor, attend: Attend) -> Tensor:
        inputs = {"input_ids": token_ids[None], "position_ids": positions[None], "logits_to_keep": sampled}
        with SdpaDoor(attend) if self._sdpa else self._door.through(attend):
            out = self.module(**inputs, use_cache=False, return_dict=True)
        return out.logits[0].float()

    def _probe(self) -> Any:
        """One token, to learn what every layer keeps; a layer that never attends would keep something else."""
        probe = ShapeProbe()
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._forward(zero, zero, zero, probe)
        layers = self.module.config.num_hidden_layers
        shape = probe.shape(layers)
        if shape is None:
            seen = sorted(set(probe.calls))
            rule = f"each of its {layers} layers must keep K and V of one shape, seen were (layer, heads, K, V) {seen}"
            raise InputError(f"model {self.name!r}: {rule}: choose another architecture")
        return shape
