"""A token by itself, as log-probabilities name it: its text, and its bytes where it is no whole character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lab.core import Sampled
from lab.detokenise import HALF
from lab.serve.messages import Alternative, Score

SPACE = "▁"  # sentencepiece's


class Tokens:
    """Texts of a tokenizer's tokens, each found once."""

    def __init__(self, tokenizer: Any, eos: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.ends = {*eos, *(tokenizer.get_added_vocab().values() if tokenizer else ())}
        self._known: dict[int, tuple[str, bytes]] = {}

    def score(self, sampled: list[Sampled], reason: str | None) -> list[Score]:
        """Without the token that stopped an output: it is not in its text."""
        if reason == "stop" and sampled and sampled[-1].token in self.ends:
            sampled = sampled[:-1]
        return [(*self.of(one.token), one.logprob, self._alternatives(one)) for one in sampled]

    def _alternatives(self, one: Sampled) -> tuple[Alternative, ...]:
        return tuple((*self.of(token), logprob) for token, logprob in one.top)

    def of(self, token: int) -> tuple[str, bytes]:
        """Its text, with what is half a character replaced, and its bytes."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: int) -> tuple[str, bytes]:
        if self.tokenizer is None:
            return f"token_id:{token}", b""
        name: str = self.tokenizer.convert_ids_to_tokens(token) or ""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if name.startswith(SPACE) and not text.startswith(" "):  # a decoder leaves out the first of a text
            text = " " + text
        if HALF not in text:
            return text, text.encode()
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            data = bytes([int(name[3:5], 16)])
        elif all(character in BYTES for character in name):
            data = bytes(BYTES[character] for character in name)
        else:
            data = text.encode()
        return text, data


def byte_alphabet() -> dict[str, int]:
    """How byte-level BPE (GPT-2) writes bytes: as the character they are, if it can be seen, else from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = byte_alphabet()
