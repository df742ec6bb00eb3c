"""A Run names a point of an experiment: checked before any work, carried out into a record, found again by its key."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.allocators import ALLOCATORS
from lab.core import Group, InputError, Limits
from lab.engine import Engine
from lab.executors.simulated import FittedCost, SimulatedExecutor
from lab.executors.survival import FILE as SEARCHES
from lab.executors.survival import Survival
from lab.hardware import hardware, pool_tokens
from lab.pool import PoolSize, pool_size
from lab.record import FORMAT, Recorder, describe
from lab.schedulers import SCHEDULERS, Scheduler
from lab.shapes import shape
from lab.sources import digest, sources
from lab.workloads import Requests, workload
from lab.workloads import describe as describe_workload
from lab.workloads.builtin import DATA
from lab.workloads.content import dress

EXECUTORS = ("simulated", "torch")
DTYPES = ("float32", "bfloat16", "float16")
COMMON = ("lab.engine", "lab.pool", "lab.record", "lab.workloads")  # what every run uses, besides its policies
VIRTUAL = ("lab.executors.simulated", "lab.executors.survival")
REAL = ("lab.real", "kernels.reference", "kernels.gpu")

FORCED = ("sharegpt", "alpaca", "opt13b-256")  # workloads that say how long answers are
TUNED = Path(__file__).parents[1] / "kernels" / "tuned.json"  # configurations, which are data

Progress = Callable[[float], None]  # told the share of a run that is done, in [0, 1]


@dataclass(frozen=True)
class Run:
    """Every setting that changes a result, and nothing else. The defaults are the paper's (Kwon et al., 6.1)."""

    allocator: str = "paged"
    scheduler: str = "continuous"
    preemption: str = "recompute"
    block: int = 16  # tokens
    batch: int = 8  # requests that a static or dynamic scheduler waits for
    timeout_s: float = 1.0  # that a dynamic one waits at most
    watermark: float | None = None  # share of the blocks that an admission leaves free; None leaves it to the scheduler
    pool: str | None = None  # tokens, bytes ("12GiB"), a share of free memory ("90%"); None: the virtual machine's own
    length: int = 2048  # longest sequence, prompt and output
    n: int = 1  # outputs of each request
    beams: int = 0  # width of a beam search; 0: none
    max_tokens: int | None = None  # that clients ask for; None: what the workload says, or the forced output itself
    prefix: int = 0  # tokens that all prompts begin with, before their own
    reserve_prefix: bool = False  # computed once, before the first request, and kept (Kwon et al., section 4.4)
    depth: int = 0  # steps that run while the next is planned: 1 hides the host's work behind the device's
    executor: str = "simulated"
    model: str = "opt-13b"
    hardware: str = "a100-40gb"  # the virtual clock's: a name, or a JSON file of fitted step times
    device: str = "cpu"  # torch's
    dtype: str = "bfloat16"
    workload: str = "sharegpt"
    arrivals: str = "poisson"
    burstiness: float = 1.0  # of gamma arrivals: 1 is Poisson's, less is burstier
    rate: float | None = 4.0  # requests per second
    duration_s: float | None = 900.0  # of the arrivals; the run is cut off there
    drain: bool = False  # not cut off: all that has arrived is served
    count: int | None = None  # requests
    steps: int | None = None  # the run is cut off there
    seed: int = 0

    @property
    def simulated(self) -> bool:
        return self.executor == "simulated"

    def identity(self) -> dict[str, Any]:
        """The settings that its record depends on, less those that say nothing in it, so that experiments share it."""
        idle = {"device", "dtype"} if self.simulated else {"hardware"}
        if self.arrivals != "gamma":
            idle |= {"burstiness"}
        if self.duration_s is None:
            idle |= {"drain"}
        if self.scheduler == "continuous":
            idle |= {"batch", "timeout_s"}
        if self.allocator in ALLOCATORS.entries and "max-tokens" not in self.allocator and self.workload in FORCED:
            idle |= {"max_tokens"}  # of answers whose length is forced only this reservation knows
        return {name: value for name, value in asdict(self).items() if name not in idle}

    def key(self) -> str:
        """Names the record: these settings, the record's format and the source of every policy and mechanism used."""
        policies = [ALLOCATORS.get(self.allocator), SCHEDULERS.get(self.scheduler)]
        named = (ALLOCATORS.homes.get(self.allocator), SCHEDULERS.homes.get(self.scheduler))
        homes = [module for module in named if module]  # import paths have none
        files = sources(policies, [*homes, *COMMON, *(VIRTUAL if self.simulated else REAL)])
        files |= {Path(__file__), *(path for path in (*DATA.iterdir(), SEARCHES, TUNED) if path.is_file())}
        data = [Path(text) for text in (self.workload.split(":", 1)[-1], self.hardware)]
        content = {str(path): digest([path]) for path in data if path.is_file()}
        weights = [] if self.simulated else stamps(Path(self.model).expanduser())
        identity = json.dumps([FORMAT, self.identity(), digest(files), content, weights], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]


def stamps(model: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a local model's files: gigabytes are not read for a key."""
    folder = model.parent if model.is_file() else model  # a file is read with what lies beside it
    files = sorted(folder.iterdir()) if folder.is_dir() and model.exists() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


@contextmanager
def blame(run: Run, when: Callable[[], str]) -> Iterator[None]:
    """Say which policies an unforeseen error came from. Its traceback stays: it may be for the policy's author."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        error.add_note(f"{when()}: allocator {run.allocator!r}, scheduler {run.scheduler!r}, seed {run.seed}")
        raise


def carry_out(run: Run, path: Path | None, tell: Progress = lambda share: None) -> Recorder:
    """Serve the run's requests and write its record to `path` (kept in memory where None)."""
    requests = requests_of(run)
    pool = pool_of(run)
    scheduler = scheduler_of(run, pool.tokens)
    executor = executor_of(run, pool.tokens)
    ended = 0
    eos = () if run.simulated else executor.model.eos
    with Recorder(path, header_of(run, requests, pool)) as recorder:
        steps = itertools.count(1)

        def on_end(_: Group) -> None:
            nonlocal ended
            ended += 1

        def go_on() -> bool:
            count = next(steps)
            if count % 64 == 0 or not run.simulated:
                until_s = math.inf if run.drain else run.duration_s or math.inf
                tell(min(1.0, max(executor.now / until_s, count / (run.steps or math.inf), ended / len(requests))))
            return count != run.steps

        engine = Engine(scheduler, executor, recorder, eos=eos, on_end=on_end, depth=run.depth)
        if run.reserve_prefix:
            engine.reserve(range(run.prefix))
        if not run.simulated:
            executor.reset_clock()
        with blame(run, lambda: f"in step {recorder.next_step}"):
            engine.run(requests, math.inf if run.drain else run.duration_s or math.inf, go_on)
        if not run.simulated:
            recorder.header["device_memory"] = executor.memory._asdict()
    return recorder


def header_of(run: Run, requests: Requests, pool: PoolSize) -> dict[str, Any]:
    where = run.hardware if run.simulated else real().device_name(run.device)
    gpu = "" if run.simulated or run.device == "cpu" else where
    header = describe(
        model=run.model, workload=run.workload, seed=run.seed, simulated=run.simulated, hardware=where, gpu=gpu
    )
    return header | {"run": asdict(run), "pool": pool._asdict(), "requests": describe_workload(requests)}


def requests_of(run: Run) -> Requests:
    """The same object for runs that differ only in what requests do not depend on."""
    return _requests(
        Run(
            executor=run.executor,
            model=run.model,
            length=run.length,
            n=run.n,
            beams=run.beams,
            prefix=run.prefix,
            max_tokens=run.max_tokens,
            device=run.device,
            dtype=run.dtype,
            workload=run.workload,
            arrivals=run.arrivals,
            burstiness=run.burstiness,
            rate=run.rate,
            duration_s=run.duration_s,
            count=run.count,
            seed=run.seed,
        )
    )


@lru_cache(maxsize=16)
def _requests(run: Run) -> Requests:
    timed = run.arrivals != "all"
    requests = workload(
        run.workload,
        rate_per_s=run.rate if timed else None,
        duration_s=run.duration_s if timed else None,
        count=run.count,
        seed=run.seed,
        arrivals=run.arrivals,
        burstiness=run.burstiness,
        limit=run.length - run.prefix,
        encode=None if run.simulated else lambda text: real().encoder(run.model)(text),
    )
    vocabulary = None if run.simulated else real().model(run.model, run.device, run.dtype).vocab_size
    return dress(requests, run.n, run.beams, run.prefix, run.max_tokens, vocabulary)


def scheduler_of(run: Run, tokens: int) -> Scheduler:
    limits = Limits(length=run.length)
    allocator = ALLOCATORS.get(run.allocator)(tokens, run.block, limits)
    waits = {"batch": run.batch, "timeout_s": run.timeout_s}
    return SCHEDULERS.get(run.scheduler)(allocator, limits, preemption=run.preemption, watermark=run.watermark, **waits)


def pool_of(run: Run) -> PoolSize:
    if not run.simulated:
        return real().pool(run.pool or "90%", run.model, run.device, run.dtype, run.block)
    model, (machine, _) = shape(run.model), clock(run.hardware)
    free = max(0, hardware(machine).memory_bytes * hardware(machine).gpus - 2 * model.parameters)
    size = str(pool_tokens(hardware(machine), model)) if run.pool is None else run.pool
    pool = pool_size(size, model.kv_bytes_per_token(), run.block, free)
    if pool.tokens * model.kv_bytes_per_token() > free:
        rule = f"{machine} has {free / 1e9:.1f} GB free beside the weights of {model.name}"
        raise InputError(f"pool size {run.pool!r}: {rule}; make it smaller or name a larger --hardware")
    return pool


def executor_of(run: Run, tokens: int) -> Any:
    if not run.simulated:
        return real().TorchExecutor(real().model(run.model, run.device, run.dtype), tokens, run.block)
    machine, step_times = clock(run.hardware)
    executor = SimulatedExecutor(shape(run.model), hardware(machine), run.block, step_times=step_times)
    if run.beams:
        executor.beams = Survival(run.beams, run.seed)
    return executor


@cache
def clock(name: str) -> tuple[str, FittedCost | None]:
    """The machine whose pace the virtual clock keeps: by name, or as step times fitted to measurements on it."""
    if not name.endswith(".json"):
        return hardware(name).name, None
    try:
        measured = json.loads(Path(name).read_text(encoding="utf-8"))
        return measured["hardware"], FittedCost(**measured["fit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"hardware {name!r}: no file of fitted step times ({error}); name a machine instead") from None


def real() -> ModuleType:
    import lab.real  # torch takes seconds to import: only where a run asks for it

    return lab.real
