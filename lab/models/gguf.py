"""GGUF files, read by transformers and unpacked to plain weights, whichever quantisation they came in."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM

from lab.core import InputError

VERSIONS = (2, 3)


def check_gguf(path: Path) -> None:
    """The first 8 bytes: what else is wrong shows while the file is parsed."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"GGUF":
        raise InputError(f"model {str(path)!r}: does not start with 'GGUF', as GGUF files do: fetch it again")
    (version,) = struct.unpack("<I", head[4:])
    if version not in VERSIONS:
        raise InputError(f"model {str(path)!r}: GGUF version {version}, but only 2 and 3 can be read: convert it again")


def read_gguf(path: Path, **options: Any) -> Any:
    """What `from_pretrained` gives for the file, with no weight left packed."""
    packing = getattr(transformers, "GgufConfig", None)  # versions that lack it always unpack
    if packing is not None:
        options["quantization_config"] = packing(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
