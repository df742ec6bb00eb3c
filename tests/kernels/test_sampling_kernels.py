"""Drawing tokens, specification and Triton kernel alike: against a race in float64, and against the probabilities."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from scenes import poison
from torch import Tensor

from kernels import for_device, reference
from lab.core import SamplingParams
from lab.executors.sampling import Draw
from lab.executors.sampling import sample as sample_in_lab

triton = pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64")
tl = pytest.importorskip("triton.language")
from kernels.sampling import _exponential  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 50, 4096, 4097, 9001]  # a tile holds 4096
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: captures a CUDA graph")


@pytest.fixture(params=["reference", "triton"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    return reference if request.param == "reference" else for_device("cuda")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poison():
        yield


def some_keys(count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), device=DEVICE)


def some_logits(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows that lie apart, with NaN in between."""
    wide = torch.full((rows + 1, size + 3), float("nan"), dtype=dtype, device=DEVICE)
    wide[:-1, :size] = 3 * torch.randn(rows, size, device=DEVICE)
    return wide[:-1, :size]


def noise(key: int, size: int) -> np.ndarray:
    """splitmix64 in unsigned arithmetic, as a float64 below 1, then -log of what is left of 1."""
    with np.errstate(over="ignore"):
        z = np.uint64(key % 2**64) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
        z ^= z >> np.uint64(31)
    return -np.log1p(-((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_the_race_wins(ops: ModuleType, size: int, dtype: torch.dtype) -> None:
    rows = 40
    logits, keys = some_logits(rows, size, dtype), some_keys(rows)
    temperature = torch.tensor([0.0, 1e-30, 0.3, 1.0, 2.5], device=DEVICE).repeat(rows // 5)
    tokens, logprobs = ops.sample(logits, temperature, keys)
    exact = logits.double().cpu()
    chosen = exact.log_softmax(-1).gather(1, tokens.cpu()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double().cpu(), chosen, rtol=1e-6, atol=2e-6)
    for row, (token, t, key) in enumerate(zip(tokens.tolist(), temperature.tolist(), keys.tolist(), strict=True)):
        scores = (exact[row] - exact[row].max()).numpy()
        if t:
            scores = scores / t - np.log(noise(key, size))
        assert scores[token] >= scores.max() - 1e-5, "not even a photo finish"
        if size > 1 and np.sort(scores)[-1] - np.sort(scores)[-2] > 1e-5:
            assert token == scores.argmax()


def test_both_draw_the_same() -> None:
    rows = 1000 if DEVICE == "cuda" else 100
    logits, keys = some_logits(rows, 5000, torch.bfloat16), some_keys(rows)
    temperature = 2 * torch.rand(rows, device=DEVICE)
    temperature[::7] = 0
    ours, theirs = (ops.sample(logits, temperature, keys) for ops in (for_device("cuda"), reference))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=2e-6)


def test_the_lab_draws_the_same_when_alternatives_are_asked_for() -> None:
    logits, keys = some_logits(200, 300, torch.float32), some_keys(200)
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0], device=DEVICE).repeat(50)
    draws = [
        Draw(SamplingParams(temperature=t), k, 1) for t, k in zip(temperature.tolist(), keys.tolist(), strict=True)
    ]
    drawn = sample_in_lab(logits, draws)
    tokens, logprobs = reference.sample(logits, temperature, keys)
    assert torch.equal(tokens, drawn.tokens)
    torch.testing.assert_close(drawn.logprobs, logprobs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equals_is_the_likeliest(ops: ModuleType, dtype: torch.dtype) -> None:
    firsts = [0, 17, 4095, 4096, 8191, 8999]
    logits = some_logits(len(firsts) + 1, 9000, dtype).clamp(max=20)
    for row, first in enumerate(firsts):
        logits[row, [first, *(place for place in (*firsts, 6000) if place > first)]] = 40
    logits[-1] = -7.5
    zeros = torch.zeros(len(logits), device=DEVICE)
    assert ops.sample(logits, zeros, some_keys(len(logits)))[0].tolist() == [*firsts, 0]


def test_what_is_impossible_is_never_drawn(ops: ModuleType) -> None:
    """Among them whole tiles, the first and the last; and the rest far below one token."""
    logits = torch.full((50, 12300), float("-inf"), device=DEVICE)
    logits[:10, 5000] = -1e4
    logits[10:40, 4500:4503] = torch.tensor([1e4, 1e4, 0.0], device=DEVICE)
    logits[40:] = -200.0
    logits[40:, 12299] = 0.0
    temperature = torch.tensor([0.0, 1.0], device=DEVICE).repeat(25)
    tokens, logprobs = ops.sample(logits, temperature, some_keys(50))
    assert tokens[:10].tolist() == [5000] * 10
    assert set(tokens[10:40].tolist()) == {4500, 4501}
    assert tokens[40:].tolist() == [12299] * 10
    torch.testing.assert_close(logprobs[:10], torch.zeros_like(logprobs[:10]))
    torch.testing.assert_close(logprobs[10:40], torch.full_like(logprobs[10:40], -np.log(2)))


def test_a_row_of_nan_gives_some_token() -> None:
    logits = torch.full((2, 5000), float("nan"), device=DEVICE)
    tokens, _ = for_device("cuda").sample(logits, torch.tensor([0.0, 1.0], device=DEVICE), some_keys(2))
    assert all(0 <= token < 5000 for token in tokens.tolist())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_tokens_come_as_often_as_they_should(ops: ModuleType, temperature: float) -> None:
    """Chi-square over keys in a row, below its 99.9 % quantile, of a normal approximation."""
    draws = 20_000 if DEVICE == "cuda" or ops is reference else 300  # 10 ms each in the interpreter
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected = draws * (logits[0].double() / temperature).softmax(0).cpu()
    temperatures = torch.full((draws,), temperature, device=DEVICE)
    tokens, _ = ops.sample(logits.expand(draws, -1), temperatures, torch.arange(draws, device=DEVICE))
    common = expected >= 5
    freedom = int(common.sum()) - 1
    assert freedom >= 7
    counts = torch.bincount(tokens.cpu(), minlength=20)
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5


def key_of(top: int, place: int = 0) -> int:
    """The key whose hash at this place has these upper 53 bits: splitmix64 backwards."""
    state = top << 11
    for shift, factor in ((31, 1), (27, MIX_2), (30, MIX_1)):
        state = state * pow(factor, -1, 2**64) % 2**64
        state ^= (state >> shift) ^ (state >> 2 * shift)
    key = (state - (place + 1) * GAMMA) % 2**64
    return key - 2**64 if key >= 2**63 else key


@triton.jit
def noise_kernel(keys_ptr, out_ptr):
    place = tl.program_id(0)
    tl.store(out_ptr + place, tl.max(_exponential(tl.load(keys_ptr + place), tl.arange(0, 1)), 0))


def test_noise_is_exact_however_small() -> None:
    """Between 2**-54 and 1 - 2**-16: later than that, nothing wins."""
    tops = [
        0,
        1,
        2,
        12345,
        *(2**bit + offset for bit in range(3, 53) for offset in (-1, 0, 1)),
        2**49 - 2**26,
        2**53 - 2**37,
    ]
    keys = [key_of(top) for top in tops]
    out = torch.empty(len(keys), device=DEVICE)
    noise_kernel[(len(keys),)](torch.tensor(keys, device=DEVICE), out)
    exact = np.array([-np.log1p(-(top + 0.5) * 2.0**-53) for top in tops])
    np.testing.assert_allclose([noise(key, 1)[0] for key in keys], exact, rtol=1e-12)
    np.testing.assert_allclose(reference.exponential(torch.tensor(keys), 1)[:, 0], exact, rtol=1e-6)
    np.testing.assert_allclose(out.cpu(), exact, rtol=2e-6, atol=0)


def test_what_must_win_wins_however_late(ops: ModuleType) -> None:
    """Its uniform number is 1 in float32, its noise 22.9; all others never arrive."""
    logits = torch.full((1, 10), -200.0, device=DEVICE)
    logits[0, 7] = 0
    key = torch.tensor([key_of(2**53 - 2**20, 7)], device=DEVICE)
    assert ops.sample(logits, torch.ones(1, device=DEVICE), key)[0].tolist() == [7]


def test_what_is_not_supported_is_named(ops: ModuleType) -> None:
    logits, temperature, keys = some_logits(3, 8, torch.float32), torch.ones(3, device=DEVICE), some_keys(3)
    assert [part.shape for part in ops.sample(logits[:0], temperature[:0], keys[:0])] == [(0,), (0,)]
    with pytest.raises(ValueError, match=r"logits torch\.int64 \[3, 8\]"):
        ops.sample(torch.zeros(3, 8, dtype=torch.int64, device=DEVICE), temperature, keys)
    with pytest.raises(ValueError, match=r"logits \[3, 0\]"):
        ops.sample(logits[:, :0], temperature, keys)
    with pytest.raises(ValueError, match=r"temperature torch\.float32 \[2\]"):
        ops.sample(logits, temperature[:2], keys)
    with pytest.raises(ValueError, match=r"keys torch\.int32 \[3\]"):
        ops.sample(logits, temperature, keys.int())


@needs_gpu
def test_a_graph_replays_it() -> None:
    ops = for_device("cuda")
    logits, temperature, keys = some_logits(9, 9001, torch.bfloat16), torch.rand(9, device=DEVICE), some_keys(9)
    ops.sample(logits, temperature, keys)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample(logits, temperature, keys)
    for tensor, new in ((logits, some_logits(9, 9001, torch.bfloat16)), (temperature, 2 - temperature), (keys, -keys)):
        tensor.copy_(new)
    temperature[::2] = 0
    graph.replay()
    for a, b in zip(captured, ops.sample(logits, temperature, keys), strict=True):
        assert torch.equal(a, b)
