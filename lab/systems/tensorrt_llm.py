"""TensorRT-LLM: paging with in-flight batching, under its two capacity policies.

Models. In-flight batching is continuous batching: contexts (prompts) and generations share a step. Memory is paged, 32
tokens a block by default. Who may start is decided by one of two policies:

    tensorrt-llm               GUARANTEED_NO_EVICT, the default: a request starts when the free blocks cover all that
                               it may still need up to its `max_tokens`, besides all that the running ones may still
                               need; once started it is never paused
    tensorrt-llm-utilisation   MAX_UTILIZATION: it starts when the next step fits; where a running one finds no block,
                               the one that started last is paused, its blocks are freed, and it is computed again

The first counts blocks and hands them out as they are written; here they are handed out at admission. Who runs when is
the same, to the block; only the account differs: what is promised shows here as reserved (or as excess, where the
answer ends early), there as free blocks that nobody may take. That makes it the policy of `tgi` with larger blocks, and
at equal blocks (`--block-size 16`) the two are one. The second is `vllm` without its watermark, with larger blocks.

Sources.
- NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp (GuaranteedNoEvictScheduler,
  MaxUtilizationScheduler), scheduledBlocksManager.h (enoughAvailableBlocks, decrementReservedBlocks) and
  kvCacheManager.cpp (getRemainingBlocksToCompletion: prompt and max_new_tokens over the block, rounded up).
- nvidia.github.io/TensorRT-LLM: "Useful Runtime Options" (the policies, the default, the risk of pausing);
  "KvCacheConfig" (tokens_per_block = 32, enable_block_reuse = True).

Leaves out. Block reuse, on by default there: finished blocks stay until they are needed, and a request waits a step
when another is about to compute the prefix they share. Its caps on a step (max_num_tokens, max_batch_size), chunked
contexts, the third policy STATIC_BATCH, host offloading, compiled engines and kernels: they are most of why one picks
it, and none of what is compared here. The order within the queue is first come first served, as there by default.
"""

from lab.systems import register

register("tensorrt-llm", allocator="paged-max-tokens", scheduler="continuous", block=32)
register("tensorrt-llm-utilisation", allocator="paged", scheduler="continuous", block=32, watermark=0.0)
