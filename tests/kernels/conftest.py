"""A test draws the same numbers whatever ran before it, and in whichever process: one that fails will fail again."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
