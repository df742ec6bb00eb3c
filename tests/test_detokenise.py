"""Text comes in whole characters and ends before a stop string, however tokens cut it up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from talking import byte_level, sentencepiece

from lab.detokenise import HALF, Text

TEXTS = [
    "Grüße, là-bas! ça va? 😀😀 and 👩‍👩‍👧 too — naïve café.",
    "日本語のテキスト und ein Rest",
    "The quick brown fox",
    " leading and  double spaces\n\n\tindented",
    "🇨🇭",
]
TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece()}


def follow(
    tokenizer: Any, text: str, stop: tuple[str, ...] = (), prompt: tuple[int, ...] = ()
) -> tuple[Text, list[str]]:
    """Every piece of a text, token by token."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    follower = Text(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(follower.add(token))
        if follower.stopped:
            break
    return follower, [*pieces, follower.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_make_up_the_text(kind: str, text: str) -> None:
    follower, pieces = follow(TOKENIZERS[kind], text)
    given = "".join(pieces)
    assert given == follower.text == TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text))
    assert given.strip(" ") == text.strip(" ")
    assert HALF not in given
    assert sum(map(bool, pieces)) > len(text) // 12, "it comes in pieces"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_space_before_the_first_word_hangs_on_the_prompt(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("A door")
    both = tokenizer.encode("A door opens.")
    assert both[: len(prompt)] == prompt
    follower = Text(tokenizer.decode, prompt)
    assert "".join(follower.add(token) for token in both[len(prompt) :]) + follower.finish() == " opens."


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_half_a_character_at_the_end_is_given_at_the_end(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode("so 😀")[:-1]
    follower = Text(tokenizer.decode)
    assert "".join(follower.add(token) for token in tokens) == "so "
    assert set(follower.finish()) == {HALF}


def test_special_tokens_leave_no_text() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    follower = Text(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    for token in tokenizer.encode("<|user|>A door<|end|> opens.<|end|>"):
        follower.add(token)
    follower.finish()
    assert follower.text == "A door opens."


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    follower = Text(lambda ids: "".join(map(chr, ids)), (), ("END", "ENOUGH"))
    given = [follower.add(ord(c)) for c in "an ENEMY's EN"]
    assert given == ["a", "n", " ", "", "", "EN", "EM", "Y", "'", "s", " ", "", ""]
    assert follower.finish() == "EN"
    assert not follower.stopped


def test_the_first_of_several_stop_strings_counts() -> None:
    follower = Text(lambda ids: "".join(map(chr, ids)), (), ("cd", "bcde"))
    assert [follower.add(ord(c)) for c in "abcd"] == ["a", "", "", "b"]
    assert follower.stopped
    assert follower.text == "ab"
    assert follower.finish() == ""


@given(
    st.text(alphabet="ab é😀\n", max_size=30),
    st.text(alphabet="ab é😀\n", min_size=1, max_size=4),
    st.sampled_from([*TOKENIZERS]),
)
def test_text_ends_before_the_stop_string_wherever_tokens_end(text: str, stop: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    whole = tokenizer.decode(tokenizer.encode(text))
    follower, pieces = follow(tokenizer, text, (stop,))
    assert "".join(pieces) == follower.text == whole.partition(stop)[0]
    assert follower.stopped == (stop in whole)
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert whole.startswith(so_far)
        assert HALF not in piece
