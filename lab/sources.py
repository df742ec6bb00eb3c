"""Which source files a result depends on: the import graph below given modules, as far as it is the project's own.

A result is found again only while none of them has changed, so an edited policy is never served old numbers. The graph
is read off the source: nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

FOREIGN = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def sources(policies: Iterable[Callable[..., Any]], modules: Iterable[str]) -> set[Path]:
    """The files of these policies and modules, and of everything of ours that they import.

    Ours is what lies outside the standard library and the installed packages, and the packages that were given.
    """
    homes = [home for policy in policies for home in _homes(policy)]
    modules = [*modules, *(name for name, _ in homes)]
    ours = frozenset(name.partition(".")[0] for name in modules)
    todo = {path for _, path in homes}.union(*(_files(name, ours) for name in modules))
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        found.add(path)
        todo |= _imports(path, ours) - found
    return found


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents, in the order of the paths."""
    sha = hashlib.sha256()
    for path in sorted(paths):
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def _homes(policy: Callable[..., Any]) -> list[tuple[str, Path]]:
    """Module and file in which a policy is defined; of a partial also those of the functions it is completed with."""
    parts: list[Any] = [policy]
    if isinstance(policy, partial):
        parts = [policy.func, *policy.args, *policy.keywords.values()]
    defined = [part for part in map(inspect.unwrap, parts) if inspect.isclass(part) or inspect.isroutine(part)]
    modules = {part.__module__ for part in defined or [type(policy)]}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return [(name, Path(file).resolve()) for name, file in files.items() if file]


@cache
def _imports(path: Path, ours: frozenset[str]) -> frozenset[Path]:
    """Files of ours that a file imports, wherever in it the statement stands."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {file for alias in node.names for file in _files(alias.name, ours)}
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            for name in (".".join([*module, alias.name]) for alias in node.names):
                found |= _beside(path.parents[node.level - 1], name) if node.level else _files(name, ours)
    return frozenset(found)


def _beside(folder: Path, name: str) -> set[Path]:
    """The file that a relative import means, and those of the packages it lies in."""
    parts = name.split(".")
    places = [folder / "__init__", *(folder.joinpath(*parts[:i]) for i in range(1, len(parts) + 1))]
    files = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
    return {file.resolve() for file in files if file.is_file()}


@cache
def _files(module: str, ours: frozenset[str]) -> frozenset[Path]:
    """The file of a module and those of the packages it lies in, where they are ours."""
    found: set[Path] = set()
    parts = module.split(".")
    where: list[str] | None = None  # None: sys.path
    for i in range(1, len(parts) + 1):
        spec = _spec(".".join(parts[:i]), where)
        if spec is None:
            break  # the rest is an attribute
        if spec.origin and spec.origin.endswith(".py"):
            found.add(Path(spec.origin).resolve())
        if not spec.submodule_search_locations:
            break
        where = list(spec.submodule_search_locations)
    own = parts[0] in ours
    return frozenset(path for path in found if own or not any(path.is_relative_to(place) for place in FOREIGN))


def _spec(name: str, where: list[str] | None) -> ModuleSpec | None:
    """Of a top-level module from whoever finds it (an editable install may), of those below from their folder."""
    if where is not None:
        return PathFinder.find_spec(name, where)
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # of a module that is there without a file
        return None
