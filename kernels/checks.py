"""What every implementation accepts. Errors name the value, the rule and the remedy."""

import torch
from torch import Tensor

from kernels.ragged import Ragged

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    _check_caches(k_cache, v_cache)
    _check_same_device(k_cache.device, {"k": k, "v": v, "v_cache": v_cache, "slots": slots})
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _check_like(name, new, cache)
        if new.shape[1:] != cache.shape[2:]:
            raise ValueError(
                f"{name} {list(new.shape)}: its cache {list(cache.shape)} holds {list(cache.shape[2:])} per token; "
                f"pass [tokens, num_kv_heads, head_dim]"
            )
    if len(slots) != len(k) or len(k) != len(v):
        raise ValueError(
            f"{len(k)} keys, {len(v)} values, {len(slots)} slots: one of each per token; slot -1 drops a token"
        )
    if slots.dtype != torch.int64:
        raise ValueError(f"slots {slots.dtype}: slots of a large pool pass 2**31 elements; pass int64")


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ragged: Ragged,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    _check_caches(k_cache, v_cache)
    others = {} if sinks is None else {"sinks": sinks}
    _check_same_device(k_cache.device, {"q": q, "v_cache": v_cache, "the ragged batch": ragged.starts, **others})
    _check_like("q", q, k_cache)
    num_blocks, block, num_kv_heads, head_dim = k_cache.shape
    if q.ndim != 3 or q.shape[2] != head_dim:
        raise ValueError(
            f"q {list(q.shape)}: the cache's keys have head_dim {head_dim}; pass [tokens, num_heads, {head_dim}]"
        )
    if q.shape[1] % num_kv_heads:
        raise ValueError(
            f"{q.shape[1]} query heads over {num_kv_heads} KV heads: each serves as many; "
            f"pass a multiple of {num_kv_heads}"
        )
    if q.shape[0] != ragged.num_tokens:
        raise ValueError(
            f"q has {q.shape[0]} tokens, the ragged batch {ragged.num_tokens}: pass the batch built for this step"
        )
    if block != ragged.block:
        raise ValueError(
            f"a cache with blocks of {block}, a ragged batch with blocks of {ragged.block}: build it with block={block}"
        )
    if ragged.num_blocks > num_blocks:
        raise ValueError(
            f"a table points at block {ragged.num_blocks - 1}, the cache has {num_blocks}: pass this cache's tables"
        )
    if not scale > 0:
        raise ValueError(f"scale = {scale}: logits are multiplied by it; pass scale > 0, such as head_dim**-0.5")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: a query sees at least itself; pass window >= 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}: logits are held within +-softcap; pass softcap > 0, or None for no cap")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks {list(sinks.shape)}: one logit per query head; pass [{q.shape[1]}]")


def check_copy(cache: Tensor, pairs: Tensor) -> None:
    if cache.ndim != 5:
        raise ValueError(
            f"cache {list(cache.shape)}: pass [layers, num_blocks, block, num_kv_heads, head_dim]; [None] adds layers"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(
            f"pairs {pairs.dtype} {list(pairs.shape)}: pass int64 [n, 2], rows (source block, destination block)"
        )
    if pairs.device.type != "cpu" or not len(pairs):  # on a device, looking would mean waiting for it
        return
    if int(pairs.min()) < 0 or int(pairs.max()) >= cache.shape[1]:
        raise ValueError(
            f"pairs name blocks {int(pairs.min())} to {int(pairs.max())}: the cache has 0 to {cache.shape[1] - 1}"
        )
    sources, targets = (set(column) for column in pairs.t().tolist())
    if sources & targets or len(targets) < len(pairs):
        raise ValueError(
            f"pairs {pairs.tolist()}: all are copied at once, so no block may be written twice, or read and written; "
            f"copy dependent pairs in separate calls"
        )


def check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    _check_rows("x", x)
    _check_parts("x", x, x.shape[1:], weight=weight, bias=bias)
    _check_parts("x", x, x.shape, residual=residual)


def check_silu(gate_up: Tensor) -> None:
    _check_rows("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up {list(gate_up.shape)}: as many gates as values; pass [tokens, 2 * size], gates first"
        )


def check_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, gated: bool, residual: Tensor | None
) -> None:
    _check_rows("x", x)
    if len(x) != 1:
        raise ValueError(f"x {list(x.shape)}: a row alone; multiply several with torch.nn.functional.linear")
    if weight.ndim != 2 or (gated and weight.shape[0] % 2):
        raise ValueError(f"weight {list(weight.shape)}: pass [out, in]; gated: [2 * out, in], gates first")
    _check_parts("x", x, (weight.shape[0], x.shape[1]), weight=weight)
    _check_parts("x", x, weight.shape[:1], bias=bias)
    _check_parts("x", x, x.shape[1:], norm=norm)
    _check_parts("x", x, (1, weight.shape[0] // (1 + gated)), residual=residual)


def check_rotate(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    rotation: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> int:
    """The number of query heads."""
    _check_rows("qkv", qkv)
    _check_caches(k_cache, v_cache)
    _check_like("qkv", qkv, k_cache)
    kv_heads, head_dim = k_cache.shape[2:]
    if v_cache.shape[3] != head_dim or head_dim % 2:
        raise ValueError(
            f"head dims {head_dim}, {v_cache.shape[3]}: a head turns by halves, and qkv has heads of one size; "
            f"pass caches of the same even head_dim"
        )
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if heads < 1 or qkv.shape[1] % head_dim:
        raise ValueError(
            f"qkv {list(qkv.shape)}: {kv_heads} heads of {head_dim} are its keys, as many its values; "
            f"pass [tokens, (query heads + {2 * kv_heads}) * {head_dim}]"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("only one of q_norm, k_norm is None: queries and keys are normed alike; pass both or neither")
    _check_parts("qkv", qkv, k_cache.shape[3:], q_norm=q_norm, k_norm=k_norm)
    _check_parts("qkv", qkv, qkv.shape[:1], torch.int64, positions=positions, slots=slots)
    if rotation is not None:
        _check_parts("qkv", qkv, (len(rotation), head_dim), torch.float32, rotation=rotation)
    _check_same_device(k_cache.device, {"qkv": qkv, "v_cache": v_cache})
    return heads


def check_sample(logits: Tensor, temperature: Tensor, keys: Tensor) -> None:
    _check_rows("logits", logits)
    if not logits.shape[1]:
        raise ValueError(f"logits {list(logits.shape)}: a token is drawn from at least one; pass [rows, vocabulary]")
    _check_parts("logits", logits, logits.shape[:1], torch.float32, temperature=temperature)
    _check_parts("logits", logits, logits.shape[:1], torch.int64, keys=keys)


def _check_rows(name: str, x: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES or x.stride(1) != 1:
        raise ValueError(
            f"{name} {x.dtype} {list(x.shape)}, strides {x.stride()}: rows of float32, float16 or bfloat16, dense in "
            f"themselves; pass a matrix with stride 1 along its rows"
        )


def _check_parts(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, **parts: Tensor | None
) -> None:
    """`parts` are what goes with x: where it is, of its type unless another is named."""
    dtype = dtype or x.dtype
    for part_name, part in parts.items():
        if part is None:
            continue
        if part.shape != shape or part.dtype != dtype or part.device != x.device or not part.is_contiguous():
            raise ValueError(
                f"{part_name} {part.dtype} {list(part.shape)} on {part.device}: {name} {list(x.shape)} wants it "
                f"contiguous, {dtype} {list(shape)} on {x.device}; convert it before the first step"
            )


def _check_same_device(device: torch.device, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, k_cache on {device}: move it there first")


def _check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 4:
            raise ValueError(
                f"{name} {list(cache.shape)}: pass one layer's [num_blocks, block, num_kv_heads, head_dim]"
            )
        if cache.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {cache.dtype}: the kernels read float32, float16 and bfloat16; convert the cache"
            )
        if cache.stride(3) != 1:
            raise ValueError(f"{name} has stride {cache.stride(3)} along head_dim: it must be 1; lay head_dim out last")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache {list(k_cache.shape)}, v_cache {list(v_cache.shape)}: they differ before head_dim; pass a pair"
        )


def _check_like(name: str, new: Tensor, cache: Tensor) -> None:
    if new.dtype != cache.dtype:
        raise ValueError(
            f"{name} is {new.dtype}, its cache {cache.dtype}: convert {name} first; nothing is converted here"
        )
    if new.ndim and new.stride(-1) != 1:
        raise ValueError(f"{name} has stride {new.stride(-1)} along head_dim: it must be 1; pass {name}.contiguous()")
