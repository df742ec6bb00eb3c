"""The nouns: Request, Group, Sequence, Plan, Move, and the registry in which policies are found by name.

Memory is counted in tokens (K and V of one token in every layer); bytes appear only in executors and on axes. Time is
in seconds. There is no prefill phase and no decode phase: a sequence has tokens known and tokens computed, and a step
is `{sequence: tokens to compute}`.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeVar

NUMBERS: dict[str, type] = {
    **dict.fromkeys(("max_tokens", "n", "beams", "top_k", "seed", "logprobs"), Integral),
    **dict.fromkeys(("temperature", "top_p"), Real),
}  # what sampling parameters must be
UNKNOWN = -1  # stands for the token that a step in flight will give
F = TypeVar("F", bound=Callable[..., Any])


class InputError(ValueError):
    """Something a user typed is wrong. One line: the value, the rule, the remedy. Commands exit with status 2."""


class Limits(NamedTuple):
    """Upper limits of a step and of a sequence; the defaults are the paper's (Kwon et al., section 6.1)."""

    seqs: int = 2048  # sequences in one step
    tokens: int = 2560  # tokens computed in one step
    length: int = 2048  # tokens of one sequence, prompt and output


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a client may ask for. `max_tokens` is all that an honest reservation policy can look at."""

    max_tokens: int = 16
    n: int = 1  # outputs that share the prompt
    beams: int = 0  # width of a beam search, of which the n best are given; 0: none
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int | str, ...] = ()  # token ids that end a sequence; strings are for who looks at text (`lab.llm`)
    logprobs: int = 0  # alternatives reported with each token

    def __post_init__(self) -> None:
        for name, kind in NUMBERS.items():
            if not isinstance(getattr(self, name), kind):
                rule = "a whole number" if kind is Integral else "a number"
                raise InputError(f"{name}={getattr(self, name)!r}: must be {rule}")
        stop = tuple(self.stop) if isinstance(self.stop, tuple | list) else (self.stop,)
        object.__setattr__(self, "stop", stop)
        checks = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", self.n >= 1, "at least 1"),
            ("beams", self.beams >= 0, "0 (no beam search) or more"),
            ("n", self.n <= (self.beams or self.n), f"at most the {self.beams} beams, of which the best are given"),
            ("temperature", not (self.beams and self.temperature), "0 with beams: their search draws nothing"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number, 0 (greedy) or more"),
            ("top_k", 0 <= self.top_k < 2**63, "0 (keep all) or more, of 64 bits"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("logprobs", self.logprobs >= 0, "0 or more"),
            ("seed", -(2**63) <= self.seed < 2**63, "a number of 64 bits"),
            (
                "stop",
                all(isinstance(s, int | str) and s != "" for s in stop),
                "token ids, and strings that are not empty",
            ),
        )
        for name, ok, rule in checks:
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r}: must be {rule}")

    @property
    def width(self) -> int:
        """Sequences in flight."""
        return self.beams or self.n


@dataclass(frozen=True, slots=True)
class Request:
    """Immutable, so that the same workload is replayed under every policy."""

    id: int
    arrival_s: float
    prompt: Seq[int]  # token ids; a `range` where only lengths matter, so that a million requests stay small
    output: int | None = None  # tokens it WILL generate, where the workload forces them: for oracles
    sampling: SamplingParams = SamplingParams()
    noise: int | None = None  # what its sampling noise is a function of, instead of its id

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise InputError(f"request {self.id}: its prompt is empty; give at least one token")
        if self.output is not None and self.output < 1:
            raise InputError(
                f"request {self.id}: output of {self.output} tokens; must be at least 1, or None if unknown"
            )

    @property
    def most(self) -> int:
        """Tokens of one of its sequences at the end: exact where the output is forced, else an upper bound."""
        return len(self.prompt) + (self.output or self.sampling.max_tokens)


@dataclass(eq=False, slots=True)
class Sequence:
    """One output in flight. `tokens[:computed]` have K and V in memory."""

    group: Group
    index: int  # which of the request's outputs
    tokens: list[int]  # those that steps in flight will give, at the end, are UNKNOWN
    computed: int = 0

    @property
    def pending(self) -> int:
        """Tokens known but not computed: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def outputs(self) -> int:
        return len(self.tokens) - len(self.group.request.prompt)

    @property
    def end(self) -> int:
        """Tokens whose K and V will ever be written. The last token's never are. Only oracles and accounts may look."""
        request = self.group.request
        return len(request.prompt) + request.output - 1 if request.output else self.computed

    def __repr__(self) -> str:
        return f"Sequence({self.group.request.id}.{self.index}, {self.computed}/{len(self.tokens)})"


class Group:
    """One request in flight: admitted, preempted, swapped, cancelled and refused as one (the paper's sequence group).

    All its outputs are live from the start. While they hold the same tokens only the first, the leader, computes; when
    one shared token is left, the others fork from it and every sequence computes that token in a row of its own. After
    a preemption by recomputation the same rule applies to whatever prefix they still have in common.
    """

    __slots__ = ("ended", "forks", "live", "preemptions", "request", "together")

    def __init__(self, request: Request) -> None:
        self.request = request
        # due before the next step: (parent, who takes over its tokens)
        self.forks: list[tuple[Sequence, Sequence]] = []
        self.live = [Sequence(self, i, list(request.prompt)) for i in range(request.sampling.width)]
        self.ended: list[Sequence] = []
        self.preemptions = 0
        # a search: all are sampled in the same step, and their tokens must be known before the next is planned
        self.together = request.sampling.beams > 0

    @property
    def to_share(self) -> int:
        """Tokens the leader computes before the others fork from it; 0 if there is nothing (left) to fork."""
        if len(self.live) == 1 or self.live[1].computed:
            return 0
        return common_prefix([s.tokens for s in self.live]) - 1

    @property
    def complete(self) -> bool:
        """Has every output ended, with its last token collected?"""
        return not self.live and all(s.tokens[-1] != UNKNOWN for s in self.ended)

    @property
    def sequences(self) -> list[Sequence]:
        return self.live + self.ended

    def outputs(self) -> list[list[int]]:
        """Tokens of what has ended, prompts included, in order of the outputs."""
        return [s.tokens for s in sorted(self.ended, key=lambda s: s.index)]

    @property
    def distinct(self) -> int:
        """Computed tokens, a prefix that several share counted once: what a preemption loses."""
        total = sum(s.computed for s in self.live)
        if len(self.live) > 1:
            ordered = sorted(self.live, key=lambda s: s.tokens)  # then whoever shares most is next to each other
            for s, following in itertools.pairwise(ordered):
                total -= min(common_prefix([s.tokens, following.tokens]), s.computed, following.computed)
        return total

    def __repr__(self) -> str:
        return f"Group({self.request.id}, live={self.live}, ended={self.ended})"


def common_prefix(lists: Seq[Seq[int]]) -> int:
    """Length of the longest prefix that all share; the lists are compared by content.

    Two tokens that are UNKNOWN pass for the same, and may not be. Nobody is misled: they are the last of their lists,
    and what is computed or shared by forking (`distinct`, `to_share`) ends before the last token.
    """
    first = lists[0]
    length = min(len(other) for other in lists)
    for other in lists[1:]:
        if first[:length] != other[:length]:
            length = next(i for i in range(length) if first[i] != other[i])
    return length


Kind = Literal["copy", "out", "in", "map", "unmap"]


class Move(NamedTuple):
    """Memory to be moved before a step computes. `src` and `dst` are block ids, on the side that `kind` says.

    `copy` moves within the device, `out` to host memory, `in` back; `tokens` may span several consecutive blocks.
    `map` and `unmap` are for allocators that back addresses with physical pages on demand.
    """

    kind: Kind
    src: int
    dst: int
    tokens: int


@dataclass(slots=True)
class Plan:
    """Everything the policies decide about one step. Recorded unless it orders nothing at all."""

    work: dict[Sequence, int] = field(default_factory=dict)  # tokens to compute; one is sampled iff work == pending
    moves: list[Move] = field(default_factory=list)  # carried out first, in order
    admitted: dict[Group, int] = field(default_factory=dict)  # tokens found in memory
    preempted: dict[Group, int] = field(default_factory=dict)  # computed tokens it lost, or took to host memory
    swapped: set[Group] = field(default_factory=set)  # preempted to or admitted from host memory
    forked: list[Sequence] = field(default_factory=list)
    padding: dict[Sequence, tuple[int, int]] = field(default_factory=dict)
    # rows of a rectangle: dead tokens computed, dead positions that attention reads (per row, beyond the live ones)
    blocked: Group | None = None  # head of the queue, for which there was no memory
    wake_s: float = math.inf  # nothing to do: call again then


class Sampled(NamedTuple):
    token: int
    logprob: float = 0.0  # natural logarithm, of the distribution before temperature, top-k and top-p
    top: tuple[tuple[int, float], ...] = ()


class Registry:
    """Policies by name. Registering is defining: `@ALLOCATORS.register("mine")` on a class is all there is to it."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package  # a file in its folder is an entry, with no list to edit
        self.entries: dict[str, Callable[..., Any]] = {}
        self.homes: dict[str, str] = {}  # the module that registered it, whose source a result depends on

    def register(self, name: str) -> Callable[[F], F]:
        def add(factory: F) -> F:
            self.entries[name] = factory
            self.homes[name] = sys._getframe(1).f_globals["__name__"]
            return factory

        return add

    def names(self) -> list[str]:
        return list(self.entries)

    def get(self, name: str) -> Callable[..., Any]:
        """The factory called `name`, or the one at the import path `module:attribute`."""
        if name in self.entries:
            return self.entries[name]
        if ":" in name:
            return load(name, self.kind)
        raise InputError(unknown(self.kind, name, self.entries) + ", or name your own as module:Class")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist, with the nearest that do."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{kind} {name!r} is unknown: {hint}known are {', '.join(known)}"


def load(path: str, kind: str) -> Callable[..., Any]:
    """The object at `module:attribute`."""
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
        if hasattr(found, attribute):
            return getattr(found, attribute)
        raise ImportError(f"module {module} has no {attribute}")
    except ImportError as error:
        raise InputError(f"{kind} {path!r} cannot be imported ({error}): give module:Class, on PYTHONPATH") from None
