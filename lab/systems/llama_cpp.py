"""llama.cpp's server with an explicit `--parallel`: a fixed context divided among a fixed number of slots.

Models. The KV cache is allocated once, `--ctx-size` tokens; `--parallel N` divides it into N equal parts. A request
takes a free slot, whole, while it runs, and waits where there is none; no sequence can be longer than a slot. All busy
slots share each batch, prompts and decodes alike (continuous batching, on by default since March 2024).

    | slot 0: ####........ | slot 1: ##########.. | slot 2: #........... | slot 3: free     |      --parallel 4

The pool is the context. The number of slots is the careful operator's: as many as the pool holds of the longest
sequence, so that none is refused that the model could serve: 7 slots of 2,240 tokens in the paper's pool. That is Orca
(Max) under another name, and the two reach the same here. Other numbers by import path: `--allocator
lab.allocators.slots:four` (or eight, sixteen): fewer slots leave memory to nobody, more refuse long requests.

Sources (ggml-org/llama.cpp).
- src/llama-context.cpp: n_ctx_seq is n_ctx / n_seq_max unless kv_unified. Issue 11681: a user's surprise at that.
- Pull requests 6231 (continuous batching on by default), 16736 (one buffer for all slots, 4 slots), 17997 of December
  2025 (`-np` is "auto" by default, which means 4 slots on one unified buffer; an explicit `-np` divides as before).
- tools/server/README-dev.md, "Batching"; pull requests 15416 (context shift off by default), 13577 (an answer ends
  where its slot does).

Leaves out. The unified buffer, the default of today: any slot takes cells anywhere in the context and none is reserved,
which is paging with pages of one token, at most 4 sequences, and an error instead of a preemption where the context is
full (issue 23652). Answers cut short at the end of a slot: here a request that cannot end in its slot is refused. The
prompt cache of idle slots. Quantised weights and caches, its kernels, and CPUs, for which it is what people use.
Clients' `max_tokens` changes nothing: a slot is a slot.
"""

from lab.systems import register

register("llama.cpp", allocator="slots", scheduler="continuous")
