"""Shapes of models by name, and what follows from them: parameters, bytes of K and V per token, operations.

They are the PagedAttention paper's models (Kwon et al., section 6.1) and newer ones that fit one GPU or a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lab.core import InputError, unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer, less its weights. Operations count a multiplication and an addition as two."""

    name: str
    family: str  # what transformers calls the architecture: opt, llama, qwen3
    layers: int
    hidden: int
    heads: int  # of queries
    kv_heads: int  # of keys and of values; fewer than `heads` where groups of query heads share them
    head_dim: int
    intermediate: int  # width of the MLP
    vocab: int
    max_length: int  # tokens of the longest sequence it was made for
    gated: bool = True  # MLP with a third matrix, whose output gates the first's
    tied: bool = False  # the output head is the embedding matrix
    biases: bool = False  # in every linear layer and norm
    qk_norm: bool = False  # a norm over each query head and each key head
    learned_positions: int = 0  # rows of the position table; 0 where positions are rotations

    @property
    def matrix_parameters(self) -> int:
        """Of the matrices that every token is multiplied with: all layers, without embeddings and output head."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim  # Q and output; K and V
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def vector_parameters(self) -> int:
        """Of norms and biases."""
        norm = self.hidden * (2 if self.biases else 1)
        layer = 2 * norm + (2 * self.head_dim if self.qk_norm else 0)
        if self.biases:
            layer += (self.heads + 2 * self.kv_heads) * self.head_dim + self.intermediate + 2 * self.hidden
        return self.layers * layer + norm

    @property
    def embedding_parameters(self) -> int:
        """Of the token embeddings; the output head has as many, and is the same matrix where tied."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.embedding_parameters * (1 if self.tied else 2) + self.learned_positions * self.hidden
        return self.matrix_parameters + self.vector_parameters + embeddings

    @property
    def parameters_read(self) -> int:
        """What each step reads, however few its tokens: the layers and the head. Of embeddings it reads rows only."""
        return self.matrix_parameters + self.vector_parameters + self.embedding_parameters

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of one token's K and V in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype_bytes

    @property
    def linear_flops_per_token(self) -> int:
        """Operations of the layers' matrix products, per token."""
        return 2 * self.matrix_parameters

    @property
    def head_flops_per_row(self) -> int:
        """Operations of the output head, per row of logits: only tokens that are sampled from need one."""
        return 2 * self.embedding_parameters

    def attention_flops(self, tokens: int, positions: int) -> int:
        """Operations of causal attention when the last `tokens` of `positions` are computed, in all layers.

        A query meets the positions up to its own; each pair costs a product with K and one with V.
        """
        pairs = tokens * positions - tokens * (tokens - 1) // 2
        return 4 * self.layers * self.heads * self.head_dim * pairs

    def transformers_config(self) -> dict[str, Any]:
        """What to pass to `transformers.AutoConfig.for_model(family, **arguments)` for this very shape."""
        common = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.max_length,
            "tie_word_embeddings": self.tied,
        }
        if self.family == "opt":
            return common | {"ffn_dim": self.intermediate, "word_embed_proj_dim": self.hidden}
        grouped = {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        return common | grouped | {"intermediate_size": self.intermediate}


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    """Zhang et al., OPT (2022), table 1. Its position table has two rows more than the longest sequence."""
    return ModelShape(
        name=name,
        family="opt",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocab=50272,
        max_length=2048,
        gated=False,
        tied=True,
        biases=True,
        learned_positions=2050,
    )


_ALL = (
    _opt("opt-13b", layers=40, hidden=5120, heads=40),
    _opt("opt-66b", layers=64, hidden=9216, heads=72),
    _opt("opt-175b", layers=96, hidden=12288, heads=96),
    ModelShape(
        name="llama-13b",
        family="llama",
        layers=40,
        hidden=5120,
        heads=40,
        kv_heads=40,
        head_dim=128,
        intermediate=13824,
        vocab=32000,
        max_length=2048,
    ),
    ModelShape(
        name="llama-3-8b",
        family="llama",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate=14336,
        vocab=128256,
        max_length=8192,
    ),
    ModelShape(
        name="qwen3-0.6b",
        family="qwen3",
        layers=28,
        hidden=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=3072,
        vocab=151936,
        max_length=40960,
        tied=True,
        qk_norm=True,
    ),
    ModelShape(
        name="smollm2-135m",
        family="llama",
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        intermediate=1536,
        vocab=49152,
        max_length=8192,
        tied=True,
    ),
)

SHAPES = {shape.name: shape for shape in _ALL}


def shape(name: str) -> ModelShape:
    """The shape called `name`, in capitals or not. Raises InputError for a name that does not exist."""
    found = SHAPES.get(name.lower())
    if found is None:
        raise InputError(unknown("model shape", name.lower(), SHAPES))
    return found
