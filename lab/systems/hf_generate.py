"""transformers' `generate` on a batch of prompts, as its own documentation shows it: static batching with padding.

Models. Whoever calls `generate` has collected a batch; prompts are padded to the longest, computed as one rectangle,
and decoded until every row has ended. A row that has ended is computed on as padding, and its memory is kept. The cache
(DynamicCache, the default) grows by what is appended: nothing is reserved, and there is no pool.

    prompt A . . | a a a a a a        . padding: computed, thrown away
    prompt B b b | b b - - - -        - ended row: a dead token per step, and its memory is kept

The nearest of our allocators is one extent per row that grows where it lies, or moves to a larger hole. Approximated by
it: transformers' cache is a tensor [rows, heads, longest, head size] per layer, so every row, padding included, is as
long as the longest; here the cells of padding cost time (they are computed and read) and no memory. There every step
copies the whole cache into a tensor one token longer (torch.cat); here an extent moves only where it cannot grow.

The batch is 7: the most rows of 2,048 tokens that the paper's pool can hold. transformers has no preemption, it raises
out of memory; here a row that finds no room is computed again, as moving needs old and new extent at once: never with
ShareGPT's lengths, and only where all seven come near to 2,048. Take `--batch` for other pools.

Sources.
- huggingface/transformers: src/transformers/cache_utils.py (DynamicLayer.update concatenates; StaticLayer allocates
  ahead, on demand only), src/transformers/generation/utils.py (the sampling loop runs until all rows have ended and
  pads those that have). Documentation: "Cache strategies" (DynamicCache is the default), "Continuous batching".

Leaves out. `generate_batch` and `transformers serve`, which are continuous batching over a paged cache: another path in
the same library (pull request 41655 reaches it from `generate` by cache_implementation="paged"). StaticCache. Kernels,
and the eager Python between them, which are most of what it took in our measurement. When a batch starts is up to the
caller; here it does when it is full, or when nothing more will come.
"""

from lab.systems import Reached, register

register(
    "hf-generate",
    Reached(
        "620 useful output tokens/s (437 in batches of 64)",
        "transformers 5.17.0, generate, a static batch of 256, padded; Qwen3-0.6B's shape, random weights, on an H100 "
        "80GB; 256 prompts of 100 to 1024 tokens with 100 to 1024 forced output tokens; measured by us. vLLM 0.24.0 on "
        "a like draw: 5,100 to 6,300 eager, 17,830 to 18,800 with CUDA graphs",
        "kernels and host: on our virtual H100, whose kernels are ideal, the same static batch reaches some 7,400 and "
        "paging some 16,300 (papers/systems.md), so that of a factor near 30 about 2 is static batching",
    ),
    Reached(
        "123 output tokens/s in batches of 8, 31 one by one",
        "transformers 5.17.0, generate, SmolLM2-135M, float32, two CPU cores; measured by us",
        "another model, on a CPU; its own padding and host code",
    ),
    allocator="contiguous-need-firstfit",
    scheduler="static",
    batch=7,
)
