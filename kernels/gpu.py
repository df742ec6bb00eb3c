"""Every operation as a Triton kernel, with the signature and the meaning of `kernels.reference`."""

from kernels.attention import attention
from kernels.cache import copy_blocks, store
from kernels.layers import norm, rotate_and_store, silu_and_mul
from kernels.row import row_product
from kernels.sampling import sample

__all__ = ["attention", "copy_blocks", "norm", "rotate_and_store", "row_product", "sample", "silu_and_mul", "store"]
