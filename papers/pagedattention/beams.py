"""Measures which beams survive: SmolLM2-135M searches for answers to real prompts, and every step's parents are kept.

The virtual clock replays them (lab/executors/survival.py). A beam search that must share memory is only as good as the
coming and going of its beams, and no distribution that one could guess has a language model's.

    python papers/pagedattention/beams.py            some five minutes on two cores
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import torch

from lab.allocators import ALLOCATORS
from lab.beams import Beams, Candidate
from lab.core import Limits, Request, Sampled, SamplingParams, Sequence
from lab.engine import Engine
from lab.executors.survival import FILE
from lab.executors.torch import TorchExecutor
from lab.models.loading import load
from lab.real import encoder
from lab.schedulers import SCHEDULERS
from lab.workloads import workload

WIDTHS = (2, 4, 6)
MODEL = "smollm2"
LENGTH = 256  # of a sequence
parents: dict[int, list[str]] = {}


def watch() -> None:
    """Have every search say, step by step, which beam each of its beams continues."""
    go_on = Beams._go_on

    def watched(self: Beams, going: list[Candidate]) -> dict[Sequence, list[Sampled]]:
        parents.setdefault(self.request.id, []).append("".join(str(c.rank) for c in going))
        return go_on(self, going)

    Beams._go_on = watched  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="how many (default: 24)")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer (default: 64)")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    watch()
    model = load(MODEL, dtype=torch.float32)
    asked = workload("prompts", count=args.prompts, arrivals="all", limit=LENGTH - args.tokens, encode=encoder(MODEL))
    found = {}
    for width in WIDTHS:
        parents.clear()
        limits = Limits(length=LENGTH)
        pool = LENGTH * width * 16
        scheduler = SCHEDULERS.get("continuous")(ALLOCATORS.get("paged")(pool, 16, limits), limits)
        sampling = SamplingParams(max_tokens=args.tokens, n=width, beams=width)
        requests = [Request(r.id, 0.0, r.prompt, None, sampling) for r in asked]
        Engine(scheduler, TorchExecutor(model, pool, 16), eos=model.eos).run(requests)
        found[width] = [" ".join(steps) for _, steps in sorted(parents.items())]
        print(f"width {width}: {sum(len(run.split()) for run in found[width])} steps of {len(found[width])} searches")
    measured = {"model": MODEL, "dtype": "float32", "prompts": args.prompts, "tokens": args.tokens}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"measured": measured, "parents": found}, indent=1)
    args.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(args.out)


if __name__ == "__main__":
    main()
