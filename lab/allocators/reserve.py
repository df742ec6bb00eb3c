"""Reservation policies: how many tokens to ask for, for a sequence of which `length` tokens must be in memory now.

Each is one function `(request, length, limit) -> tokens`, and every placement can be combined with each. `pow2` and
`oracle` look at the output's true length, which no real system knows: like the paper's Orca (Pow2) and Orca (Oracle)
they bound what a contiguous allocator could reach (Kwon et al., section 6.1).
"""

from __future__ import annotations

from collections.abc import Callable

from lab.core import InputError, Request

Reserve = Callable[[Request, int, int], int]


def need(request: Request, length: int, limit: int) -> int:
    """What is there, and nothing ahead of time: paging's policy."""
    return length


def maximum(request: Request, length: int, limit: int) -> int:
    """The longest sequence the model allows: Orca (Max)."""
    return limit


def pow2(request: Request, length: int, limit: int) -> int:
    """The prompt and the true output length rounded up to a power of two: Orca (Pow2)."""
    return min(len(request.prompt) + power_of_two(true_output(request)), limit)


def oracle(request: Request, length: int, limit: int) -> int:
    """The prompt and the true output length: Orca (Oracle)."""
    return min(len(request.prompt) + true_output(request), limit)


def max_tokens(request: Request, length: int, limit: int) -> int:
    """The prompt and the longest output the client allows: all that an honest system can know."""
    return min(len(request.prompt) + request.sampling.max_tokens, limit)


def double(request: Request, length: int, limit: int) -> int:
    """Twice the prompt, and twice that whenever it overflows, as a growing array does: honest, no guess."""
    room = 2 * len(request.prompt)
    while room < length:
        room *= 2
    return max(length, min(room, limit))


RESERVE: dict[str, Reserve] = {
    "need": need,
    "max": maximum,
    "pow2": pow2,
    "oracle": oracle,
    "max-tokens": max_tokens,
    "double": double,
}


def policy(name: str, limit: int) -> Callable[[Request, int], int]:
    """The policy called `name` for sequences of at most `limit` tokens; never less than what is there."""
    reserve = RESERVE[name]
    if reserve is need:
        return lambda request, length: length
    return lambda request, length: max(reserve(request, length, limit), length)


def true_output(request: Request) -> int:
    if request.output is None:
        raise InputError(
            f"request {request.id} has no known output length: oracle and pow2 reservations need a workload that "
            "forces output lengths; take max, max-tokens, double or need"
        )
    return request.output


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()
