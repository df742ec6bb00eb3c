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

import torch
from torch import Tensor

from kernels.ragged import Ragged, Row
from kernels.upload import upload
from lab.core import UNKNOWN, Plan, Sequence
from lab.models import Packed

NOWHERE = -1  # slot of a token whose K and V are not kept


def slots_of(table: Seq[int], first: int, end: int, block: int) -> list[int]:
    """Where positions [first, end) of a sequence lie."""
    return [table[p // block] * block + p % block for p in range(first, end)]


class Rows:
    """The step's rows as lists, which grow row by row; tensors are made of them once."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.rows: list[Row] = []
        self.last: list[int] = []  # token of the batch, for each sampled sequence
        self.sampled: list[Sequence] = []  # whose next token is drawn
        self.unknown: list[tuple[int, Sequence]] = []  # places in token_ids to be filled from the step before

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

    @property
    def paged(self) -> bool:
        """Memory is addressed without a table where every sequence holds one extent (its table is a `range`)."""
        return not all(isinstance(row.table, range) for row in self.rows)

    def on(self, device: torch.device) -> Packed:
        token_ids, positions, slots, last = _upload([self.token_ids, self.positions, self.slots, self.last], device)
        return Packed(token_ids, positions, slots, last, Ragged.build(self.rows, self.block, self.paged, device))


def lay_out(plan: Plan, tables: Mapping[Sequence, Seq[int]], block: int) -> Rows:
    """The rows of a step, none where the plan has no work. Tables are read here and never again."""
    made = Rows(block)
    for s, tokens in plan.work.items():
        made.live(s, tokens, plan.padding.get(s, (0, 0))[1], tables[s])
    if not made.rows:
        return made
    for s, (tokens, positions) in plan.padding.items():
        length = s.computed + plan.work.get(s, 0)
        if tokens and length:
            made.dead(tokens, length, positions, tables[s])
        elif tokens:  # holds nothing yet: one position of any memory stands for the first
            made.dead(tokens, 1, max(positions - 1, 0), made.rows[0].table)
    return made


def _upload(columns: list[list[int]], device: torch.device) -> list[Tensor]:
    """Lists as int64 tensors, in one copy to the device."""
    joined = torch.tensor([number for column in columns for number in column], dtype=torch.int64)
    return list(upload(joined, device).split([len(column) for column in columns]))
