"""Prompts that begin alike: blocks with ids, conversations, and what a prefix cache finds of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lab.core import InputError, common_prefix
from lab.run import Run, carry_out
from lab.workloads import alike, digest, has_times, workload
from lab.workloads.content import dress
from lab.workloads.pieces import APART, OWN, SHARED, Piece, Pieces

HEADER = "arrival_s,prompt_tokens,output_tokens,hash_ids_4,output_hash_ids_4\n"
CHAT = "conversations:turns=4,system=20,users=3"


def write(tmp_path: Path, *rows: str, header: str = HEADER) -> str:
    path = tmp_path / "trace.csv"
    path.write_text(header + "".join(f"{row}\n" for row in rows))
    return str(path)


def prompts(spec: str, prefix: int = 0, vocabulary: int | None = None, **asked: Any) -> list[list[int]]:
    """As a run asks for them."""
    requests = dress(workload(spec, **{"arrivals": "all", **asked}), prefix=prefix, vocabulary=vocabulary)
    return [list(r.prompt) for r in requests]


def shared(a: Seq[int], b: Seq[int]) -> int:
    return common_prefix([list(a), list(b)])


# ---- pieces


@pytest.mark.parametrize("vocabulary", [None, 50])
def test_pieces_are_a_sequence(vocabulary: int | None) -> None:
    pieces = Pieces((Piece(SHARED, 5), Piece(7, 0), Piece(SHARED + 123, 3), Piece(OWN, 4)), 9).within(2, vocabulary)
    every = list(pieces)
    assert len(pieces) == len(every) == 2 + 5 + 3 + 4
    assert every[:2] == [0, 1]
    assert [pieces[i] for i in range(-14, 14)] == [every[i] for i in range(-14, 14)]
    bounds = [None, 0, 1, 2, 6, 7, 9, 13, 14, 99, -1, -5]
    for low, high, step in itertools.product(bounds, bounds, (None, 1, 2, -1)):
        assert pieces[low:high:step] == every[low:high:step]
    with pytest.raises(IndexError):
        pieces[14]
    assert pieces == Pieces(pieces.pieces, 9, 2, vocabulary)
    assert len({pieces, pieces.of(9), pieces.of(8), pieces.within(3, vocabulary), Pieces(pieces.pieces[:2])}) == 4


@pytest.mark.parametrize("vocabulary", [None, 7, 50_000])
def test_texts_differ_and_begin_alike_only_with_themselves(vocabulary: int | None) -> None:
    """Among them keys that are alike in all but one digit of the vocabulary."""
    draw = Random(0)
    keys = [*range(40), *(7**i for i in range(12)), *(SHARED + int(draw.random() * 10**12) for _ in range(200)), 10**19]
    texts = {key: tuple(Pieces((Piece(key, 24),), prefix=3, vocabulary=vocabulary)) for key in set(keys)}
    assert len(set(texts.values())) == len(texts)
    assert all(text[:3] == (0, 1, 2) and min(text[3:]) >= 3 for text in texts.values())
    assert vocabulary is None or max(max(text) for text in texts.values()) < vocabulary
    for key, text in texts.items():
        assert tuple(Pieces((Piece(key, 9),), prefix=3, vocabulary=vocabulary)) == text[:12]


def test_a_vocabulary_must_hold_more_than_the_prefix() -> None:
    with pytest.raises(InputError, match=r"prefix of 9 tokens .* the vocabulary has only 10"):
        Pieces((Piece(1, 3),)).within(9, 10)


# ---- ids of blocks


@pytest.mark.parametrize(("prefix", "vocabulary"), [(0, None), (6, None), (0, 1000), (6, 1000)])
def test_equal_ids_are_equal_tokens(tmp_path: Path, prefix: int, vocabulary: int | None) -> None:
    path = write(
        tmp_path,
        "0,9,3,1 2,7",  # two full blocks and one token of its own
        "0,13,3,1 2 3,",  # goes on
        "0,9,3,1 4,",  # parts after a block
        "0,3,3,,",  # none is full
        "0,3,3,,",
        "0,11,3,1 2 3,",  # a last id for what is no full block
    )
    a, b, c, d, e, f = (p[prefix:] for p in prompts(path, prefix, vocabulary))
    assert list(map(len, (a, b, c, d, e, f))) == [9, 13, 9, 3, 3, 11]
    assert (shared(a, b), shared(a, c), shared(b, c), shared(b, f), shared(a, f)) == (8, 4, 4, 11, 8)
    assert shared(a, d) == shared(d, e) == shared(c, e) == 0
    assert vocabulary is None or all(prefix <= token < vocabulary for p in (a, b, c, d, e, f) for token in p)
    assert {tuple(p[:prefix]) for p in prompts(path, prefix, vocabulary)} == {tuple(range(prefix))}


def test_ids_and_lengths_do_not_meet(tmp_path: Path) -> None:
    """Token ids of prompts of which only the length is known lie elsewhere."""
    longest = (10_000_001 + 1) * APART
    [prompt] = prompts(write(tmp_path, "0,8,3,0 1,"))
    assert min(prompt) > longest
    [own] = prompts(write(tmp_path, "0,3,3,,"))
    assert own == prompts("uniform:prompt=3,output=3", count=1)[0]


def test_parquet_may_hold_ids_as_text_or_as_lists(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    expected = digest(workload(write(tmp_path, "0,9,3,1 2,", "0,3,3,,"), arrivals="all"))
    for ids in (["1 2", None], [[1, 2], []]):
        table = {"prompt_tokens": [9, 3], "output_tokens": [3, 3], "hash_ids_4": ids}
        parquet.write_table(pyarrow.table(table), tmp_path / "trace.parquet")
        assert digest(workload(str(tmp_path / "trace.parquet"), arrivals="all")) == expected


def test_digest_depends_on_the_ids(tmp_path: Path) -> None:
    rows = ("0,9,3,1 2,", "0,9,3,1 3,", "0,8,3,1 2,", "0,9,4,1 2,")
    assert len({digest(workload(write(tmp_path, row), arrivals="all")) for row in rows}) == 4
    requests = workload(write(tmp_path, "0,9,3,1 2,"), arrivals="all")
    dressed = [dress(requests), dress(requests, prefix=4), dress(requests, vocabulary=1000)]
    assert len({digest(r) for r in dressed}) == 3


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ("0,9,3,1,", ("line 3", "column hash_ids_4", "has 1 ids", "2 full blocks of 4 in 9 tokens")),
        ("0,9,3,,", ("line 3", "has 0 ids")),
        ("0,9,3,1 2 3 4,", ("line 3", "has 4 ids")),
        ("0,8,3,1 2 3,", ("line 3", "has 3 ids")),
        ("0,9,3,1 x,", ("line 3", "'x'", "whole number")),
        ("0,9,3,1 -2,", ("line 3", "'-2'", "whole number")),
        ("0,9,3,1;2,", ("line 3", "'1;2'", "whole number")),
        (f"0,9,3,1 {10**19},", ("line 3", "whole number")),
    ],
)
def test_bad_ids(tmp_path: Path, row: str, fragments: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        workload(write(tmp_path, "0,3,3,,", row), arrivals="trace")
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        ("hash_ids_16,hash_ids_512", "hash_ids_16 and hash_ids_512: one size"),
        ("hash_ids_0", "'hash_ids_0' is unknown: did you mean hash_ids_16"),
        ("hash_id_16", "did you mean hash_ids_16"),
    ],
)
def test_bad_id_columns(tmp_path: Path, columns: str, fragment: str) -> None:
    header = f"prompt_tokens,output_tokens,{columns}\n"
    with pytest.raises(InputError, match=fragment):
        workload(write(tmp_path, "8,3,1,1", header=header), arrivals="all")


# ---- conversations


def turns(prefix: int = 0, vocabulary: int | None = None, spec: str = CHAT, **asked: Any) -> dict[int, list[Any]]:
    """The requests of each conversation, told apart by the first token after the system's."""
    system = int(spec.partition("system=")[2].partition(",")[0])
    found: dict[int, list[Any]] = {}
    for r in dress(workload(spec, **{"rate_per_s": 4.0, "count": 120, **asked}), prefix=prefix, vocabulary=vocabulary):
        found.setdefault(r.prompt[prefix + system], []).append(r)
    return found


@pytest.mark.parametrize(("prefix", "vocabulary"), [(0, None), (11, None), (0, 50_272), (11, 50_272)])
def test_a_turn_says_again_all_that_was_said(prefix: int, vocabulary: int | None) -> None:
    """Its prompt is the prompt of the turn before, room for that turn's answer, and at least a token more."""
    conversations = turns(prefix, vocabulary)
    assert len(conversations) > 20
    assert max(len(requests) for requests in conversations.values()) == 4
    for requests in conversations.values():
        for before, after in itertools.pairwise(requests):
            assert shared(before.prompt, after.prompt) == len(before.prompt)
            assert len(after.prompt) > len(before.prompt) + before.output
            assert before.arrival_s <= after.arrival_s
    firsts = [requests[0].prompt for requests in conversations.values()]
    assert all(shared(a, b) == prefix + 20 for a, b in itertools.combinations(firsts, 2))
    assert vocabulary is None or max(max(p) for p in firsts) < vocabulary


def test_conversations_end_with_their_turns_or_below_the_limit() -> None:
    short = turns(limit=700)
    assert all(r.most < 700 and r.sampling.max_tokens == r.output for own in short.values() for r in own)
    assert {len(own) for own in short.values()} >= {1, 2}
    long = [len(own) for own in turns(limit=10**6).values()]
    assert sorted(long)[3:] == [4] * (len(long) - 3)  # but for the three that were going on at the end
    assert set(map(len, turns(spec="conversations:turns=1,system=5").values())) == {1}


def test_users_talk_in_turns_of_their_own() -> None:
    """As many conversations go on at once as there are users, each as often as the others."""
    [alone] = [list(own) for own in turns(spec="conversations:turns=500,users=1,system=5", limit=10**6).values()]
    assert [r.id for r in alone] == list(range(120))
    several = turns(spec="conversations:turns=500,users=4,system=5", limit=10**6, count=400)
    assert len(several) == 4
    assert all(70 < len(own) < 130 for own in several.values())


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("conversations:turns=0", "turns=0: must be a whole number, at least 1"),
        ("conversations:users=0", "users=0"),
        ("conversations:system=-1", "system=-1"),
        ("conversations:system=1985", "system=1985: must leave 64 of the 2048 tokens"),
        ("conversations:sytem=3", "did you mean system"),
    ],
)
def test_bad_conversations(spec: str, fragment: str) -> None:
    with pytest.raises(InputError, match=fragment):
        workload(spec, count=10, arrivals="all")
    assert len(list(workload("conversations:system=1984", count=9, arrivals="all"))) == 9


# ---- what a cache finds


def hits(run: Run) -> dict[int, int]:
    events = carry_out(run, None).record().events
    admitted = events[events["kind"] == "admitted"]
    return dict(zip(admitted["request"], admitted["tokens"], strict=True))


def test_a_cache_finds_the_blocks_whose_ids_came_before(tmp_path: Path) -> None:
    """One request at a time, room for all: whole blocks of an earlier prompt, less the last token of this one."""
    draw = Random(1)
    ids: list[list[int]] = [[]]
    number = itertools.count()
    rows, expected = [], {}
    for i in range(40):
        base = ids[int(draw.random() * len(ids))]
        mine = [*base[: int(draw.random() * (len(base) + 1))], *(next(number) for _ in range(int(draw.random() * 6)))]
        tokens = 16 * len(mine) + 1 + int(draw.random() * 15)
        expected[i] = 16 * max(shared(mine, earlier) for earlier in ids)
        ids.append(mine)
        rows.append(f"{100 * i},{tokens},3,{' '.join(map(str, mine))}")
    path = write(tmp_path, *rows, header="arrival_s,prompt_tokens,output_tokens,hash_ids_16\n")
    common: dict[str, Any] = {"workload": path, "arrivals": "trace", "rate": None, "duration_s": None, "drain": True}
    assert hits(Run(allocator="paged-prefix", **common)) == expected
    assert sum(expected.values()) > 1000
    assert set(hits(Run(allocator="paged", **common)).values()) == {0}


def test_a_cache_finds_a_conversation_up_to_its_last_question() -> None:
    """One turn at a time, room for all: an answer is computed once more by the next turn, then found."""
    spec = "conversations:turns=3,system=32,users=2"
    run = Run(allocator="paged-prefix", workload=spec, rate=0.01, duration_s=None, count=30, drain=True)
    found = hits(with_room(run))
    conversations = turns(spec=spec, rate_per_s=0.01, count=30)
    first = True
    for requests in sorted(conversations.values(), key=lambda own: own[0].id):
        for i, r in enumerate(requests):
            known = len(requests[i - 1].prompt) if i else 0 if first else 32
            first = False
            assert found[r.id] == known // 16 * 16


def with_room(run: Run) -> Run:
    """With room for everything."""
    return Run(**{**run.__dict__, "hardware": "h200", "model": "qwen3-0.6b"})


def test_which_workloads_begin_alike_and_have_times(tmp_path: Path) -> None:
    with_ids = write(tmp_path, ",9,3,1 2,")
    assert (alike(with_ids), has_times(with_ids)) == (True, False)
    without = write(tmp_path, "0.5,9,3", header="arrival_s,prompt_tokens,output_tokens\n")
    assert (alike(without), has_times(without)) == (False, True)
    assert (alike(CHAT), has_times(CHAT)) == (True, False)
    assert (alike("sharegpt"), has_times("sharegpt")) == (False, False)
    with pytest.raises(InputError, match="does not exist"):
        has_times(str(tmp_path / "gone.csv"))
