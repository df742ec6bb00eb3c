"""Text Generation Inference (Hugging Face): blocks for the prompt and `max_new_tokens` at admission.

Models. Continuous batching over a paged cache, with vLLM's kernels, but not with vLLM's policy: when a request leaves
the queue it gets all blocks that it could ever need, for its prompt and for as many tokens as the client allowed; it
keeps them to its end, so that nothing is ever preempted. An answer that ends early gives back what it never used. What
clients ask for is therefore what decides how many run at once: see the experiment `systems`, which varies it.

    blocks at admission   | prompt | allowed by the client                          |
    of which written      | prompt | answer          | never                        |

Sources.
- huggingface/text-generation-inference, backends/v3/src/queue.rs (State::next_batch asks the block allocator for input
  length + max_new_tokens + speculation - 1 and leaves the request at the queue's head where that fails) and
  block_allocator.rs (SimpleAllocator hands out exactly these blocks, freed when the request is dropped).
- In its first form, server/text_generation_server/models/flash_causal_lm.py, CacheManager.allocate, with blocks of 16;
  models/globals.py: 16 tokens a block for attention `paged`, 256 for `flashdecoding`, 1 for `flashinfer`.
- The launcher's reference: max_total_tokens, max_batch_total_tokens, waiting_served_ratio (0.3), max_waiting_tokens
  (20). Issue 2294 ("paged attention in tgi is fake?") is a user's discovery of the policy.

Leaves out. Prompts and decodes do not share a step there: the batch that runs is paused for a prefill when enough wait
(waiting_served_ratio) or after 20 decode steps (max_waiting_tokens); here they are mixed, so time to the first token is
ours and not TGI's. The cap on the tokens of a prefill (max_batch_prefill_tokens): here 2,560 a step, as for all. The
budget max_batch_total_tokens, which counts the same tokens once more. Block 0, kept for health checks; one token less a
request. The prefix cache of version 3 (a radix tree, blocks of 1), its own kernels, its Rust router. It has other
back ends by now (TensorRT-LLM, llama.cpp, vLLM), which this is not about.
"""

from lab.systems import register

register("tgi", allocator="paged-max-tokens", scheduler="continuous")
