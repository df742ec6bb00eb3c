"""The ragged batch of one step, drawn in `kernels/__init__.py`: planned once on the host, read by every layer."""

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.upload import upload

# Query tokens per tile: a decode, a speculated or short chunk, a prompt. A row goes to the first that holds it whole,
# else to the last. Each size that occurs is one launch; a kernel may cut the last into smaller tiles.
TILE_TOKENS = (1, 16, 128)

ALIGNMENT = 4  # int32 entries, 16 bytes: Triton compiles anew for a pointer that is aligned less


class Row(NamedTuple):
    """One sequence's part in a step."""

    num_queries: int  # query tokens
    first: int  # position of the first of them
    length: int  # tokens in memory, this step's included
    dead: int  # further positions read and scored only to be thrown away
    table: Sequence[int]  # block ids; a `range` where memory is contiguous


class Tiles(NamedTuple):
    """One launch: the queries of some rows, cut into tiles of at most `tokens` tokens, longest context first."""

    tokens: int
    places: Tensor  # int32 [num_tiles, 2]: (row, tokens of the row before the tile)


@dataclass(frozen=True, eq=False)
class Ragged:
    starts: Tensor  # int32 [num_rows + 1]
    firsts: Tensor  # int32 [num_rows]
    lengths: Tensor  # int32 [num_rows]
    dead: Tensor  # int32 [num_rows]
    tables: Tensor  # int32 [num_rows, width]; contiguous: width 1
    tiles: tuple[Tiles, ...]
    num_tokens: int
    num_blocks: int  # a cache must have at least so many blocks: no table points beyond
    block: int
    paged: bool
    any_dead: bool
    longest: int  # no row reads more keys
    plans: dict[tuple, Tensor] = field(default_factory=dict, init=False, compare=False)  # see kernels.shares

    @staticmethod
    def build(
        rows: Iterable[tuple[int, int, int, int, Sequence[int]]], block: int, paged: bool, device: torch.device | str
    ) -> "Ragged":
        """Rows are `Row`s or plain tuples (num_queries, first, length, dead, table). One copy to the device in all."""
        if block < 1:
            raise ValueError(f"block = {block}: a block holds at least one token; pass block >= 1")
        batch = [Row(*row) for row in rows]
        if not batch:
            raise ValueError("rows = []: a step computes at least one token; do not run an empty step")
        for index, row in enumerate(batch):
            _check(index, row, block, paged)
        needed = [-(-row.length // block) for row in batch]  # blocks
        starts = list(itertools.accumulate((row.num_queries for row in batch), initial=0))
        tables, width = _join_tables(batch, needed, paged)
        tiles = _cut(batch)
        columns = [[row.first for row in batch], [row.length for row in batch], [row.dead for row in batch]]
        buffer, spans = _pack([starts, *columns, tables, *(itertools.chain(*places) for places in tiles.values())])
        num_blocks = _highest_block(buffer[spans[4]].view(len(batch), width), needed, paged) + 1
        buffer = upload(buffer, device)
        starts_, firsts, lengths, dead, tables_, *places_ = (buffer[span] for span in spans)
        return Ragged(
            starts=starts_,
            firsts=firsts,
            lengths=lengths,
            dead=dead,
            tables=tables_.view(len(batch), width),
            tiles=tuple(Tiles(tokens, flat.view(-1, 2)) for tokens, flat in zip(tiles, places_, strict=True)),
            num_tokens=starts[-1],
            num_blocks=num_blocks,
            block=block,
            paged=paged,
            any_dead=any(row.dead for row in batch),
            longest=max(row.length + row.dead for row in batch),
        )


def _check(index: int, row: Row, block: int, paged: bool) -> None:
    def refuse(what: str, rule: str, remedy: str) -> None:
        raise ValueError(f"row {index}: {what}: {rule}; {remedy}")

    if row.num_queries < 1:
        refuse(f"num_queries = {row.num_queries}", "a row computes at least one token", "leave the sequence out")
    if row.first < 0:
        refuse(f"first = {row.first}", "positions count from 0", "pass the position of the first query token")
    if row.length < 1:
        refuse(f"length = {row.length}", "every row reads at least one token", "give padding one token of its own row")
    if row.dead < 0:
        refuse(f"dead = {row.dead}", "it counts positions read for nothing", "pass 0 where there is no padding")
    table = row.table
    if len(table) * block < row.length:
        rule = f"{len(table)} blocks of {block} hold {len(table) * block} tokens"
        refuse(f"length = {row.length}", rule, "extend the table before the step")
    if not paged and isinstance(table, range) and table.step == 1:
        return
    if not paged and any(table[i] + 1 != table[i + 1] for i in range(len(table) - 1)):
        refuse(f"table {table}", "contiguous memory has consecutive blocks", "pass a range, or paged=True")


def _join_tables(rows: list[Row], needed: list[int], paged: bool) -> tuple[array, int]:
    """All tables end to end, each cut to the blocks in use and filled up to the widest; or the first blocks alone."""
    joined = array("i")
    if not paged:
        joined.extend(row.table[0] for row in rows)
        return joined, 1
    width = max(needed)
    for row, blocks in zip(rows, needed, strict=True):
        joined.extend(row.table[:blocks])
        joined.extend(itertools.repeat(0, width - blocks))
    return joined, width


def _highest_block(tables: Tensor, needed: list[int], paged: bool) -> int:
    if int(tables.min()) < 0:
        index = int((tables < 0).any(1).nonzero()[0])
        raise ValueError(
            f"row {index}: its table has a block id below 0; blocks count from 0; pass allocated blocks only"
        )
    last = tables.amax(1) if paged else tables[:, 0] + torch.tensor(needed) - 1
    return int(last.max())


def _cut(rows: list[Row]) -> dict[int, list[tuple[int, int]]]:
    """Tokens per tile -> (row, tokens of the row before the tile). Long tiles come first, so that none starts last."""
    tiles: dict[int, list[tuple[int, int, int]]] = {}
    for index, row in enumerate(rows):
        tokens = next((size for size in TILE_TOKENS if row.num_queries <= size), TILE_TOKENS[-1])
        for before in range(0, row.num_queries, tokens):
            keys = min(row.first + min(before + tokens, row.num_queries), row.length) + row.dead
            tiles.setdefault(tokens, []).append((-keys, index, before))
    return {tokens: [(index, before) for _, index, before in sorted(tiles[tokens])] for tokens in sorted(tiles)}


def _pack(parts: list[Iterable[int]]) -> tuple[Tensor, list[slice]]:
    """Everything the device needs in one buffer, so that a step costs one copy; each part starts aligned."""
    joined = array("i")
    spans = []
    for part in parts:
        start = len(joined)
        joined.extend(part)
        spans.append(slice(start, len(joined)))
        joined.extend(itertools.repeat(0, -len(joined) % ALIGNMENT))
    return torch.frombuffer(joined, dtype=torch.int32), spans
