"""vLLM as it is in the PagedAttention paper: paging on demand.

Models. Memory in blocks of 16 tokens, any block for any sequence, handed out when the first token that goes into it is
about to be computed; nothing is reserved, so what a client asks for (`max_tokens`) has no effect. Outputs of one
request share the blocks of their prompt and copy on write. Iteration-level scheduling, first come first served, prompts
and decodes mixed in one step of at most 2,560 tokens and 2,048 sequences. An admission leaves 1 % of the blocks free.
Where a running sequence finds no block, the request that arrived last gives all its memory back and is computed again
later; `--preemption swap` takes it to host memory instead. Nobody is admitted in a step that preempted.

Sources.
- Kwon et al., SOSP'23, arXiv 2309.06180: sections 4.1 to 4.4 (blocks, tables, sharing), 4.5 (scheduling, preemption),
  6.1 (set-up).
- The authors' artifact, whose run lists and constants (block 16, watermark 1 %, 2,560 tokens, 2,048 sequences) the
  paper leaves out.

Leaves out. The paper recomputes a request of one sequence and swaps one of several: here one of the two is chosen for
all. Its kernels, CUDA graphs, tensor parallelism and host code. And all that came since: in today's vLLM the prefix
cache is on by default, long prompts are cut into chunks that share a step with decodes, preemption recomputes and
swapping is gone (docs.vllm.ai, "Optimization and Tuning"); of these, chunks appear here only for prompts above the cap.

The nearest to today's vLLM is this system with the prefix cache switched on; on requests that share no prefix the two
differ little in who gets which memory when, which is what is compared here.
"""

from lab.systems import Reached, register

register(
    "vllm",
    Reached(
        "1,967 to 1,980 output tokens/s, 43.6 to 44.0 s, 423 preemptions",
        "vLLM 0.24.0 on an H100 80GB, OPT-13B's shape in bf16 with random weights, 983 blocks of 16, the 256 requests "
        "of the workload opt13b-256 at once; measured by us",
        "its kernels and host code; chunked prompts there; another machine than the virtual clock's default. The same "
        "requests here: --workload opt13b-256 --arrivals all; on such a GPU, papers/performance",
    ),
    Reached(
        "a knee at about 1.9 requests/s",
        "the paper's own, OPT-13B, A100 40 GB, ShareGPT, figure 12 (a), read by eye",
        "none in policy: this is what is modelled",
    ),
    allocator="paged",
    scheduler="continuous",
)
