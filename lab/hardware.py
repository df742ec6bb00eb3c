"""Hardware by name: what the data sheet promises, and apart from it what was measured or is assumed to be attained.

Three are the PagedAttention paper's machines (Kwon et al., table 1); on the last two we measure ourselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lab.core import InputError, unknown
from lab.shapes import ModelShape

GIB = 2**30  # device memory is sold in GB of this size


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one GPU attains. Fields named in `measured` come from a measurement, all others are assumptions."""

    flops: float  # FLOP/s of matrix products in bf16 or fp16
    bytes_per_s: float  # of device memory
    host_bytes_per_s: float  # between device and pinned host memory, each way
    link_bytes_per_s: float  # to the other GPUs, each way
    step_s: float  # what each step takes besides the work on the GPU: planning, launching, sampling
    transfer_s: float  # latency of one transfer to or from the host
    all_reduce_s: float  # latency of one sum over all GPUs
    measured: frozenset[str]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One or more equal GPUs. All figures are those of one GPU; peaks are the data sheet's, dense (no sparsity)."""

    name: str
    gpus: int
    memory_bytes: int
    flops: float  # FLOP/s in bf16 or fp16
    bytes_per_s: float  # of device memory
    host_bytes_per_s: float  # PCI Express, each way
    link_bytes_per_s: float  # NVLink, each way
    source: str
    calibrated: Calibration


_A100_GUESS = Calibration(
    flops=140e12,
    bytes_per_s=1.2e12,
    host_bytes_per_s=25e9,
    link_bytes_per_s=230e9,
    step_s=8e-3,
    transfer_s=2.9e-6,
    all_reduce_s=20e-6,
    measured=frozenset(),
    source="all assumed: 140 TFLOP/s, 1.2 TB/s (77 % of the data sheet) and 8 ms per step, a first guess under which "
    "the paper's request rates (figure 12a) come out; 2.9 us per transfer, with which 256 tokens of OPT-13B in blocks "
    "of 1 take the 135 ms of figure 19a, out and in; 78 % of the data sheet for the host link, 77 % for NVLink; "
    "20 us per sum",
)

_A100_40GB = Hardware(
    name="a100-40gb",
    gpus=1,
    memory_bytes=40 * GIB,
    flops=312e12,
    bytes_per_s=1555e9,
    host_bytes_per_s=32e9,
    link_bytes_per_s=300e9,
    source="NVIDIA A100 data sheet, SXM 40 GB: 312 TFLOP/s, 1,555 GB/s, PCIe gen4 x16, NVLink 600 GB/s both ways",
    calibrated=_A100_GUESS,
)

_A100_80GB = replace(
    _A100_40GB,
    name="a100-80gb",
    memory_bytes=80 * GIB,
    bytes_per_s=2039e9,
    source="NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s, 2,039 GB/s, PCIe gen4 x16, NVLink 600 GB/s both ways",
    calibrated=replace(
        _A100_GUESS,
        bytes_per_s=1.57e12,
        source=f"{_A100_GUESS.source}; 1.57 TB/s here, the same 77 % of the data sheet as the 40 GB card's 1.2",
    ),
)

_H100 = Hardware(
    name="h100-80gb",
    gpus=1,
    memory_bytes=80 * GIB,
    flops=989e12,
    bytes_per_s=3.35e12,
    host_bytes_per_s=64e9,
    link_bytes_per_s=450e9,
    source="NVIDIA H100 data sheet, SXM 80 GB: 989 TFLOP/s, 3.35 TB/s, PCIe gen5 x16, NVLink 900 GB/s both ways",
    calibrated=Calibration(
        flops=740e12,
        bytes_per_s=3.04e12,
        host_bytes_per_s=50e9,
        link_bytes_per_s=345e9,
        step_s=3e-3,
        transfer_s=2.9e-6,
        all_reduce_s=20e-6,
        measured=frozenset({"flops", "bytes_per_s"}),
        source="measured on an H100 80GB HBM3, torch 2.11: 3.04 TB/s read; 680 to 798 TFLOP/s in bf16 products of 8192 "
        "x 8192 matrices, of which 740 is taken; both are ceilings, a model attains less. Assumed: 3 ms per step; the "
        "host link and NVLink at the same share of the data sheet, and latencies, as of the A100",
    ),
)

_H200 = Hardware(
    name="h200",
    gpus=1,
    memory_bytes=141 * GIB,
    flops=989e12,
    bytes_per_s=4.8e12,
    host_bytes_per_s=64e9,
    link_bytes_per_s=450e9,
    source="NVIDIA H200 data sheet, SXM 141 GB: 989 TFLOP/s, 4.8 TB/s, PCIe gen5 x16, NVLink 900 GB/s both ways",
    calibrated=replace(
        _H100.calibrated,
        flops=788e12,
        bytes_per_s=4.3e12,
        source="measured on an H200: 4.3 TB/s copied, 788 TFLOP/s in a bf16 matrix product; both are ceilings, a model "
        "attains less. Assumed: the rest, as for the H100",
    ),
)

HARDWARE = {
    machine.name: machine
    for machine in (
        _A100_40GB,
        replace(_A100_40GB, name="4xa100-40gb", gpus=4),
        _A100_80GB,
        replace(_A100_80GB, name="8xa100-80gb", gpus=8),
        _H100,
        _H200,
    )
}


def hardware(name: str) -> Hardware:
    """The machine called `name`, in capitals or not. Raises InputError for a name that does not exist."""
    found = HARDWARE.get(name.lower())
    if found is None:
        raise InputError(unknown("hardware", name.lower(), HARDWARE))
    return found


# Pools in tokens. The first three are the paper's table 1, "max # KV cache slots" (15.7K, 9.7K, 60.1K), in whole blocks
# of 16: 12 GiB, 21.3 GiB (printed as 21) and 264 GiB. The last two are ours: the paper's pool kept on a larger GPU,
# since with more memory nothing is short of it and all allocators look alike.
POOLS = {
    ("opt-13b", "a100-40gb"): 983 * 16,
    ("opt-66b", "4xa100-40gb"): 606 * 16,
    ("opt-175b", "8xa100-80gb"): 3754 * 16,
    ("opt-13b", "h100-80gb"): 983 * 16,
    ("opt-13b", "h200"): 983 * 16,
}


def pool_tokens(machine: Hardware, shape: ModelShape) -> int:
    """Tokens of K and V in fp16 that a server of this shape on this machine has room for, in whole blocks of 16.

    From POOLS where it has an entry. Otherwise by the rule of the paper's own engine: of each GPU 95 % of its memory,
    less weights, the activations of a step of 2,560 tokens, and a workspace of 1 GiB. Our guess at the activations: six
    hidden vectors and one of the MLP's per token in fp16, and logits in fp32. The rule then gives 2.7, 12.0 and 2.7 %
    more than the three values of table 1. Raises InputError where nothing is left.
    """
    known = POOLS.get((shape.name, machine.name))
    if known is not None:
        return known
    activations = 2560 * (2 * (6 * shape.hidden + shape.intermediate // machine.gpus) + 4 * shape.vocab // machine.gpus)
    each = 0.95 * machine.memory_bytes - 2 * shape.parameters / machine.gpus - activations - GIB
    tokens = int(each * machine.gpus // shape.kv_bytes_per_token()) // 16 * 16
    if tokens <= 0:
        why = f"{2 * shape.parameters / 1e9:.0f} GB of weights leave no room for K and V"
        raise InputError(f"model {shape.name!r} on {machine.name!r}: {why}; take more memory or a smaller model")
    return tokens
