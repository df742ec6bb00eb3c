"""Every architecture that runs here, at a tiny random shape, with weights large enough for attention to matter."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lab.models.checkpoints import fuse
from lab.models.decoder import Decoder
from lab.models.packed import PackedModel, implementation

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
SLIDING = ALTERNATING | {"sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
DIFFERENT: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "gpt2": GPT2,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": 8},
    "gemma": {"head_dim": 16},
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0},
    "gemma3_text": GEMMA | ALTERNATING,
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": EXPERTS | {"head_dim": 16, "num_experts": 4},
    "gpt_oss": SLIDING | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": EXPERTS
    | LATENT
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_bigcode": GPT2,
    "cohere2": SLIDING,
    "olmo3": SLIDING,
    "exaone4": SLIDING,
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
}


def tiny_config(kind: str, **other: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **COMMON | DIFFERENT.get(kind, {}) | other)


def build(config: PretrainedConfig, attention: str, state: dict[str, torch.Tensor] | None = None) -> Any:
    """A model in float32; random weights of standard deviation 0.2, or those of `state`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
        if state is not None:
            model.load_state_dict(state)
            return model
        for parameter in model.parameters():
            noise = 0.2 * torch.randn_like(parameter)
            parameter.data = noise if parameter.ndim > 1 else parameter.data + noise
    return model


def pair(kind: str, **other: Any) -> tuple[Any, PackedModel]:
    """transformers' own model, with its plainest attention, and ours with the same weights."""
    theirs = build(tiny_config(kind, **other), "eager")
    config = tiny_config(kind, **other)
    return theirs, PackedModel(build(config, implementation(config), theirs.state_dict()), f"tiny {kind}", (2,))


def fused(kind: str, **other: Any) -> tuple[Any, Decoder]:
    """The same with our own decoder, which takes the weights out of a module of its own."""
    theirs = build(tiny_config(kind, **other), "eager")
    return theirs, fuse(build(tiny_config(kind, **other), "eager", theirs.state_dict()), f"tiny {kind}", (2,))


@torch.inference_mode()
def ordinary_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] in one pass over one sequence."""
    return model(torch.tensor([tokens])).logits[0]
