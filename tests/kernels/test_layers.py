"""What a decoder layer computes around attention, specification and Triton kernel alike, against float64.

Memory that nobody wrote holds NaN: what lies between rows and behind them, caches, and what the operations allocate.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from scenes import poison
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernels import for_device, reference

pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: captures a CUDA graph")


@pytest.fixture(params=["reference", "triton"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    return reference if request.param == "reference" else for_device("cuda")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poison():
        yield


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=DEVICE).to(dtype)


def apart(x: Tensor) -> Tensor:
    """The same rows with NaN between them."""
    wide = x.new_full((len(x) + 2, x.shape[1] + 5), float("nan"))
    wide[1:-1, 2:-3] = x
    return wide[1:-1, 2:-3]


def close(out: Tensor, exact: Tensor, roundings: int) -> None:
    """The interpreter truncates to bfloat16: each rounding may cost a whole unit in the last place, not half of one."""
    assert not out.isnan().any()
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=max(roundings * eps, 2e-6), atol=max(eps / 64, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 77, 1024, 5120, 16384])
@pytest.mark.parametrize("with_bias", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_norm(ops: ModuleType, with_bias: bool, hidden: int, dtype: torch.dtype) -> None:
    x, residual = apart(random(5, hidden, dtype=dtype)), random(5, hidden, dtype=dtype)
    weight, bias = random(hidden, dtype=dtype), random(hidden, dtype=dtype) if with_bias else None

    def exact(x: Tensor) -> Tensor:
        x = x.double()
        if bias is not None:
            variance = x.var(-1, keepdim=True, correction=0)
            return (x - x.mean(-1, keepdim=True)) / (variance + 1e-3).sqrt() * weight.double() + bias.double()
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()

    before = x.clone()
    out = ops.norm(x, weight, bias, 1e-3)
    assert out.is_contiguous()
    close(out, exact(x), 3)
    added = residual.clone()
    out = ops.norm(x, weight, bias, 1e-3, added)
    assert torch.equal(x, before)
    close(added, (x.float() + residual.float()).to(dtype).double(), 1 if DEVICE == "cpu" else 0)
    close(out, exact(added), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    x, theirs = random(5, 96, dtype=dtype), LlamaRMSNorm(96, 1e-5).to(DEVICE, dtype)
    theirs.weight.data = random(96, dtype=dtype)
    assert torch.equal(reference.norm(x, theirs.weight.data, None, 1e-5), theirs(x))


HEADS = [(1, 1, 2), (4, 2, 16), (7, 1, 80), (5, 3, 128), (40, 8, 128), (2, 2, 256)]  # of queries, of keys; their size
CASES = [*((heads, torch.float32) for heads in HEADS), *(((6, 2, 128), dtype) for dtype in DTYPES[1:])]


@pytest.mark.parametrize(("heads", "dtype"), CASES)
@pytest.mark.parametrize("with_norm", [True, False], ids=["normed", "as they are"])
@pytest.mark.parametrize("with_rotation", [True, False], ids=["rotated", "at rest"])
def test_rotate_and_store(
    ops: ModuleType, with_rotation: bool, with_norm: bool, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, d = heads
    qkv = random(5, (num_heads + 2 * num_kv_heads) * d, dtype=dtype)
    qkv[0, -1] = float("inf")  # a value, which must reach neither its other half nor a key
    norms = [random(d, dtype=dtype) if with_norm else None for _ in range(2)]
    angles = random(50, d // 2)
    rotation = torch.cat([angles.cos(), angles.sin()], 1) if with_rotation else None
    positions = torch.tensor([49, 0, 7, 7, 20], device=DEVICE)
    slots = [20, -1, 0, 7, -1]  # in blocks of 3
    k_cache = torch.full((num_kv_heads, 3, 7, d), float("nan"), dtype=dtype, device=DEVICE).permute(2, 1, 0, 3)
    v_cache = torch.full((7, 3, num_kv_heads, d + 4), float("nan"), dtype=dtype, device=DEVICE)[..., :d]
    q = ops.rotate_and_store(
        apart(qkv), *norms, 1e-3, rotation, positions, torch.tensor(slots, device=DEVICE), k_cache, v_cache
    )
    assert q.is_contiguous()
    assert q.shape == (5, num_heads, d)

    def exact(token: int, head: int, norm: Tensor | None) -> Tensor:
        x = qkv[token, head * d : (head + 1) * d].double()
        if norm is not None:
            x = x / (x.square().mean() + 1e-3).sqrt() * norm.double()
        if rotation is not None:
            turn = torch.complex(*rotation[positions[token]].double().view(2, -1))
            turned = torch.complex(*x.view(2, -1)) * turn
            x = torch.cat([turned.real, turned.imag])
        return x

    def compare(got: Tensor, expected: Tensor) -> None:
        eps = max(torch.finfo(dtype).eps, 5e-7)
        torch.testing.assert_close(got.double(), expected, rtol=4 * eps, atol=16 * eps)

    for token, slot in enumerate(slots):
        compare(q[token], torch.stack([exact(token, head, norms[0]) for head in range(num_heads)]))
        if slot < 0:
            continue
        k, v = k_cache[slot // 3, slot % 3], v_cache[slot // 3, slot % 3]
        compare(k, torch.stack([exact(token, num_heads + head, norms[1]) for head in range(num_kv_heads)]))
        assert torch.equal(v, qkv[token].view(-1, d)[-num_kv_heads:])
    for cache in (k_cache, v_cache):
        assert int((~cache.isnan()).any(-1).any(-1).sum()) == 3  # slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_those_of_qwen3(dtype: torch.dtype) -> None:
    heads, kv_heads, d, tokens = 4, 2, 32, 6
    qkv = random(tokens, (heads + 2 * kv_heads) * d, dtype=dtype)
    norms = [Qwen3RMSNorm(d, 1e-6).to(DEVICE, dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data = random(d, dtype=dtype)
    angles = torch.arange(tokens, device=DEVICE)[:, None] / 10 ** torch.linspace(0, 4, d // 2, device=DEVICE)
    rotation = torch.cat([angles.cos(), angles.sin()], 1)
    q, k, v = qkv.view(tokens, -1, d).split([heads, kv_heads, kv_heads], 1)
    cos, sin = (torch.cat([part(angles)] * 2, 1)[None].to(dtype) for part in (torch.cos, torch.sin))
    states = (norm(x).transpose(0, 1)[None] for norm, x in zip(norms, (q, k), strict=True))  # [1, H, T, D]
    q_theirs, k_theirs = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*states, cos, sin))
    k_cache, v_cache = random(2, 4, kv_heads, d, dtype=dtype), random(2, 4, kv_heads, d, dtype=dtype)
    slots = torch.arange(tokens, device=DEVICE)
    q_norm, k_norm = (norm.weight.data for norm in norms)
    q_ours = reference.rotate_and_store(qkv, q_norm, k_norm, 1e-6, rotation, slots, slots, k_cache, v_cache)
    eps = max(torch.finfo(dtype).eps, 1e-6)  # they round cosines and products to bfloat16
    torch.testing.assert_close(q_ours, q_theirs, rtol=2 * eps, atol=8 * eps)
    torch.testing.assert_close(k_cache.flatten(0, 1)[:tokens], k_theirs, rtol=2 * eps, atol=8 * eps)
    assert torch.equal(v_cache.flatten(0, 1)[:tokens], v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 77, 1024, 3000])
def test_silu_and_mul(ops: ModuleType, size: int, dtype: torch.dtype) -> None:
    gate_up = apart(3 * random(4, 2 * size, dtype=dtype))
    gate_up[0, 0] = -1e4  # its exponential overflows
    gate, up = gate_up[:, :size].double(), gate_up[:, size:].double()
    close(ops.silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "hidden"), [(1, 1), (77, 130), (96, 1024), (33, 3000), (4100, 2048)])
@pytest.mark.parametrize("kind", ["plain", "bias", "norm", "gated", "residual", "all"])
def test_row_product(ops: ModuleType, kind: str, size: int, hidden: int, dtype: torch.dtype) -> None:
    everything, gated = kind == "all", kind in ("gated", "all")
    x, weight = apart(random(1, hidden, dtype=dtype)), (random(size * (1 + gated), hidden) / hidden**0.5).to(dtype)
    bias = random(len(weight), dtype=dtype) if everything or kind == "bias" else None
    norm = random(hidden, dtype=dtype) if everything or kind == "norm" else None
    residual = random(1, size, dtype=dtype) if everything or kind == "residual" else None
    exact = x.double()
    if norm is not None:
        exact = exact / (exact.square().mean() + 1e-3).sqrt() * norm.double()
    exact = exact @ weight.double().t()
    exact = exact if bias is None else exact + bias.double()
    exact = torch.nn.functional.silu(exact[:, :size]) * exact[:, size:] if gated else exact
    exact = exact if residual is None else exact + residual.double()
    before = x.clone()
    out = ops.row_product(x, weight, bias, norm=norm, eps=1e-3, gated=gated, residual=residual)
    assert torch.equal(x, before)
    assert residual is None or out.data_ptr() == residual.data_ptr()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=4 * eps, atol=max(8 * eps, 1e-5))


def test_nothing_to_do(ops: ModuleType) -> None:
    none, weight, cache = random(0, 16), random(16), random(2, 4, 1, 4)
    places = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert ops.norm(none, weight, None, 1e-5, none).shape == (0, 16)
    assert ops.silu_and_mul(none).shape == (0, 8)
    assert ops.rotate_and_store(none, None, None, 0.0, None, places, places, cache, cache).shape == (0, 2, 4)


def test_what_is_not_supported_is_named(ops: ModuleType) -> None:
    x, weight, cache, places = random(3, 16), random(16), random(2, 4, 1, 4), torch.arange(3, device=DEVICE)

    def rotate(qkv: Tensor = x, cache: Tensor = cache, slots: Tensor = places, **others: Tensor) -> None:
        named = dict.fromkeys(("q_norm", "k_norm", "rotation")) | others
        ops.rotate_and_store(qkv, eps=1e-6, positions=places, slots=slots, k_cache=cache, v_cache=cache, **named)

    with pytest.raises(ValueError, match=r"x torch.float64 \[3, 16\]"):
        ops.norm(x.double(), weight, None, 1e-5)
    with pytest.raises(ValueError, match=r"x .* strides \(1, 3\)"):
        ops.norm(random(16, 3).t(), weight, None, 1e-5)
    with pytest.raises(ValueError, match=r"weight torch.float32 \[3\]"):
        ops.norm(x, weight[:3], None, 1e-5)
    with pytest.raises(ValueError, match=r"bias torch.float16 \[16\]"):
        ops.norm(x, weight, weight.half(), 1e-5)
    with pytest.raises(ValueError, match=r"residual torch.float32 \[2, 16\]"):
        ops.norm(x, weight, None, 1e-5, x[:2])
    with pytest.raises(ValueError, match=r"x \[3, 16\]: a row alone"):
        ops.row_product(x, random(4, 16))
    with pytest.raises(ValueError, match=r"weight \[3, 16\]: .* gates first"):
        ops.row_product(x[:1], x, gated=True)
    with pytest.raises(ValueError, match=r"weight torch.float32 \[4, 15\]"):
        ops.row_product(x[:1], random(4, 15))
    with pytest.raises(ValueError, match=r"norm torch.float32 \[3\]"):
        ops.row_product(x[:1], random(4, 16), norm=weight[:3])
    with pytest.raises(ValueError, match=r"residual torch.float32 \[1, 3\]"):
        ops.row_product(x[:1], random(4, 16), residual=random(1, 3))
    with pytest.raises(ValueError, match=r"gate_up \[3, 15\]: as many gates"):
        ops.silu_and_mul(x[:, :15])
    with pytest.raises(ValueError, match=r"qkv is torch\.float16, its cache torch\.float32"):
        rotate(x.half())
    with pytest.raises(ValueError, match=r"qkv \[3, 8\]: 1 heads of 4"):
        rotate(x[:, :8])
    with pytest.raises(ValueError, match="head dims 5, 5"):
        rotate(cache=random(2, 4, 1, 5))
    with pytest.raises(ValueError, match="only one of q_norm, k_norm"):
        rotate(q_norm=weight[:4])
    with pytest.raises(ValueError, match=r"k_norm torch.float32 \[3\]"):
        rotate(q_norm=weight[:4], k_norm=weight[:3])
    with pytest.raises(ValueError, match=r"rotation torch.float32 \[3, 2\]"):
        rotate(rotation=random(3, 2))
    with pytest.raises(ValueError, match=r"slots torch.int32 \[3\]"):
        rotate(slots=places.int())


def test_rows_too_long_for_a_program_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden = 16385: a program holds up to 16384"):
        for_device("cuda").norm(random(1, 16385), random(16385), None, 1e-5)


@needs_gpu
def test_a_graph_replays_them() -> None:
    """Captured once, they compute from what lies in the same memory later."""
    ops, dtype = for_device("cuda"), torch.bfloat16
    x, residual, weight, rotation = random(6, 256, dtype=dtype), random(6, 256, dtype=dtype), random(256), random(9, 32)
    k_cache, v_cache = random(4, 4, 2, 32, dtype=dtype), random(4, 4, 2, 32, dtype=dtype)
    positions, slots = torch.arange(6, device=DEVICE), torch.arange(6, device=DEVICE)
    weight = weight.to(dtype)

    def step() -> Tensor:
        qkv = ops.norm(x, weight, None, 1e-5, residual)
        q = ops.rotate_and_store(qkv, weight[:32], weight[32:64], 1e-5, rotation, positions, slots, k_cache, v_cache)
        return ops.silu_and_mul(q.flatten(1))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor, new in ((x, random(6, 256, dtype=dtype)), (positions, positions + 3), (slots, 15 - slots)):
        tensor.copy_(new)
    slots[2] = -1
    states = (residual, k_cache, v_cache)
    before = [state.clone() for state in states]
    graph.replay()
    got = [state.clone() for state in (captured, *states)]
    for state, old in zip(states, before, strict=True):
        state.copy_(old)
    expected = step()
    for a, b in zip(got, (expected, *states), strict=True):
        assert torch.equal(a, b)
