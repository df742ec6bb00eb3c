"""Plants bugs, one at a time, in a copy of the tree, and says which tests notice: `python tests/policies/plant.py`.

A proof that cannot fail proves nothing. With words as arguments, only bugs whose name contains one of them are planted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
POLICIES = ("extents", "engine", "continuous", "static", "checksum", "allocators", "prefixes", "beams", "depth")
POLICY_TESTS = tuple(f"tests/policies/test_{name}.py" for name in POLICIES)


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = POLICY_TESTS


BUGS = (
    Bug(
        "extent merging: a merged twin keeps the start of its right half",
        "lab/allocators/extents.py",
        "            start &= ~size\n",
        "",
    ),
    Bug(
        "extent merging: the hole on the left is forgotten if it is the first",
        "lab/allocators/extents.py",
        "if i > 0 and sum(self.holes[i - 1]) == start:",
        "if i > 1 and sum(self.holes[i - 1]) == start:",
    ),
    Bug(
        "reference counts: a block is freed when one holder is left",
        "lab/allocators/paged.py",
        "self.holders[b] -= 1\n        if not self.holders[b]:",
        "self.holders[b] -= 1\n        if self.holders[b] <= 1:",
    ),
    Bug(
        "copy-on-write: the last two holders write into the same block",
        "lab/allocators/paged.py",
        "self.holders[table[first]] > 1",
        "self.holders[table[first]] > 2",
    ),
    Bug(
        "swap order: what goes out is copied before the moves that were ordered earlier",
        "lab/allocators/swap.py",
        'allocator.moves += moves("out", table[new:], [host[b] for b in table[new:]], tokens, self.block)',
        'allocator.moves[:0] = moves("out", table[new:], [host[b] for b in table[new:]], tokens, self.block)',
    ),
    Bug(
        "swap order: a block comes back to where the next one was",
        "lab/allocators/swap.py",
        'moves("in", table[shared:], new, tokens - s.computed, self.block)',
        'moves("in", table[shared:], sorted(new), tokens - s.computed, self.block)',
    ),
    Bug(
        "relocation: the last computed token stays behind",
        "lab/allocators/contiguous.py",
        "self.copy(held, self.tables[s], s.computed)",
        "self.copy(held, self.tables[s], s.computed - 1)",
    ),
    Bug(
        "fork of a shared tail: a last block that is not full is not shared",
        "lab/allocators/paged.py",
        "self.tables[parent][: blocks(length, self.block)]",
        "self.tables[parent][: length // self.block]",
    ),
    Bug(
        "computed after preemption: one token is believed to be still there",
        "lab/schedulers/__init__.py",
        "            if s in group.live:\n                s.computed = 0",
        "            if s in group.live:\n                s.computed = min(1, s.computed)",
    ),
    Bug(
        "slot arithmetic: a move of several blocks ends a token early",
        "lab/allocators/__init__.py",
        "min(tokens, i * block) - start * block",
        "min(tokens, i * block - (i > start + 1)) - start * block",
    ),
    Bug(
        "slot arithmetic: the executor's blocks are one token shorter",
        "lab/executors/checksum.py",
        "table[position // self.block] * self.block + position % self.block",
        "table[position // self.block] * (self.block - 1) + position % self.block",
    ),
    Bug(
        "the mask of the last block: a query sees all of its block (reference)",
        "kernels/reference.py",
        "(keys <= queries)",
        "(keys <= (queries | (ragged.block - 1)))",
        ("tests/kernels/test_reference.py",),
    ),
    Bug(
        "the mask of the last block: a query sees the token after it (Triton)",
        "kernels/softmax.py",
        "(key[None, :] <= query[:, None])",
        "(key[None, :] <= query[:, None] + 1)",
        ("tests/kernels/test_triton.py",),
    ),
    Bug(
        "prefix cache: a block is found before it is full",
        "lab/allocators/paged.py",
        "min(s.computed // self.block, len(table))",
        "min(blocks(s.computed, self.block), len(table))",
    ),
    Bug(
        "prefix cache: the beginning of a prefix is evicted before its end",
        "lab/allocators/paged.py",
        "for b in reversed(self.tables.pop(s, [])):",
        "for b in self.tables.pop(s, []):",
    ),
    Bug(
        "prefix cache: what is still to come from the host is found",
        "lab/allocators/paged.py",
        'if any(move.kind == "in" for move in self.moves):',
        "if False:",
    ),
    Bug(
        "beams: a beam that goes on twice is not copied to the dropped one",
        "lab/beams.py",
        "self.forks.append((parent, home))",
        "pass",
    ),
    Bug(
        "beams: the memory of a dropped beam is believed to be of its new tokens",
        "lab/engine.py",
        "dropped.computed = 0",
        "pass",
    ),
    Bug(
        "beams: what was to be forked is forgotten when a group is swapped out",
        "lab/schedulers/__init__.py",
        "            plan.swapped.add(group)\n        else:\n            group.forks.clear()\n",
        "            plan.swapped.add(group)\n        group.forks.clear()\n",
    ),
    Bug(
        "depth 1: a row that was dead when it was computed gives a token",
        "lab/engine.py",
        "                    del tokens[at:]\n",
        "",
    ),
    Bug(
        "depth 1: a value takes the place of the one that is to come after it",
        "lab/engine.py",
        "                at -= 1  # the other one",
        "                pass  # the other one",
    ),
    Bug(
        "depth 1: a group is complete though a last token is on its way",
        "lab/core.py",
        "not self.live and all(s.tokens[-1] != UNKNOWN for s in self.ended)",
        "not self.live",
    ),
    Bug(
        "depth 1: a beam search goes on without its values",
        "lab/engine.py",
        " and not any(s.group.together for s in plan.work)",
        "",
    ),
    Bug(
        "depth 1: host memory of an output that has ended is not given back",
        "lab/allocators/swap.py",
        "self.free += [b for b in table if b not in kept]",
        "pass",
    ),
    Bug(
        "depth 1: who ended while preempted waits to be resumed",
        "lab/engine.py",
        "                self.scheduler.forget(s)\n",
        "                pass\n",
    ),
    Bug(
        "depth 1: a request is cancelled before what is in flight has come",
        "lab/engine.py",
        "            self._land()  # then nothing of it is in flight\n",
        "",
    ),
    Bug(
        "replay: rows that fill up a batch store their keys and values",
        "lab/executors/replay.py",
        "columns[2] = NOWHERE",
        "columns[2] = 0",
        ("tests/test_torch_executor.py",),
    ),
    Bug(
        "replay: a token on its way is taken from the wrong row",
        "lab/executors/replay.py",
        "columns[5, place] = before[s]",
        "columns[5, place] = 0",
        ("tests/test_torch_executor.py",),
    ),
    Bug(
        "replay: the noise of a row is the first one's",
        "lab/executors/replay.py",
        "[draw.key for draw in draws]",
        "draws[0].key",
        ("tests/test_torch_executor.py",),
    ),
    Bug(
        "accounting: the slot after the last computed token counts as stored",
        "lab/allocators/__init__.py",
        "if any(s.computed > start + offset for s, start, is_ended in holders if not is_ended):",
        "if any(s.computed >= start + offset for s, start, is_ended in holders if not is_ended):",
    ),
)


def failing(tree: Path, tests: tuple[str, ...], *options: str) -> list[str]:
    """The tests of these files that fail."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", *options, *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]


def copied(folder: str) -> Path:
    tree = Path(folder)
    for name in ("lab", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def plant(bug: Bug, without: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        file = tree / bug.file
        source = file.read_text(encoding="utf-8")
        assert source.count(bug.right) == 1, f"{bug.file}: {bug.right!r} is there {source.count(bug.right)} times"
        file.write_text(source.replace(bug.right, bug.wrong), encoding="utf-8")
        print(f"\n{bug.name}\n  {bug.file}\n  - {bug.right.strip()}\n  + {bug.wrong.strip()}", flush=True)
        caught = [test for tests in bug.tests for test in failing(tree, (tests,), "-x", *without)]
    for test in caught:
        print(f"  caught by {test}", flush=True)
    if not caught:
        print("  ESCAPED", flush=True)
    return bool(caught)


if __name__ == "__main__":
    wanted = [bug for bug in BUGS if not sys.argv[1:] or any(word in bug.name for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        files = tuple(dict.fromkeys(file for bug in wanted for file in bug.tests))
        already = failing(copied(folder), files)
    print(f"without a bug {len(already)} tests fail" + "".join(f"\n  {test}" for test in already))
    results = [plant(bug, [f"--deselect={test}" for test in already]) for bug in wanted]
    print(f"\n{sum(results)} of {len(results)} caught")
    sys.exit(not all(results))
