"""Every operation in plain torch: the specification of the Triton kernels, and what runs on a CPU.

Shapes: T tokens, R rows of one kind, N query tokens of each, L positions read, H query heads, Hk KV heads, G = H / Hk
query heads per KV head, D head_dim, Dv head_dim_v. The layouts are drawn in `kernels/__init__.py`.
"""

import functools

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu

from kernels.checks import (
    check_attention,
    check_copy,
    check_norm,
    check_rotate,
    check_row,
    check_sample,
    check_silu,
    check_store,
)
from kernels.ragged import Ragged

MAX_LOGITS = 2**26  # computed at a time: 256 MiB of float32

# splitmix64 (Steele, Lea and Flood, 2014), as the signed numbers that torch has
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write keys k [T, Hk, D], values v [T, Hk, Dv] to slots int64 [T], each at most once; slot -1 drops the token."""
    check_store(k, v, k_cache, v_cache, slots)
    block = k_cache.shape[1]
    kept = slots >= 0  # [T]
    blocks, offsets = slots[kept] // block, slots[kept] % block
    k_cache[blocks, offsets] = k[kept]
    v_cache[blocks, offsets] = v[kept]


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, H, D] over each row's own context -> [T, H, Dv]; sums in float32.

    `window`: key j is seen by the query at p only if p - j < window. `softcap`: a logit s becomes softcap *
    tanh(s / softcap). `sinks` [H]: one more logit per head in the softmax's sum. A query that sees no key gives 0; so
    do all of a row of length 0, which fills up a batch.
    """
    check_attention(q, k_cache, v_cache, ragged, scale, window, softcap, sinks)
    out = q.new_zeros(*q.shape[:2], v_cache.shape[3])  # [T, H, Dv]
    for tokens, slots, seen in _plan(ragged, q.shape[1], window):
        k, v = _gather(k_cache, slots).float(), _gather(v_cache, slots).float()  # [R, L, Hk, D], [R, L, Hk, Dv]
        grouped = q[tokens].float().unflatten(2, (k.shape[2], -1))  # [R, N, Hk, G, D]
        if softcap is None and sinks is None:
            attended = _attend(grouped, k, v, seen, scale)
        else:
            attended = _attend_by_hand(grouped, k, v, seen, scale, softcap, sinks)
        out[tokens] = attended.flatten(2, 3).to(q.dtype)
    return out


@functools.lru_cache(maxsize=2)  # all layers of a step ask the same; two, where some layers have a window
def _plan(ragged: Ragged, num_heads: int, window: int | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows that are computed together: their tokens [R, N], the slots they read [R, L], who sees these [R, N, L]."""
    starts, contexts = ragged.starts.long(), ragged.lengths + ragged.dead
    counts = starts.diff() * (contexts > 0)  # query tokens of each row that reads anything
    found = []
    for count in counts[counts > 0].unique().tolist():  # rows with as many queries together, as long as the longest
        alike = (counts == count).nonzero()[:, 0]
        logits_per_row = count * num_heads * int(contexts[alike].max())
        for rows in alike.split(max(1, MAX_LOGITS // logits_per_row)):  # [R]
            tokens = starts[rows, None] + torch.arange(count, device=starts.device)  # [R, N]
            found.append((tokens, *_keys_of(ragged, rows, count, window)))
    return found


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """What lies in slots [R, L] of cache [num_blocks, block, Hk, D]: [R, L, Hk, D]."""
    if cache.stride(0) == cache.shape[1] * cache.stride(1):  # as one list of slots, which is faster to pick from
        return cache.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape)
    return cache[slots // cache.shape[1], slots % cache.shape[1]]


def _attend(grouped: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of grouped queries [R, N, Hk, G, D] as torch has it, over those keys that are seen [R, N, L]."""
    count, groups = grouped.shape[1], grouped.shape[3]
    q = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [R, Hk, G * N, D]
    mask = seen[:, None].expand(-1, groups, -1, -1).flatten(1, 2)[:, None]  # [R, 1, G * N, L]
    out = scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    out = out.unflatten(2, (groups, count)).permute(0, 3, 1, 2, 4)  # [R, N, Hk, G, Dv]
    return out.masked_fill(~seen.any(-1)[:, :, None, None, None], 0.0)


def _attend_by_hand(
    grouped: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The same with a cap on the logits, or sinks [H] in the sum."""
    logits = torch.einsum("rnkgd,rlkd->rkgnl", grouped, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen[:, None, None], float("-inf"))
    weights = _softmax(logits, None if sinks is None else sinks.float().view(k.shape[2], -1, 1, 1))
    return torch.einsum("rkgnl,rlkd->rnkgd", weights, v)


def _keys_of(ragged: Ragged, rows: Tensor, count: int, window: int | None) -> tuple[Tensor, Tensor]:
    """The slots that these rows read [R, L], and who sees what lies there [R, N, L].

    A row reads its live positions [low, high) and then `dead` more, whose addresses wrap around inside [low, high).
    So do the positions that fill a short row up to L: nothing outside a row's own live positions is ever read.
    """
    device = rows.device
    firsts, lengths, dead = (column[rows].long()[:, None] for column in (ragged.firsts, ragged.lengths, ragged.dead))
    high = torch.minimum(firsts + count, lengths)  # [R, 1]; at least 1
    low = torch.zeros_like(high)
    if window is not None:
        low = torch.minimum(firsts - window + 1, high - 1).clamp(min=0)
    positions = low + torch.arange(int((high - low + dead).max()), device=device)  # [R, L]
    address = low + (positions - low) % (high - low)
    in_table = address // ragged.block
    tables = ragged.tables[rows].long()  # [R, width]
    blocks = tables.gather(1, in_table) if ragged.paged else tables[:, :1] + in_table
    queries = (firsts + torch.arange(count, device=device))[..., None]  # [R, N, 1]
    keys = positions[:, None]  # [R, 1, L]
    seen = (keys < high[..., None]) & (keys <= queries)
    if window is not None:
        seen &= queries - keys < window
    return blocks * ragged.block + address % ragged.block, seen


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of [R, Hk, G, N, L] over L, `sinks` [Hk, G, 1, 1] joining the sum; 0 where all are -inf."""
    top = logits.amax(-1, keepdim=True) if sinks is None else logits.amax(-1, keepdim=True).maximum(sinks)
    top = top.clamp(min=torch.finfo(torch.float32).min)  # all -inf: 0 / tiny below, and no NaN
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.clamp(min=torch.finfo(torch.float32).tiny)


def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks of cache [layers, num_blocks, block, Hk, D] in all layers: pairs int64 [n, 2] (source, target).

    All pairs are copied at once, in no order. That no block is a target twice, or a target and a source, is the
    caller's contract; it is checked where that is free, for pairs on the CPU.
    """
    check_copy(cache, pairs)
    sources, targets = pairs.to(cache.device).unbind(1)
    cache[:, targets] = cache[:, sources]


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm of x [T, hidden], LayerNorm where there is a bias; x is first added to `residual`, where there is one.

    The residual changes in place, and what is normalised is the rounded sum. Statistics are in float32.
    """
    check_norm(x, weight, bias, residual)
    x = x if residual is None else residual.add_(x)
    if bias is not None:
        return layer_norm(x.float(), x.shape[1:], weight.float(), bias.float(), eps).to(x.dtype)
    return _rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounded before the weight and after it, as in transformers' Llama."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    rotation: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Norm and rotary embedding of queries and keys, both optional; keys and values to their slots -> q [T, H, D].

    qkv [T, (H + 2 Hk) * D] holds the heads of queries, then of keys, then of values. q_norm, k_norm [D] are weights of
    an RMSNorm of each head (Qwen3). Row p of `rotation` float32 [positions, D] holds the cosines, then the sines of
    position p: the halves (a, b) of a head become (a cos - b sin, b cos + a sin). positions, slots: int64 [T].
    """
    heads = check_rotate(qkv, q_norm, k_norm, rotation, positions, slots, k_cache, v_cache)
    kv_heads, head_dim = k_cache.shape[2:]
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    if q_norm is not None and k_norm is not None:
        q, k = _rms_norm(q, q_norm, eps), _rms_norm(k, k_norm, eps)
    if rotation is not None:
        cos, sin = rotation[positions, None].chunk(2, -1)  # [T, 1, D / 2]
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    store(k, v, k_cache, v_cache, slots)
    return q.clone(memory_format=torch.contiguous_format)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [T, 2 I], gates first -> [T, I]; in float32, rounded once."""
    check_silu(gate_up)
    gate, up = gate_up.float().chunk(2, -1)
    return (silu(gate) * up).to(gate_up.dtype)


def row_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x [1, K] times weight [N, K], plus bias [N] -> [1, N]. One row alone, so that a kernel can do all of it at once.

    Before: an RMSNorm of x, with weights `norm` [K]. After: SwiGLU, where weight is [2 N, K], gates first; and the sum
    with `residual` [1, N], which changes in place and is what returns. Rounded where each of these rounds, or less.
    """
    check_row(x, weight, bias, norm, gated, residual)
    out = linear(x if norm is None else _rms_norm(x, norm, eps), weight, bias)
    out = silu_and_mul(out) if gated else out
    return out if residual is None else residual.add_(out)


def sample(logits: Tensor, temperature: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [S, V] -> int64 [S], and its log-probability before temperature, float32 [S].

    temperature float32 [S]; at 0 the likeliest token, the first of equals. Else the winner of a race: token i arrives
    at E_i / p_i, and is first with probability p_i. E is `exponential` of keys int64 [S].
    """
    check_sample(logits, temperature, keys)
    logits = logits.float()
    tokens = logits.argmax(-1)
    drawn = (temperature > 0).nonzero()[:, 0]
    scaled = logits[drawn] - logits[drawn].amax(-1, keepdim=True)  # at most 0: dividing does not overflow
    scaled /= temperature[drawn, None].clamp(min=torch.finfo(torch.float32).tiny)
    tokens[drawn] = (scaled - exponential(keys[drawn], logits.shape[1]).log()).argmax(-1)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def exponential(keys: Tensor, size: int) -> Tensor:
    """Exponentially distributed noise float32 [S, size] from keys int64 [S]: a hash of (key, place)."""
    counter = torch.arange(1, size + 1, device=keys.device)
    state = keys[:, None] + counter * GAMMA
    state = (state ^ _shift(state, 30)) * MIX_1
    state = (state ^ _shift(state, 27)) * MIX_2
    state = state ^ _shift(state, 31)
    uniform = (_shift(state, 11).double() + 0.5) * 2.0**-53
    return -torch.log1p(-uniform).float()


def _shift(state: Tensor, bits: int) -> Tensor:
    """Right shift of int64 as if unsigned."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
