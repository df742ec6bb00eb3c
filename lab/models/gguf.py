"""GGUF files, read by transformers and unpacked to plain weights, whichever quantisation they came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM


def read_gguf(path: Path, **options: Any) -> Any:
    """What `from_pretrained` gives for the file, with no weight left packed."""
    packing = getattr(transformers, "GgufConfig", None)  # versions that lack it always unpack
    if packing is not None:
        options["quantization_config"] = packing(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
