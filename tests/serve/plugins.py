"""Policies of which a server is told by name, module:name, and which do in its engine's process what a test needs.

Token 13 at the start of a prompt makes the allocator fail, 14 the launch of its step, 15 what comes of it; the text
"untokenisable" makes the tokenizer fail.
"""

from __future__ import annotations

import os
import time
from typing import Any

import lab
from lab.allocators import ALLOCATORS, Allocator
from lab.core import Limits, Plan, Sequence
from lab.executors.torch import TorchExecutor

ALLOCATOR, LAUNCH, COLLECT = 13, 14, 15
UNTOKENISABLE = "untokenisable"
STEP_S = float(os.environ.get("KVLAB_TEST_STEP_S", "0.02"))


def slow(capacity: int, block: int, limits: Limits) -> Allocator:
    """Steps that last, so that a test can do something meanwhile."""
    launch: Any = getattr(TorchExecutor.launch, "quick", TorchExecutor.launch)  # policies are made more than once

    def slowly(self: Any, plan: Plan, tables: Any) -> None:
        time.sleep(STEP_S)
        launch(self, plan, tables)

    slowly.quick = launch  # type: ignore[attr-defined]
    TorchExecutor.launch = slowly  # type: ignore[method-assign]
    return ALLOCATORS.get("paged")(capacity, block, limits)


def stuck(capacity: int, block: int, limits: Limits) -> Allocator:
    """Takes its time to be made."""
    time.sleep(60)
    return ALLOCATORS.get("paged")(capacity, block, limits)


def broken(capacity: int, block: int, limits: Limits) -> Allocator:
    """Fails whatever is asked of it."""
    memory: Any = ALLOCATORS.get("paged")(capacity, block, limits)

    def extending(s: Sequence, length: int) -> bool:
        raise RuntimeError("planted in every step")

    memory.extend = extending
    return memory


def failing(capacity: int, block: int, limits: Limits) -> Allocator:
    """Fails where a prompt says so, once it has an answer of two tokens."""
    memory: Any = ALLOCATORS.get("paged")(capacity, block, limits)
    plant_failures(memory)
    return memory


def faulty(capacity: int, block: int, limits: Limits) -> Allocator:
    """Both: failing, and slow."""
    memory = failing(capacity, block, limits)
    slow(capacity, block, limits)
    return memory


def plant_failures(memory: Any) -> None:
    extend, launch, encode = memory.extend, _LAUNCH, _ENCODE

    def says(s: Sequence, token: int) -> bool:
        return s.group.request.prompt[0] == token and s.outputs >= 2

    def extending(s: Sequence, length: int) -> bool:
        if says(s, ALLOCATOR):
            raise RuntimeError("planted in the allocator")
        return extend(s, length)

    def launching(self: Any, plan: Plan, tables: Any) -> None:
        if any(says(s, LAUNCH) for s in plan.work):
            raise RuntimeError("planted in the executor")
        launch(self, plan, tables)

    def collecting(self: Any) -> Any:
        sampled = _COLLECT(self)
        if any(says(s, COLLECT) for s in sampled):
            raise RuntimeError("planted in what the executor gives")
        return sampled

    def encoding(self: Any, prompt: Any, index: int = 0) -> Any:
        if prompt == UNTOKENISABLE:
            raise RuntimeError(f"planted in the tokenizer: {prompt}")
        return encode(self, prompt, index)

    memory.extend = extending
    TorchExecutor.launch = launching  # type: ignore[method-assign]
    TorchExecutor.collect = collecting  # type: ignore[method-assign]
    lab.LLM.encode = encoding  # type: ignore[method-assign]


_LAUNCH: Any = TorchExecutor.launch
_COLLECT: Any = TorchExecutor.collect
_ENCODE: Any = lab.LLM.encode
