"""What an experiment times itself, kept point by point, so that an interruption loses only one; and on what machine."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from lab.command import write
from lab.core import InputError
from lab.record import describe
from lab.run import COMMON, REAL, TUNED, VIRTUAL, real
from lab.sources import digest, sources

BENCH = ("kernels.bench", "kernels.timing")  # what times kernels, besides what runs them

Row = dict[str, Any]


class Stopped(Exception):
    """Time is up, and points are left to measure."""


class Once:
    """Calls whoever measures a point, unless that was done before: on this machine, by the sources as they are."""

    def __init__(self, file: Path, experiment: Any, stop_s: float = math.inf, fresh: bool = False) -> None:
        """A line of `file` for each. None is begun after `stop_s` (of time.monotonic); with `fresh` none is found."""
        self.file = file
        self.found, self.done = 0, 0  # points of this call: known before, and all so far
        self._module = inspect.getmodule(experiment)
        self._stop_s = stop_s
        self._kept: dict[str, dict[str, Any]] = {} if fresh else _read(file)

    def __call__(self, point: Mapping[str, Any], measure: Callable[[], list[Row]]) -> list[Row]:
        """Rows of a point, which names all that they depend on besides sources and CPU: plain numbers and names.

        Raises Stopped, InputError where they cannot be written, and whatever `measure` does: then nothing is kept.
        """
        key = hashlib.sha256(json.dumps([self._origin, point], sort_keys=True).encode()).hexdigest()[:16]
        if key in self._kept:
            self.found += 1
        elif time.monotonic() > self._stop_s:
            raise Stopped
        else:
            line = json.dumps({"key": key, "point": point, "rows": measure()}, default=plain)
            self._kept[key] = json.loads(line)  # as it will be found
            write(self.file, (json.dumps(kept) + "\n" for kept in self._kept.values()))
        self.done += 1
        return [dict(row) for row in self._kept[key]["rows"]]

    @cached_property
    def _origin(self) -> list[str]:
        """The CPU, which a point does not name, and the sources: of the engine, the kernels and the experiment."""
        files = sources([], [*COMMON, *VIRTUAL, *REAL, *BENCH]) | ({TUNED} if TUNED.is_file() else set())
        if self._module is not None and self._module.__file__:
            home = Path(self._module.__file__).resolve().parent
            files |= {file for file in sources([], [self._module.__name__]) if file.parent == home}
        return [_cpu(), digest(files)]


def plain(value: Any) -> Any:
    """Of a number or truth value of numpy's what JSON can hold."""
    return value.item()


def machine_of(header: Mapping[str, Any]) -> str:
    """On what a record was measured: a GPU, or a CPU, its threads and its model."""
    machine = header["machine"]
    return str(header["hardware"] if machine["gpu"] else f"{header['hardware']} ({machine['cpu']})")


def machine_here(device: str) -> str:
    """The same of what is going to be measured."""
    name = real().device_name(device)
    return machine_of({"hardware": name, "machine": {"cpu": _cpu(), "gpu": "" if device == "cpu" else name}})


@cache
def _cpu() -> str:
    return str(describe(model="", workload="", seed=0, simulated=False, hardware="")["machine"]["cpu"])


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {line["key"]: {name: line[name] for name in ("key", "point", "rows")} for line in lines}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not what was measured ({error}): remove it, or measure again with --fresh") from None
