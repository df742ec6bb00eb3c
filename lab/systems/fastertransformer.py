"""FasterTransformer behind the dynamic batching that the PagedAttention paper gave it.

Models. A batch of the earliest requests, five at most, starts as soon as the one before has ended (no waiting for it to
fill). Prompts are padded to the longest of the batch and computed as a rectangle; then all rows decode together until
the last has its last token. A row that has ended is computed on as dead tokens and keeps its memory. Memory is one
extent per row for the longest sequence that the model takes, given back when the whole batch has ended; it shows in the
account alone, for five such extents always fit.

    prompt A . . | a a a a a a        . dead token: computed, thrown away
    prompt B b b | b b - - - -        - ended row: a dead token per step, and its memory is kept

Sources.
- Kwon et al., SOSP'23, section 6.1: FasterTransformer has no scheduler of its own, so the authors wrote one with
  dynamic batching as in serving systems such as Triton, with a batch as large as memory allows.
- Their artifact: 5 requests for OPT-13B on ShareGPT (this system's setting), 14 on Alpaca (`--batch 14`), 2 and 8 for
  OPT-66B; the padding to the longest prompt, the decoding to the longest output, all ending together.
- NVIDIA/FasterTransformer, src/fastertransformer/models/multi_gpu_gpt/ParallelGpt.cc: key and value buffers allocated
  for the whole rectangle of a call, batch x longest length.

Leaves out. FasterTransformer's kernels, which were the fastest of their day: for attention alone the paper measures its
own as 20 to 26 % slower (figure 18 a). Whatever holds it at 5 requests, where 7 of the longest fit the pool. Tensor and
pipeline parallelism. There a batch is handed back when all of it has ended; here each answer counts as ended at its own
last token, which makes the latencies of short answers better than theirs.

What it reached is the paper's number, not ours: nobody of us ran it, and its repository has been superseded by
TensorRT-LLM.
"""

from lab.systems import Reached, register

register(
    "fastertransformer",
    Reached(
        "a knee at about 0.3 requests/s",
        "Kwon et al., OPT-13B, A100 40 GB, ShareGPT, batches of 5, figure 12 (a), read by eye; not measured by us",
        "kernels, faster there; there an answer is handed back with the longest of its batch",
    ),
    allocator="contiguous-max",
    scheduler="dynamic",
    timeout_s=0.0,
    batch=5,
)
