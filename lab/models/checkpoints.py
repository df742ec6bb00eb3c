"""A model through transformers: its configuration, its weights read, and which of our two kinds is made of them.

A file of its own because transformers' modelling code takes seconds to import, which random weights do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lab.core import InputError
from lab.models import KVShape, LanguageModel
from lab.models.architectures import check_architecture
from lab.models.decoder import Decoder
from lab.models.drawn import draw
from lab.models.families import FAMILIES, LLAMA, Anatomy, covers, turns
from lab.models.files import first_line
from lab.models.gguf import read_gguf
from lab.models.names import Source
from lab.models.packed import PackedModel, implementation
from lab.models.quiet import quiet


def read(source: Source, name: str, device: torch.device, dtype: torch.dtype, seed: int, fused: bool) -> LanguageModel:
    """Our own decoder where that covers the architecture, unless `fused` is False, else transformers' modules."""
    with quiet():
        config = _config(source, name)
    check_architecture(config, name)
    with quiet(), torch.device(device):  # weights are made where they stay, in the type they keep: one copy
        module = _random(source, config, dtype, seed) if source.shape else _read(source, config, name, dtype)
    make = fuse if fused and covers(config) else PackedModel
    return make(module.to(device), name, _end_of_text(module, source))


def fuse(module: Any, name: str, eos: tuple[int, ...] = ()) -> Decoder:
    """Our decoder with the weights of a transformers module, which is empty afterwards: they are moved."""
    config, family = module.config, FAMILIES[module.config.model_type]
    assert covers(config), f"{name}: a decoder of another kind"
    heads = config.num_attention_heads
    head_dim, kv_heads, activation = config.hidden_size // heads, heads, "silu"
    if family is LLAMA:  # the others have no such settings
        head_dim, kv_heads = getattr(config, "head_dim", None) or head_dim, config.num_key_value_heads or heads
    else:
        activation = config.activation_function
    layers = module.get_submodule(family.layer.partition(".{}")[0])
    # Qwen's layers know their own; of the others only Mistral's heed the setting, which any configuration may have.
    window = config.sliding_window if config.model_type == "mistral" else None
    length, rotation = config.max_position_embeddings, None
    if not family.positions:
        rotary = module.model.rotary_emb
        rotation = turns(rotary.inv_freq.to(module.device), length, rotary.attention_scaling)
    anatomy = Anatomy(
        family=family,
        vocab_size=config.vocab_size,
        max_length=length,
        kv=KVShape(config.num_hidden_layers, kv_heads, head_dim, head_dim),
        eps=getattr(config, "rms_norm_eps", getattr(config, "layer_norm_epsilon", 1e-5)),
        activation=activation,
        windows=tuple(getattr(getattr(each, "self_attn", None), "sliding_window", window) for each in layers),
        rotation=rotation,
    )
    return Decoder(anatomy, _taken(module), name, eos)


def read_tokenizer(source: Source, name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source.folder, **_gguf(source))
    except Exception as error:  # a tokenizer's files can be wrong in any number of ways
        unread = f"its tokenizer cannot be read ({first_line(error)})"
        raise InputError(f"model {name!r}: {unread}: fetch it again") from error


def _taken(module: Any) -> dict[str, Tensor]:
    """All weights by name, those that are tied as one object; the module keeps none."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = {parameter: parameter.data for parameter in parameters.values()}
    for parameter in tensors:
        parameter.data = parameter.data.new_empty(0)
    return {name: tensors[parameter] for name, parameter in parameters.items()}


def _config(source: Source, name: str) -> Any:
    try:
        if source.shape is not None:
            return AutoConfig.for_model(source.shape.family, **source.shape.transformers_config())
        return AutoConfig.from_pretrained(source.folder, **_gguf(source))
    except Exception as error:  # whatever a damaged or foreign file leads the parser to
        unread = f"its configuration cannot be read ({first_line(error)})"
        raise InputError(f"model {name!r}: {unread}: fetch it again") from error


def _gguf(source: Source) -> dict[str, Any]:
    """What transformers wants to know besides the folder."""
    return {"gguf_file": source.file} if source.kind == "gguf" else {}


def _random(source: Source, config: Any, dtype: torch.dtype, seed: int) -> Any:
    """transformers' modules with the same random weights that our own decoder has."""
    assert source.shape is not None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # transformers draws some first
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation(config))
    module.load_state_dict(draw(source.shape, module.device, dtype, seed))
    return module


def _read(source: Source, config: Any, name: str, dtype: torch.dtype) -> Any:
    options = {"dtype": dtype, "attn_implementation": implementation(config), "output_loading_info": True}
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    try:
        if source.kind == "gguf":
            module, info = read_gguf(source.folder / str(source.file), **options)
        else:
            config.transformers_weights = source.file  # None: the usual name, or the index of the shards
            module, info = from_pretrained(source.folder, config=config, use_safetensors=True, **options)
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        raise InputError(f"model {name!r}: reading it needs a package that is missing: {first_line(error)}") from error
    except Exception as error:  # whatever a damaged file leads the parser to
        unread = f"its weights cannot be read ({first_line(error)})"
        raise InputError(f"model {name!r}: {unread}: fetch them again") from error
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        rule = f"lacks {len(wrong)} weights that its configuration asks for, {wrong[0]} first"
        raise InputError(f"model {name!r}: {rule}: fetch config and weights again, from one place")
    return module


def _end_of_text(module: Any, source: Source) -> tuple[int, ...]:
    """Token ids that end a text; random weights never mean to."""
    if source.kind == "random":
        return ()
    ends = getattr(module.generation_config, "eos_token_id", None) or module.config.eos_token_id
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
