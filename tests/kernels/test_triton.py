"""The Triton kernels against the specification: in Triton's interpreter without a GPU, for real with one.

The interpreter takes some 3 ms for every step of every program's loop, so the shapes are small and odd.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import FEATURES, Scene, make_scene, random_rows

from kernels import for_device, reference
from kernels.ragged import Ragged

pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64")
from kernels import shares

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(
    DEVICE == "cpu", reason="needs a CUDA GPU: measures rounding in real matrix instructions"
)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return for_device("cuda")


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """As on a GPU that runs so many shares of decodes at a time for one KV head, and that cuts shares of one step."""

    def change(at_a_time: int) -> None:
        def plan(ragged: Ragged, places: Any, _: int, turns: int, __: int, step: int, window: int | None) -> Any:
            return shares.plan(ragged, places, at_a_time, turns, 1, step, window)

        monkeypatch.setattr("kernels.attention.plan", plan)

    return change


def check(gpu: ModuleType, scene: Scene) -> None:
    out, expected = scene.attend(gpu.attention, DEVICE), scene.attend(reference.attention)
    eps = max(torch.finfo(scene.q.dtype).eps, 1e-5)  # weights are rounded to the type of V, and so is the result
    torch.testing.assert_close(out.float(), expected.float(), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_on_a_mixed_step(gpu: ModuleType, name: str, paged: bool) -> None:
    check(gpu, make_scene(5, random_rows(5), block=3, paged=paged, **FEATURES[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 3, 16, 256])
def test_every_block_size_and_type(gpu: ModuleType, block: int, dtype: torch.dtype) -> None:
    check(gpu, make_scene(block, random_rows(block), block=block, dtype=dtype))


@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 80), (96, 64), (192, 128), (256, 256)])
def test_every_head_size(gpu: ModuleType, dims: tuple[int, int]) -> None:
    dtype = torch.bfloat16 if dims[0] % 64 == 0 else torch.float32
    check(gpu, make_scene(1, [(1, 70, 3), (18, 2, 0)], heads=(2, 1), dims=dims, dtype=dtype))


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("block", [1, 3, 16, 48, 64, 128, 256])
def test_a_prompt_longer_than_a_tile(gpu: ModuleType, block: int, paged: bool) -> None:
    check(gpu, make_scene(2, [(131, 3, 0), (70, 0, 40)], heads=(3, 1), block=block, paged=paged, window=90))


@pytest.mark.parametrize("window", [None, 1, 64, 65, 100])
@pytest.mark.parametrize(
    "rows",
    [[(17, 46, 0)], [(64, 64, 0), (65, 63, 0)], [(128, 1, 1), (20, 130, 70)], [(2, 100, 0), (20, 62, 0)]],
    ids=str,
)
def test_steps_without_masks_end_where_masks_begin(gpu: ModuleType, rows: list, window: int | None) -> None:
    """Contexts that end at, before and behind a step of 64 keys, with and without keys that left the window."""
    check(gpu, make_scene(3, rows, heads=(2, 1), window=window))


# Rows of one key, of fewer keys than a step has, of whole steps of 64 keys, and of seven.
DECODES = [(1, 0, 0), (1, 4, 0), (1, 63, 9), (1, 64, 0), (1, 447, 0), (1, 130, 140)]


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("at_a_time", [1, 2, 6, 9, 70])
def test_decodes_in_shares(gpu: ModuleType, cut: Callable, at_a_time: int, paged: bool) -> None:
    cut(at_a_time)
    check(gpu, make_scene(at_a_time, DECODES, heads=(3, 1), block=48, paged=paged))


@pytest.mark.parametrize("name", FEATURES)
def test_decodes_in_shares_with_every_feature(gpu: ModuleType, cut: Callable, name: str) -> None:
    """Sinks, for one, are counted once; and a prompt in the same step is not cut."""
    cut(9)
    options = FEATURES[name] | ({"window": 170} if name == "everything" else {})
    check(gpu, make_scene(6, [(2, 0, 0), (1, 200, 0), (1, 3, 0), (1, 120, 70)], **options))


def test_more_shares_than_are_combined_at_once(gpu: ModuleType, cut: Callable) -> None:
    cut(99)
    check(gpu, make_scene(2, [(1, 1100, 0)], heads=(8, 1), dims=(64, 64), block=64))


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("at_a_time", [1, 9])
def test_rows_that_fill_up_a_batch(gpu: ModuleType, cut: Callable, at_a_time: int, paged: bool, dead: int) -> None:
    """They have length 0: they read nothing, from no address either, and give 0."""
    cut(at_a_time)
    scene = make_scene(4, [(1, 20, dead), (1, 9, 0), (1, 300, 0), (1, 2, 0)], heads=(3, 1), paged=paged)
    out, expected = (scene.attend(*how, empty=(1, 3)) for how in ((gpu.attention, DEVICE), (reference.attention,)))
    assert not out[[1, 3]].any()
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_a_decode_in_shares_that_sees_no_key_gives_0(gpu: ModuleType, cut: Callable) -> None:
    cut(4)
    scene = make_scene(1, [(1, 200, 0), (1, 70, 0)], window=150)
    scene.rows[1] = scene.rows[1]._replace(first=500)
    check(gpu, scene)


ROWS = st.lists(st.integers(0, 5000), min_size=1, max_size=40).filter(any)


def planned(lengths: list[int], at_a_time: int, turns: int, fewest: int, step: int, longest: int) -> list[list[int]]:
    """(row, split, splits, keys) of every item, those without work left out."""
    rows = [(1, max(length, 1) - 1, max(length, 1), 0, [0] * max(length, 1)) for length in lengths]
    ragged = replace(Ragged.build(rows, 1, True, DEVICE), longest=max(longest, *lengths))
    for column in (ragged.firsts, ragged.lengths):
        column[[i for i, length in enumerate(lengths) if not length]] = 0  # these fill up a batch
    items = shares.plan(ragged, ragged.tiles[0].places, at_a_time, turns, fewest, step, None).tolist()
    work = [item for item in items if item[0] >= 0]
    assert all(item[0] == -1 for item in items[len(work) :])  # programs without any come last
    for row, start, first, low, high, at, stop, _, _ in work:
        assert (start, first, low, high) == (row, max(lengths[row] - 1, 0), 0, lengths[row])
        assert 0 <= at <= stop <= high
    return [[row, split, splits, stop - at] for row, _, _, _, _, at, stop, split, splits in work]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 70), st.integers(1, 3), st.sampled_from([16, 128]), st.sampled_from([16, 64]), st.data())
def test_shares_cover_every_row_once(
    lengths: list[int], at_a_time: int, turns: int, fewest: int, step: int, data: st.DataObject
) -> None:
    longest = data.draw(st.integers(max(lengths), 4 * max(lengths)))  # a captured step knows no more than a bound
    work = planned(lengths, at_a_time, turns, fewest, step, longest)
    order = list(dict.fromkeys(item[0] for item in work))
    assert sorted(order) == list(range(len(lengths)))
    for row, length in enumerate(lengths):
        own = [item for item in work if item[0] == row]
        assert [item[1:3] for item in own] == [[split, len(own)] for split in range(len(own))]
        shares = [item[3] for item in own]
        assert sum(shares) == length
        assert len(set(shares[:-1])) <= 1
        assert shares[-1] <= shares[0]
        assert all(share % step == 0 and 2 * share >= fewest for share in shares[:-1])


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 70))
def test_nobody_works_much_longer_than_the_others(lengths: list[int], at_a_time: int) -> None:
    """All are done within a share of the mean, since each free place takes the next one, and no share is long."""
    step, fewest = 16, 128
    work = planned(lengths, at_a_time, 2, fewest, step, max(lengths))
    ends = [0] * at_a_time
    for *_, keys in work:
        ends[ends.index(min(ends))] += keys
    each, largest = sum(lengths) / at_a_time, max(item[3] for item in work)
    assert largest <= max(1.25 * each, fewest) + 2 * step
    assert max(ends) <= (each + largest if len(work) > at_a_time else largest)


@pytest.mark.parametrize(
    ("lengths", "at_a_time", "rows_cut", "items"),
    [
        ([1024] * 64, 66, 0, 64),  # all at once, and equal: nothing to gain
        ([512] * 256, 66, 0, 256),  # others have work for as long
        ([8192] * 8, 66, 8, 64),  # as many as run at a time
        ([8192, *[1024] * 63], 66, 64, 15 + 2 * 63),  # two turns of 551 keys each, in steps of 32
        ([500], 66, 1, 4),  # shares of 128 keys
    ],
)
def test_rows_are_cut_where_it_pays(lengths: list[int], at_a_time: int, rows_cut: int, items: int) -> None:
    work = planned(lengths, at_a_time, 2, 128, 32, max(lengths))
    assert len({item[0] for item in work if item[2] > 1}) == rows_cut
    assert len(work) == items


@needs_gpu
def test_a_graph_splits_by_the_lengths_it_finds(gpu: ModuleType) -> None:
    """Captured with one set of lengths, replayed with others: the grid stays, shares follow the rows."""
    scene = make_scene(8, [(1, 2000, 0), (1, 900, 0), (1, 3, 0)], heads=(8, 2), dims=(64, 64), dtype=torch.float16)
    found = Ragged.build(scene.rows, scene.block, True, "cuda")
    q, k_cache, v_cache = scene.q.cuda(), scene.k_cache.cuda(), scene.v_cache.cuda()

    def attend() -> torch.Tensor:
        return gpu.attention(q, k_cache, v_cache, replace(found), scale=0.125)  # without the shares of another's

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for lengths in ([2001, 901, 4], [130, 1, 2], [64, 500, 3]):
        scene.rows = [
            row._replace(first=length - 1, length=length) for row, length in zip(scene.rows, lengths, strict=True)
        ]
        found.lengths.copy_(torch.tensor(lengths))
        found.firsts.copy_(torch.tensor(lengths) - 1)
        graph.replay()
        torch.testing.assert_close(out.cpu(), scene.attend(reference.attention), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
def test_first_last_and_boundary_tokens_count(gpu: ModuleType, paged: bool) -> None:
    """Each in turn takes nearly all the weight: a key off by one shows in full."""
    length = 131  # two steps of 64 keys and three more, in blocks of 16
    for dominant in (0, 15, 16, 63, 64, 127, 128, 129, 130):
        scene = make_scene(dominant, [(1, length - 1, 2)], heads=(1, 1), paged=paged)
        table = scene.rows[0].table
        scene.k_cache[table[dominant // 16], dominant % 16] = 30 * scene.q[0] / scene.q[0].norm()
        out = scene.attend(gpu.attention, DEVICE)
        torch.testing.assert_close(out[0, 0], scene.values[0][dominant, 0], rtol=0, atol=1e-3)


def test_no_token_after_the_query_counts(gpu: ModuleType) -> None:
    """A key that would take all the weight lies right behind each query of a chunk in turn."""
    for query in (0, 3, 15):
        scene = make_scene(query, [(17, 60, 0)], heads=(1, 1))
        plain = scene.attend(gpu.attention, DEVICE)
        position = 60 + query + 1
        scene.k_cache[scene.rows[0].table[position // 16], position % 16] = 1e3 * scene.q[query, 0]
        hidden = scene.attend(gpu.attention, DEVICE)
        assert torch.equal(hidden[: query + 1], plain[: query + 1])
        assert not torch.equal(hidden[query + 1 :], plain[query + 1 :])


def test_dead_positions_change_nothing(gpu: ModuleType) -> None:
    rows = random_rows(7)
    alive = make_scene(7, [(count, before, 0) for count, before, _ in rows])
    padded = make_scene(7, [(count, before, 150) for count, before, _ in rows])
    out = padded.attend(gpu.attention, DEVICE)
    torch.testing.assert_close(out, alive.attend(gpu.attention, DEVICE), rtol=0, atol=1e-6)


def test_dead_queries_and_blocks_before_the_window(gpu: ModuleType) -> None:
    scene = make_scene(2, [(2, 60, 9), (1, 30, 0), (1, 6, 70)], block=4, window=6)
    for row in scene.rows:
        for index in range((row.first - 6 + 1) // 4):
            scene.k_cache[row.table[index]] = scene.v_cache[row.table[index]] = float("nan")
    check(gpu, scene)
    scene.rows[2] = scene.rows[2]._replace(first=8)  # of length 7: sees what is left in the window
    check(gpu, scene)
    scene.rows[2] = scene.rows[2]._replace(first=50)  # sees nothing
    check(gpu, scene)


def test_any_strides(gpu: ModuleType) -> None:
    scene = make_scene(4, random_rows(4, longest=20))
    scene.k_cache = scene.k_cache.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    scene.v_cache = torch.cat([scene.v_cache, scene.v_cache], 3)[..., :16]
    scene.q = torch.cat([scene.q, scene.q], 1)[:, :4]
    check(gpu, scene)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store(gpu: ModuleType, dtype: torch.dtype) -> None:
    k, v = torch.randn(5, 3, 80).to(dtype), torch.randn(5, 3, 20).to(dtype)
    k_cache, v_cache = (torch.full((4, 7, 3, size), 9.0, dtype=dtype) for size in (80, 20))
    k_stored, v_stored = k_cache.clone().to(DEVICE), v_cache.clone().to(DEVICE)
    slots = torch.tensor([27, -1, 0, 7, 6])
    reference.store(k, v, k_cache, v_cache, slots)
    gpu.store(k.to(DEVICE), v.to(DEVICE), k_stored, v_stored, slots.to(DEVICE))
    assert torch.equal(k_stored.cpu(), k_cache)
    assert torch.equal(v_stored.cpu(), v_cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_blocks(gpu: ModuleType, dtype: torch.dtype) -> None:
    cache = torch.randn(3, 6, 5, 3, 80).to(dtype)
    copied = cache.clone().to(DEVICE)
    pairs = torch.tensor([[1, 2], [1, 5], [4, 0]])
    reference.copy_blocks(cache, pairs)
    gpu.copy_blocks(copied, pairs)
    assert torch.equal(copied.cpu(), cache)


def test_nothing_to_do(gpu: ModuleType) -> None:
    cache = torch.randn(1, 6, 4, 2, 8, device=DEVICE)
    before = cache.clone()
    gpu.copy_blocks(cache, torch.zeros(0, 2, dtype=torch.int64))
    none = torch.zeros(0, 2, 8, device=DEVICE)
    gpu.store(none, none, cache[0], cache[0], torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert torch.equal(cache, before)


def test_what_is_not_supported_is_named(gpu: ModuleType) -> None:
    def attend(q: torch.Tensor, cache: torch.Tensor, **options: object) -> None:
        gpu.attention(q, cache, cache, Ragged.build([(1, 3, 4, 0, [0])], 4, True, DEVICE), scale=1.0, **options)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)

    cache, q = zeros(2, 4, 2, 8), zeros(1, 4, 8)
    with pytest.raises(ValueError, match="a tile holds up to 256"):
        attend(zeros(1, 4, 320), zeros(2, 4, 2, 320))
    with pytest.raises(ValueError, match=r"k_cache is torch.float64"):
        attend(q.double(), cache.double())
    with pytest.raises(ValueError, match=r"q is torch.float16, its cache torch.float32"):
        attend(q.half(), cache)
    with pytest.raises(ValueError, match="3 query heads over 2 KV heads"):
        attend(zeros(1, 3, 8), cache)
    with pytest.raises(ValueError, match="q has 2 tokens, the ragged batch 1"):
        attend(zeros(2, 4, 8), cache)
    with pytest.raises(ValueError, match="blocks of 8, a ragged batch with blocks of 4"):
        attend(q, zeros(2, 8, 2, 8))
    with pytest.raises(ValueError, match="stride 2 along head_dim"):
        attend(q, zeros(2, 4, 2, 16)[..., ::2])
    with pytest.raises(ValueError, match="window = 0"):
        attend(q, cache, window=0)
    with pytest.raises(ValueError, match="softcap = -1"):
        attend(q, cache, softcap=-1.0)
    with pytest.raises(ValueError, match=r"sinks \[2\]"):
        attend(q, cache, sinks=zeros(2))


@needs_gpu
@pytest.mark.parametrize(("count", "before"), [(1, 1023), (700, 0), (100, 500)], ids=["decode", "prompt", "chunk"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_error_is_at_most_twice_that_of_torch(gpu: ModuleType, head_dim: int, count: int, before: int) -> None:
    scene = make_scene(1, [(count, before, 0)], heads=(8, 2), dims=(head_dim, head_dim), dtype=torch.bfloat16)
    seen = torch.ones(count, count + before, dtype=torch.bool).tril(before)
    q, k, v = (x.transpose(0, 1)[None].cuda() for x in (scene.q, scene.keys[0], scene.values[0]))  # [1, H, N, D]

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen.cuda(), enable_gqa=True)
        return out[0].transpose(0, 1).double().cpu()

    exact = sdpa(q.double(), k.double(), v.double())
    ours = (scene.attend(gpu.attention, "cuda").double() - exact).norm()
    assert ours <= 2 * (sdpa(q, k, v) - exact).norm()
