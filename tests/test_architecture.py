"""Imports go one way, policies need no torch, kernels need no lab, and files and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES_OF_A_FILE = 320
MOST_LINES_OF_A_FUNCTION = 60

# What each part of the house may import of the others; a part is the longest prefix of a module's name in this table.
#
#   core <- allocators <- schedulers <- engine                     policy half: imports without torch
#   core <- executors.{simulated, checksum}
#   core <- executors.{batch, cache, torch} -> models -> kernels   mechanism half: torch lives here alone
#   allocators <- record <- metrics <- plot                        reads, never decides
#   all of them <- run <- harness <- experiments <- experiment
#   engine, real, record <- llm <- generate, serve.worker <- serve
POLICIES = {"lab.core", "lab.allocators", "lab.schedulers"}
TENSORS = {"lab.executors.batch", "lab.executors.cache", "lab.executors.sampling"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "lab": {"lab.core"},
    "lab.core": set(),
    "lab.sources": set(),
    "lab.shapes": {"lab.core"},
    "lab.hardware": {"lab.core", "lab.shapes"},
    "lab.pool": {"lab.core"},
    "lab.tables": {"lab.core"},
    "lab.allocators": {"lab.core"},
    "lab.schedulers": {"lab.core", "lab.allocators"},
    "lab.events": {"lab.core", "lab.allocators"},
    "lab.engine": POLICIES | {"lab.beams", "lab.events", "lab.executors"},
    "lab.workloads": {"lab.core"},
    "lab.systems": {"lab.core"},
    "lab.executors": {"lab.core"},
    "lab.executors.simulated": {"lab.core", "lab.hardware", "lab.shapes"},
    "lab.executors.checksum": {"lab.core"},
    "lab.executors.survival": {"lab.core", "lab.beams"},
    "lab.beams": {"lab.core"},
    "lab.executors.sampling": {"lab.core", "kernels"},
    "lab.executors.batch": {"lab.core", "lab.models", "kernels"},
    "lab.executors.cache": {"lab.core", "lab.models", "kernels"},
    "lab.executors.replay": TENSORS | {"lab.core", "lab.models", "kernels"},
    "lab.executors.torch": TENSORS | {"lab.executors.replay", "lab.core", "lab.models", "kernels"},
    "lab.models": {"lab.core", "lab.shapes", "kernels"},
    "lab.record": {"lab.core", "lab.allocators", "lab.events", "lab.tables"},
    "lab.latency": {"lab.core", "lab.record"},
    "lab.metrics": {"lab.core", "lab.record", "lab.latency"},
    "lab.plot": {"lab.core", "lab.allocators", "lab.film"},
    "lab.film": {"lab.core", "lab.record", "lab.metrics"},
    "lab.view": {"lab.command", "lab.core", "lab.record", "lab.film"},
    "lab.trace": {"lab.command", "lab.record", "lab.metrics", "lab.film", "lab.view"},
    "lab.real": {"lab.core", "lab.pool", "lab.models", "lab.executors.cache", "lab.executors.torch"},
    "lab.command": {"lab.core"},
    "lab.detokenise": set(),
    "lab.tokenise": {"lab.core"},
    "lab.answers": {"lab.core", "lab.allocators", "lab.beams", "lab.detokenise", "lab.events"},
    "lab.llm": POLICIES | {"lab.answers", "lab.engine", "lab.real", "lab.record", "lab.tokenise"},
    "lab.generate": POLICIES | {"lab", "lab.answers", "lab.command", "lab.workloads"},
    "lab.serve.messages": {"lab.core", "lab.answers"},
    "lab.serve.camera": POLICIES | {"lab.engine", "lab.events", "lab.film", "lab.record", "lab.serve.messages"},
    "lab.serve.watch": POLICIES | {"lab.engine", "lab.events", "lab.record", "lab.serve.camera", "lab.serve.messages"},
    "lab.serve.tokens": {"lab.core", "lab.detokenise", "lab.serve.messages"},
    "lab.serve.worker": {"lab", "lab.core", "lab.answers"}
    | {f"lab.serve.{m}" for m in ("messages", "tokens", "watch")},
    "lab.serve": POLICIES | {"lab.answers", "lab.command", "lab.view"} | {"lab.serve.messages", "lab.serve.worker"},
    "lab.run": POLICIES
    | {"lab.engine", "lab.executors.simulated", "lab.executors.survival", "lab.hardware", "lab.shapes", "lab.pool"}
    | {"lab.real", "lab.record"}
    | {"lab.sources", "lab.workloads"},
    "lab.check": POLICIES
    | {"lab.engine", "lab.executors.simulated", "lab.hardware", "lab.run", "lab.shapes", "lab.workloads"},
    "lab.conformance": POLICIES | {"lab.check", "lab.command", "lab.engine", "lab.executors.checksum"},
    "lab.options": {"lab.core", "lab.run", "lab.systems"},
    "lab.bench": POLICIES
    | {"lab.engine", "lab.executors.cache", "lab.executors.torch", "lab.models", "lab.pool", "lab.real", "lab.record"}
    | {"lab.command", "lab.plot", "lab.run", "lab.shapes", "kernels"},
    "lab.processes": {"lab.core", "lab.run"},
    "lab.measured": {"lab.command", "lab.core", "lab.record", "lab.run", "lab.sources"},
    "lab.harness": {
        "lab.measured",
        "lab.options",
        "lab.processes",
        "lab.core",
        "lab.plot",
        "lab.record",
        "lab.run",
        "lab.metrics",
        "lab.latency",
        "lab.systems",
    },
    "experiments": POLICIES
    | {"lab.executors.simulated", "lab.hardware", "lab.shapes", "lab.workloads", "lab.record", "lab.run", "lab.harness"}
    | {"lab.latency", "lab.metrics", "lab.plot", "lab.systems", "lab.check", "lab.options", "lab.measured", "kernels"},
    "lab.experiment": POLICIES
    | {
        "lab.command",
        "lab.check",
        "lab.harness",
        "lab.options",
        "lab.hardware",
        "lab.run",
        "lab.shapes",
        "lab.systems",
        "lab.workloads",
    }
    | {"experiments"},
    "lab.results": {"lab.core", "lab.experiment", "lab.harness", "lab.record"},
    "lab.report": {"lab.command", "lab.results"},
}
# Policies, and what of the rest must work where torch is not installed.
WITHOUT_TORCH = (
    "lab",
    "lab.core",
    "lab.allocators",
    "lab.schedulers",
    "lab.engine",
    "lab.executors.simulated",
    "lab.executors.checksum",
    "lab.workloads",
    "lab.record",
    "lab.metrics",
    "lab.plot",
    "lab.view",
    "lab.trace",
    "lab.experiment",
    "lab.report",
    "lab.generate",
    "lab.answers",
    "lab.serve.__main__",
    "experiments",
)
STANDARD_LIBRARY_ONLY = (
    "lab.core",
    "lab.allocators",
    "lab.schedulers",
    "lab.engine",
    "lab.executors.checksum",
    "lab.detokenise",
    "lab.answers",
    "lab.serve.messages",
    "lab.serve.tokens",
)
TORCH_LIVES_IN = (
    "lab.executors.batch",
    "lab.executors.cache",
    "lab.executors.replay",
    "lab.executors.sampling",
    "lab.executors.torch",
    "lab.models",
    "lab.real",
    "lab.bench",
    "kernels",
)

# (file, what it imports inside a function): each with the reason why it cannot be at the top.
HIDDEN_IMPORTS: dict[tuple[str, str], str] = {
    ("lab.executors.torch", "triton"): "there is none where torch has no GPU support",
    ("lab.workloads.traces", "pyarrow"): "only traces in Parquet need it",
    ("lab.workloads.traces", "pyarrow.parquet"): "the same",
    ("lab.run", "lab.real"): "it brings torch, which takes seconds and which the virtual clock does not need",
    ("lab.models.loading", "lab.models"): "checkpoints bring transformers: seconds that random weights do without",
    ("lab.models.names", "lab.models"): "SmolLM2's conversion brings it too",
    ("lab.models.names", "lab.models.hub"): "the Hub's client, for a model of the Hub",
    ("kernels.bench", "kernels.shares"): "it brings Triton, which is not where only a CPU is timed",
    ("lab.bench.__main__", "lab.bench"): "it draws: a second of imports that would count as start-up",
}


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sources("lab", "kernels", "experiments") if path.read_text().strip()}


def part_of(module: str) -> str:
    return max(
        (part for part in MAY_IMPORT if module == part or module.startswith(part + ".")), key=len, default=module
    )


def imported(module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that is imported, anywhere in the file: `from lab import shapes` is lab.shapes."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: write the full name instead of dots"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in MODULES else str(node.module)), node


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("lab", "kernels", "experiments")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    part = part_of(module)
    assert part != "lab" or module == "lab", f"{module} has no place in the house: give it a line in MAY_IMPORT"
    assert part in MAY_IMPORT, f"{module} has no place in the house: give it a line in MAY_IMPORT"
    for name, node in imported(module):
        if is_ours(name) and part_of(name) != part:
            assert part_of(name) in MAY_IMPORT[part], (
                f"{MODULES[module].name}:{node.lineno}: {part} must not import {name}"
            )


def test_the_table_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while done != set(MAY_IMPORT):
        ready = {part for part in MAY_IMPORT if part not in done and MAY_IMPORT[part] <= done}
        assert ready, f"a cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= ready


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_by_the_mechanism_alone(module: str) -> None:
    heavy = {"torch", "triton", "transformers", "safetensors", "gguf", "huggingface_hub"}
    names = {name.split(".")[0] for name, node in imported(module) if not is_type_checking(module, node)}
    if not module.startswith(TORCH_LIVES_IN):
        assert not names & heavy, f"{module} imports {names & heavy}"
    if module.startswith("kernels"):
        assert not {name for name in names if name in ("lab", "experiments")}
        assert names <= {"torch", "triton", "kernels", *sys.stdlib_module_names}, (
            f"{module} imports more than torch and triton"
        )
    if module.startswith(STANDARD_LIBRARY_ONLY):
        assert names <= {"lab", *sys.stdlib_module_names}, f"{module} imports more than the standard library"


def is_type_checking(module: str, node: ast.stmt) -> bool:
    for block in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            return block.lineno <= node.lineno <= (block.end_lineno or 0)
    return False


def test_policies_import_without_torch() -> None:
    """In a process of its own, where importing torch or what brings it fails."""
    modules = [module for module in WITHOUT_TORCH if module in MODULES]
    assert len(modules) >= 7
    code = f"""
import importlib, sys
for name in ("torch", "triton", "transformers", "kernels", "safetensors", "gguf"):
    sys.modules[name] = None  # importing it raises ImportError
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_import_without_lab() -> None:
    names = [module for module in MODULES if module in ("kernels", "kernels.ragged", "kernels.reference")]
    code = f"import importlib, sys; sys.modules['lab'] = None; [importlib.import_module(name) for name in {names!r}]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def hidden_imports() -> set[tuple[str, str]]:
    found = set()
    for module, path in MODULES.items():
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import):
                        found |= {(module, alias.name) for alias in node.names}
                    elif isinstance(node, ast.ImportFrom):
                        found.add((module, str(node.module)))
    return found


def test_no_import_hides_inside_a_function() -> None:
    assert hidden_imports() == set(HIDDEN_IMPORTS), "move it to the top of the file, or say here why it cannot be"
    assert all(HIDDEN_IMPORTS.values())


FILES = [*sources("lab", "kernels", "experiments", "tests")]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if "tests" not in path.relative_to(ROOT).parts:
        assert len(lines) <= MOST_LINES_OF_A_FILE, f"{len(lines)} lines: one idea per file"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not lines, "say in a sentence or two what this file is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} at line {node.lineno} has {length} lines"
