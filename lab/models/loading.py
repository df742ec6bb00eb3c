"""A model by name, on its device: our own decoder where that covers the architecture, else transformers' modules."""

from __future__ import annotations

from typing import Any

import torch

from lab.core import InputError
from lab.models import DEFAULT, LanguageModel
from lab.models.decoder import Decoder
from lab.models.device import check_device, check_heads, check_type
from lab.models.drawn import anatomy_of, draw
from lab.models.names import find


def load(
    name: str = DEFAULT,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    fused: bool = True,
) -> LanguageModel:
    """A model on `device`; `dtype` None is bfloat16 on a GPU, float32 on a CPU; `seed` is that of random weights.

    `fused` False: transformers' modules in any case.
    """
    device = check_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_type(device, dtype)
    source = find(name)
    try:
        if source.shape and fused:
            tensors = draw(source.shape, device, dtype, seed)
            model: LanguageModel = Decoder(anatomy_of(source.shape, device), tensors, name)
        else:
            from lab.models import checkpoints  # transformers' modelling code takes seconds to import

            model = checkpoints.read(source, name, device, dtype, seed, fused)
    except torch.OutOfMemoryError as error:
        rule = f"its weights in {dtype} do not fit {device}"
        raise InputError(f"model {name!r}: {rule}: take a smaller model or dtype") from error
    check_heads(device, model.kv, name)
    return model


def load_tokenizer(name: str = DEFAULT) -> Any:
    """transformers' tokenizer of a model, with its chat template."""
    source = find(name)
    if source.kind == "random":
        rule = "random weights have no tokenizer"
        raise InputError(f"model {name!r}: {rule}: give prompts as token ids, or take a real model")
    from lab.models import checkpoints

    return checkpoints.read_tokenizer(source, name)
