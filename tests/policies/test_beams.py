"""The rule of beam search, step by step, and which beam takes over which."""

from __future__ import annotations

import pytest

from lab.allocators import ALLOCATORS
from lab.beams import Beams
from lab.core import InputError, Plan, Request, Sampled, SamplingParams
from lab.schedulers import SCHEDULERS

NEVER: frozenset[int] = frozenset()


def beams(width: int = 2, n: int = 1, prompt: tuple[int, ...] = (1, 2)) -> Beams:
    return Beams(Request(0, 0.0, prompt, None, SamplingParams(max_tokens=9, n=n, beams=width)))


def step(group: Beams, *tops: list[tuple[int, float]], ends: frozenset[int] = NEVER, most: int = 9) -> None:
    """Give each live beam its continuations, in order of ranks."""
    drawn = {s: Sampled(*top[0], tuple(top)) for s, top in zip(group.live, tops, strict=True)}
    group.advance(drawn, ends, most)


def texts(group: Beams) -> list[list[int]]:
    return [s.tokens[2:] for s in group.live]


def test_at_first_all_beams_come_from_one_and_nothing_is_forked() -> None:
    group = beams()
    order = list(group.live)
    step(group, [(7, -1.0), (8, -2.0), (9, -3.0)], [(7, -1.0), (8, -2.0), (9, -3.0)])
    assert texts(group) == [[7], [8]]
    assert group.live == order
    assert group.scores == [-1.0, -2.0]
    assert group.forks == []


def test_a_beam_that_goes_on_twice_takes_the_place_of_one_that_does_not() -> None:
    group = beams()
    first, second = group.live
    step(group, [(7, -1.0), (8, -2.0)], [(7, -1.0), (8, -2.0)])
    step(group, [(3, -0.1), (4, -0.2)], [(5, -3.0), (6, -4.0)])
    assert texts(group) == [[7, 3], [7, 4]]
    assert group.forks == [(first, second)]
    group.forks.clear()
    step(group, [(3, -5.0), (4, -6.0)], [(5, -0.1), (6, -0.2)])
    assert texts(group) == [[7, 4, 5], [7, 4, 6]]
    assert group.live == [second, first], "the best is the beam that went on, the other one was dropped for its twin"
    assert group.forks == [(second, first)]


def test_equal_scores_keep_the_order_of_ranks() -> None:
    group = beams()
    step(group, [(7, -1.0), (8, -1.0)], [(7, -1.0), (8, -1.0)])
    step(group, [(3, -1.0), (4, -2.0)], [(5, -1.0), (6, -2.0)])
    assert texts(group) == [[7, 3], [8, 5]]


def test_only_the_best_k_may_end_and_the_score_is_a_mean() -> None:
    group = beams()
    step(group, [(7, -1.0), (8, -2.0)], [(7, -1.0), (8, -2.0)])
    ends = frozenset({0})
    step(group, [(0, -0.5), (3, -1.0), (4, -9.0)], [(5, -0.1), (0, -7.0), (6, -8.0)], ends=ends)
    assert [(h.tokens[2:], h.score, h.reason) for h in group.finished] == [([7, 0], -0.75, "stop")]
    assert texts(group) == [[7, 3], [8, 5]], "of those that do not end, -2.0 and -2.1 are the best"
    assert not group.over


def test_it_is_over_once_nobody_can_be_better_than_the_worst_that_finished() -> None:
    ends = frozenset({0})
    group = beams(n=2)
    step(group, [(7, -1.0), (8, -2.0)], [(7, -1.0), (8, -2.0)])
    step(group, [(0, -0.1), (3, -8.0), (4, -9.0)], [(0, -0.2), (5, -9.0), (6, -9.0)], ends=ends)
    assert group.over
    assert group.outputs() == [[1, 2, 7, 0], [1, 2, 8, 0]]
    assert group.forks == []
    longer = beams(n=2)
    step(longer, [(7, -1.0), (8, -2.0)], [(7, -1.0), (8, -2.0)])
    step(longer, [(0, -0.1), (3, -0.2), (4, -9.0)], [(0, -0.2), (5, -9.0), (6, -9.0)], ends=ends)
    assert not longer.over, "-1.2 over two tokens is better than -2.2 over two"


def test_at_the_greatest_length_all_end() -> None:
    group = beams(n=2)
    step(group, [(7, -1.0), (8, -2.0)], [(7, -1.0), (8, -2.0)], most=2)
    held = [list(s.tokens) for s in group.live]
    step(group, [(3, -0.1), (4, -0.2)], [(5, -3.0), (6, -4.0)], most=2)
    assert group.over
    assert [h.reason for h in group.finished] == ["length", "length"]
    assert group.outputs() == [[1, 2, 7, 3], [1, 2, 7, 4]]
    assert [s.tokens[:-1] for s in group.live] == held, "tokens stay those that memory was computed for"


def test_what_a_preemption_loses_counts_shared_tokens_once() -> None:
    group = beams(width=3)
    a, b, c = group.live
    a.tokens, b.tokens, c.tokens = [1, 2, 3, 4, 5], [1, 2, 3, 9, 9], [1, 2, 8, 8, 8]
    a.computed = b.computed = c.computed = 4
    assert group.distinct == 4 + 1 + 2
    c.computed = 0
    assert group.distinct == 4 + 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"beams": -1}, "beams=-1: must be 0"),
        ({"beams": 2, "n": 3}, "n=3: must be at most the 2 beams"),
        ({"beams": 2, "temperature": 0.5}, "temperature=0.5: must be 0 with beams"),
    ],
)
def test_settings_that_make_no_search(settings: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_a_fork_that_is_due_survives_a_swap() -> None:
    """Otherwise the dropped beam would be computed anew: the right text, at the price of its whole length."""
    scheduler = SCHEDULERS.get("continuous")(ALLOCATORS.get("paged")(64, 4), preemption="swap", watermark=0.0)
    group = beams(prompt=tuple(range(9)))
    scheduler.submit(group)
    for _ in range(2):  # all but the last token of the prompt, then that one, by both
        for s, tokens in scheduler.schedule(0.0, False).work.items():
            s.computed += tokens
    first, second = group.live
    step(group, [(7, -1.0), (8, -2.0)], [(7, -1.0), (8, -2.0)])
    for s, tokens in scheduler.schedule(0.0, False).work.items():
        s.computed += tokens
    step(group, [(3, -0.1), (4, -0.2)], [(5, -3.0), (6, -4.0)])
    second.computed = 0
    assert group.forks == [(first, second)]
    scheduler.preempt(group, Plan())
    assert group in scheduler.host.saved
    plan = scheduler.schedule(0.0, False)
    assert plan.forked == [second]
    assert plan.work == {first: 1, second: 1}
