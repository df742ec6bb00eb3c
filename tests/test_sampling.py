"""Drawing tokens: against a second implementation in numpy, against the probabilities, and alone or in company."""

import struct
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lab.core import Group, Request, SamplingParams
from lab.executors.sampling import Draw, draw_of, exponential, noise_key, sample

VOCAB = 50


def reference(logits: np.ndarray, params: SamplingParams, key: int) -> int:
    """One row, in float64: the rules one after the other, as they are usually told."""
    if params.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = list(order[: params.top_k or len(order)])
    p = np.exp(scaled[kept] - scaled[kept].max())
    p /= p.sum()
    nucleus = next(i for i in range(1, len(p) + 1) if i == len(p) or p[:i].sum() >= params.top_p)
    candidates = kept[:nucleus]
    times = reference_noise(key, len(logits))[candidates] / np.exp(scaled[candidates] - scaled.max())
    return int(candidates[int(times.argmin())])


def reference_noise(key: int, size: int) -> np.ndarray:
    """splitmix64 in unsigned arithmetic, then -log of what is left of 1."""
    with np.errstate(over="ignore"):
        z = np.uint64(key % 2**64) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return -np.log1p(-((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB, 1000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 1.0]),
    logprobs=st.integers(0, 4),
)


@given(st.lists(st.tuples(PARAMS, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=12), st.integers(0, 1000))
def test_rows_of_any_settings_as_the_reference_one_by_one(
    settings: list[tuple[SamplingParams, int]], seed: int
) -> None:
    draws = [Draw(params, key, params.logprobs) for params, key in settings]
    logits = random_logits(len(draws), seed)
    drawn = sample(logits, draws)
    exact = logits.double().numpy()
    logprobs = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    for i, draw in enumerate(draws):
        token = int(drawn.tokens[i])
        assert token == reference(logits[i].numpy(), draw.params, draw.key)
        assert float(drawn.logprobs[i]) == pytest.approx(float(logprobs[i, token]), abs=1e-5)
        n = draw.params.logprobs
        best = np.argsort(-logprobs[i], kind="stable")[:n]
        assert drawn.top_tokens[i, :n].tolist() == best.tolist()
        assert drawn.top_logprobs[i, :n].tolist() == pytest.approx(logprobs[i, best].tolist(), abs=1e-5)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_noise_is_splitmix64(key: int) -> None:
    ours = exponential(torch.tensor([key]), 1000)[0].numpy()
    np.testing.assert_allclose(ours, reference_noise(key, 1000), rtol=1e-6)


def test_noise_depends_on_each_of_four_numbers() -> None:
    keys = {noise_key(*four) for four in np.ndindex(4, 5, 6, 7)}
    assert len(keys) == 4 * 5 * 6 * 7
    packed = struct.pack("<4q", 3, 1, 4, 1)
    assert noise_key(3, 1, 4, 1) == int.from_bytes(blake2b(packed, digest_size=8).digest(), "little", signed=True)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.8),
    ],
)
def test_tokens_come_as_often_as_they_should(params: SamplingParams) -> None:
    """Chi-square over 20,000 draws from one distribution; below its 99.9 % quantile, of a normal approximation."""
    draws = 20_000
    logits = random_logits(1) / 2
    got = sample(logits.expand(draws, -1), [Draw(params, noise_key(0, i, 0, 9), 0) for i in range(draws)]).tokens
    scaled = logits[0].double() / params.temperature
    order = scaled.argsort(descending=True)
    p = scaled.softmax(0)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    cumulated = p[order].cumsum(0) - p[order]
    p[order[cumulated >= params.top_p]] = 0
    expected = draws * p / p.sum()
    counts = torch.bincount(got, minlength=VOCAB)
    assert not counts[expected == 0].any()
    common = expected >= 5
    freedom = int(common.sum()) - 1
    assert freedom >= 4
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5


def test_neighbours_in_the_noise_are_independent() -> None:
    """Of positions, requests and vocabulary entries next to each other."""
    keys = torch.tensor([noise_key(0, i // 100, 0, i % 100) for i in range(2000)])
    noise = torch.exp(-exponential(keys, 50)) - 0.5  # uniform
    for a, b in ((noise[1:], noise[:-1]), (noise[100:], noise[:-100]), (noise[:, 1:], noise[:, :-1])):
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_company_changes_nothing() -> None:
    logits = random_logits(20)
    kinds = [SamplingParams(temperature=1), SamplingParams(), SamplingParams(temperature=2, top_k=9, logprobs=3)]
    draws = [Draw(kinds[i % 3], noise_key(0, i, 0, 5), kinds[i % 3].logprobs) for i in range(20)]
    together = sample(logits, draws)
    for i in range(20):
        alone = sample(logits[i : i + 1], draws[i : i + 1])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_a_last_bit_changes_hardly_any_token() -> None:
    """Logits of batches of other sizes differ by about 1e-6: none of 600 draws from a flat distribution may follow."""
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(2))
    other = logits + 2e-6 * torch.randn(1, 20_000, generator=torch.Generator().manual_seed(3))
    different = 0
    for start in range(0, 600, 100):
        draws = [Draw(SamplingParams(temperature=1), noise_key(0, i, 0, 1), 0) for i in range(start, start + 100)]
        pairs = (sample(x.expand(100, -1), draws).tokens for x in (logits, other))
        different += int(torch.ne(*pairs).sum())
    assert different == 0


def test_each_output_and_position_has_its_own_noise() -> None:
    group = Group(Request(7, 0.0, [1, 2, 3], sampling=SamplingParams(n=3, temperature=1.0, seed=5)))
    assert [draw_of(s).key for s in group.live] == [noise_key(5, 7, i, 3) for i in range(3)]
    group.live[1].tokens.append(9)
    assert draw_of(group.live[1]).key == noise_key(5, 7, 1, 4)


def test_no_rows() -> None:
    drawn = sample(torch.empty(0, VOCAB), [])
    assert drawn.tokens.shape == (0,)
