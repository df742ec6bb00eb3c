"""Tokens out of a prompt: text as it stands, token ids, or a chat through the model's template; `index`: whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from numbers import Integral
from typing import Any, TypeGuard

from lab.core import InputError

Message = Mapping[str, Any]  # of a chat: role and content
Prompt = str | Seq[int] | Seq[Message]
BYTES = (bytes, bytearray, memoryview)  # numbers to Python, which no tokenizer made


def encode(prompt: Prompt, index: int, tokenizer: Any, vocabulary: int) -> list[int]:
    """At least one token, of `vocabulary` that there are. `tokenizer`: transformers', None where the model has none."""
    tokens: list[int]
    if isinstance(prompt, Seq) and not prompt:
        raise InputError(f"prompt {index}: {prompt!r} is empty: give text, token ids or messages")
    if isinstance(prompt, str):
        tokens = _text(prompt, index, needed(tokenizer, index))
    elif isinstance(prompt, Seq) and isinstance(prompt[0], Mapping):
        tokens = _chat(prompt, index, tokenizer)  # type: ignore[arg-type]
    elif isinstance(prompt, Seq) and not isinstance(prompt, BYTES) and all(isinstance(t, Integral) for t in prompt):
        tokens = [int(token) for token in prompt]  # type: ignore[arg-type]
    else:
        raise InputError(f"prompt {index}: {str(prompt)[:60]!r}: must be text, token ids, or messages of a chat")
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(f"prompt {index}: token {wrong}: the model has 0 to {vocabulary - 1}: take its own")
    if not tokens:
        raise InputError(f"prompt {index}: {str(prompt)[:60]!r} gives no token: leave it out")
    return tokens


def needed(tokenizer: Any, index: int) -> Any:
    if tokenizer is None:
        raise InputError(f"prompt {index}: random weights have no tokenizer: give token ids, or take a real model")
    return tokenizer


def is_one(prompts: Any) -> TypeGuard[Prompt]:
    """Is this a single prompt: text, token ids, or messages; or what is no list of prompts, and no prompt either?"""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        return True
    return isinstance(prompts, Seq) and bool(prompts) and isinstance(prompts[0], Integral | Mapping)


def _text(text: str, index: int, tokenizer: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        rule = "has half of a surrogate pair, which is no text: give whole characters"
        raise InputError(f"prompt {index}: {text[:60]!r} {rule}") from None
    tokens: list[int] = tokenizer.encode(text, verbose=False)
    return tokens


def _chat(messages: Seq[Message], index: int, tokenizer: Any) -> list[int]:
    for message in messages:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message):
            rule = 'must be {"role": "user", "content": "..."}'
            raise InputError(f"prompt {index}: message {str(message)[:60]!r}: {rule}")
    if not needed(tokenizer, index).chat_template:
        raise InputError(f"prompt {index}: the model has no chat template: give text, or take an instruct model")
    make: Callable[..., list[int]] = tokenizer.apply_chat_template
    try:
        return make(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # templates refuse what they like, by whatever error
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"prompt {index}: the model's chat template refuses it: {said}") from error
