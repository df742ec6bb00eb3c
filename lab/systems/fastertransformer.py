"""FasterTransformer with the PagedAttention paper's own scheduler in front (Kwon et al., SOSP'23, section 6.1)."""

from lab.systems import register

register("fastertransformer", allocator="contiguous-max", scheduler="dynamic", timeout_s=0.0, batch=7)
