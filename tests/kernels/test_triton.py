"""The Triton kernels against the specification: in Triton's interpreter without a GPU, for real with one.

The interpreter takes some 3 ms for every step of every program's loop, so the shapes are small and odd.
"""

from types import ModuleType

import pytest
import torch
from scenes import FEATURES, Scene, make_scene, random_rows

from kernels import for_device, reference
from kernels.ragged import Ragged
from kernels.tuning import Machine, plan_splits

pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(
    DEVICE == "cpu", reason="needs a CUDA GPU: measures rounding in real matrix instructions"
)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return for_device("cuda")


def check(gpu: ModuleType, scene: Scene, splits: int | None = None) -> None:
    out, expected = scene.attend(gpu.attention, DEVICE, splits), scene.attend(reference.attention)
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


# Rows of one key, of fewer keys than splits, of whole steps of 64 keys, and of steps for all of seven splits.
DECODES = [(1, 0, 0), (1, 4, 0), (1, 63, 9), (1, 64, 0), (1, 447, 0), (1, 130, 140)]


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_split_decodes(gpu: ModuleType, splits: int, paged: bool) -> None:
    check(gpu, make_scene(splits, DECODES, heads=(3, 1), block=48, paged=paged), splits)


@pytest.mark.parametrize("name", FEATURES)
def test_split_decodes_with_every_feature(gpu: ModuleType, name: str) -> None:
    """Sinks, for one, are counted once; and a prompt in the same step is not split."""
    options = FEATURES[name] | ({"window": 170} if name == "everything" else {})
    check(gpu, make_scene(6, [(2, 0, 0), (1, 200, 0), (1, 3, 0), (1, 120, 70)], **options), splits=3)


@pytest.mark.parametrize("dead", [0, 5])
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_fill_up_a_batch(gpu: ModuleType, splits: int, paged: bool, dead: int) -> None:
    """They have length 0: they read nothing, from no address either, and give 0."""
    scene = make_scene(4, [(1, 20, dead), (1, 9, 0), (1, 300, 0), (1, 2, 0)], heads=(3, 1), paged=paged)
    out, expected = (
        scene.attend(*how, empty=(1, 3)) for how in ((gpu.attention, DEVICE, splits), (reference.attention,))
    )
    assert not out[[1, 3]].any()
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def test_a_split_decode_that_sees_no_key_gives_0(gpu: ModuleType) -> None:
    scene = make_scene(1, [(1, 200, 0), (1, 70, 0)], window=150)
    scene.rows[1] = scene.rows[1]._replace(first=500)
    check(gpu, scene, splits=2)


def test_the_number_of_splits_follows_from_the_shape() -> None:
    h100 = Machine(False, 227 * 1024, 132, "H100")
    for programs, longest, expected in (
        (64 * 40, 1024, (1, 1024)),  # programs enough, none longer than the rest
        (64 * 8, 1024, (1, 1024)),
        (64 * 8, 2048, (1, 1024)),
        (64 * 8, 2049, (3, 1024)),
        (256 * 8, 512, (1, 1024)),
        (256 * 8, 4096, (1, 1024)),  # others have work for as long
        (256 * 8, 16384, (4, 1024)),
        (64 * 8, 8192, (8, 1024)),  # the longest would take the longest: shares of 1024 keys, shorter rows whole
        (8 * 8, 8192, (8, 128)),  # 512 programs for 132 processors
        (8, 8192, (64, 128)),
        (8, 200, (2, 128)),
        (8, 1, (1, 128)),
    ):
        assert plan_splits(programs, longest, 1024, h100) == expected


@needs_gpu
def test_a_graph_splits_by_the_lengths_it_finds(gpu: ModuleType) -> None:
    """Captured with one set of lengths, replayed with others: the grid stays, shares follow the rows."""
    scene = make_scene(8, [(1, 2000, 0), (1, 900, 0), (1, 3, 0)], heads=(8, 2), dims=(64, 64), dtype=torch.float16)
    ragged = Ragged.build(scene.rows, scene.block, True, "cuda")
    q, k_cache, v_cache = scene.q.cuda(), scene.k_cache.cuda(), scene.v_cache.cuda()

    def attend() -> torch.Tensor:
        return gpu.attention(q, k_cache, v_cache, ragged, scale=0.125)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for lengths in ([2001, 901, 4], [130, 1, 2], [64, 500, 3]):
        scene.rows = [
            row._replace(first=length - 1, length=length) for row, length in zip(scene.rows, lengths, strict=True)
        ]
        ragged.lengths.copy_(torch.tensor(lengths))
        ragged.firsts.copy_(torch.tensor(lengths) - 1)
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
