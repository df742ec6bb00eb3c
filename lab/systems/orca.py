"""Orca as the PagedAttention paper rebuilt it (Kwon et al., SOSP'23, section 6.1): contiguous memory, three ways.

Continuous batching as in Yu et al. (OSDI'22); one extent per sequence from a buddy system, reserved at admission for
the longest sequence (Max), for the output rounded up to a power of two (Pow2), or for the output itself (Oracle).
"""

from lab.systems import register

register("orca-max", allocator="contiguous-max", scheduler="continuous")
register("orca-pow2", allocator="contiguous-pow2", scheduler="continuous")
register("orca-oracle", allocator="contiguous-oracle", scheduler="continuous")
