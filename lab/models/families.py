"""Families of decoders, as rows of a table: what `decoder.py` must know of an architecture besides its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.models import KVShape


@dataclass(frozen=True, kw_only=True)
class Family:
    """What transformers calls the weights of a family. Norms without a bias are RMSNorm, with one LayerNorm."""

    embed: str
    layer: str  # of layer {}
    first_norm: str  # before attention
    qkv: tuple[str, ...]
    out: str
    second_norm: str  # before the MLP
    up: tuple[str, ...]  # gate and up where there are two
    down: str
    last_norm: str
    q_norm: str = "self_attn.q_norm"  # of each head, where there is one
    k_norm: str = "self_attn.k_norm"
    positions: str = ""  # learned; else they are rotations
    skipped: int = 0  # rows of the position table that stand before position 0
    transposed: bool = False  # matrices are [in, out]


LLAMA = Family(
    embed="model.embed_tokens",
    layer="model.layers.{}.",
    first_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    second_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    last_norm="model.norm",
)
OPT = Family(
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    skipped=2,
    layer="model.decoder.layers.{}.",
    first_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    second_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
    last_norm="model.decoder.final_layer_norm",
)
GPT2 = Family(
    embed="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{}.",
    first_norm="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    second_norm="ln_2",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    last_norm="transformer.ln_f",
    transposed=True,
)
HEAD = "lm_head"  # in all of them; the embedding itself where the two are tied
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "opt": OPT, "gpt2": GPT2}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the context's length


class Anatomy(NamedTuple):
    """One decoder of a family."""

    family: Family
    vocab_size: int
    max_length: int
    kv: KVShape
    eps: float  # of its norms
    activation: str  # of an MLP without a gate; with one it is SiLU
    windows: tuple[int | None, ...]  # of each layer's attention
    rotation: Tensor | None  # see `turns`; None where positions are learned


def turns(inverse_frequencies: Tensor, max_length: int, scaling: float = 1.0) -> Tensor:
    """Cosines, then sines, of the angles that each position turns a head by: float32 [max_length, head_dim]."""
    frequencies = inverse_frequencies.float()  # [head_dim / 2]
    angles = torch.arange(max_length, device=frequencies.device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * scaling


def covers(config: Any) -> bool:
    """Can a row of the table say all there is to say about this architecture?"""
    if config.model_type not in FAMILIES:
        return False
    family = FAMILIES[config.model_type]
    if family is LLAMA:
        rotation = config.rope_parameters or {}
        whole = rotation.get("partial_rotary_factor") in (None, 1.0)
        return config.hidden_act == "silu" and rotation.get("rope_type") in FIXED_ROTATIONS and whole
    if config.activation_function not in ACTIVATIONS:
        return False
    if config.model_type == "opt":
        plain = config.do_layer_norm_before and not getattr(config, "_remove_final_layer_norm", False)
        return plain and config.word_embed_proj_dim == config.hidden_size and config.layer_norm_elementwise_affine
    return not (config.scale_attn_by_inverse_layer_idx or config.add_cross_attention) and config.scale_attn_weights
