"""Which source files a result depends on: the import graph below given modules, as far as it is the project's own.

A result is found again only while none of them has changed, so an edited policy is never served old numbers.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

FOREIGN = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def sources(policies: Iterable[Callable[..., Any]], modules: Iterable[str]) -> set[Path]:
    """The files of these policies and modules, and of everything of ours that they import."""
    todo = [Path(inspect.getfile(p.func if isinstance(p, partial) else p)).resolve() for p in policies]
    todo += [path for name in modules if (path := _file(name))]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imports(path)
    return found


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents, in the order of the paths."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Files of ours that a file imports, wherever in it the statement stands."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(sorted({found for name in names if (found := _file(name))}))


@cache
def _file(module: str) -> Path | None:
    """The file of a module if it is ours, None for anything else (an attribute, say). Imports nothing foreign."""
    package = module.rpartition(".")[0]
    if package and _file(package) is None:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin).resolve()
    return None if any(path.is_relative_to(place) for place in FOREIGN) else path
