"""Whatever goes wrong: nothing stays held, no request ends without an answer or an error, and health is told truly."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults import ANSWERED, FAILED, LEFT, PROMPTS, REFUSED, bodies, disconnects, failures, flood
from running import Running

from lab import LLM, SamplingParams

ENDS = [f"vllm:request_success_total:{reason}" for reason in ("stop", "length", "abort", "error")]
GROWTH = 50_000  # KB that a server may grow by while it is sent a hundred times its limit


def grown(server: Running, before: dict[str, float]) -> dict[str, float]:
    server.until(server.nothing_held)
    assert server.http.get("/health").status_code == 200
    return {name: value - before[name] for name, value in server.metrics().items()}


@pytest.mark.parametrize("requests", [400, pytest.param(2000, marks=pytest.mark.full)])
def test_a_third_of_them_go_away(faulty: Running, llm: LLM, requests: int) -> None:
    """At any time. All others get their own text."""
    before = faulty.metrics()
    expected = [result.text for result in llm.generate(PROMPTS, SamplingParams(max_tokens=16))]
    assert len(set(expected)) == len(PROMPTS)
    kinds = Counter(reply.kind for reply in asyncio.run(disconnects(faulty, requests, expected)))
    assert kinds.keys() == {ANSWERED, LEFT}
    assert requests // 6 < kinds[LEFT] <= requests // 3
    stop, length, abort, error = (grown(faulty, before)[name] for name in ENDS)
    assert error == 0
    assert abort > requests // 10
    assert kinds[ANSWERED] <= stop + length <= requests - abort, "some left before, and some after their answer"


@pytest.mark.parametrize("seconds", [4.0, pytest.param(30.0, marks=pytest.mark.full)])
def test_a_flood(faulty: Running, seconds: float) -> None:
    """As many are answered as without it, all others are told to come back, and the server stays well meanwhile."""
    before = faulty.metrics()
    waits: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            start_s = time.monotonic()
            assert faulty.http.get("/health").status_code == 200
            waits.append(time.monotonic() - start_s)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        replies, capacity = asyncio.run(flood(faulty, seconds))
    finally:
        over.set()
        looking.join()
    kinds = Counter(reply.kind for reply in replies)
    assert kinds.keys() == {ANSWERED, REFUSED}
    assert {reply.status for reply in replies if reply.kind == REFUSED} == {429}
    assert kinds[ANSWERED] >= 30 + 0.5 * capacity * seconds
    assert len(waits) > 10
    assert max(waits) < 5
    grew = grown(faulty, before)
    assert grew["kvlab:requests_refused_total:queue"] == kinds[REFUSED]
    assert grew["vllm:request_success_total:length"] == kinds[ANSWERED]


def test_wrong_bodies(faulty: Running) -> None:
    """A hundred MB, 10,000 stop strings, a billion answers, ...: refused, and not kept."""
    before, peak_kb = faulty.metrics(), most_memory(faulty)
    replies = asyncio.run(bodies(faulty))
    assert [reply.kind for reply in replies] == [REFUSED] * len(replies)
    assert {reply.status for reply in replies} == {400, 413}
    assert not any(grown(faulty, before)[name] for name in ENDS)
    assert most_memory(faulty) - peak_kb < GROWTH


def most_memory(server: Running) -> int:
    """KB that the process which speaks HTTP ever had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


TEXTS = [
    *("".join(chr(c) for c in range(start, start + 48) if not 0xD800 <= c < 0xE000) for start in range(1, 0x3000, 509)),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308",  # joined emoji
    "e\u0301\u0302\u0303\u0304" * 8,  # many accents on one letter
    "\u202eback to front\u202c \u0627\u0644\u0639 \u05d0\u05d1",
    "\u0000\u0001\u001b[31m\r\n\t\u2028\u2029\ufeff",
    "\ue000\uf8ff\U000f0000\U0010ffff\ufffe\ufffd",  # private, unassigned, the replacement itself
    "".join(chr(c) for c in range(0x4E00, 0x4E20)) + "".join(chr(c) for c in range(0x20000, 0x20008)),
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_of_all_kinds(server: Running, text: str) -> None:
    """Comes back as it was sent: a prompt that is echoed, whole and in a stream; as a stop string it harms nobody."""
    asked: Any = {
        "model": "tiny",
        "prompt": text,
        "max_tokens": 3,
        "temperature": 0,
        "echo": True,
        "stop": ["~" + text],
    }
    whole = server.openai.completions.create(**asked).choices[0].text
    assert whole.startswith(text)
    chunks = list(server.openai.completions.create(**asked, stream=True, user=text))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    chat: Any = [{"role": "user", "content": text, "name": text}]
    made = server.openai.chat.completions.create(model="tiny", messages=chat, max_tokens=3)
    assert made.choices[0].finish_reason in ("length", "stop")


def test_planted_failures(faulty: Running) -> None:
    """Of a step: those in it fail. Of a tokenizer: that request alone."""
    before = faulty.metrics()
    replies = asyncio.run(failures(faulty))
    kinds = Counter(reply.kind for reply in replies)
    assert kinds.keys() == {ANSWERED, FAILED}
    assert [reply.kind for reply in replies[:27:9]] == [FAILED] * 3, "each that was planted in a step"
    assert [reply.kind for reply in replies[27:]] == [FAILED] + [ANSWERED] * 9
    grew = grown(faulty, before)
    assert grew["kvlab:failed_steps_total"] == 3
    assert grew["vllm:request_success_total:error"] == kinds[FAILED]
