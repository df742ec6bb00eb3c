"""The specification itself, against attention in float64 that shares no code with it."""

import pytest
import torch
from scenes import FEATURES, Scene, make_scene, random_rows

from kernels import reference
from kernels.ragged import Ragged, Row


def check(scene: Scene, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(scene.attend(reference.attention).double(), scene.expected(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_on_a_mixed_step(name: str, paged: bool) -> None:
    for seed in range(3):
        check(make_scene(seed, random_rows(seed), block=3, paged=paged, **FEATURES[name]))


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
@pytest.mark.parametrize("block", [1, 3, 16, 256])
def test_every_block_size(block: int, paged: bool) -> None:
    for seed in range(3):
        check(make_scene(seed, random_rows(seed), block=block, paged=paged))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_result_alone(dtype: torch.dtype) -> None:
    check(make_scene(0, random_rows(0), dtype=dtype), tolerance=4 * torch.finfo(dtype).eps)


def test_rows_of_a_kind_are_computed_in_parts_when_there_is_much_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_LOGITS", 500)
    check(make_scene(0, [(1, length, 0) for length in (50, 3, 20, 70, 0)]))


def test_dead_positions_change_nothing() -> None:
    rows = random_rows(3)
    alive = make_scene(3, [(count, before, 0) for count, before, _ in rows], window=5)
    padded = make_scene(3, [(count, before, 500) for count, before, _ in rows], window=5)
    torch.testing.assert_close(alive.attend(reference.attention), padded.attend(reference.attention), rtol=0, atol=1e-6)


def test_dead_positions_are_read() -> None:
    """They cost what they are said to cost: the gather takes as many positions more."""
    ragged = Ragged.build([(1, 4, 5, 30, [0, 1])], 4, True, "cpu")
    slots, seen = reference._keys_of(ragged, torch.tensor([0]), 1, None)
    assert slots.shape == (1, 35)
    assert int(seen.sum()) == 5


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "contiguous"])
def test_dead_queries_see_all_keys_of_their_row_and_disturb_nobody(paged: bool) -> None:
    scene = make_scene(1, [(1, 9, 0), (5, 0, 0)], block=4, paged=paged)
    live = scene.attend(reference.attention)
    row = scene.rows[1]
    scene.rows.insert(1, Row(3, 10, 5, 7, row.table))  # three dead queries behind the prompt's five tokens
    scene.q = torch.cat([scene.q[:1], scene.q[-3:], scene.q[1:]])
    out = scene.attend(reference.attention)
    torch.testing.assert_close(torch.cat([out[:1], out[4:]]), live)
    scene.keys.insert(1, scene.keys[1])
    scene.values.insert(1, scene.values[1])
    torch.testing.assert_close(out.double(), scene.expected(), rtol=0, atol=2e-5)


def test_a_query_that_sees_no_key_gives_0() -> None:
    scene = make_scene(1, [(1, 5, 0)], window=3)
    scene.rows[0] = scene.rows[0]._replace(first=50)
    assert torch.equal(scene.attend(reference.attention), torch.zeros(1, 4, 16))


def test_blocks_before_the_window_are_not_read() -> None:
    scene = make_scene(2, [(2, 60, 9), (1, 30, 0)], block=4, window=6)
    expected = scene.expected()
    for row in scene.rows:
        for index in range((row.first - 6 + 1) // 4):
            scene.k_cache[row.table[index]] = scene.v_cache[row.table[index]] = float("nan")
    torch.testing.assert_close(scene.attend(reference.attention).double(), expected, rtol=0, atol=2e-5)


def test_any_strides() -> None:
    """A pool may keep layers, K and V, or heads in any order: only head_dim must be dense."""
    scene = make_scene(4, random_rows(4))
    expected = scene.attend(reference.attention)
    scene.k_cache = scene.k_cache.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    scene.v_cache = torch.cat([scene.v_cache, scene.v_cache], 3)[..., :16]
    assert torch.equal(scene.attend(reference.attention), expected)


def test_store_writes_to_its_slots_and_nowhere_else() -> None:
    k_cache, v_cache = torch.zeros(5, 3, 2, 4), torch.zeros(5, 3, 2, 6)
    k, v = torch.rand(4, 2, 4) + 1, torch.rand(4, 2, 6) + 1
    reference.store(k, v, k_cache, v_cache, torch.tensor([14, -1, 0, 7]))
    for new, cache in ((k, k_cache), (v, v_cache)):
        expected = torch.zeros_like(cache)
        expected[4, 2], expected[0, 0], expected[2, 1] = new[0], new[2], new[3]
        assert torch.equal(cache, expected)


def test_copy_blocks_copies_whole_blocks_in_every_layer() -> None:
    cache = torch.randn(3, 6, 4, 2, 8)
    before = cache.clone()
    reference.copy_blocks(cache, torch.tensor([[1, 2], [1, 5], [4, 0]]))
    assert torch.equal(cache, before[:, [4, 1, 1, 3, 4, 1]])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((0, 0, 1, 0, [0]), "num_queries = 0"),
        ((1, -1, 1, 0, [0]), "first = -1"),
        ((1, 0, 0, 0, [0]), "length = 0"),
        ((1, 0, 1, -2, [0]), "dead = -2"),
        ((1, 4, 5, 0, [0]), "1 blocks of 4 hold 4 tokens"),
        ((1, 4, 5, 0, [0, -1]), "block id below 0"),
    ],
)
def test_a_wrong_row_is_named(row: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: .*{words}"):
        Ragged.build([(1, 0, 1, 0, [2]), row], 4, True, "cpu")


def test_a_scattered_table_is_not_contiguous() -> None:
    with pytest.raises(ValueError, match="consecutive blocks"):
        Ragged.build([(1, 7, 8, 0, [2, 4])], 4, False, "cpu")
    assert Ragged.build([(1, 7, 8, 0, [2, 3])], 4, False, "cpu").num_blocks == 4


def test_a_table_that_points_outside_the_cache_is_refused() -> None:
    for paged, table in ((True, [9, 1]), (False, range(8, 10))):
        ragged = Ragged.build([(1, 7, 8, 0, table)], 4, paged, "cpu")
        cache = torch.zeros(9, 4, 2, 8)
        with pytest.raises(ValueError, match="points at block 9, the cache has 9"):
            reference.attention(torch.zeros(1, 2, 8), cache, cache, ragged, scale=1.0)


@pytest.mark.parametrize("pairs", [[[0, 1], [1, 2]], [[0, 2], [1, 2]], [[0, 6]], [[-1, 0]]])
def test_dependent_or_foreign_copies_are_refused(pairs: list) -> None:
    with pytest.raises(ValueError, match="pairs"):
        reference.copy_blocks(torch.zeros(1, 6, 4, 2, 8), torch.tensor(pairs))


@pytest.mark.parametrize("name", ["q", "v_cache", "the ragged batch", "sinks"])
def test_attention_wants_everything_where_the_cache_is(name: str) -> None:
    where = dict.fromkeys(("q", "v_cache", "the ragged batch", "sinks"), "cpu") | {name: "meta"}
    ragged = Ragged.build([(1, 7, 8, 0, [2, 3])], 4, True, where["the ragged batch"])
    q, sinks = torch.zeros(1, 2, 8, device=where["q"]), torch.zeros(2, device=where["sinks"])
    k_cache, v_cache = torch.zeros(9, 4, 2, 8), torch.zeros(9, 4, 2, 8, device=where["v_cache"])
    with pytest.raises(ValueError, match=f"^{name} is on meta, k_cache on cpu"):
        reference.attention(q, k_cache, v_cache, ragged, scale=1.0, sinks=sinks)


@pytest.mark.parametrize("name", ["k", "v", "v_cache", "slots"])
def test_store_wants_everything_where_the_cache_is(name: str) -> None:
    new, cache = torch.zeros(1, 2, 8), torch.zeros(9, 4, 2, 8)
    tensors = {"k": new, "v": new, "k_cache": cache, "v_cache": cache, "slots": torch.zeros(1, dtype=torch.int64)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name} is on meta, k_cache on cpu"):
        reference.store(**tensors)


def test_a_tile_covers_every_query_once_and_the_longest_context_comes_first() -> None:
    counts = [1, 17, 200, 1, 16, 2, 64, 65]
    rows = [(count, index, count + index, 0, range(300)) for index, count in enumerate(counts)]
    ragged = Ragged.build(rows, 1, True, "cpu")
    covered = set()
    for tokens, places in ragged.tiles:
        contexts = [min(before + tokens, counts[row]) + row for row, before in places.tolist()]
        assert contexts == sorted(contexts, reverse=True)
        covered |= {
            (row, before + i) for row, before in places.tolist() for i in range(tokens) if before + i < counts[row]
        }
    assert [tokens for tokens, _ in ragged.tiles] == [1, 16, 128]
    assert covered == {(row, i) for row, count in enumerate(counts) for i in range(count)}
