"""Text out of tokens as they come: whole characters only, cut off where a stop string begins.

A token is no piece of text by itself: it may be half a character of UTF-8 (byte-level BPE, byte fallback), and whether
its word begins with a space may hang on the token before it (sentencepiece). So a few tokens are decoded together:

    decoded before    [ a window of tokens whose text is known ]
    decoded now       [ a window of tokens whose text is known ][ piece ]    unless it ends in half a character

The window begins where a piece began, and begins anew when it has grown long.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

HALF = "\ufffd"  # what decoders put for bytes that are no character, or not yet
WINDOW = 16  # tokens decoded together, or more where no character is complete
CONTEXT = 6  # tokens of the prompt that are decoded with the first of the answer

Decode = Callable[[list[int]], str]


class Text:
    """The text of one output. What `add` and `finish` return, end to end, is `text`."""

    def __init__(self, decode: Decode, prompt: Seq[int] = (), stop: Seq[str] = ()) -> None:
        self.decode = decode
        self.stop = stop
        self.stopped = False  # a stop string was found; it and what follows are left out
        self._tokens = list(prompt[-CONTEXT:])  # the window
        self._read = len(self._tokens)  # of these, the text is known
        self._known = decode(self._tokens).rstrip(HALF)
        self._pieces: list[str] = []
        self._held = ""  # text that may be the beginning of a stop string

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """The text that is certain now, and was not before; often one token's, at times none or several's."""
        self._tokens.append(token)
        text = self.decode(self._tokens)
        if len(text) <= len(self._known) or text.endswith(HALF):
            return ""
        piece = text[len(self._known) :]
        if len(self._tokens) > WINDOW:
            del self._tokens[: self._read]
            text = self.decode(self._tokens)
        self._read, self._known = len(self._tokens), text
        return self._give(piece)

    def finish(self) -> str:
        """No token follows: what was held back, halves of characters included."""
        if self.stopped:
            return ""
        rest = self.decode(self._tokens)[len(self._known) :]
        self._tokens, self._known = [], ""
        piece = self._give(rest)
        if self._held:
            self._pieces.append(self._held)
            piece, self._held = piece + self._held, ""
        return piece

    def _give(self, piece: str) -> str:
        """All of it but what belongs to a stop string, or may. A stop string can begin only in what was held."""
        if not self.stop:
            if piece:
                self._pieces.append(piece)
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped = True
            given, self._held = text[: min(found)], ""
        else:
            given = text[: len(text) - self._beginning(text)]
            self._held = text[len(given) :]
        if given:
            self._pieces.append(given)
        return given

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self.stop), default=0)
        return next(
            (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0
        )
