"""Runs of several experiments, spread over all GPUs of a machine: in the order given, of each the longest first.

    python papers/pagedattention/together.py factorial systems growth --out results/gpu --stop-after 900
    python papers/pagedattention/together.py --options factorial       how that one is run on a GPU

One experiment after the other would leave GPUs idle whenever its last runs end. Afterwards each experiment, called with
the same options, finds its runs and has only to read, draw and judge: ./gpu.sh does both. Exit status 3: runs are left.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # where lab and experiments are, installed or not

from lab.command import Parser, status  # noqa: E402
from lab.core import InputError, unknown  # noqa: E402
from lab.experiment import runs_of  # noqa: E402
from lab.harness import STOPPED, carry_out_all, make_room  # noqa: E402
from lab.run import Run  # noqa: E402

RESERVING = "contiguous-max,contiguous-oracle,contiguous-oracle-firstfit,paged-oracle,paged"
OPTIONS = {  # OPT-13B's shape, random weights, 12 GiB pool; fragmentation and clock find the GPU themselves
    "fragmentation": "",
    "clock": "",
    "indirection": "--device cuda",
    "preemption": "--device cuda",
    "blocksize": "--device cuda --seeds 0",
    "factorial": f"--device cuda --allocator {RESERVING} --scheduler static,continuous --batch 2048 --seeds 0",
    "capacity": "--device cuda --workload sharegpt --system vllm,orca-oracle,orca-max --duration 300 --seeds 0",
    "growth": "--device cuda --seeds 0",
    "gap": "--device cuda --seeds 0",
    "systems": "--device cuda --arrivals all --seeds 0",
    "fidelity": "--device cuda --seeds 0",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "finished runs are kept, and the same command goes on from there")


def _main(arguments: list[str]) -> int:
    parser = Parser(prog="together.py", description="Carry out the runs of several experiments on all GPUs.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="of: " + ", ".join(OPTIONS))
    parser.add_argument("--options", action="store_true", help="only say with which options each is run on a GPU")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="S", help="begin no run later than this")
    args = parser.parse_args(arguments)
    for name in args.names:
        if name not in OPTIONS:
            raise InputError(unknown("experiment", name, OPTIONS))
    if args.options:
        print("\n".join(OPTIONS[name] for name in args.names))
        return 0
    stop_s = time.monotonic() + args.stop_after
    each = (longest_first(runs_of([name, *shlex.split(OPTIONS[name])], args.out)) for name in args.names)
    runs = list(dict.fromkeys(run for runs in each for run in runs))  # what comes first is complete where time runs out
    places = {run: args.out / "runs" / run.key() for run in runs}
    missing: dict[Path, Run] = {}
    for run, place in places.items():
        if not place.exists():
            missing.setdefault(place, run)  # some share a place
    print(f"{len(set(places.values()))} runs, {len(missing)} to carry out", flush=True)
    make_room(args.out, len(missing))
    carry_out_all({run: place for place, run in missing.items()}, stop_s)
    left = sum(not place.exists() for place in missing)
    if left:
        print(f"{left} runs are left: the same command goes on with them")
    return STOPPED if left else 0


def longest_first(runs: Iterable[Run]) -> list[Run]:
    return sorted(dict.fromkeys(runs), key=expected_s, reverse=True)


def expected_s(run: Run) -> float:
    """Roughly: nothing but the order depends on it. 256 requests at once take a minute where memory is paged."""
    if run.arrivals != "all" and run.duration_s:
        return run.duration_s
    slow = 2 if run.allocator.startswith("paged") else 4
    return 30.0 * slow * (1 if run.scheduler == "continuous" else 3) * (run.count or 256) / 256


if __name__ == "__main__":
    sys.exit(main())
