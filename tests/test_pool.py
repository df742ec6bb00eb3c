"""How large a pool is: tokens, bytes or a share, rounded down to whole blocks, and one line for what makes no sense."""

from __future__ import annotations

import pytest

from lab.core import InputError
from lab.pool import pool_size

PER_TOKEN = 1000  # bytes


@pytest.mark.parametrize(
    ("size", "tokens", "left_over"),
    [
        ("160", 160, 0),
        (160, 160, 0),
        ("167", 160, 7 * PER_TOKEN),
        ("1_600", 1600, 0),
        ("16kB", 16, 0),
        ("16.5 kb", 16, 500),
        ("1MiB", 1040, 8576),
        ("1GB", 1_000_000, 0),
        ("25%", 16, 9000),  # of 100,000 bytes
        ("0.25", 16, 9000),
        ("16000b", 16, 0),
    ],
)
def test_sizes(size: str | int, tokens: int, left_over: int) -> None:
    assert pool_size(size, PER_TOKEN, 16, 100_000) == (tokens, left_over)


@pytest.mark.parametrize(
    ("size", "block", "said"),
    [
        ("15", 16, "holds no block of 16 tokens"),
        ("1kB", 16, "holds no block of 16 tokens"),
        ("0", 16, "above zero"),
        ("-5", 16, "above zero"),
        ("-1GiB", 16, "above zero"),
        ("100%", 16, "below 1"),
        ("1.5", 16, "below 1"),
        ("nan", 16, "give tokens"),
        ("12 parsecs", 16, "give tokens"),
        ("", 16, "give tokens"),
        ("160", 0, "at least 1 token"),
        ("160", -16, "at least 1 token"),
    ],
)
def test_nonsense(size: str, block: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        pool_size(size, PER_TOKEN, block, 100_000)
    assert "\n" not in str(error.value)


def test_a_share_needs_to_know_of_what() -> None:
    with pytest.raises(InputError, match="not known on this device"):
        pool_size("90%", PER_TOKEN, 16, None)
