"""Is the device there, and can it do what is asked of it? Answered in one line, before any work."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import torch

from kernels.tuning import MAX_HEAD_DIM
from lab.core import InputError
from lab.models import KVShape
from lab.models.files import first_line

OLDEST_TRITON = (3, 6)  # that our kernels were tried with
BFLOAT16_FROM = (8, 0)  # compute capability


def check_device(device: torch.device | str) -> torch.device:
    """The device, if it is there, and its driver and Triton are recent enough."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {str(device)!r}: unknown: give cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r}: there are kernels for cpu and cuda only: give one of them")
    if found.type == "cpu":
        return found
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        there = f"this machine has {count} CUDA devices{'' if count else _why_none()}"
        raise InputError(f"device {str(device)!r}: {there}: give cpu, or one that exists")
    _check_triton(str(device))
    return torch.device("cuda", found.index or 0)


def check_type(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where a GPU has no arithmetic in `dtype`."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < BFLOAT16_FROM:
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
        raise InputError(f"dtype bfloat16: {gpu} computes none: take --dtype float16")


def check_heads(device: torch.device, kv: KVShape, name: str) -> None:
    """Raise InputError where the kernels of a GPU have no room for a model's heads."""
    widest = max(kv.head_dim, kv.head_dim_v)
    if device.type == "cuda" and widest > MAX_HEAD_DIM:
        rule = f"its heads have {widest} numbers, our kernels hold up to {MAX_HEAD_DIM}"
        raise InputError(f"model {name!r}: {rule}: run it with --device cpu")


def _why_none() -> str:
    """A driver that is older than this torch, for one, hides all of them."""
    if torch.version.cuda is None:
        return ""
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f" ({first_line(error)})"
    return ""


def _check_triton(device: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"device {device!r}: needs the package triton: install it, or give cpu")
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise InputError(f"triton {found}: our kernels need {oldest} or later: install that, or run with --device cpu")
