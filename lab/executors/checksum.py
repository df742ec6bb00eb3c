"""A model whose next token is a checksum of its KV cache, read back through the block tables.

The cell of position p is a hash of token p and of the cell before it, as K and V depend on the whole prefix; the next
token is a hash of all cells. Any aliasing, lost copy, wrong swap, wrong prefix hit or wrong table therefore changes the
text, and every combination of policies is proven in seconds, with no GPU and no torch. `text` says what must come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from lab.core import UNKNOWN, Plan, Request, Sampled, Sequence

MASK = (1 << 61) - 1
GARBAGE = 0xDEAD


def mix(*values: int) -> int:
    """A hash that is the same in every process (FNV-1a over integers)."""
    h = 0xCBF29CE484222325
    for value in values:
        h = ((h ^ value) * 0x100000001B3) & MASK
    return h


def text(request: Request, vocabulary: int = 97, length: int = 2048) -> list[list[int]]:
    """The outputs of a request, computed without any memory management."""
    return [_output(request, index, vocabulary, length) for index in range(request.sampling.n)]


def _output(request: Request, index: int, vocabulary: int, length: int) -> list[int]:
    tokens = list(request.prompt)
    cell, total = 0, 0
    computed = 0
    while True:
        for p in range(computed, len(tokens)):
            cell = mix(cell, tokens[p])
            total = mix(total, cell)
        computed = len(tokens)
        tokens.append(_sample(request, index, computed, total, vocabulary))
        outputs = len(tokens) - len(request.prompt)
        if request.output is not None:
            if outputs == request.output:
                break
        elif tokens[-1] in request.sampling.stop or outputs == request.sampling.max_tokens or len(tokens) == length:
            break
    return tokens[len(request.prompt) :]


def _sample(request: Request, index: int, position: int, total: int, vocabulary: int) -> int:
    """Outputs of a request differ, as sampled ones do: noise is a function of (seed, request, output, position)."""
    return mix(total, request.sampling.seed, request.id, index, position) % vocabulary


def continuations(request: Request, position: int, total: int, vocabulary: int) -> list[tuple[int, float]]:
    """Every next token of a beam with its log-probability, the likeliest first; no two are equally likely."""
    weights = [(mix(total, request.id, position, token) & 0xFFFFF, token) for token in range(vocabulary)]
    return [(token, -(weight * vocabulary + token) / 2**21) for weight, token in sorted(weights)]


class ChecksumExecutor:
    """Cells instead of K and V. Every step takes one second of virtual time."""

    def __init__(self, num_blocks: int, block: int, *, host_blocks: int = 0, vocabulary: int = 97) -> None:
        self.block = block
        self.vocabulary = vocabulary
        self.device = [GARBAGE] * (num_blocks * block)  # a cell per slot
        self.host = [GARBAGE] * (host_blocks * block)
        self.now = 0.0
        self.compiled = False
        self.moved: dict[str, int] = {}  # Moves performed, by kind
        self.launched: list[dict[Sequence, list[Sampled]]] = []

    def launch(self, plan: Plan, tables: Mapping[Sequence, Seq[int]]) -> None:
        self._move(plan)
        for s, tokens in plan.work.items():
            self._store(s, tables[s], tokens)
        self.launched.append({s: [self._next(s, tables[s])] for s, n in plan.work.items() if n == s.pending})
        self.now += 1.0

    def collect(self) -> dict[Sequence, list[Sampled]]:
        return self.launched.pop(0)

    def wait(self, until_s: float) -> None:
        self.now = max(self.now, until_s)

    def wake(self) -> None:
        """Virtual time passes only when told to."""

    def _move(self, plan: Plan) -> None:
        for move in plan.moves:
            src = self.host if move.kind == "in" else self.device
            dst = self.host if move.kind == "out" else self.device
            a, b = move.src * self.block, move.dst * self.block
            dst[b : b + move.tokens] = src[a : a + move.tokens]
            self.moved[move.kind] = self.moved.get(move.kind, 0) + 1

    def _slot(self, table: Seq[int], position: int) -> int:
        return table[position // self.block] * self.block + position % self.block

    def _store(self, s: Sequence, table: Seq[int], tokens: int) -> None:
        for p in range(s.computed, s.computed + tokens):
            before = self.device[self._slot(table, p - 1)] if p else 0
            token = s.tokens[p]
            if token == UNKNOWN:
                token = self.launched[-1][s][0].token  # which the step before drew
            self.device[self._slot(table, p)] = mix(before, token)

    def _next(self, s: Sequence, table: Seq[int]) -> Sampled:
        total = 0
        for p in range(len(s.tokens)):
            total = mix(total, self.device[self._slot(table, p)])
        request = s.group.request
        if request.sampling.beams:
            top = continuations(request, len(s.tokens), total, self.vocabulary)
            return Sampled(*top[0], tuple(top))
        return Sampled(_sample(request, s.index, len(s.tokens), total, self.vocabulary))
