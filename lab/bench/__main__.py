"""The command: python -m lab.bench."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

import kernels.bench
import lab.bench
from lab.bench.cases import CASES
from lab.bench.profile import steps_of
from lab.bench.workloads import Rows, first_token, laptop, policies, startup, step, throughput
from lab.command import Parser, status
from lab.core import InputError, unknown
from lab.record import describe
from lab.run import real

REGRESS = ("compare", "baseline")  # have options of their own


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "what was measured is kept, given --out")


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] in REGRESS:
        from lab.bench import regress  # draws: a second of imports, which would count as start-up below

        return regress.main(arguments)
    parser = Parser(
        prog="python -m lab.bench", description=lab.bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=["throughput", "step", "policies", "profile", "startup", "laptop", "kernels", "first-token", *REGRESS],
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="of throughput and profile: " + ", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="of each case; every second one is recorded")
    parser.add_argument("--depth", type=int, choices=(0, 1), default=1, help="steps that run while the next is planned")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write what was measured there, as JSON")
    args = parser.parse_args(arguments)
    if args.what == "kernels":
        return kernels.bench.main(["--out", str(args.out)] if args.out else [])
    said = Said()
    rows: list[dict[str, Any]] = []
    try:
        with redirect_stdout(said):
            for row in _measure(args):  # what is measured is kept, whatever comes after
                rows.append(row)
    finally:
        if args.out and rows:
            _keep(args, shlex.join(["python", "-m", "lab.bench", *arguments]), said.getvalue(), rows)
    return 0


def _keep(args: argparse.Namespace, command: str, said: str, rows: list[dict[str, Any]]) -> None:
    machine = real().device_name("cpu" if args.what == "laptop" else args.device)
    header = describe(model="", workload="", seed=0, simulated=False, hardware=machine, gpu=machine)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.what}.txt").write_text(f"$ {command}\n\n{said}")
    (args.out / f"{args.what}.json").write_text(json.dumps({**header, "command": command, "rows": rows}, indent=1))


class Said(StringIO):
    """What is printed, kept besides."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text) if sys.__stdout__ else None
        return super().write(text)

    def flush(self) -> None:
        sys.__stdout__.flush() if sys.__stdout__ else None


def _measure(args: argparse.Namespace) -> Rows:
    if args.what == "laptop":
        return laptop(args.rounds)
    if not torch.cuda.is_available():
        raise InputError(f"{args.what} is measured on a GPU, and there is none: take laptop for this CPU")
    if args.what == "first-token":
        first_token(args.cases[0], args.device)
        return iter(())
    for name in args.cases:
        if name not in CASES:
            raise InputError(unknown("case", name, CASES))
    if args.what == "throughput":
        return throughput(args.cases or list(CASES), args.rounds, args.depth, args.device)
    if args.what == "profile":
        return steps_of(args.cases or ["qwen3-0.6b", "opt-13b"], args.depth, args.device)
    if args.what == "policies":
        return policies(args.rounds, args.device)
    return step(args.device) if args.what == "step" else startup(args.device)


if __name__ == "__main__":
    sys.exit(main())
