"""Reservation policies to the token, on the examples and the definitions of the PagedAttention paper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.allocators import ALLOCATORS, Allocator, account
from lab.allocators.reserve import RESERVE, power_of_two
from lab.core import Group, InputError, Limits, Request, SamplingParams

LIMIT = 2048


def asked(policy: str, prompt: int, output: int | None, max_tokens: int, length: int | None = None) -> int:
    request = Request(0, 0.0, range(prompt), output, SamplingParams(max_tokens=max_tokens))
    return RESERVE[policy](request, length or prompt, LIMIT)


@pytest.mark.parametrize(
    ("prompt", "output", "max_tokens", "expected"),
    [
        # the paper's mean request (figure 11), with a client that allows 512 tokens
        (161, 338, 512, {"need": 161, "max": 2048, "pow2": 673, "oracle": 499, "max-tokens": 673, "double": 322}),
        # request A of figure 3: a prompt of 7, 4 tokens to come, 2048 allowed in all
        (7, 4, 2041, {"need": 7, "max": 2048, "pow2": 11, "oracle": 11, "max-tokens": 2048, "double": 14}),
        # request B of figure 3: a prompt of 3, 512 allowed in all
        (3, 3, 509, {"need": 3, "max": 2048, "pow2": 7, "oracle": 6, "max-tokens": 512, "double": 6}),
        # one token more than a power of two costs twice as much
        (100, 256, 256, {"need": 100, "max": 2048, "pow2": 356, "oracle": 356, "max-tokens": 356, "double": 200}),
        (100, 257, 257, {"need": 100, "max": 2048, "pow2": 612, "oracle": 357, "max-tokens": 357, "double": 200}),
        # nobody asks for more than a sequence can have
        (1500, 500, 600, {"need": 1500, "max": 2048, "pow2": 2012, "oracle": 2000, "max-tokens": 2048, "double": 2048}),
        (1500, 513, 600, {"need": 1500, "max": 2048, "pow2": 2048, "oracle": 2013, "max-tokens": 2048, "double": 2048}),
        (1, 1, 1, {"need": 1, "max": 2048, "pow2": 2, "oracle": 2, "max-tokens": 2, "double": 2}),
    ],
)
def test_to_the_token(prompt: int, output: int, max_tokens: int, expected: dict[str, int]) -> None:
    assert {policy: asked(policy, prompt, output, max_tokens) for policy in RESERVE} == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(5, 10), (10, 10), (11, 20), (20, 20), (21, 40), (1281, 2048), (2048, 2048)]
)
def test_double_doubles_when_it_overflows(length: int, expected: int) -> None:
    assert asked("double", 5, None, 16, length) == expected


def test_need_follows_the_sequence_and_the_others_stay() -> None:
    for length in (161, 162, 300, 498):
        assert asked("need", 161, 338, 512, length) == length
        for policy, tokens in (("max", 2048), ("pow2", 673), ("oracle", 499), ("max-tokens", 673)):
            assert asked(policy, 161, 338, 512, length) == tokens


@pytest.mark.parametrize("policy", ["pow2", "oracle"])
def test_an_oracle_refuses_an_output_that_nobody_knows(policy: str) -> None:
    with pytest.raises(InputError, match=r"request 0 has no known output length.*max-tokens") as error:
        asked(policy, 161, None, 512)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["need", "max", "max-tokens", "double"])
def test_honest_policies_do_not_look_at_the_true_output(policy: str) -> None:
    assert {asked(policy, 161, output, 512) for output in (None, 1, 338, 512)} == {asked(policy, 161, 338, 512)}


@given(st.integers(1, 1 << 20))
def test_power_of_two(n: int) -> None:
    power = power_of_two(n)
    assert bin(power).count("1") == 1
    assert n <= power < 2 * n


def admitted(name: str, capacity: int, requests: list[Request], **limits: int) -> tuple[Allocator, list[Group]]:
    """As many of the requests as find room, in order, each with its prompt computed."""
    allocator = ALLOCATORS.get(name)(capacity, 16, Limits(**limits))
    groups = []
    for request in requests:
        group = Group(request)
        if allocator.admit(group) is None:
            break
        group.live[0].computed = len(request.prompt)
        groups.append(group)
    return allocator, groups


def test_figure_3() -> None:
    """Request A: a prompt of 7 tokens, 4 to come, of which the last is never stored, and 2048 slots."""
    request = Request(0, 0.0, range(7), 4, SamplingParams(max_tokens=2041))
    allocator, [group] = admitted("contiguous-max-tokens", 4096, [request])
    group.live[0].computed = 8  # the prompt and the current token
    usage = account(allocator, group.live)
    assert usage == (8, 0, 2, 2038, 0, 0, 2048)  # the paper: 7 + 1, 2 reserved, 2038 never used


@pytest.mark.parametrize(
    ("name", "output", "batch"),
    [
        ("contiguous-max", 338, 7),  # 2048 tokens are 128 blocks; the paper's figure 13 prints 7.00
        ("contiguous-oracle", 338, 30),  # 499 tokens are 32 blocks: 4 in each of seven twins, 2 in the leftover 64
        ("contiguous-oracle", 380, 15),  # 541 tokens are 34 blocks, rounded to 64: 2 in each of seven, 1 in the 64
        ("contiguous-oracle-firstfit", 380, 28),  # 983 / 34
        ("contiguous-oracle-bestfit", 380, 28),
        ("paged-oracle", 380, 28),
        ("contiguous-pow2", 338, 15),  # 161 + 512 tokens are 43 blocks, rounded to 64
        ("contiguous-pow2-firstfit", 338, 22),  # 983 / 43
        ("paged-max-tokens", 338, 30),
        ("contiguous-need-firstfit", 338, 89),  # 161 tokens are 11 blocks: 983 / 11
        ("contiguous-double-firstfit", 338, 46),  # 322 tokens are 21 blocks: 983 / 21
        ("paged", 338, 89),
    ],
)
def test_how_many_requests_the_paper_s_pool_takes(name: str, output: int, batch: int) -> None:
    """983 blocks of 16 tokens, and requests with a prompt of 161 tokens that have not generated anything yet."""
    requests = [Request(i, 0.0, range(161), output, SamplingParams(max_tokens=output)) for i in range(100)]
    _, groups = admitted(name, 983 * 16, requests)
    assert len(groups) == batch


def test_seven_of_orca_max_waste_as_the_paper_says() -> None:
    requests = [Request(i, 0.0, range(161), 338, SamplingParams(max_tokens=338)) for i in range(8)]
    allocator, groups = admitted("contiguous-max", 983 * 16, requests)
    usage = account(allocator, [group.live[0] for group in groups])
    assert usage == (7 * 161, 0, 7 * 337, 7 * (2048 - 498), 0, 0, 87 * 16)
    assert round(100 * usage.free / allocator.capacity, 2) == 8.85
