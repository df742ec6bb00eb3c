"""The K and V tensors: one preallocated pool on the device, host memory beside it, and the Moves among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from kernels.upload import upload
from lab.core import Move
from lab.models import KVShape

HOST_SLAB = 16  # blocks of host memory made at a time


def free_bytes(device: torch.device) -> int | None:
    """Device memory that a pool could take; None where that is not known (CPU)."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, of a pool that is gone
    return torch.cuda.mem_get_info(device)[0] + kept


class BlockMove(NamedTuple):
    """A Move of one block. Host blocks are told from device blocks by `kind`."""

    kind: str
    src: int
    dst: int

    @property
    def read(self) -> tuple[bool, int]:
        return self.kind == "in", self.src  # (is it on the host, block)

    @property
    def written(self) -> tuple[bool, int]:
        return self.kind == "out", self.dst


def split(moves: Iterable[Move], block: int) -> Iterator[BlockMove]:
    """Moves as moves of single blocks, in an order in which a move whose two ranges overlap reads before it writes."""
    for move in moves:
        assert move.kind in ("copy", "out", "in"), f"{move}: this pool has no pages to {move.kind}"
        if move.kind == "copy" and move.src == move.dst:
            continue
        offsets = range(-(-move.tokens // block))
        for i in reversed(offsets) if move.dst > move.src else offsets:
            yield BlockMove(move.kind, move.src + i, move.dst + i)


def independent(moves: Iterable[BlockMove]) -> Iterator[list[BlockMove]]:
    """Cut a list of moves, in order, into batches in which no block is written twice, or read and written."""
    batch: list[BlockMove] = []
    read: set[tuple[bool, int]] = set()
    written: set[tuple[bool, int]] = set()
    for move in moves:
        if move.written in written or move.written in read or move.read in written:
            yield batch
            batch, read, written = [], set(), set()
        batch.append(move)
        read.add(move.read)
        written.add(move.written)
    if batch:
        yield batch


class KVCache:
    """`k` [layers, num_blocks, block, Hk, D] and `v` [layers, num_blocks, block, Hk, Dv], and blocks in host memory.

    Moves carry whole blocks: what lies in the last one beyond a Move's tokens has no meaning, here or there.
    Host memory is made, and pinned, in the step that first swaps to it, which takes the longer for it: HOST_SLAB blocks
    at a time, so that as much is taken as was ever swapped out and not as much as might be.
    """

    def __init__(
        self,
        shape: KVShape,
        num_blocks: int,
        block: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        poison: bool = False,
    ) -> None:
        """`poison` fills the pool with NaN, so that reading what nobody wrote shows in the text."""
        self.block = block
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.poison = poison
        sizes = [
            (shape.layers, num_blocks, block, shape.num_kv_heads, dim) for dim in (shape.head_dim, shape.head_dim_v)
        ]
        fill = float("nan") if poison else 0.0
        self.k, self.v = (torch.full(size, fill, dtype=dtype, device=self.device) for size in sizes)
        self._host: dict[int, tuple[Tensor, Tensor]] = {}  # slab -> K, V [HOST_SLAB, layers, block, Hk, D]
        self._copy_blocks = kernels.for_device(self.device).copy_blocks

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @property
    def host_nbytes(self) -> int:
        """Of host memory made so far."""
        return sum(k.nbytes + v.nbytes for k, v in self._host.values())

    def perform(self, moves: Iterable[Move]) -> None:
        """All moves, with the effect of one after the other."""
        for batch in independent(split(moves, self.block)):
            for kind, carry in (("copy", self._copy), ("out", self._out), ("in", self._in)):
                pairs = sorted((move.dst, move.src) for move in batch if move.kind == kind)
                if pairs:
                    carry([src for _, src in pairs], [dst for dst, _ in pairs])

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        pairs = torch.tensor([sources, targets]).t().contiguous()
        for cache in (self.k, self.v):
            self._copy_blocks(cache, pairs)

    def _out(self, sources: list[int], targets: list[int]) -> None:
        """Gathered on the device and carried over in runs that are consecutive on the host, a slab at most."""
        for start, end in _runs(targets):
            index = upload(torch.tensor(sources[start:end]), self.device)
            at = targets[start] % HOST_SLAB
            for host, cache in zip(self._slab(targets[start]), (self.k, self.v), strict=True):
                staged = cache.index_select(1, index).transpose(0, 1).contiguous()  # [n, layers, block, Hk, D]
                host[at : at + end - start].copy_(staged, non_blocking=True)

    def _in(self, sources: list[int], targets: list[int]) -> None:
        """The way back: carried over in such runs, scattered on the device."""
        order = sorted(range(len(sources)), key=sources.__getitem__)
        sources, targets = [sources[i] for i in order], [targets[i] for i in order]
        for start, end in _runs(sources):
            index = upload(torch.tensor(targets[start:end]), self.device)
            at = sources[start] % HOST_SLAB
            for host, cache in zip(self._slab(sources[start]), (self.k, self.v), strict=True):
                staged = host[at : at + end - start].to(self.device, non_blocking=True)
                cache.index_copy_(1, index, staged.transpose(0, 1))

    def _slab(self, block_id: int) -> tuple[Tensor, Tensor]:
        slab = block_id // HOST_SLAB
        if slab not in self._host:
            fill = float("nan") if self.poison else 0.0
            sizes = [(HOST_SLAB, cache.shape[0], *cache.shape[2:]) for cache in (self.k, self.v)]
            pinned = self.device.type == "cuda"
            k, v = (torch.full(size, fill, dtype=self.k.dtype, pin_memory=pinned) for size in sizes)
            self._host[slab] = k, v
        return self._host[slab]


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """Cut ascending block ids into index ranges of consecutive ids within one slab."""
    cuts = [0]
    cuts += [i for i in range(1, len(ids)) if ids[i] != ids[i - 1] + 1 or ids[i] % HOST_SLAB == 0]
    return list(pairwise([*cuts, len(ids)]))
