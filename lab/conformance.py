"""Is an allocator right? `complaint(MyAllocator)` says in words the first thing that is wrong with it, "" if nothing.

By name or import path: `python -m lab.conformance my_module:MyAllocator`. It is asked for one request, fills tiny
pools to the brim, and serves a crowd with and without room, under static and continuous batching and both ways to
preempt. After each call its tables are compared with what it says. The text of each request is a checksum of memory as
read through those tables (`lab.executors.checksum`), so that a wrong block, a lost copy or an alias shows in it.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from random import Random
from typing import Any

from lab.allocators import ALLOCATORS, Allocator
from lab.check import nonsense
from lab.command import Parser, status
from lab.core import Group, InputError, Limits, Request, SamplingParams, Sequence
from lab.engine import Engine
from lab.executors.checksum import ChecksumExecutor, text
from lab.schedulers import SCHEDULERS

BLOCK = 4  # tokens
LIMITS = Limits(seqs=16, tokens=48, length=64)
METHODS = ("admit", "extend", "release", "idle", "fork")
CROWDS = (("continuous", "recompute"), ("continuous", "swap"), ("static", "recompute"))
TINY = (2, 3, 5, 9, 20, 40)  # blocks of pools that are filled to the brim
STEPS = 20_000  # more than any crowd takes, so that who never gets memory is noticed
MOST_BLOCKS = 4096  # a pool in which any request should fit

Factory = Callable[..., Allocator]


class Wrong(Exception):
    """What is wrong, in words."""


def main(arguments: list[str] | None = None) -> int:
    return status(lambda: _main(sys.argv[1:] if arguments is None else arguments), "nothing is kept")


def _main(arguments: list[str]) -> int:
    """Exit status 1 where something is wrong."""
    about = "Is an allocator right? Says in words the first thing that is wrong with each."
    parser = Parser(prog="python -m lab.conformance", description=about)
    parser.add_argument("allocator", nargs="+", help="a name, or module:Class of your own, on PYTHONPATH")
    found = {name: complaint(ALLOCATORS.get(name)) for name in parser.parse_args(arguments).allocator}
    for name, wrong in found.items():
        print(f"{name}: {wrong or 'nothing is wrong with it'}")
    return int(any(found.values()))


def complaint(factory: Factory) -> str:
    """The first thing that is wrong with the allocators it makes (called like the class: capacity, block, limits)."""
    try:
        requests = _crowd(0)
        found = nonsense(watched(factory(64 * BLOCK, BLOCK, LIMITS)), requests[1])
        if found:
            return f"one request in an empty pool: {found}"
        for blocks in TINY:
            _fill(watched(factory(blocks * BLOCK, BLOCK, LIMITS)), requests)
        for scheduler, preemption in CROWDS:
            for blocks in (_fewest(factory, requests), 512):
                _serve(factory, requests, blocks, scheduler, preemption)
    except Wrong as wrong:
        return str(wrong)
    except NotImplementedError as error:
        return f"{_where(error)} is not written yet: {str(error) or 'it raises NotImplementedError'}"
    except InputError as error:
        return str(error)
    except Exception as error:
        return f"{_where(error)} failed with {type(error).__name__}: {error}"
    return ""


def watched(allocator: Allocator) -> Allocator:
    """The same allocator, which raises Wrong at the end of the first call that leaves its books in disorder."""
    depth = 0

    def wrap(name: str) -> None:
        method = getattr(allocator, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            before = None if depth else _state(allocator)
            depth += 1
            try:
                answer = method(*args, **kwargs)
            finally:
                depth -= 1
            if before is not None:
                _judge(allocator, name, args, answer, before)
            return answer

        setattr(allocator, name, call)

    for name in ("admit", "extend", "release", "fork"):
        wrap(name)
    return allocator


def _judge(allocator: Allocator, name: str, args: tuple[Any, ...], answer: Any, before: Any) -> None:
    if name == "admit" and not (answer is None or type(answer) is int):
        raise Wrong(f"admit() returned {answer!r}: must be the number of prompt tokens found in memory, or None")
    if name in ("extend", "fork") and type(answer) is not bool:
        raise Wrong(f"{name}() returned {answer!r}: must be True, or False where there is no room")
    if answer is False or (answer is None and name == "admit"):
        if _state(allocator) != before:
            raise Wrong(f"{name}() found no room, but tables or idle() have changed: on failure nothing may")
        return
    if name == "admit":
        _covers(allocator, "admit", args[0].live[0], 1)
    if name == "extend":
        _covers(allocator, "extend", args[0], args[1])
    if name == "fork":
        _covers(allocator, "fork", args[1], args[2])
    if name == "release" and (args[0] in allocator.tables or args[0] in allocator.asked):
        raise Wrong("release() left the sequence in tables or asked: it must be in neither")
    _books(allocator, name)


def _covers(allocator: Allocator, name: str, s: Sequence, length: int) -> None:
    table = allocator.tables.get(s)
    if table is None or s not in allocator.asked:
        raise Wrong(f"after {name}() the sequence is missing in tables or asked: both must say what it was given")
    room = len(table) * allocator.block
    if room < length:
        raise Wrong(
            f"after {name}() a table of {len(table)} blocks has room for {room} tokens: {length} were asked for"
        )


def _books(allocator: Allocator, name: str) -> None:
    """Every block is in the pool, held once or shared on purpose, and free, cached and held make up the whole."""
    holders: Counter[int] = Counter()
    for table in allocator.tables.values():
        holders.update(table)
        if len(set(table)) < len(table):
            raise Wrong(f"after {name}() a table holds the same block twice: {list(table)}")
    outside = [b for b in holders if not 0 <= b < allocator.num_blocks]
    if outside:
        raise Wrong(f"after {name}() a table holds block {outside[0]}: the pool has 0 to {allocator.num_blocks - 1}")
    shared = [b for b, count in holders.items() if count > 1]
    if shared and type(allocator).fork is Allocator.fork and not allocator.publishes:
        raise Wrong(f"after {name}() block {shared[0]} belongs to two sequences: one would overwrite the other")
    idle, held = allocator.idle(), len(holders) * allocator.block
    if idle.free + idle.cached + held != allocator.capacity:
        said = f"{idle.free} free and {idle.cached} cached, and tables hold {held}"
        raise Wrong(f"after {name}() idle() says {said} tokens: together they must be all {allocator.capacity}")
    if not 0 <= idle.largest <= idle.free + idle.cached:
        rule = f"must be 0 to {idle.free + idle.cached}, what is free or cached"
        raise Wrong(f"after {name}() idle() says {idle.largest} for the largest single grant: {rule}")


def _state(allocator: Allocator) -> Any:
    return {s: tuple(table) for s, table in allocator.tables.items()}, dict(allocator.asked), allocator.idle()


def _fill(allocator: Allocator, requests: Seq[Request]) -> None:
    """Admit whoever finds room; let these grow by leaps, and then the others without being admitted; then all go."""
    empty = allocator.idle()
    groups = [Group(request) for request in requests if request.sampling.n == 1]
    admitted = [group for group in groups if allocator.admit(group) is not None]
    for group in [*admitted, *groups]:
        s, most = group.live[0], max(len(group.live[0].tokens), group.request.most - 1)
        for length in [*range(len(s.tokens), most, 7), most]:
            allocator.extend(s, length)
    for group in groups:
        allocator.release(group.live[0])
    if allocator.idle() != empty:
        raise Wrong(f"all is released, but idle() was {tuple(empty)} and is {tuple(allocator.idle())}")


def _serve(factory: Factory, requests: Seq[Request], blocks: int, scheduler: str, preemption: str) -> None:
    allocator = watched(factory(blocks * BLOCK, BLOCK, LIMITS))
    empty = allocator.idle()
    policy = SCHEDULERS.get(scheduler)(allocator, LIMITS, preemption=preemption, batch=4)
    executor = ChecksumExecutor(allocator.num_blocks, BLOCK, host_blocks=policy.host.num_blocks)
    done: dict[int, Group] = {}
    engine = Engine(policy, executor, on_end=lambda group: done.update({group.request.id: group}))
    steps = iter(range(STEPS))
    where = f"{len(requests)} requests in {blocks} blocks of {BLOCK} tokens ({scheduler}, {preemption})"
    try:
        engine.run(requests, go_on=lambda: next(steps, None) is not None)
    except Wrong as wrong:
        raise Wrong(f"{where}: {wrong}") from None
    for request in requests:
        if request.id not in done:
            raise Wrong(f"{where}: request {request.id} was never answered")
        if [tokens[len(request.prompt) :] for tokens in done[request.id].outputs()] != text(request):
            rule = "its blocks were overwritten, not copied, or not where its table says"
            raise Wrong(f"{where}: the text of request {request.id} is wrong: {rule}")
    idle = allocator.idle()
    if allocator.tables or (idle.free + idle.cached, idle.largest) != (empty.free, empty.largest):
        said = f"idle() was {tuple(empty)} and is {tuple(idle)}"
        raise Wrong(f"{where}: all have ended, but memory is not as it was: {said}")


def _crowd(seed: int) -> list[Request]:
    random = Random(seed)

    def requests() -> Iterator[Request]:
        for id in range(24):
            prompt = tuple(random.randrange(97) for _ in range(random.choice((1, 6, 13, 24))))
            n = 2 if id % 6 == 4 else 1
            output = random.randint(1, 24 // n)
            yield Request(id, id / 4, prompt, output, SamplingParams(max_tokens=output, n=n))

    return list(requests())


def _fewest(factory: Factory, requests: Seq[Request]) -> int:
    """Blocks of the smallest pool in which each request fits alone: as tight as memory can be."""
    blocks = 2
    while not all(factory(blocks * BLOCK, BLOCK, LIMITS).fits(request) for request in requests):
        blocks += 1
        if blocks > MOST_BLOCKS:
            raise Wrong(f"fits() says no to some request even in a pool of {MOST_BLOCKS} blocks")
    return blocks


def _where(error: Exception) -> str:
    """The allocator's method that it came through, the innermost of them."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((f"{name}()" for name in reversed(names) if name in METHODS), "the allocator")


if __name__ == "__main__":
    sys.exit(main())
