"""The grammar of a workload's name: `NAME` or `NAME:KEY=VALUE,KEY=VALUE`, and how a value is read."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lab.core import InputError, unknown


def parameters(spec: str, known: Iterable[str]) -> dict[str, str]:
    """What stands behind the colon of `spec`; only `known` keys, each once."""
    name, _, text = spec.partition(":")
    known = tuple(known)
    values: dict[str, str] = {}
    for part in text.split(",") if text else []:
        key, equals, value = part.partition("=")
        if not known:
            raise InputError(f"workload {spec!r}: {name} takes no parameters: write {name}")
        if not equals:
            raise InputError(f"workload {spec!r}: {part!r} must be KEY=VALUE, with KEY one of {', '.join(known)}")
        if key not in known:
            raise InputError(f"workload {spec!r}: {unknown('parameter', key, known)}")
        if key in values:
            raise InputError(f"workload {spec!r}: parameter {key!r} is there twice: leave one out")
        values[key] = value
    return values


def whole(spec: str, values: dict[str, str], key: str, default: int, least: int = 1) -> int:
    """A whole number, at least `least`."""
    text = values.get(key, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise InputError(f"workload {spec!r}: {key}={text}: must be a whole number, at least {least}")
    return int(text)


def span(spec: str, values: dict[str, str], key: str) -> tuple[int, int]:
    """`LO-HI` or one number for both, in tokens."""
    text = _required(spec, values, key, "LO-HI, such as 1-100")
    match = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    lowest, highest = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= lowest <= highest:
        raise InputError(f"workload {spec!r}: {key}={text}: must be LO-HI with 1 <= LO <= HI, such as 1-100")
    return lowest, highest


def mean_deviation(spec: str, values: dict[str, str], key: str) -> tuple[float, float]:
    """`MEAN+-DEVIATION`, in tokens."""
    text = _required(spec, values, key, "MEAN+-DEVIATION, such as 161+-299")
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\+-([0-9]{1,9}(?:\.[0-9]{1,6})?)", text)
    mean, deviation = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    if mean <= 0:
        raise InputError(
            f"workload {spec!r}: {key}={text}: must be MEAN+-DEVIATION with MEAN above 0, such as 161+-299"
        )
    return mean, deviation


def _required(spec: str, values: dict[str, str], key: str, form: str) -> str:
    if key not in values:
        raise InputError(f"workload {spec!r}: parameter {key!r} is missing: add {key}={form}")
    return values[key]
