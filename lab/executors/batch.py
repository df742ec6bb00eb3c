"""A Plan and the block tables, as tensors: one ragged batch per step, whatever the mix of prompts and decodes.

work {A: 3, B: 1}, padding {B: (2, 4)}     A computes three tokens of its prompt, B decodes; B's row of the rectangle
                                           has two dead tokens, and attention reads four positions beyond its live ones
token_ids  [a0 a1 a2 | b5 |  0  0 ]
positions  [ 0  1  2 |  5 |  0  0 ]        dead tokens come last and have no position of their own
slots      [ .  .  . |  . | -1 -1 ]        nothing of theirs is stored
rows       [ A       | B  | B dead ]       dead queries read B's live positions, then the dead ones; nobody looks
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ragged import Ragged, Row
from kernels.upload import upload
from lab.core import UNKNOWN, Plan, Sequence
from lab.models import Packed

NOWHERE = -1  # slot of a token whose K and V are not kept


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    packed: Packed
    sampled: tuple[Sequence, ...]  # whose next token is drawn, in the order of packed.sampled
    unknown: tuple[tuple[int, Sequence], ...]  # places in token_ids to be filled from the step before


def slots_of(table: Seq[int], first: int, end: int, block: int) -> list[int]:
    """Where positions [first, end) of a sequence lie."""
    return [table[p // block] * block + p % block for p in range(first, end)]


class _Builder:
    """Lists that grow row by row; tensors are made of them once."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.rows: list[Row] = []
        self.last: list[int] = []  # token of the batch, for each sampled sequence
        self.sampled: list[Sequence] = []
        self.unknown: list[tuple[int, Sequence]] = []

    def live(self, s: Sequence, tokens: int, dead: int, table: Seq[int]) -> None:
        first, end = s.computed, s.computed + tokens
        ids = s.tokens[first:end]
        start = len(self.token_ids)
        self.unknown += [(start + i, s) for i, token in enumerate(ids) if token == UNKNOWN]
        self.token_ids += ids
        self.positions += range(first, end)
        self.slots += slots_of(table, first, end, self.block)
        self.rows.append(Row(tokens, first, end, dead, table))
        if end == len(s.tokens):
            self.sampled.append(s)
            self.last.append(len(self.token_ids) - 1)

    def dead(self, tokens: int, length: int, dead: int, table: Seq[int]) -> None:
        self.token_ids += [0] * tokens
        self.positions += [0] * tokens  # a position past the model's last would have no embedding
        self.slots += [NOWHERE] * tokens
        self.rows.append(Row(tokens, length, length, dead, table))


def build(plan: Plan, tables: Mapping[Sequence, Seq[int]], block: int, device: torch.device) -> Batch | None:
    """The step's batch, on `device`; None where the plan has no work. Tables are read here and never again.

    Memory is addressed without a table where every sequence of the step holds one extent (its table is a `range`).
    """
    made = _Builder(block)
    for s, tokens in plan.work.items():
        made.live(s, tokens, plan.padding.get(s, (0, 0))[1], tables[s])
    if not made.rows:
        return None
    for s, (tokens, positions) in plan.padding.items():
        length = s.computed + plan.work.get(s, 0)
        if tokens and length:
            made.dead(tokens, length, positions, tables[s])
        elif tokens:  # holds nothing yet: one position of any memory stands for the first
            made.dead(tokens, 1, max(positions - 1, 0), made.rows[0].table)
    paged = not all(isinstance(row.table, range) for row in made.rows)
    columns = [made.token_ids, made.positions, made.slots, made.last]
    token_ids, positions_, slots, last = _upload(columns, device)
    ragged = Ragged.build(made.rows, block, paged, device)
    return Batch(Packed(token_ids, positions_, slots, last, ragged), tuple(made.sampled), tuple(made.unknown))


def _upload(columns: list[list[int]], device: torch.device) -> list[Tensor]:
    """Lists as int64 tensors, in one copy to the device."""
    joined = torch.tensor([number for column in columns for number in column], dtype=torch.int64)
    return list(upload(joined, device).split([len(column) for column in columns]))
