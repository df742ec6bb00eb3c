"""vLLM as in the PagedAttention paper (Kwon et al., SOSP'23, sections 4 and 6.1): paging on demand.

Blocks of 16 tokens, handed out when their first token is computed; continuous batching, first come first served,
prompts and decodes mixed in one step of at most 2,560 tokens; 1 % of the blocks left free by admissions; the latest
arrival preempted where memory runs out.
"""

from lab.systems import register

register("vllm", allocator="paged", scheduler="continuous")
