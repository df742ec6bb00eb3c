"""Which beams survive on the virtual clock, where no model says it: searches of a real model, replayed.

Each was measured with SmolLM2-135M on a real prompt (`papers/pagedattention/beams.py`): for every step and every beam
that went on, the rank of the beam that it continues. A longer search repeats its run from the second step on.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

from lab.beams import Beams
from lab.core import InputError, Sampled, Sequence

FILE = Path(__file__).parent / "data" / "beam_parents.json.gz"
GAP = 1e-3  # between the scores of two beams of neighbouring ranks: they have no meaning here but their order


@cache
def searches(width: int) -> list[list[list[int]]]:
    """[searches][steps][beams]: the rank that each beam continues. Raises InputError for a width not measured."""
    measured = json.loads(gzip.decompress(FILE.read_bytes()))["parents"]
    if str(width) not in measured:
        rule = f"on the virtual clock only searches of {', '.join(measured)} beams were measured"
        raise InputError(f"beams={width}: {rule}; take one of them, or --executor torch")
    return [[[int(rank) for rank in step] for step in run.split()] for run in measured[str(width)]]


class Survival:
    """Candidates for the beams of any request, so that those survive that did in a measured search."""

    def __init__(self, width: int, seed: int) -> None:
        self.runs = searches(width)
        self.seed = seed

    def __call__(self, s: Sequence) -> Sampled:
        group = s.group
        assert isinstance(group, Beams)
        run = self.runs[(group.request.id + self.seed) % len(self.runs)]
        step = s.outputs
        parents = run[step if step < len(run) else 1 + (step - 1) % (len(run) - 1)]
        rank = group.live.index(s)
        mine = [i for i, parent in enumerate(parents) if parent == rank]
        return Sampled(0, 0.0, tuple((i, -i * GAP - group.scores[rank]) for i in mine))
