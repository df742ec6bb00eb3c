"""Which files a result depends on, on a package made for the purpose, and what the key of a run changes with."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lab.run
from lab.allocators import ALLOCATORS
from lab.run import Run
from lab.sources import digest, sources

ROOT = Path(__file__).parents[1]
PACKAGE = {
    "strange/__init__.py": "",
    "strange/policy.py": "import json\nimport numpy\nfrom . import near\nfrom strange.deep.far import there\n"
    "class Mine:\n    pass\ndef make(x):\n    import strange.hidden\n",
    "strange/near.py": "from .deep import also\n",
    "strange/hidden.py": "",
    "strange/unused.py": "raise RuntimeError('never imported')\n",
    "strange/deep/__init__.py": "",
    "strange/deep/far.py": "there = 1\nimport strange.policy\n",  # a cycle
    "strange/deep/also.py": "",
}


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "strange"]:
        del sys.modules[name]
    forget()


def forget() -> None:
    """As a fresh process: a key looks at imports once."""
    lab.sources._imports.cache_clear()
    lab.sources._files.cache_clear()


def names(paths: set[Path], below: Path) -> set[str]:
    return {str(path.relative_to(below)) for path in paths}


EXPECTED = set(PACKAGE) - {"strange/unused.py"}


def test_everything_of_ours_that_is_imported_and_nothing_else(strange: Path) -> None:
    assert names(sources([], ["strange.policy"]), strange) == EXPECTED
    assert "strange" not in sys.modules, "looking for sources must not import them"


def test_a_policy_brings_its_own_files(strange: Path) -> None:
    policy = importlib.import_module("strange.policy")
    given: Any
    for given in (policy.Mine, policy.make, partial(policy.Mine), policy.Mine(), partial(dict, reserve=policy.make)):
        assert names({p for p in sources([given], []) if p.is_relative_to(strange)}, strange) == EXPECTED


def test_an_installed_plug_in_counts_too(strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.sources, "FOREIGN", [*lab.sources.FOREIGN, strange])
    assert names(sources([], ["strange.policy"]), strange) == EXPECTED
    forget()
    assert sources([importlib.import_module("strange.policy").Mine], []) >= {strange / "strange/deep/far.py"}


def test_a_digest_is_of_contents(strange: Path) -> None:
    paths = sources([], ["strange.policy"])
    before = digest(paths)
    (strange / "strange/deep/also.py").write_text("changed = 1\n")
    assert digest(paths) != before


# -- the key of a run

OTHER = {
    "allocator": "contiguous-max",
    "scheduler": "static",
    "preemption": "swap",
    "block": 32,
    "pool": "9999",
    "length": 1024,
    "executor": "torch",
    "model": "opt-66b",
    "hardware": "h200",
    "device": "cuda",
    "dtype": "float16",
    "workload": "alpaca",
    "arrivals": "gamma",
    "burstiness": 0.5,
    "batch": 9,
    "timeout_s": 2.0,
    "watermark": 0.02,
    "rate": 5.0,
    "duration_s": 5.0,
    "count": 7,
    "steps": 9,
    "seed": 1,
    "n": 2,
    "beams": 2,
    "prefix": 80,
    "max_tokens": 512,
    "reserve_prefix": True,
    "drain": True,
    "depth": 1,
}


ASKING = Run(arrivals="gamma", scheduler="dynamic", allocator="paged-max-tokens")  # in which nearly all settings tell
ASKING_REAL = replace(ASKING, executor="torch", model="random:opt-13b")
SIMULATED_ONLY, REAL_ONLY = {"hardware"}, {"device", "dtype"}


def test_the_key_changes_with_every_field() -> None:
    assert {field.name for field in fields(Run)} == set(OTHER)
    for base, idle in ((ASKING, REAL_ONLY), (ASKING_REAL, SIMULATED_ONLY)):
        changes = {name: value for name, value in OTHER.items() if getattr(base, name) != value and name not in idle}
        keys = [base.key(), *(replace(base, **{name: value}).key() for name, value in changes.items())]  # type: ignore[arg-type]
        assert len(set(keys)) == len(changes) + 1
        assert base.key() == keys[0]


@pytest.mark.parametrize(
    ("base", "idle"),
    [
        (Run(), {"device": "cuda", "dtype": "float16", "burstiness": 0.5, "max_tokens": 512}),
        (Run(), {"batch": 9, "timeout_s": 2.0}),
        (Run(duration_s=None, count=9), {"drain": True}),
        (replace(Run(), executor="torch", model="random"), {"hardware": "h200"}),
    ],
)
def test_settings_that_say_nothing_share_a_record(base: Run, idle: dict[str, Any]) -> None:
    assert {replace(base, **{name: value}).key() for name, value in idle.items()} == {base.key()}


def test_max_tokens_tell_where_lengths_are_not_forced() -> None:
    for run in (
        Run(workload="prompts"),
        Run(workload="trace.csv"),
        Run(allocator="tests.policies.my_allocator:SizeClasses"),
    ):
        assert replace(run, max_tokens=512).key() != run.key()


def test_the_key_changes_with_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Run().key()
    monkeypatch.setattr(lab.run, "FORMAT", -1)
    assert Run().key() != before


REAL = Run(executor="torch", model="smollm2")
USED = [
    ("lab/allocators/paged.py", Run(), True),
    ("lab/allocators/reserve.py", Run(), True),
    ("lab/allocators/extents.py", Run(), False),
    ("lab/allocators/contiguous.py", Run(), False),
    ("lab/allocators/extents.py", Run(allocator="contiguous-max"), True),
    ("lab/schedulers/continuous.py", Run(), True),
    ("lab/schedulers/static.py", Run(), False),
    ("lab/schedulers/static.py", Run(scheduler="dynamic"), True),
    ("lab/schedulers/__init__.py", Run(), True),
    ("lab/engine.py", Run(), True),
    ("lab/executors/simulated.py", Run(), True),
    ("lab/hardware.py", Run(), True),
    ("lab/shapes.py", Run(), True),
    ("lab/executors/torch.py", Run(), False),
    ("lab/metrics.py", Run(), False),
    ("lab/plot/memory.py", Run(), False),
    ("lab/workloads/lengths.py", Run(), True),
    ("lab/workloads/data/sharegpt_joint_quantiles.csv", Run(), True),
    ("lab/executors/torch.py", REAL, True),
    ("lab/executors/cache.py", REAL, True),
    ("lab/executors/sampling.py", REAL, True),
    ("lab/models/packed.py", REAL, True),
    ("lab/models/loading.py", REAL, True),
    ("kernels/reference.py", REAL, True),
    ("kernels/attention.py", REAL, True),
    ("kernels/bench.py", REAL, False),
]


@pytest.mark.parametrize(("file", "run", "used"), USED)
def test_the_key_changes_with_the_sources_used(
    file: str, run: Run, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[Path] = set()

    def look(paths: Iterable[Path]) -> str:
        seen.update(paths)
        return ""

    monkeypatch.setattr(lab.run, "digest", look)
    run.key()
    assert (ROOT / file).is_file()
    assert (ROOT / file in seen) == used


def test_the_key_changes_with_a_plug_in_and_with_what_it_imports(strange: Path) -> None:
    run = Run(allocator="strange.policy:Mine")
    before = run.key()
    forget()
    assert run.key() == before
    for name in ("strange/policy.py", "strange/deep/also.py"):
        (strange / name).write_text((strange / name).read_text() + "\n# edited\n")
        forget()
        after = run.key()
        assert after != before
        before = after
    (strange / "strange/unused.py").write_text("")
    assert run.key() == before


def test_the_key_changes_with_the_module_that_registered_a_name(strange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it registers a class of ours with other arguments, whose own file says nothing of it."""
    (strange / "strange/variant.py").write_text(
        "from functools import partial\nfrom lab.allocators import ALLOCATORS\nfrom lab.allocators.paged import Paged\n"
        "ALLOCATORS.register('paged-variant')(partial(Paged, reserve='max'))\n"
    )
    monkeypatch.setattr(ALLOCATORS, "entries", dict(ALLOCATORS.entries))
    importlib.import_module("strange.variant")
    before = Run(allocator="paged-variant").key()
    with (strange / "strange/variant.py").open("a") as file:
        file.write("# another\n")
    assert Run(allocator="paged-variant").key() != before


def test_the_key_changes_with_the_files_that_are_named(tmp_path: Path) -> None:
    trace, pace, weights = tmp_path / "trace.csv", tmp_path / "pace.json", tmp_path / "model.gguf"
    for file in (trace, pace, weights):
        file.write_text("1")
    runs = [
        Run(workload=str(trace)),
        Run(workload=f"paper:{trace}"),
        Run(hardware=str(pace)),
        replace(REAL, model=str(weights)),
        replace(REAL, model=str(tmp_path)),
    ]
    before = [run.key() for run in runs]
    assert [run.key() for run in runs] == before
    for file in (trace, pace, weights):
        file.write_text("22")
    assert not set(before) & {run.key() for run in runs}


def test_keys_are_quick_and_import_nothing_heavy() -> None:
    program = (
        "import sys, time\nfrom lab.run import Run\nstart = time.perf_counter()\n"
        "for seed in range(60): Run(seed=seed).key(), Run(seed=seed, executor='torch', model='smollm2').key()\n"
        "print(time.perf_counter() - start, *{'torch', 'transformers', 'matplotlib', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *heavy = done.stdout.split()
    assert not heavy
    assert float(seconds) < 5, "120 keys"
