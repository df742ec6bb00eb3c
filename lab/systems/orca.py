"""Orca as the PagedAttention paper rebuilt it: contiguous memory reserved at admission, three ways.

Models. Iteration-level scheduling: requests join and leave the batch at any step. Every sequence gets one contiguous
extent when it is admitted and keeps it to its end; there is nothing to preempt for. How long the extent is, makes the
three variants:

    orca-max      the longest sequence that the model takes (2,048 tokens): all that can be had without a guess
    orca-pow2     the prompt and the true output rounded up to a power of two: never more than twice too much
    orca-oracle   the prompt and the true output: the best that reserving can do, and what no system knows

Extents come from a buddy system: a slab cut into powers of two. Each output of a request holds its own copy of the
prompt. First come first served, at most 2,560 tokens in a step, as vllm here.

Sources.
- Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI'22: section 3
  (iteration-level scheduling, selective batching) and section 4 (the scheduler's algorithm).
- Kwon et al., SOSP'23, section 6.1 (the three variants; "we assume" a buddy system) and their artifact (slabs of 2,048
  tokens, leftovers in smaller powers of two, 2,560 tokens a step).

Leaves out. Orca itself: it is not public, and its own paper says something else about memory. There a request reserves,
when it is first scheduled, slots for as many tokens as it may at most have (`max_tokens`), out of a fixed number of
slots. The nearest to that here is neither of the three but `--allocator contiguous-max-tokens`; how Orca places these
slots is not told, and the rounding and the holes of the buddy system are the authors' assumption, not Orca's property.
Also left out: pipelining across GPUs, its fused kernels, the cap on the batch that an operator chooses.
"""

from lab.systems import Reached, register

_OURS = "its kernels and the authors' engine there, ours here; the policy is the same"
_PAPER = "Kwon et al.'s rebuilt Orca, OPT-13B, A100 40 GB, ShareGPT, figure 12 (a), read by eye"

register(
    "orca-max",
    Reached("a knee at about 0.5 requests/s", _PAPER, _OURS),
    allocator="contiguous-max",
    scheduler="continuous",
)
register(
    "orca-pow2",
    Reached("a knee at about 0.75 requests/s", _PAPER, _OURS),
    allocator="contiguous-pow2",
    scheduler="continuous",
)
register(
    "orca-oracle",
    Reached("a knee at about 1.1 requests/s", _PAPER, _OURS),
    allocator="contiguous-oracle",
    scheduler="continuous",
)
