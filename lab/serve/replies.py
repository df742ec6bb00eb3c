"""What a reply says, in OpenAI's two forms: whole, or in the chunks of a stream."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable
from typing import Any

from lab.answers import Memory, Timing
from lab.serve.messages import Accepted, Answer, Delta, Output, Score

Json = dict[str, Any]


class Reply:
    """To one call: its prompts times n choices, in this order."""

    prefix = object = chunk_object = ""

    def __init__(self, model: str, first_key: int, n: int, alternatives: int | None) -> None:
        self.n = n
        self.first_key = first_key
        self.alternatives = alternatives
        self.about: Json = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def index(self, key: int, output: int) -> int:
        """Of the choice."""
        return (key - self.first_key) * self.n + output

    def whole(self, answers: list[Answer], echoes: list[str]) -> Json:
        choices = [
            self.choice(self.index(answer.key, i), output, echo)
            for answer, echo in zip(answers, echoes, strict=True)
            for i, output in enumerate(answer.outputs)
        ]
        return {**self.about, "object": self.object, "choices": choices, "usage": usage(answers)}

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        return {**self.about, "object": self.chunk_object, "choices": choices, **more}

    def choice(self, index: int, output: Output, echo: str) -> Json:
        raise NotImplementedError

    def opening(self, accepted: Accepted) -> list[Json]:
        """Choices of a stream's first chunk for a prompt."""
        raise NotImplementedError

    def delta(self, delta: Delta) -> Json:
        """A choice of a later one."""
        raise NotImplementedError


class ChatReply(Reply):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, output: Output, echo: str) -> Json:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        scores = self._scores(output.scores)
        return {"index": index, "message": message, "logprobs": scores, "finish_reason": output.reason}

    def opening(self, accepted: Accepted) -> list[Json]:
        start = {"role": "assistant", "content": ""}
        return [{"index": i, "delta": start, "logprobs": None, "finish_reason": None} for i in range(self.n)]

    def delta(self, delta: Delta) -> Json:
        index = self.index(delta.key, delta.output)
        text = {"content": delta.text} if delta.text or not delta.reason else {}
        return {
            "index": index,
            "delta": text,
            "logprobs": self._scores(delta.scores or None),
            "finish_reason": delta.reason,
        }

    def _scores(self, scores: list[Score] | None) -> Json | None:
        if self.alternatives is None or scores is None:
            return None
        content = []
        for text, data, logprob, top in scores:
            alternatives = [_token(*alternative) for alternative in top[: self.alternatives]]
            content.append({**_token(text, data, logprob), "top_logprobs": alternatives})
        return {"content": content, "refusal": None}


class TextReply(Reply):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, first_key: int, n: int, alternatives: int | None) -> None:
        super().__init__(model, first_key, n, alternatives)
        self._offsets: dict[int, int] = {}  # of each choice: characters of the tokens so far

    def choice(self, index: int, output: Output, echo: str) -> Json:
        scores = self._scores(index, output.scores)
        return {"index": index, "text": echo + output.text, "logprobs": scores, "finish_reason": output.reason}

    def opening(self, accepted: Accepted) -> list[Json]:
        if not accepted.echo:
            return []
        indices = [self.index(accepted.key, i) for i in range(self.n)]
        return [{"index": i, "text": accepted.echo, "logprobs": None, "finish_reason": None} for i in indices]

    def delta(self, delta: Delta) -> Json:
        index = self.index(delta.key, delta.output)
        scores = self._scores(index, delta.scores or None)
        return {"index": index, "text": delta.text, "logprobs": scores, "finish_reason": delta.reason}

    def _scores(self, index: int, scores: list[Score] | None) -> Json | None:
        if self.alternatives is None or scores is None:
            return None
        at = self._offsets.get(index, 0)
        offsets, tops = [], []
        for text, _, logprob, top in scores:
            offsets.append(at)
            at += len(text)
            # The likelier of two with the same text stands; the one that was drawn is among them.
            tops.append({text: logprob} | {other: p for other, _, p in reversed(top[: self.alternatives])})
        self._offsets[index] = at
        return {
            "tokens": [text for text, *_ in scores],
            "token_logprobs": [logprob for _, _, logprob, _ in scores],
            "top_logprobs": tops if self.alternatives else None,
            "text_offset": offsets,
        }


def usage(answers: list[Answer]) -> Json:
    """Tokens; and, under names of ours, what a call held (of several prompts the sum) and waited for (the longest)."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    output = sum(output.tokens for answer in answers for output in answer.outputs)
    kv = Memory(*map(sum, zip(*(answer.memory for answer in answers), strict=True)))
    timing = {name: _longest(getattr(answer.timing, name) for answer in answers) for name in Timing._fields}
    return {**counts(prompt, output), "kv": kv._asdict(), "timing": timing}


def counts(prompt: int, output: int) -> Json:
    """Tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _longest(seconds: Iterable[float]) -> float | None:
    """None where there is none: of one token there is no time to the next."""
    return max((round(s, 6) for s in seconds if not math.isnan(s)), default=None)


def _token(text: str, data: bytes, logprob: float) -> Json:
    return {"token": text, "bytes": list(data), "logprob": logprob}
