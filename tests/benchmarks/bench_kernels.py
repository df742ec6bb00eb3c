"""The batch of a step built on the host, and every kernel: on a CPU the reference, on a GPU ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from bench_steps import decoding
from torch import Tensor

from kernels import for_device
from kernels.ragged import Ragged
from lab.core import Plan
from lab.executors.batch import lay_out

BLOCK, HEAD_DIM = 16, 64


class Size(NamedTuple):
    """Of a step: what takes a millisecond or so on the device."""

    decodes: int  # rows of one token
    context: int  # tokens of each
    prompt: int  # tokens of one prompt
    heads: int
    kv_heads: int
    vocab: int
    dtype: torch.dtype


SIZES = {
    "cpu": Size(16, 128, 128, 4, 2, 4096, torch.float32),
    "cuda": Size(256, 1024, 4096, 32, 8, 128256, torch.bfloat16),
}
devices = pytest.mark.parametrize("device", SIZES)


@pytest.mark.parametrize("kind", ["decodes", "prompts"])
def test_lay_out(timed: Any, kind: str) -> None:
    """256 decodes, or 8 prompts of some hundred tokens, as lists and then as tensors."""
    scheduler = decoding(256 if kind == "decodes" else 8)
    plan = scheduler.schedule(0.0, False)
    if kind == "prompts":
        for s in plan.work:
            s.computed = 0
        plan = Plan(work={s: len(s.tokens) for s in plan.work})
    tables = scheduler.allocator.tables
    rows = sum(plan.work.values())
    timed(lambda: lay_out(plan, tables, BLOCK).on(torch.device("cpu")), count=rows, unit="tokens")


class Scene:
    """Caches and inputs of one layer, random, the blocks of each sequence anywhere in the pool."""

    def __init__(self, device: str) -> None:
        self.size, self.device, self.ops = SIZES[device], device, for_device(device)
        self.draw = torch.Generator().manual_seed(0)
        self.blocks = self.size.decodes * self.size.context // BLOCK
        cache = (self.blocks, BLOCK, self.size.kv_heads, HEAD_DIM)
        self.k_cache, self.v_cache = self.random(*cache), self.random(*cache)
        self.order = torch.randperm(self.blocks, generator=self.draw)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.device, self.size.dtype)

    def slots(self, tokens: int) -> Tensor:
        return torch.randperm(self.blocks * BLOCK, generator=self.draw)[:tokens].to(self.device)

    def timed(self, timed: Any, call: Callable[[], object], tokens: int, repeats: int = 1) -> None:
        if self.device == "cuda":
            repeats = 20  # calls that the GPU has in its queue, as in a model

        def work() -> None:
            for _ in range(repeats):
                call()
            if self.device == "cuda":
                torch.cuda.synchronize()

        timed(work, beside=self.device, count=repeats * tokens, unit="tokens")


@devices
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("kind", ["decodes", "prompt"])
def test_attention(timed: Any, device: str, kind: str, paged: bool) -> None:
    scene = Scene(device)
    size, ops = scene.size, scene.ops
    order = scene.order if paged else torch.arange(scene.blocks)
    if kind == "decodes":
        tables = order.split(size.context // BLOCK)
        rows = [(1, size.context - 1, size.context, 0, table.tolist()) for table in tables]
    else:
        rows = [(size.prompt, 0, size.prompt, 0, order[: size.prompt // BLOCK].tolist())]
    ragged = Ragged.build(rows, BLOCK, paged, device)
    q = scene.random(ragged.num_tokens, size.heads, HEAD_DIM)
    scale = HEAD_DIM**-0.5
    call = partial(ops.attention, q, scene.k_cache, scene.v_cache, ragged, scale=scale)
    scene.timed(timed, call, ragged.num_tokens)


def calls(scene: Scene, ops: ModuleType) -> dict[str, Callable[[], object]]:
    """Everything but attention, on the tokens of a prompt; copies of an eighth of the pool in four layers."""
    size, tokens = scene.size, scene.size.prompt
    hidden = size.heads * HEAD_DIM
    kv = scene.random(tokens, size.kv_heads, HEAD_DIM)
    x, weight = scene.random(tokens, hidden), scene.random(hidden)
    qkv = scene.random(tokens, (size.heads + 2 * size.kv_heads) * HEAD_DIM)
    turns = torch.rand(tokens, HEAD_DIM, generator=scene.draw).to(scene.device)
    places = torch.arange(tokens).to(scene.device)
    slots = scene.slots(tokens)
    pool = scene.k_cache.expand(4, *scene.k_cache.shape).clone()
    pairs = scene.order[: scene.blocks // 4].view(2, -1).T.contiguous().to(scene.device)
    logits = scene.random(size.decodes, size.vocab)
    keys = torch.arange(size.decodes).to(scene.device)
    caches = scene.k_cache, scene.v_cache
    warm = torch.full((size.decodes,), 1.0, device=scene.device)
    return {
        "store": partial(ops.store, kv, kv, *caches, slots),
        "copy_blocks": partial(ops.copy_blocks, pool, pairs),
        "norm": partial(ops.norm, x, weight, None, 1e-5),
        "rotate_and_store": partial(ops.rotate_and_store, qkv, None, None, 1e-6, turns, places, slots, *caches),
        "silu_and_mul": partial(ops.silu_and_mul, scene.random(tokens, 4 * hidden)),
        "sample": partial(ops.sample, logits, warm, keys),
    }


@devices
@pytest.mark.parametrize("name", ["store", "copy_blocks", "norm", "rotate_and_store", "silu_and_mul", "sample"])
def test_kernel(timed: Any, device: str, name: str) -> None:
    scene = Scene(device)
    call = calls(scene, scene.ops)[name]
    tokens = scene.size.decodes if name == "sample" else scene.size.prompt
    scene.timed(timed, call, tokens, repeats=8 if name == "norm" else 1)  # of which one call is too short to be timed
