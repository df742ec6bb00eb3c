"""What a model's name means: SmolLM2, a folder, a safetensors or GGUF file, a Hub name, random weights at a shape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

from lab import shapes
from lab.core import InputError, unknown
from lab.models import DEFAULT
from lab.models.files import check_folder, check_gguf, tensor_names

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
        from lab.models import smollm2  # and transformers, seconds that no other name needs; the Hub's client likewise

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
        from lab.models.hub import from_hub

        return Source("safetensors", folder=from_hub(name))
    known = [*SMOLLM2[:2], "random", *(f"random:{shape}" for shape in shapes.SHAPES)]
    raise InputError(unknown("model", name, known) + ", a folder, a file, or organisation/name on the Hub")


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
