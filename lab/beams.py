"""Beam search: which continuations of a request's beams survive a step (Kwon et al., section 4.4, figure 9).

The rule is that of transformers' `generate` with its default settings (length penalty 1, no early stopping):
- Of all continuations of the k beams, ordered by the sum of their log-probabilities, the best k that do not end go on.
- One of the best k that ends is finished, with its sum over its length as its score; the best k finished are kept.
- The search is over once k are finished and the best beam, by the same score, is no better than the worst of them.

How memory follows is not decided here: a beam that is not continued is dropped, and takes over one that goes on twice.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

from lab.core import Group, Request, Sampled, Sequence


class Hypothesis(NamedTuple):
    """A finished output."""

    tokens: list[int]  # prompt and output
    score: float  # sum of log-probabilities over the number of output tokens
    reason: str  # stop, or length


class Candidate(NamedTuple):
    score: float  # sum of log-probabilities
    rank: int  # of the beam that it continues
    token: int
    logprob: float


class Beams(Group):
    """The beams of one request, in order of their scores: equal scores keep the order of ranks, so rank is state."""

    __slots__ = ("finished", "over", "scores")

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.scores = [0.0] * len(self.live)  # of each live beam
        self.finished: list[Hypothesis] = []  # the best first
        self.over = False

    def outputs(self) -> list[list[int]]:
        """The n best, prompts included, the best first."""
        return [h.tokens for h in self.finished[: self.request.sampling.n]]

    def take(
        self, sampled: dict[Sequence, list[Sampled]], eos: frozenset[int], limit: int
    ) -> list[tuple[Sequence, str]]:
        """A step of a beam search, whose candidates become what was sampled; all its beams end together."""
        request = self.request
        drawn = {s: sampled.pop(s)[0] for s in self.live}
        if request.output is None:
            ends: frozenset[object] = eos | set(request.sampling.stop)
            most = min(request.sampling.max_tokens, limit - len(request.prompt))
        else:
            ends, most = frozenset(), request.output
        sampled.update(self.advance(drawn, ends, most))
        if not self.over:
            return []
        reason = "length" if all(h.reason == "length" for h in self.finished) else "stop"
        return [(s, reason) for s in self.live]

    def advance(
        self, drawn: Mapping[Sequence, Sampled], ends: Container[object], most: int
    ) -> dict[Sequence, list[Sampled]]:
        """One step: continue the beams with tokens out of `top` of what was `drawn`; returns what each one was given.

        `ends` are the tokens that end an output, `most` its greatest length in tokens. Afterwards `forks` says which
        beam takes over which, and `over` whether the search has come to its end.
        """
        length = self.live[0].outputs + 1
        width = len(self.live)
        candidates = self._candidates(drawn)
        ending = [c.token in ends or length >= most for c in candidates]
        for c, ends_here in zip(candidates[:width], ending, strict=False):
            if ends_here:
                reason = "stop" if c.token in ends else "length"
                tokens = [*self.live[c.rank].tokens, c.token]
                self.finished.append(Hypothesis(tokens, c.score / length, reason))
        self.finished.sort(key=lambda h: -h.score)
        del self.finished[width:]
        going = [c for c, ends_here in zip(candidates, ending, strict=True) if not ends_here][:width]
        full = len(self.finished) == width
        self.over = not going or (full and going[0].score / length <= self.finished[-1].score)
        if self.over:
            return self._last(drawn)
        assert len(going) == width, f"{width} beams need more candidates than {len(candidates)}"
        return self._go_on(going)

    def _candidates(self, drawn: Mapping[Sequence, Sampled]) -> list[Candidate]:
        """Continuations, the best first; of beams that are still alike those of the first alone."""
        beams = self.live if self.live[0].outputs else self.live[:1]
        found = [
            Candidate(self.scores[rank] + logprob, rank, token, logprob)
            for rank, s in enumerate(beams)
            for token, logprob in drawn[s].top
        ]
        return sorted(found, key=lambda c: -c.score)

    def _go_on(self, going: list[Candidate]) -> dict[Sequence, list[Sampled]]:
        """The first continuation of a beam stays in its sequence, others move into sequences that have none."""
        parents = self.live
        alike = not parents[0].outputs
        stay: dict[int, Candidate] = {}
        for c in going:
            stay.setdefault(c.rank, c)
        dropped = iter([s for rank, s in enumerate(parents) if rank not in stay])
        homes = []
        for i, c in enumerate(going):
            parent = parents[c.rank]
            home = parents[i] if alike else parent
            if not alike and stay[c.rank] is not c:
                home = next(dropped)
                home.tokens = list(parent.tokens)
                self.forks.append((parent, home))
            homes.append(home)
        for home, c in zip(homes, going, strict=True):
            home.tokens.append(c.token)
        self.live = homes
        self.scores = [c.score for c in going]
        return {s: [Sampled(c.token, c.logprob)] for s, c in zip(homes, going, strict=True)}

    def _last(self, drawn: Mapping[Sequence, Sampled]) -> dict[Sequence, list[Sampled]]:
        """Every sequence ends with its own best token: its tokens stay those that its memory was computed for."""
        for s in self.live:
            s.tokens.append(drawn[s].token)
        return {s: [Sampled(drawn[s].token, drawn[s].logprob)] for s in self.live}


def group_of(request: Request) -> Group:
    return Beams(request) if request.sampling.beams else Group(request)
