"""Prompts put together from pieces of which only the identity is known: this block of text is that block again.

Traces with ids of prompt blocks, and conversations, say which parts of prompts are alike and nothing of their words. A
piece stands for a text of its own, numbered by its key; its token ids follow from the key when somebody looks at them,
because requests that wait in a long trace should not each hold thousands of numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from lab.core import InputError

APART = 1 << 32  # between the token ids of two texts, where no model will look at them
OWN = -1  # the key of a piece that no other request has
SHARED = 1 << 24  # keys from here on are shared between requests; those below are requests' own, by their ids


class Piece(NamedTuple):
    """The first `tokens` tokens of the text `key`."""

    key: int
    tokens: int


class Pieces(Seq[int]):
    """Token ids of pieces, one after the other; equal keys give equal ids, different keys different ones.

    Without a vocabulary, token j of text k is k * APART + j beyond the prefix. Within one, the token at j is the j-th
    digit of k (in the base of the ids that are left beside the prefix) plus j steps of 1 + the first digit: texts
    differ as long as they have as many tokens as k has digits.
    """

    __slots__ = ("length", "owner", "pieces", "prefix", "vocabulary")

    def __init__(
        self, pieces: Seq[Piece], owner: int | None = None, prefix: int = 0, vocabulary: int | None = None
    ) -> None:
        """`owner` is the id of the request, of which pieces with the key OWN are; `prefix` tokens 0, 1, 2 .. go
        before all, and no other has such an id. Token ids stay below `vocabulary`: InputError where it is too small."""
        if vocabulary is not None and vocabulary - prefix < 2:
            raise InputError(f"a prefix of {prefix} tokens of different ids: the vocabulary has only {vocabulary}")
        self.pieces = tuple(piece for piece in pieces if piece.tokens)
        self.length = prefix + sum(piece.tokens for piece in self.pieces)
        self.owner = owner
        self.prefix = prefix
        self.vocabulary = vocabulary

    def of(self, owner: int) -> Pieces:
        """The same prompt as one request's: what is its own differs from all others'."""
        return Pieces(self.pieces, owner, self.prefix, self.vocabulary)

    def within(self, prefix: int, vocabulary: int | None) -> Pieces:
        """The same prompt behind a prefix of so many tokens, for a model that knows so many ids (None: any number)."""
        return Pieces(self.pieces, self.owner, prefix, vocabulary)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return self._from(0)

    def __getitem__(self, place: Any) -> Any:
        """One id, or a list of those in a slice."""
        if isinstance(place, slice):
            start, stop, step = place.indices(self.length)
            if step == 1:
                return list(itertools.islice(self._from(start), max(0, stop - start)))
            return list(self)[place]
        return next(self._from(range(self.length)[place]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pieces) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        """All that the ids follow from, in short: digests are made of it."""
        whose = self.owner if any(piece.key == OWN for piece in self.pieces) else None
        pieces = " ".join(f"{key}x{tokens}" for key, tokens in self.pieces)
        return f"Pieces({pieces}, owner={whose}, prefix={self.prefix}, vocabulary={self.vocabulary})"

    def _from(self, start: int) -> Iterator[int]:
        """The ids from this place on."""
        yield from range(start, self.prefix)
        start = max(0, start - self.prefix)
        for key, tokens in self.pieces:
            if start < tokens:
                yield from itertools.islice(self._text(key, tokens), start, None)
            start = max(0, start - tokens)

    def _text(self, key: int, tokens: int) -> Iterable[int]:
        if key == OWN:
            assert self.owner is not None, "a piece of nobody's own"
            key = self.owner
        if self.vocabulary is None:
            first = self.prefix + (key + 1) * APART
            return range(first, first + tokens)
        return self._digits(key, tokens, self.vocabulary - self.prefix)

    def _digits(self, key: int, tokens: int, base: int) -> Iterator[int]:
        step = 1 + key % base
        for place in range(0, tokens * step, step):
            key, digit = divmod(key, base)
            yield self.prefix + (digit + place) % base
