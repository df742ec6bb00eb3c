"""Attention over a KV cache that lies in blocks: the specification in torch, the same in Triton.

**The cache.** One layer keeps the keys of every token it has seen in one tensor K, and the values in one tensor V:

    K [num_blocks, block, num_kv_heads, head_dim]        V [num_blocks, block, num_kv_heads, head_dim_v]

A *slot* holds one token. Slots are numbered through: slot = block_id * block + offset. Slot -1 means nowhere: what is
stored there is dropped. With block = 4:

                 block 0         block 1         block 2         block 3
             +---+---+---+---+---+---+---+---+---+---+---+---+---+---+---+---+
    K and V  |   |   |   |   | a4| a5|   |   | b0| b1| b2|   | a0| a1| a2| a3|      one letter per sequence,
             +---+---+---+---+---+---+---+---+---+---+---+---+---+---+---+---+      one digit per position
       slot    0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15

**Block tables.** A sequence's table lists its blocks in the order of its positions: a: [3, 1], b: [2].

    paged        position p lies in block table[p // block], at offset p % block
    contiguous   position p lies in block table[0] + p // block, at offset p % block: the table is one number

Nothing else differs between the two: same cache, same kernel, same configuration, one `tl.constexpr` apart.

**The ragged batch.** One step computes any number of tokens for each of its sequences: a whole prompt, a chunk of one,
the one token of a decode. Their queries are laid end to end, with no padding. Say sequence a decodes (its token 5, five
tokens are in memory) while b computes its prompt (tokens 0 to 2):

    q       [a5 b0 b1 b2]        num_tokens = 4
    starts  [0, 1, 4]            row r owns the queries q[starts[r] : starts[r + 1]]
    firsts  [5, 0]               position of the row's first query
    lengths [6, 3]               tokens in memory, those of this step included (they are stored first)
    tables  [[3, 1], [2, .]]
    dead    [0, 0]               positions read and scored only to be thrown away: see below

The query at position p sees the key at position j iff j <= p and j < length (and p - j < window, where there is one).

A system that batches statically computes rectangles: every row as long as the longest. Its padding costs time and
changes nothing. *Dead positions* charge that cost: that many further keys are read and scored, then masked out. Their
addresses wrap around inside what the row reads anyway, so nobody else's memory is touched. *Dead queries* have
positions >= length: they see all keys of their row, their slot is -1, and nobody looks at their result.

`kernels.ragged.Ragged.build` makes the batch once per step, on the host; every layer then makes the same device calls:

    ops = kernels.for_device(device)             # kernels.reference on a CPU, kernels.gpu on a GPU
    ops.store(k, v, k_cache, v_cache, slots)
    out = ops.attention(q, k_cache, v_cache, ragged, scale=head_dim**-0.5)
    ops.copy_blocks(cache, pairs)

A decoder of our own makes few and fused calls around them, which `kernels.reference` specifies: ops.norm,
ops.rotate_and_store (in place of store), ops.silu_and_mul, ops.sample; and ops.row_product, where a token is alone.
"""

import importlib
import importlib.metadata
import os
from types import ModuleType

__version__ = "0.1.0"


def _adopt_hugging_face() -> None:
    """Live beside Hugging Face's distribution `kernels`, which has the same import name and which transformers imports.

    Whoever comes first on sys.path is `kernels`. When it is this package and theirs is installed too, their names and
    submodules are added to ours, so that `from kernels import CUDAProperties` finds them.
    """
    try:
        theirs = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    init = str(theirs.locate_file("kernels/__init__.py"))
    if not os.path.exists(init) or os.path.samefile(init, __file__):
        return
    __path__.append(os.path.dirname(init))
    with open(init, encoding="utf-8") as source:
        exec(compile(source.read(), init, "exec"), globals())


_adopt_hugging_face()


def for_device(device: object) -> ModuleType:
    """The module with the operations for a torch.device or its name ("cpu", "cuda:0")."""
    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return importlib.import_module("kernels.reference")
    if kind != "cuda":
        raise ValueError(
            f"device {str(device)!r}: there are kernels for 'cpu' and 'cuda' only; move the tensors to one"
        )
    try:
        return importlib.import_module("kernels.gpu")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("device 'cuda' needs the package triton: pip install triton, or run on 'cpu'") from error
