"""How fast is the engine? Whole workloads, single steps and the start, against floors that no engine could pass.

    python -m lab.bench throughput [CASE...]   output tokens per second of whole workloads
    python -m lab.bench step                   the time of one step at batch 1, against that of reading the weights
    python -m lab.bench policies               the same step under every policy: memory is compared, not kernels
    python -m lab.bench profile [CASE...]      where a step's time goes: kinds of kernels, gaps between them, the host
    python -m lab.bench startup                from the shell to the first token, with nothing compiled and with all
    python -m lab.bench laptop                 SmolLM2 on this CPU, beside transformers' own generate
    python -m lab.bench kernels                the kernels alone: python -m kernels.bench
    python -m lab.bench compare                did anything get slower? of many small benchmarks; compare --help

All requests come at once, output lengths are forced and weights random, of the true shape: speed does not depend on
their values. The floor is bytes / bandwidth + operations / rate: K and V that decoding reads once, all weights once a
step, and the arithmetic of the prompts; both rates are measured on the spot. A first round, in which kernels are
compiled and graphs captured, does not count; of the others the median does.
"""
