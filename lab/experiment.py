"""Experiments by name: `python -m lab.experiment fragmentation`. Without a name it lists them."""

from __future__ import annotations

import argparse
import importlib
import math
import pkgutil
import shlex
import signal
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import experiments
from lab.allocators import ALLOCATORS
from lab.check import check, check_numbers
from lab.command import Parser, status
from lab.core import InputError, Registry, unknown
from lab.hardware import HARDWARE
from lab.harness import HEADER, Experiment, make_room, perform
from lab.options import Options
from lab.run import EXECUTORS, Run
from lab.schedulers import PREEMPTION, SCHEDULERS
from lab.shapes import SHAPES
from lab.systems import SYSTEMS, system
from lab.workloads import ARRIVALS

MOST_SEEDS = 1000


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "finished runs are kept, and the same command goes on from there")


def names() -> list[str]:
    return sorted(
        module.name for module in pkgutil.iter_modules(experiments.__path__) if not module.name.startswith("_")
    )


def find(name: str) -> Experiment:
    if name not in names():
        raise InputError(unknown("experiment", name, names()))
    module: Any = importlib.import_module(f"experiments.{name}")
    return module


def _main(arguments: list[str]) -> int:
    if not arguments:
        for name in names():
            print(f"{name:16} {question(find(name))}")
        print("\npython -m lab.experiment NAME runs one; python -m lab.experiment --help says how to vary it")
        return 0
    args = _parser().parse_args(arguments)
    options = _options(args)
    command = shlex.join(["python", "-m", "lab.experiment", *arguments])
    if args.name == "all":
        return _all(options, args.fresh, command)
    return _one(args.name, options, args.fresh, command)


def _one(name: str, options: Options, fresh: bool, command: str) -> int:
    experiment = find(name)
    if (options.rates or options.thresholds) and not hasattr(experiment, "THRESHOLDS"):
        raise InputError(f"{name} looks for no sustained rate: leave --rates and --thresholds to capacity")
    return perform(experiment, _checked(experiment, options, fresh), name, options, fresh, command)


def _checked(experiment: Experiment, options: Options, fresh: bool = False) -> list[Run]:
    """Its runs. What has its record is drawn anywhere, also where its device is not."""
    make_room(options.out)
    runs = experiment.runs(options)
    for run in runs:
        there = not fresh and (options.out / "runs" / run.key() / HEADER).is_file()
        (check_numbers if there else check)(run)
    return runs


def runs_of(arguments: list[str], out: Path) -> list[Run]:
    """What `python -m lab.experiment` would carry out with these arguments; InputError where it would refuse."""
    args = _parser().parse_args([*arguments, "--out", str(out)])
    return _checked(find(args.name), _options(args))


def _all(options: Options, fresh: bool, command: str) -> int:
    """Every experiment, one after the other; one that cannot run does not keep the others from it."""
    worst = 0
    for name in names():
        print(f"\n== {name}: {question(find(name))}", flush=True)
        try:
            worst = max(worst, _one(name, options, fresh, command))
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            worst = 2
    return worst


def question(experiment: Experiment) -> str:
    return (experiment.__doc__ or "").strip().splitlines()[0]


def _parser() -> argparse.ArgumentParser:
    """Each option is called like the field of Run that it sets."""
    parser = Parser(
        prog="python -m lab.experiment",
        description="Run an experiment; records, table, summary and figure go to --out.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", help="one of: " + ", ".join(names()) + "; or all")
    add("--system", metavar="A[,B...]", help="serving systems instead of the experiment's own")
    add("--allocator", metavar="A[,B...]", help="allocators instead of the experiment's own")
    add("--scheduler", metavar="S[,T...]", help="schedulers instead of the experiment's own")
    add("--preemption", choices=PREEMPTION, help="what happens to a request that must give up its memory")
    add("--length", type=int, metavar="TOKENS", help="longest sequence, prompt and output")
    add("--batch", type=int, metavar="N", help="requests that a static or dynamic scheduler waits for (default: 8)")
    add(
        "--timeout",
        dest="timeout_s",
        type=float,
        metavar="S",
        help="how long a dynamic scheduler waits for them (default: 1)",
    )
    add("--n", type=int, metavar="N", help="outputs of each request, which share its prompt (default: 1)")
    add("--beams", type=int, metavar="K", help="width of a beam search (default: none)")
    add("--max-tokens", type=int, metavar="TOKENS", help="what clients ask for, who do not know how long answers are")
    add("--prefix", type=int, metavar="TOKENS", help="a prefix that all prompts share, put before each of them")
    add("--reserve-prefix", action="store_true", default=None, help="it is computed once, before the first request")
    add("--watermark", type=float, metavar="SHARE", help="of the blocks, left free by admissions (default: 0.01, or 0)")
    add("--block-size", dest="block", type=int, metavar="TOKENS", help="tokens per block")
    add("--pool", metavar="SIZE", help="KV memory: tokens (15728), bytes (12GiB) or a share of what is free (90%%)")
    add("--executor", choices=EXECUTORS, help="simulated: a virtual clock; torch: a real model on a real device")
    late = "an end that only a token tells shows a step late"
    add("--depth", type=int, metavar="0|1", help=f"1 plans a step while one runs, to hide the host; {late} (torch)")
    add("--device", help="cpu, cuda or cuda:N (torch only)")
    add("--hardware", help="whose pace the virtual clock keeps (simulated only)")
    add("--model", help="a model, see below")
    add("--workload", help="requests, see below")
    add("--arrivals", choices=ARRIVALS, help="when requests come; all: at once, trace: at the file's own times")
    add("--burstiness", type=float, metavar="SHAPE", help="of gamma arrivals: 1 is Poisson's, less is burstier")
    add("--rate", type=float, metavar="REQ/S", help="requests that arrive per second")
    add("--rates", metavar="R,S,...", help="rates to try, ascending, where an experiment looks for the sustained one")
    add("--thresholds", metavar="S,T,...", help="seconds per token up to which a rate counts as sustained")
    add("--duration", dest="duration_s", type=float, metavar="S", help="seconds of arrivals; the run is cut off there")
    add("--drain", action="store_true", default=None, help="do not cut it off: serve all that has arrived")
    add("--count", type=int, metavar="N", help="requests at most")
    add("--steps", type=int, metavar="N", help="iterations after which a run is cut off")
    add("--seeds", metavar="0,1,2 or 0-9", help="repeat with these seeds (default: the experiment's own)")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="where results go (default: results)")
    add(
        "--quick",
        action="store_true",
        help="a small version, in seconds; claims about the paper's numbers are not judged",
    )
    add("--fresh", action="store_true", help="run and measure again what has finished before")
    late = "begin no run and no measurement later than this; the same command goes on with the others (exit status 3)"
    add("--stop-after", dest="stop_after_s", type=float, default=math.inf, metavar="S", help=late)
    return parser


def _epilog() -> str:
    """What the names may be, wrapped."""
    named = "a JSON file of fitted step times"
    models = f"on the virtual clock {', '.join(SHAPES)}; for torch smollm2, random:SHAPE, a folder, a .safetensors"
    drawn = "sharegpt, alpaca, conversations:..., uniform:..., lognormal:..., adversarial"
    lengths = f"{drawn}, opt13b-256, prompts, paper:PATH"
    kinds = {
        "systems": ", ".join(SYSTEMS),
        "allocators": ", ".join(ALLOCATORS.names()),
        "schedulers": ", ".join(SCHEDULERS.names()),
        "hardware": f"{', '.join(HARDWARE)}, or {named}",
        "models": f"{models} or .gguf file, a name on the Hub",
        "workloads": f"{lengths}, a trace (.csv, .parquet), prompts (.jsonl); see python -m pydoc lab.workloads",
        "your own": "--allocator my_module:MyAllocator, or a file in lab/allocators/; schedulers likewise",
    }
    wrap = textwrap.TextWrapper(width=100, subsequent_indent=" " * 13, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{kind:12} {names}") for kind, names in kinds.items())


def _options(args: argparse.Namespace) -> Options:
    chosen = {field.name: getattr(args, field.name, None) for field in fields(Run)}
    several = ("allocator", "scheduler", "seed")
    if not args.stop_after_s > 0:
        raise InputError(f"stop-after {args.stop_after_s:g}: must be a number of seconds above zero")
    return Options(
        changes={name: value for name, value in chosen.items() if value is not None and name not in several},
        allocators=_named(args.allocator, ALLOCATORS),
        schedulers=_named(args.scheduler, SCHEDULERS),
        systems=_systems(args),
        seeds=_seeds(args.seeds),
        quick=args.quick,
        out=args.out,
        rates=_ascending("rates", args.rates),
        thresholds=_ascending("thresholds", args.thresholds),
        stop_after_s=args.stop_after_s,
    )


def _named(text: str | None, registry: Registry) -> list[str] | None:
    """The names in a list with commas, each of which must exist; None where there is no list."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        registry.get(name)
    return names


def _systems(args: argparse.Namespace) -> list[str] | None:
    """A system says which allocator and scheduler it has, so that none can be named beside it."""
    if args.system is None:
        return None
    if args.allocator or args.scheduler:
        raise InputError(f"system {args.system!r} has an allocator and a scheduler: leave --allocator, --scheduler out")
    return [system(name.strip()).name for name in args.system.split(",")]


def _ascending(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < a < math.inf for a in numbers) or sorted(set(numbers)) != numbers:
        raise InputError(f"{name} {text!r}: give numbers above zero in ascending order, as 0.5,1,2")
    return numbers


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        first, dash, last = text.partition("-")
        seeds = range(int(first), int(last) + 1) if dash else [int(seed) for seed in text.split(",")]
        if not 0 < len(seeds) <= MOST_SEEDS or min(seeds) < 0:
            raise ValueError
        return list(seeds)
    except (ValueError, OverflowError):
        rule = f"give whole numbers from 0 on, {MOST_SEEDS} at most, as 0,1,2 or 0-9"
        raise InputError(f"seeds {text!r}: {rule}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it: finished runs are kept
    sys.exit(main())
