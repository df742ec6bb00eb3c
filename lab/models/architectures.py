"""Which of transformers' architectures run here: those whose logits a test compares, and why certain others cannot."""

from __future__ import annotations

from typing import Any

from lab.core import InputError, unknown

# Each is compared with transformers' ordinary logits in tests/models/test_architectures.py, which walks this list.
THROUGH_INTERFACE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi",
    "phi3",
    "starcoder2",
    "stablelm",
    "olmo2",
    "granite",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "cohere",
    "gpt_bigcode",
    "arcee",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "glm",
    "glm4",
    "glm4_moe",
    "granitemoe",
    "nemotron",
    "olmo",
    "olmo3",
    "olmoe",
    "seed_oss",
)
THROUGH_SDPA = ("falcon",)  # asks no registry, but calls torch's attention function
PROVEN = THROUGH_INTERFACE + THROUGH_SDPA

OWN_ATTENTION = "computes attention inside its own module, out of reach of another cache"
STATE = "keeps state other than K and V ({}), which no block table describes"
REFUSED = {
    **dict.fromkeys(("gptj", "codegen", "bloom", "mpt", "gpt_neo", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), STATE.format("a state-space layer's")),
    **dict.fromkeys(("jamba", "bamba", "zamba", "zamba2", "nemotron_h"), STATE.format("a state-space layer's")),
    **dict.fromkeys(("falcon_h1", "granitemoehybrid"), STATE.format("a state-space layer's")),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), STATE.format("a convolution's")),
    **dict.fromkeys(("rwkv", "xlstm", "recurrent_gemma"), STATE.format("a recurrence's")),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "minimax", "kimi_linear"), STATE.format("linear attention's")
    ),
}


def check_architecture(config: Any, name: str) -> None:
    """Refuse what cannot run, by name, before any weight is read. `name` is what was typed."""
    kind = config.model_type
    if kind in REFUSED:
        raise InputError(f"model {name!r}: architecture {kind} {REFUSED[kind]}: choose one of {', '.join(PROVEN)}")
    if kind not in PROVEN:
        reason = "its logits have not been compared with transformers' own here; add it to lab/models/architectures.py"
        raise InputError(f"model {name!r}: {unknown('architecture', kind, PROVEN)}: {reason}")
    if getattr(config, "alibi", False):
        reason = "adds ALiBi to the logits, which our attention does not"
        raise InputError(f"model {name!r}: {kind} with alibi=True {reason}: choose a checkpoint with rotary positions")
    if getattr(config, "use_bidirectional_attention", False):
        reason = "attends to later tokens too, which makes it an encoder"
        raise InputError(f"model {name!r}: {kind} with use_bidirectional_attention=True {reason}: choose a decoder")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        reason = f"has layers of kind {', '.join(sorted(kinds))}, of which only full and sliding attention run here"
        raise InputError(f"model {name!r}: {kind} {reason}: choose a checkpoint without them")
