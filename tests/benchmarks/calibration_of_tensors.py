"""The fixed work beside which tensors are timed: see `calibration.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch

torch.set_num_threads(1)


def tensors(device: str) -> Callable[[], None]:
    """What a model does in a step: a product, a gather, a softmax and calls too small to matter. Some 2 ms on a CPU."""
    big = device != "cpu"
    draw = torch.Generator().manual_seed(0)
    side, rows = (4096, 2**16) if big else (192, 2**12)
    square = torch.randn(side, side, generator=draw).to(device)
    memory = torch.randn(rows, 256, generator=draw).to(device)
    order = torch.randperm(rows, generator=draw).to(device)

    def run() -> None:
        small = square[0]
        for _ in range(16):
            small = small * 0.5 + square[1]
        (square @ square).softmax(-1)
        memory.index_select(0, order).sum(0)
        if big:
            torch.cuda.synchronize()

    return run
