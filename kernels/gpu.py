"""The three operations as Triton kernels, with the signatures and the meaning of `kernels.reference`."""

from kernels.attention import attention
from kernels.cache import copy_blocks, store

__all__ = ["attention", "copy_blocks", "store"]
