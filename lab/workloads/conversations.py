"""Synthetic conversations: turns whose prompt is all that was said before and a new question, so that prefixes repeat.

    turn 1    system | question 1
    turn 2    system | question 1 | answer 1 | question 2
    turn 3    system | question 1 | answer 1 | question 2 | answer 2 | question 3

No real chat: lengths of questions and answers are ShareGPT's, drawn independently for each turn, and every other choice
is made up. Several users talk at once; each request is the next turn of one of them, all alike, so that turns of a
conversation stay in order whatever the arrivals, and a user's mean think time is the number of users over the rate (it
counts from the arrival of the turn before: arrivals do not wait for answers). A conversation ends after its turns, or
when the next would reach the limit; its user then begins another.

The system prompt is the same in all conversations, the rest of a history in none. An answer in a history has ids of its
own, and the answer that an engine generated earlier does not (on the virtual clock all its tokens are 0). So the next
turn finds all up to its last question in a prefix cache, but computes the last answer once more; the turns after that
find it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from lab.workloads.lengths import below
from lab.workloads.pieces import SHARED, Piece, Pieces
from lab.workloads.source import Item, below_limit

SYSTEM = SHARED  # key of the system prompt's text; those of the conversations follow


@dataclass(slots=True)
class _Talk:
    key: int
    turns: int = 0
    tokens: int = 0  # of questions and answers so far


def conversations(
    random: Random, lengths: Iterator[Item], spec: str, limit: int, *, users: int, turns: int, system: int
) -> Iterator[Item]:
    """Without end: turns of `turns` at most per conversation, behind `system` tokens; prompt and output below `limit`.

    `lengths` gives question and answer of each turn.
    """
    begun = users
    talks = [_Talk(SYSTEM + 1 + i) for i in range(users)]
    while True:
        user = below(random, users)
        turn = below_limit(lengths, spec, limit - system)
        talk = talks[user]
        if talk.turns == turns or system + talk.tokens + turn.tokens >= limit:
            begun += 1
            talk = talks[user] = _Talk(SYSTEM + begun)
        asked = talk.tokens + len(turn.prompt)
        yield Item(Pieces((Piece(SYSTEM, system), Piece(talk.key, asked))), turn.output, turn.max_tokens)
        talk.turns += 1
        talk.tokens += turn.tokens
