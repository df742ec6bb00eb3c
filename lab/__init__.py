"""A testbed for LLM serving: one engine, whose allocators, schedulers and executors are swapped by name.

`from lab import LLM, SamplingParams` is how it is used from Python (types: `__init__.pyi`).
"""

from __future__ import annotations

import importlib
from typing import Any

from lab.core import InputError, SamplingParams

__all__ = ["LLM", "InputError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """LLM brings torch, which policies and the virtual clock do without, and on which no record of theirs depends."""
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("lab.llm").LLM
