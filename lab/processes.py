"""Runs in processes of their own, on the virtual clock as many as there are cores, on GPUs one for each; warm-up."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import Array, active_children, get_context
from pathlib import Path
from typing import Any

from lab.core import InputError
from lab.run import Progress, Run, carry_out

POLL_S = 0.2
WARM_REQUESTS, WARM_STEPS = 40, 200


def in_processes(
    places: Mapping[Run, Path],
    tell: Progress,
    finished: Callable[[Run], None],
    stop_s: float = math.inf,
    gpus: Seq[str] = (),
) -> None:
    """Carry out each run into its place, but begin none after `stop_s` (of time.monotonic).

    `gpus`, as CUDA_VISIBLE_DEVICES calls them, are a process's only one each.
    """
    shares = Array("d", len(places) + 1, lock=False)  # of each run that is done; behind them: is it all over
    context = get_context("spawn" if gpus else None)  # CUDA, once in use, does not survive a fork
    free = context.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)
    most = min(len(gpus) or os.cpu_count() or 1, len(places))
    workers = ProcessPoolExecutor(most, context, initializer=_begin, initargs=(shares, free if gpus else None))
    try:
        todo = {workers.submit(_one, i, run, place, stop_s): run for i, (run, place) in enumerate(places.items())}
        while todo:
            for future in wait(todo, POLL_S, FIRST_COMPLETED).done:
                run = todo.pop(future)
                if future.result():
                    finished(run)
            tell(sum(shares[:-1]))
    except BrokenProcessPool:
        raise InputError(
            "a process was killed in the midst of its run: free some memory and go on, finished runs are kept"
        ) from None
    except BaseException:
        shares[-1] = 1.0
        for worker in active_children():
            os.kill(worker.pid or 0, signal.SIGINT)  # even out of a policy's endless loop
        raise
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def warm_up(run: Run) -> None:
    """On a GPU: serve a few of its requests, unrecorded, so that kernels are compiled before the run's clock starts.

    Once in a process for each kind of run: compiled kernels stay.
    """
    if run.simulated or not run.device.startswith("cuda"):
        return
    short = shortened(run)
    kind = replace(short, seed=0, preemption="recompute")
    if kind not in _warm:
        carry_out(short, None)
        _warm.add(kind)


def shortened(run: Run) -> Run:
    """Its first requests, all at once, for some steps: prompts and decodes of most sizes of batch."""
    few = min(run.count or WARM_REQUESTS, WARM_REQUESTS)
    return replace(run, arrivals="all", rate=None, duration_s=None, count=few, steps=WARM_STEPS, drain=True)


def _begin(shares: Any, free: Any) -> None:
    global _shares
    _shares = shares
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if free is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = free.get()


def _one(i: int, run: Run, place: Path, stop_s: float) -> bool:
    """Was it carried out?"""

    def tell(share: float) -> None:
        _shares[i] = share

    if _shares[-1]:
        raise KeyboardInterrupt
    if time.monotonic() > stop_s:
        return False
    signal.signal(signal.SIGINT, _interrupt)
    warm_up(run)
    carry_out(run, place, tell)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shares[i] = 1.0
    return True


def _interrupt(*_: object) -> None:
    """In the midst of a run: it cleans up after itself, undisturbed by a second signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


_shares: Any = None  # of a worker process, seen by the parent
_warm: set[Run] = set()  # in this process
