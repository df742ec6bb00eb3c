"""A decoder of our own, fused for speed: one definition, whose families are rows of a table.

It takes its weights out of transformers' module and computes the same logits in fewer passes over memory: one matrix
product for query, key and value, one for gate and up; the residual sum inside the norm; rotation, query and key norms
and the store of K and V in one kernel. A layer is nine launches, with nothing on the host in between, so that a whole
step can be captured as a CUDA graph. What a row of the table cannot say is left to `packed.py`.

    x -- norm -- qkv -- rotate and store -- attention -- out --+-- norm -- gate, up -- silu x up -- down --+--
      \\_______________________________________________________/ \\_______________________________________/
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from lab.models import KVShape, Packed


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
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "opt": OPT, "gpt2": GPT2}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}
FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the context's length


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


class Decoder:
    """A `LanguageModel` with the weights of a transformers module, which is empty afterwards: they are moved."""

    capturable = True

    def __init__(self, module: Any, name: str, eos: tuple[int, ...] = ()) -> None:
        config, family = module.config, FAMILIES[module.config.model_type]
        assert covers(config), f"{name}: a decoder of another kind"
        self.name = name
        self.eos = eos
        self.vocab_size: int = config.vocab_size
        self.max_length: int = config.max_position_embeddings
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = module.device
        heads = config.num_attention_heads
        head_dim, kv_heads = config.hidden_size // heads, heads
        if family is LLAMA:  # the others have no such settings
            head_dim, kv_heads = getattr(config, "head_dim", None) or head_dim, config.num_key_value_heads or heads
        self.kv = KVShape(config.num_hidden_layers, kv_heads, head_dim, head_dim)
        self.eps: float = getattr(config, "rms_norm_eps", getattr(config, "layer_norm_epsilon", 1e-5))
        self._activate = None if family is LLAMA else ACTIVATIONS[config.activation_function]
        self._ops = kernels.for_device(self.device)
        self._rotation = None if family.positions else _rotation(module, self.max_length)
        self._collect(module, family)

    def logits(self, batch: Packed, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Store K and V of every token in [layers, num_blocks, block, Hk, D]; return logits [S, vocab_size]."""
        with torch.inference_mode():
            residual = F.embedding(batch.token_ids, self._embed)  # [T, hidden]
            if self._positions is not None:
                residual += F.embedding(batch.positions, self._positions)
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

    def _collect(self, module: Any, family: Family) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        tied = parameters["lm_head.weight"] is parameters[f"{family.embed}.weight"]

        def take(name: str, transposed: bool = False) -> Tensor | None:
            """Its memory leaves the module, so that at no time there are two copies of the whole model."""
            if name not in parameters:
                return None
            parameter = parameters[name]
            data, parameter.data = parameter.data, parameter.data.new_empty(0)
            return data.t().contiguous() if transposed else data

        def weights(*names: str, matrix: bool = False) -> Weights:
            found = [take(f"{name}.weight", matrix and family.transposed) for name in names]
            biases = [bias for bias in (take(f"{name}.bias") for name in names) if bias is not None]
            together = [tensor for tensor in found if tensor is not None]
            assert len(together) == len(names), f"{self.name}: no weights called {names}"
            return Weights(_join(together), _join(biases) if biases else None)

        def layer(i: int, attention: Any) -> Layer:
            prefix = family.layer.format(i)
            matrix = partial(weights, matrix=True)
            return Layer(
                first_norm=weights(prefix + family.first_norm),
                qkv=matrix(*(prefix + name for name in family.qkv)),
                q_norm=take(prefix + "self_attn.q_norm.weight"),
                k_norm=take(prefix + "self_attn.k_norm.weight"),
                out=matrix(prefix + family.out),
                second_norm=weights(prefix + family.second_norm),
                up=matrix(*(prefix + name for name in family.up)),
                down=matrix(prefix + family.down),
                window=getattr(attention, "sliding_window", getattr(module.config, "sliding_window", None)),
            )

        layers = module.get_submodule(family.layer.partition(".{}")[0])
        self._layers = [layer(i, getattr(each, "self_attn", None)) for i, each in enumerate(layers)]
        positions = take(f"{family.positions}.weight") if family.positions else None
        self._positions = None if positions is None else positions[family.skipped :]
        embed = take(f"{family.embed}.weight")
        head = embed if tied else take("lm_head.weight")
        assert embed is not None
        assert head is not None
        self._embed, self._head = embed, head
        self._last_norm = weights(family.last_norm)
        left = [name for name, parameter in parameters.items() if parameter.numel()]
        assert not left, f"{self.name}: weights that the decoder has no place for: {left}"
        kept = [self._embed, self._positions, *self._last_norm, *([] if tied else [self._head])]
        for each in self._layers:
            kept += [each.q_norm, each.k_norm, *chain(*(part for part in each if isinstance(part, Weights)))]
        self.weight_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rotation(module: Any, max_length: int) -> Tensor:
    """Cosines, then sines, of the angles that each position turns a head by: float32 [max_length, head_dim]."""
    rotary = module.model.rotary_emb
    positions = torch.arange(max_length, device=module.device, dtype=torch.float32)
    angles = positions[:, None] * rotary.inv_freq.to(module.device, torch.float32)
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * rotary.attention_scaling
