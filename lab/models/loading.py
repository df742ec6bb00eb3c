"""A model by name: SmolLM2, a folder, a safetensors or GGUF file, a Hub name, or random weights at a named shape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lab import shapes
from lab.core import InputError, unknown
from lab.models import DEFAULT, LanguageModel, smollm2
from lab.models.architectures import check_architecture
from lab.models.decoder import Decoder, covers
from lab.models.device import check_device, check_heads, check_type
from lab.models.files import check_folder, first_line, tensor_names
from lab.models.gguf import check_gguf, read_gguf
from lab.models.hub import from_hub
from lab.models.packed import PackedModel, implementation
from lab.models.quiet import quiet

SMOLLM2 = (DEFAULT, "smollm2", "smollm2-135m")


class Source(NamedTuple):
    """Where a model comes from: a shape for random weights, a folder, or one file of a folder."""

    kind: Literal["random", "safetensors", "gguf"]
    shape: shapes.ModelShape | None = None
    folder: Path = Path()
    file: str | None = None


def find(name: str) -> Source:
    """What `name` means; fetches what is not here yet. Raises InputError where it means nothing that exists."""
    lower = name.lower()
    if lower in SMOLLM2:
        return Source("safetensors", folder=smollm2.folder())
    if lower == "random" or lower.startswith("random:"):
        return Source("random", shape=shapes.shape(lower.partition(":")[2] or "smollm2-135m"))
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return Source("safetensors", folder=path)
    if path.is_file():
        return _file(path)
    if path.suffix in (".gguf", ".safetensors") or name[:1] in "./~" or name.count("/") > 1:
        raise InputError(
            f"model {name!r}: no such file or folder: give one that exists, or one of {', '.join(SMOLLM2[:2])}"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Source("safetensors", folder=from_hub(name))
    known = [*SMOLLM2[:2], "random", *(f"random:{shape}" for shape in shapes.SHAPES)]
    raise InputError(unknown("model", name, known) + ", a folder, a file, or organisation/name on the Hub")


def load(
    name: str = DEFAULT,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    fused: bool = True,
) -> LanguageModel:
    """A model on `device`; `dtype` None is bfloat16 on a GPU, float32 on a CPU; `seed` is that of random weights.

    It is our own decoder where that covers the architecture, unless `fused` is False, else transformers' modules.
    """
    device = check_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_type(device, dtype)
    source = find(name)
    try:
        with quiet():
            config = _config(source, name)
        check_architecture(config, name)
        with quiet(), torch.device(device):  # weights are made where they stay, in the type they keep: one copy
            module = _random(config, dtype, seed) if source.kind == "random" else _read(source, config, name, dtype)
    except torch.OutOfMemoryError as error:
        rule = f"its weights in {dtype} do not fit {device}"
        raise InputError(f"model {name!r}: {rule}: take a smaller model or dtype") from error
    make = Decoder if fused and covers(config) else PackedModel
    model = make(module.to(device), name, _end_of_text(module, source))
    check_heads(device, model.kv, name)
    return model


def load_tokenizer(name: str = DEFAULT) -> Any:
    """transformers' tokenizer of a model, with its chat template."""
    source = find(name)
    if source.kind == "random":
        rule = "random weights have no tokenizer"
        raise InputError(f"model {name!r}: {rule}: give prompts as token ids, or take a real model")
    try:
        return AutoTokenizer.from_pretrained(source.folder, **_gguf(source))
    except Exception as error:  # a tokenizer's files can be wrong in any number of ways
        unread = f"its tokenizer cannot be read ({first_line(error)})"
        raise InputError(f"model {name!r}: {unread}: fetch it again") from error


def _file(path: Path) -> Source:
    if path.suffix == ".gguf":
        check_gguf(path)
        return Source("gguf", folder=path.parent, file=path.name)
    if path.suffix != ".safetensors":
        rule = "is neither .safetensors nor .gguf"
        raise InputError(f"model {str(path)!r}: {rule}: convert it with transformers' save_pretrained")
    if not path.with_name("config.json").is_file():
        raise InputError(f"model {str(path)!r}: has no config.json beside it: put the model's there")
    tensor_names(path)
    return Source("safetensors", folder=path.parent, file=path.name)


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


def _random(config: Any, dtype: torch.dtype, seed: int) -> Any:
    """Weights as transformers would start training with; the same for a seed, on one kind of device."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation(config))


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
