"""Can a run work at all? Asked before any work, and answered in one line that says what to change."""

from __future__ import annotations

import math

from lab.allocators import Allocator
from lab.core import Group, InputError, Request, SamplingParams, Sequence, unknown
from lab.engine import Engine
from lab.executors.simulated import SimulatedExecutor
from lab.hardware import hardware
from lab.run import DTYPES, EXECUTORS, Run, blame, executor_of, pool_of, real, requests_of, scheduler_of
from lab.schedulers import PREEMPTION, Scheduler
from lab.shapes import shape
from lab.workloads import ARRIVALS


def check(run: Run) -> None:
    """Raise InputError for anything in a run that cannot work, before any work."""
    check_numbers(run)
    pool = pool_of(run)
    longest = (
        shape(run.model).max_length if run.simulated else real().model(run.model, run.device, run.dtype).max_length
    )
    if not 3 <= run.length <= longest:
        raise InputError(
            f"length {run.length}: model {run.model!r} takes 3 to {longest} tokens a sequence: change one of them"
        )
    if not 0 <= run.prefix <= run.length - 3:
        raise InputError(f"prefix of {run.prefix} tokens: must leave room for 3 of the {run.length} of a sequence")
    if run.reserve_prefix and not run.prefix:
        raise InputError("reserve-prefix: there is no prefix to reserve; give its length with --prefix")
    with blame(run, lambda: "before any work"):
        scheduler = scheduler_of(run, pool.tokens)
        if run.simulated:
            executor_of(run, pool.tokens)
        check_requests(run, scheduler)


def check_numbers(run: Run) -> None:
    """What is wrong whatever the model and the machine, also of settings that the run's record does not depend on."""
    for kind, value, known in (
        ("executor", run.executor, EXECUTORS),
        ("preemption", run.preemption, PREEMPTION),
        ("dtype", run.dtype, DTYPES),
        ("arrivals", run.arrivals, ARRIVALS),
    ):
        if value not in known:
            raise InputError(unknown(kind, value, known))
    if run.depth not in (0, 1):
        raise InputError(f"depth {run.depth}: must be 0 (collect a step, then plan) or 1 (plan the next meanwhile)")
    if run.depth and run.simulated:
        rule = "the virtual clock plans in no time, so there is nothing to hide"
        raise InputError(f"depth {run.depth}: {rule}; leave --depth out, or take --executor torch")
    for name, number in (("rate", run.rate), ("duration", run.duration_s), ("count", run.count), ("steps", run.steps)):
        if number is not None and not (number > 0 and math.isfinite(number)):
            raise InputError(f"{name} {number}: must be a number above zero")
    SamplingParams(n=run.n, beams=run.beams, max_tokens=1 if run.max_tokens is None else run.max_tokens)


def check_requests(run: Run, scheduler: Scheduler) -> None:
    """Can any of the run's requests ever be served, and does the allocator know what it must know of all of them?"""
    engine = Engine(scheduler, SimulatedExecutor(shape("opt-13b"), hardware("a100-40gb")))
    allocator, requests = scheduler.allocator, requests_of(run)
    served, refusal = None, ""
    for request in requests:
        if request.output is None:
            allocator.wants(Group(request).live[0])  # an oracle's word that it cannot tell
        reason = engine.refusal(request)
        served = request if served is None and reason is None else served
        refusal = refusal or reason or ""
    if served is None:
        rule = f"none of the {len(requests)} requests can ever run"
        raise InputError(f"allocator {run.allocator!r}: {rule}; {refusal}")
    wrong = nonsense(allocator, served)
    if wrong:
        raise InputError(f"allocator {run.allocator!r}, with one request in an empty pool: {wrong}")


def nonsense(allocator: Allocator, request: Request) -> str:
    """What is wrong with the allocator's answers when one request that fits comes and goes; empty if nothing."""
    group = Group(request)
    leader: Sequence = group.live[0]
    hit = allocator.admit(group)
    if type(hit) is not int or not 0 <= hit < len(request.prompt):
        return (
            f"admit() returned {hit!r}: must be the number of prompt tokens found in memory, 0 without a prefix cache"
        )
    if not allocator.extend(leader, len(request.prompt)):
        return f"extend() found no room for a prompt of {len(request.prompt)} tokens, though fits() said yes"
    if len(allocator.tables.get(leader, ())) * allocator.block < len(request.prompt) or leader not in allocator.asked:
        return f"tables or asked lack what {len(request.prompt)} tokens need: both must say what was granted"
    for s in group.live:
        allocator.release(s)
    idle = allocator.idle()
    if idle.free + idle.cached != allocator.capacity:
        return (
            f"after release() idle() is {tuple(idle)}: free and cached must sum to the capacity, {allocator.capacity}"
        )
    return ""
