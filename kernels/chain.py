"""Kernels that follow each other closely: the next one's programs start while the last one's still run.

A kernel ordinarily starts when the one before it has ended and its last byte is written, then begins to fill the GPU:
2 to 3 us in which memory idles, as long as reading 6 to 9 MB takes on an H100. Hopper and later can start a kernel
early ("programmatic dependent launch"), which then does what depends on nothing, such as reading weights, and waits:

    one     |== read, compute, write ==|
    next            | start | weights .|. x |== compute, write ==|
                    ^ `let_next_start`      ^ `wait_for_last`: all before it has ended and can be read

Whoever starts early must write nothing, and read nothing that an earlier kernel of the same step has written, before
it has waited: that a kernel has ended does not yet say that what it wrote can be read. And it must wait: what comes
after it relies on that all before it is done.
"""

# mypy: disallow-untyped-defs=False
# Triton types the arguments of its kernels itself.

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

HOPPER = (9, 0)


@triton.jit
def let_next_start(CHAINED: tl.constexpr):
    """As soon as every program of this kernel has come here, or has ended."""
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(CHAINED: tl.constexpr):
    if CHAINED:
        gdc_wait()


@functools.cache
def chain(device: torch.device) -> dict[str, bool]:
    """What a launch there passes besides its kernel's arguments: as a constant, and as an option of Triton's."""
    able = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= HOPPER
    return {"CHAINED": True, "launch_pdl": True} if able else {"CHAINED": False}
