"""The virtual clock: a plan costs what a formula of bytes and operations says, and no token is computed.

Policies run under it unchanged; an hour of the PagedAttention paper's serving (Kwon et al., section 6) takes seconds.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lab.core import InputError, Move, Plan, Sampled, Sequence
from lab.hardware import Hardware
from lab.shapes import ModelShape

Array = NDArray[np.float64]
StepTimes = Callable[[int, int, int], float]  # tokens computed, positions read, sequences -> s
ENOUGH = 8  # measured steps between two knots of a fitted curve
TIE = 1e-10  # share of the target below which a column brings nothing


class CostModel:
    """Seconds of a step, from the model's shape and the rates that the hardware attains: two rooflines and extras.

        step      = overhead + communication + linear + attention + moves
        linear    = max(tokens * token_s + rows * row_s,  weights_s)      arithmetic | weights read once
        attention = max(pairs * pair_s,  positions * position_s)          arithmetic | K and V of each context read once

    `tokens` are those computed, `rows` those sampled from, `pairs` a query and a position it attends to, `positions`
    the lengths of all contexts after the step; the maxima are of the whole batch. Several GPUs share weights, heads and
    work without loss (tensor parallelism) and pay for two sums over all of them in each layer. Left out: the traffic
    of activations, kernels slower than the hardware's entry says, K and V that long prompts read more than once.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware, block: int = 16, dtype_bytes: int = 2) -> None:
        attained = hardware.calibrated
        flops = hardware.gpus * attained.flops
        bytes_per_s = hardware.gpus * attained.bytes_per_s
        kv_bytes = shape.kv_bytes_per_token(dtype_bytes)
        self.block = block
        self.overhead_s = attained.step_s
        self.token_s = shape.linear_flops_per_token / flops
        self.row_s = shape.head_flops_per_row / flops
        self.weights_s = shape.parameters_read * dtype_bytes / bytes_per_s
        self.pair_s = shape.attention_flops(1, 1) / flops
        self.position_s = kv_bytes / bytes_per_s
        self.host_token_s = kv_bytes / (hardware.gpus * attained.host_bytes_per_s)
        self.transfer_s = 2 * shape.layers * attained.transfer_s  # K and V of each layer are transfers of their own
        sums = 2 * shape.layers if hardware.gpus > 1 else 0
        sent = (
            2 * (hardware.gpus - 1) / hardware.gpus * shape.hidden * dtype_bytes
        )  # bytes per token, sum around a ring
        self.sums_s = sums * attained.all_reduce_s
        self.sums_token_s = sums * sent / attained.link_bytes_per_s

    def step(self, tokens: int, rows: int, pairs: int, positions: int) -> float:
        """Seconds of a step, without its moves; 0 where there is nothing to compute."""
        if not tokens:
            return 0.0
        linear_s = max(tokens * self.token_s + rows * self.row_s, self.weights_s)
        attention_s = max(pairs * self.pair_s, positions * self.position_s)
        return self.overhead_s + self.sums_s + tokens * self.sums_token_s + linear_s + attention_s

    def move(self, move: Move) -> float:
        """Seconds of a move. A copy reads and writes device memory; one kernel makes them all, without latency.

        Blocks cross the host link one by one, as in the paper's engine, where small blocks are dear (figure 19a).
        Mapping and unmapping memory moves nothing: it is a call for K and V of each layer and block.
        """
        if move.kind == "copy":
            return 2 * move.tokens * self.position_s
        transfers_s = -(-move.tokens // self.block) * self.transfer_s
        return transfers_s if move.kind in ("map", "unmap") else transfers_s + move.tokens * self.host_token_s


class SimulatedExecutor:
    """Implements `lab.executors.Executor` on a virtual clock, which stands at a step's end as soon as it is launched.

    Every sampled token is 0, with log-probability 0: an output's length comes from the workload or from `max_tokens`.
    `step_times`, where given, replaces the cost model for all but the moves; `FittedCost` is such a function.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        block: int = 16,
        dtype_bytes: int = 2,
        step_times: StepTimes | None = None,
    ) -> None:
        self.now = 0.0
        self.compiled = False
        self.cost = CostModel(shape, hardware, block, dtype_bytes)
        self.step_times = step_times
        self.launched: deque[dict[Sequence, list[Sampled]]] = deque()
        self.beams: Callable[[Sequence], Sampled] | None = None  # candidates of a beam, where requests search
        self.sampled = [Sampled(0)]  # the same list for every token: there may be millions

    def launch(self, plan: Plan, tables: Mapping[Sequence, Seq[int]]) -> None:
        """Advance the clock by what the plan costs. The loop runs a million times in a run, so it calls nothing."""
        work = plan.work
        sampled = self.sampled
        results: dict[Sequence, list[Sampled]] = {}
        tokens = len(work)
        positions = prompt_pairs = 0  # pairs beyond one row of each sequence, which has as many pairs as positions
        for s, n in work.items():
            context = s.computed + n
            positions += context
            if n > 1:
                tokens += n - 1
                prompt_pairs += (n - 1) * context - n * (n - 1) // 2
            if context == len(s.tokens):
                results[s] = sampled
        pairs = positions + prompt_pairs
        dead_rows = 0
        if plan.padding:
            dead_tokens, dead_rows, dead_pairs, dead_positions = _padding(plan)
            tokens += dead_tokens
            pairs += dead_pairs
            positions += dead_positions
        if self.step_times is None:
            self.now += self.cost.step(tokens, len(results) + dead_rows, pairs, positions)
        elif tokens:
            self.now += self.step_times(tokens, positions, len(work) + dead_rows)
        for move in plan.moves:
            self.now += self.cost.move(move)
        if self.beams is not None:
            results = {s: [self.beams(s)] for s in results}
        self.launched.append(results)

    def collect(self) -> dict[Sequence, list[Sampled]]:
        return self.launched.popleft()

    def wait(self, until_s: float) -> None:
        """Jump to `until_s`, never back. Raises RuntimeError where nothing will ever happen."""
        if not until_s < math.inf:
            raise RuntimeError(f"waiting until {until_s} s: there is no work, and nothing is left to wait for")
        self.now = max(self.now, until_s)

    def wake(self) -> None:
        """Nothing: a jump takes no time in which it could be woken."""


def _padding(plan: Plan) -> tuple[int, int, int, int]:
    """What the dead parts of a rectangle add: tokens, rows, pairs and positions.

    A row of n live and d dead tokens costs what one of n + d live tokens would. A row that has ended, and so is in the
    padding only, costs what a live row as wide would, with logits to sample from.
    """
    tokens = rows = pairs = positions = 0
    for s, (dead_tokens, dead_positions) in plan.padding.items():
        n = plan.work.get(s, 0)
        width = s.computed + n + dead_positions
        live_positions = s.computed + n if n else 0  # of an ended row, none have been counted
        tokens += dead_tokens
        rows += n == 0
        pairs += _causal_pairs(n + dead_tokens, width) - _causal_pairs(n, live_positions)
        positions += width - live_positions
    return tokens, rows, pairs, positions


def _causal_pairs(tokens: int, positions: int) -> int:
    """Pairs of a query and a position up to its own, when the last `tokens` of `positions` are queries."""
    return tokens * positions - tokens * (tokens - 1) // 2


@dataclass(frozen=True, slots=True)
class FittedCost:
    """Step times of real hardware as a function, so that the virtual clock runs at their pace.

        seconds = curve(tokens) + positions * position_s + sequences * sequence_s

    The curve never falls. It is straight between its knots, flat before the first, and beyond the last as steep as
    before it. Steps that only read weights cost the same whatever their size, and matrix products change their kernel
    with it (on a CPU, 4 rows may take a third more than 3), so that no straight line would do. What prompts pay for
    attention in excess of their positions lies in the curve, too.
    """

    knots: Seq[int]  # tokens, ascending
    curve_s: Seq[float]  # at each knot
    position_s: float
    sequence_s: float
    steps: int  # measured steps that it was fitted to
    residual_s: float  # root mean square of measured less fitted
    error: float  # sum of |measured - fitted| over sum of measured

    def __call__(self, tokens: int, positions: int, sequences: int) -> float:
        """Seconds of a step that computes `tokens` in `sequences` rows, whose contexts have `positions` in all."""
        return self.curve(tokens) + positions * self.position_s + sequences * self.sequence_s

    def curve(self, tokens: float) -> float:
        knots, curve_s = self.knots, self.curve_s
        if tokens <= knots[0] or len(knots) == 1:
            return curve_s[0]
        i = min(bisect_left(knots, tokens), len(knots) - 1)
        slope_s = (curve_s[i] - curve_s[i - 1]) / (knots[i] - knots[i - 1])
        return curve_s[i - 1] + (tokens - knots[i - 1]) * slope_s

    @classmethod
    def fit(cls, steps: Iterable[Seq[float]]) -> FittedCost:
        """Least squares over measured steps without moves: rows of tokens, positions read, sequences, seconds.

        No coefficient, and no slope of the curve, is negative. Raises InputError for too few rows or for one that is
        not four finite numbers.
        """
        rows = [tuple(map(float, step)) for step in steps]
        if len(rows) < 6 or not all(len(row) == 4 and all(map(math.isfinite, row)) for row in rows):
            rule = "give at least 6, each of tokens, positions, sequences, seconds, all finite"
            raise InputError(f"{len(rows)} measured steps: {rule}")
        tokens, positions, sequences, seconds = np.array(rows).T
        knots = _knots(tokens)
        rises = [np.clip((tokens - low) / (high - low), 0, 1) for low, high in itertools.pairwise(knots)]
        columns = np.stack([np.ones_like(tokens), *rises, positions, sequences], axis=1)  # [steps, knots + 2]
        coefficients = _non_negative(columns, seconds)
        errors = seconds - columns @ coefficients
        return cls(
            knots=knots,
            curve_s=np.cumsum(coefficients[:-2]).tolist(),
            position_s=float(coefficients[-2]),
            sequence_s=float(coefficients[-1]),
            steps=len(rows),
            residual_s=float(np.sqrt(np.mean(errors**2))),
            error=float(np.abs(errors).sum() / seconds.sum()),
        )


def _knots(tokens: Array) -> list[int]:
    """The smallest and the largest size, and of 2, 3, 4, 6, 8, 12, 16 ... those with `ENOUGH` steps up to each."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    grid = sorted(size << i for size in (2, 3) for i in range(highest.bit_length()))
    knots = [lowest]
    for knot in grid:
        if lowest < knot < highest and ((tokens > knots[-1]) & (tokens <= knot)).sum() >= ENOUGH:
            knots.append(knot)
    if len(knots) > 1 and (tokens > knots[-1]).sum() < ENOUGH:
        knots.pop()  # the last slope goes on for ever: a few steps shall not make it
    return [*knots, highest] if highest > lowest else knots


def _non_negative(columns: Array, target: Array) -> Array:
    """Least squares with coefficients >= 0: [columns].

    By active sets (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23): the column that would lower
    the error most comes in; where the ordinary solution of those that are in is negative somewhere, go towards it until
    the first coefficient is zero, and that one goes out. Columns are reduced to a triangle first, which keeps all
    inner products.
    """
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    triangle = np.asarray(np.linalg.qr(np.column_stack([columns / scale, target]), mode="r"))
    a, b = triangle[:, :-1], triangle[:, -1]
    answer = np.zeros(a.shape[1])
    chosen, useless = np.zeros((2, a.shape[1]), bool)
    least = TIE * np.linalg.norm(b)  # gradients below are rounding errors
    while True:
        gradient = np.where(chosen | useless, -np.inf, a.T @ (b - a @ answer))
        newest = int(gradient.argmax())
        if gradient[newest] <= least:
            return answer / scale
        chosen[newest] = True
        while True:
            solution = np.zeros_like(answer)
            solution[chosen] = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
            falling = np.flatnonzero(chosen & (solution <= 0))
            if not len(falling):
                break
            share = answer[falling] / np.maximum(answer[falling] - solution[falling], np.finfo(float).tiny)
            answer += share.min() * (solution - answer)
            chosen[falling[share == share.min()]] = False
            answer[~chosen] = 0.0
        answer = solution
        if chosen[newest]:
            useless[:] = False
        else:  # it brought nothing, and would not before another does
            useless[newest] = True
