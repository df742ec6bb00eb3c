"""Real prompts from a JSONL file (also .jsonl.gz): an object per line with `prompt`, the rest is optional.

`output_tokens` forces the length of the output; `max_tokens` is what the client asks for, else the forced output, else
a default. Other keys are kept for people and not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.core import InputError
from lab.workloads.files import read_text
from lab.workloads.source import Item

MAX_TOKENS = 64  # where neither the row nor the workload says more

Encode = Callable[[str], list[int]]


def read_prompts(path: Path, encode: Encode | None, max_tokens: int = MAX_TOKENS) -> list[Item]:
    """All prompts of the file as token ids; InputError names file, line, key and value of the first that is wrong.

    `encode` turns the text of a prompt into token ids, and applies the chat template if there is one. A prompt may also
    be a list of token ids.
    """
    rows = [(f"{path} line {i}", line) for i, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    if not rows:
        raise InputError(f"{path} has no rows: give an object with a prompt on each line")
    parsed = [(where, _parse(where, line)) for where, line in rows]  # all of it before the first is encoded
    if encode is None and any(isinstance(row["prompt"], str) for _, row in parsed):
        raise InputError(
            f"{path.name} holds text and nothing here tokenises it: run a real model, or a workload of lengths"
        )
    return [_item(where, row, encode, max_tokens) for where, row in parsed]


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(f'{where}: {line.strip()[:60]!r}: must be a JSON object such as {{"prompt": "Hello"}}')
    prompt = row.get("prompt")
    ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if not prompt or not (isinstance(prompt, str) or ids):
        raise InputError(f"{where}, key prompt: {str(prompt)[:60]!r}: must be text, or token ids, and not empty")
    for name in ("max_tokens", "output_tokens"):
        value = row.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{where}, key {name}: {value!r}: must be a whole number of tokens, at least 1")
    most, output = row.get("max_tokens"), row.get("output_tokens")
    if most and output and most < output:
        raise InputError(f"{where}, key max_tokens: {most}: must be at least output_tokens, which is {output}")
    return row


def _item(where: str, row: dict[str, Any], encode: Encode | None, max_tokens: int) -> Item:
    tokens = tuple(encode(row["prompt"]) if encode and isinstance(row["prompt"], str) else row["prompt"])
    if not tokens:
        raise InputError(f"{where}, key prompt: {row['prompt']!r}: gives no token: leave the row out")
    output = row.get("output_tokens")
    return Item(tokens, output, row.get("max_tokens") or output or max_tokens)
