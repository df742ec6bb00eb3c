"""A tiny random Llama with a tokenizer, and the servers of it that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import OPTIONS
from running import DEVICE, Running
from talking import tiny_llama

from lab import LLM


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    return str(folder), tiny_llama(folder)


@pytest.fixture(scope="session")
def llm(tiny: tuple[str, Any]) -> LLM:
    return LLM(tiny[0], device=DEVICE, dtype="float32", kv_memory=2048, block=8)


@pytest.fixture(scope="session")
def faulty(tiny: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("faulty"), tiny[0], *OPTIONS) as running:
        yield running


@pytest.fixture(scope="session")
def server(tiny: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("server"), tiny[0]) as running:
        yield running
