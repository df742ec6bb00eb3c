"""Models, as the executor sees them: they turn a packed batch into logits, and keep K and V in the pool they are given.

A model is anything with the attributes and the one method of `LanguageModel`. `decoder.py` is our own, fused for speed,
for the families that its table has; `packed.py` makes one from transformers' own modules, for all others. Importing
this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from kernels.ragged import Ragged

DEFAULT = "smollm2-135m-instruct"


class KVShape(NamedTuple):
    """What one token leaves in memory. K and V may differ in width (multi-head latent attention, expanded)."""

    layers: int
    num_kv_heads: int
    head_dim: int  # of K
    head_dim_v: int

    def bytes_per_token(self, itemsize: int) -> int:
        """K and V of one token in every layer, in bytes, with numbers of `itemsize` bytes."""
        return self.layers * self.num_kv_heads * (self.head_dim + self.head_dim_v) * itemsize


class Packed(NamedTuple):
    """One step's batch: the tokens of all its sequences end to end, with no padding between them."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    slots: torch.Tensor  # int64 [T], where K and V of each token go; -1 is nowhere
    sampled: torch.Tensor  # int64 [S], the tokens whose logits are wanted
    ragged: Ragged  # rows, contexts and block tables, for the attention kernel


class LanguageModel(Protocol):
    name: str
    kv: KVShape
    vocab_size: int
    max_length: int  # tokens of one sequence; positions beyond are not defined
    eos: tuple[int, ...]  # token ids that end a text
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    capturable: bool  # is a step launches alone, with nothing on the host between them: then it fits a CUDA graph

    def logits(self, batch: Packed, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """Store K and V of every token in [layers, num_blocks, block, Hk, D]; return logits [S, vocab_size]."""
        ...
