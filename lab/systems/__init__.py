"""Serving systems by name: each a named combination of allocator, scheduler and settings of a run.

A file of this folder is a system, or a family of them. Its text is a page on what it models of that system, from which
source, and what it leaves out; a file dropped here registers itself. What sets systems apart beyond these settings
(kernels, host code, languages) is left out on purpose: here all of them run on the same engine. What one reads on the
web about them, and what is true of it, is in papers/systems.md.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from lab.core import InputError, unknown


class Reached(NamedTuple):
    """What the system itself reached, which is another thing than what its policies reach on our engine."""

    result: str
    setting: str  # model, workload, machine, version, and who measured it
    difference: str  # what separates it from a run under the system's name here

    def __str__(self) -> str:
        return f"{self.result} ({self.setting}); the difference: {self.difference}"


class System(NamedTuple):
    name: str
    settings: Mapping[str, Any]  # fields of lab.run.Run
    page: str  # what it models, from where, and what it leaves out
    reached: tuple[Reached, ...] = ()


SYSTEMS: dict[str, System] = {}


def register(name: str, *reached: Reached, **settings: Any) -> None:
    """Called by a file of this folder, whose text is the page; `settings` are fields of a Run."""
    page = sys._getframe(1).f_globals["__doc__"] or ""
    SYSTEMS[name] = System(name, settings, page.strip(), reached)


def system(name: str) -> System:
    """The system called `name`. Raises InputError for a name that does not exist."""
    if name not in SYSTEMS:
        raise InputError(unknown("system", name, SYSTEMS))
    return SYSTEMS[name]


def label(run: Any) -> str:
    """The name of the system whose settings this run has; else its allocator, and scheduler where not continuous."""
    matching = [s for s in SYSTEMS.values() if all(getattr(run, key) == value for key, value in s.settings.items())]
    if matching:
        return max(matching, key=lambda s: len(s.settings)).name
    return run.allocator if run.scheduler == "continuous" else f"{run.allocator} {run.scheduler}"


def import_systems() -> None:
    """Import every file of this folder, so that each registers what it describes."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


import_systems()
