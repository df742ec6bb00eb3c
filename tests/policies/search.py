"""A beam search over the checksum model as a textbook has it: lists of tokens, no memory, no forks."""

from __future__ import annotations

from lab.core import Request
from lab.executors.checksum import continuations, mix, text


def expected(request: Request, length: int, vocabulary: int = 97) -> list[list[int]]:
    """The outputs of a request, without its prompt, whether it samples or searches."""
    if not request.sampling.beams:
        return text(request, vocabulary, length)
    return [tokens[len(request.prompt) :] for tokens in search(request, length, vocabulary)]


def search(request: Request, length: int, vocabulary: int) -> list[list[int]]:
    width = request.sampling.beams
    ends = set(request.sampling.stop) if request.output is None else set()
    most = request.output or min(request.sampling.max_tokens, length - len(request.prompt))
    running = [(0.0, list(request.prompt))]
    finished: list[tuple[float, list[int]]] = []
    for generated in range(1, most + 1):
        flat = [
            (score + logprob, [*tokens, token])
            for score, tokens in running
            for token, logprob in continuations(request, len(tokens), checksum(tokens), vocabulary)
        ]
        flat.sort(key=lambda candidate: -candidate[0])
        flat = flat[: max(2, 1 + len(ends)) * width]
        over = [tokens[-1] in ends or generated == most for _, tokens in flat]
        finished += [
            (s / generated, tokens) for (s, tokens), is_over in zip(flat[:width], over[:width], strict=True) if is_over
        ]
        finished.sort(key=lambda candidate: -candidate[0])
        finished = finished[:width]
        running = [candidate for candidate, is_over in zip(flat, over, strict=True) if not is_over][:width]
        if not running or (len(finished) == width and running[0][0] / generated <= finished[-1][0]):
            break
    return [tokens for _, tokens in finished[: request.sampling.n]]


def checksum(tokens: list[int]) -> int:
    cell = total = 0
    for token in tokens:
        cell = mix(cell, token)
        total = mix(total, cell)
    return total
