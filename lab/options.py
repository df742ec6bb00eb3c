"""What the command line asks of an experiment: settings that change its runs, policies to compare, where to run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab.core import InputError
from lab.run import Run
from lab.systems import system


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None leaves a setting to the experiment."""

    changes: Mapping[str, Any]  # fields of Run
    allocators: list[str] | None
    schedulers: list[str] | None
    systems: list[str] | None
    seeds: list[int] | None
    quick: bool
    out: Path
    rates: list[float] | None = None  # requests/s, ascending: of an experiment that looks for the one a system sustains
    thresholds: list[float] | None = None  # seconds per token up to which a rate counts as sustained
    stop_after_s: float = math.inf  # no run is begun later; the same command goes on

    def apply(self, run: Run) -> Run:
        """The run with these changes. A rate spreads out what would come at once; a trace has its own times."""
        changes = dict(self.changes)
        if "rate" in changes and changes.get("arrivals") == "all":
            raise InputError(
                f"rate {changes['rate']}: requests that come all at once have none; leave one of the two out"
            )
        if "rate" in changes and run.arrivals == "all":
            changes.setdefault("arrivals", "poisson")
        if changes.get("arrivals") == "trace":
            changes.setdefault("rate", None)
        return Run(**{**asdict(run), **changes})

    def where(self, virtual: Run, gpu: Run, laptop: Run) -> Run:
        """The setting for where it is to run: on the virtual clock, unless torch or a device is asked for."""
        executor, device, pace = (self.changes.get(name) for name in ("executor", "device", "hardware"))
        if device and executor == "simulated":
            rule = "the virtual clock has none; leave --device out, or take --executor torch"
            raise InputError(f"device {device!r}: {rule}")
        if pace and (device or executor == "torch"):
            rule = "a real device keeps its own pace; leave --hardware out, or --executor"
            raise InputError(f"hardware {pace!r}: {rule}")
        if (device or "").startswith("cuda"):
            return gpu
        return laptop if device or executor == "torch" else virtual

    def variants(self, run: Run, systems: Iterable[str]) -> list[Run]:
        """The run under each policy that is compared: --allocator x --scheduler, or --system, or else `systems`.

        What a system fixes wins over the run's own setting, and what was typed wins over both.
        """
        if self.allocators or self.schedulers:
            pairs = itertools.product(self.allocators or [run.allocator], self.schedulers or [run.scheduler])
            named: list[Mapping[str, Any]] = [{"allocator": a, "scheduler": s} for a, s in pairs]
        else:
            named = [system(name).settings for name in self.systems or systems]
        return [self.apply(replace(run, **settings)) for settings in named]
