"""A testbed for LLM serving: one engine, whose allocators, schedulers and executors are swapped by name.

`from lab import LLM, SamplingParams` is how it is used from Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.core import InputError, SamplingParams

if TYPE_CHECKING:
    from lab.llm import LLM

__all__ = ["LLM", "InputError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lab.llm import LLM  # brings torch, which policies and the virtual clock do without

    return LLM
