"""Answers to a file of prompts: `python -m lab.generate PROMPTS.jsonl --out ANSWERS.jsonl`."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

import lab
from lab.allocators import ALLOCATORS
from lab.answers import Result
from lab.command import Parser, status
from lab.core import InputError, Request, SamplingParams
from lab.schedulers import SCHEDULERS
from lab.workloads.files import read_lines

KINDS: dict[str, type] = {"prompt": str, "messages": list, "tokens": list}
BEGINNING = b'{"index": '  # of every answer

HELP = """
Each line of the prompts is an object with one of

  {"prompt": "Once upon a time"}                            text, which the model continues as it stands
  {"messages": [{"role": "user", "content": "Hello!"}]}     a chat, through the model's template: for instruct models
  {"tokens": [504, 3575, 282]}                              token ids

and, if you like, "id" (anything, given back) and "max_tokens" (instead of --max-tokens). An answer has the index of its
prompt, counted from 0, and is written when it is complete, so that answers are in no order:

  {"index": 0, "id": ..., "outputs": [{"text": "...", "finish_reason": "stop", "tokens": 12}], ...}

The same command goes on where it was interrupted; text does not depend on that, nor on allocator or scheduler.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the file of prompts."""

    where: str
    prompt: Any
    params: SamplingParams
    id: Any
    key: str  # of prompt, model and parameters: what its answer depends on


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return status(lambda: _main(arguments), "answers so far are kept, and the same command goes on from there")


def _main(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    stop = tuple(args.stop)
    params = SamplingParams(args.max_tokens, args.n, 0, args.temperature, args.top_k, args.top_p, args.seed, stop)
    rows = read(args.prompts, params, args.model)
    answered = resume(args.out, rows)
    if len(answered) == len(rows):
        print(f"{args.out} has all {len(rows)} answers already")
        return 0
    llm = lab.LLM(
        args.model,
        allocator=args.allocator,
        scheduler=args.scheduler,
        device=args.device,
        kv_memory=args.kv_memory,
        recording=False,
    )
    requests = [request_of(llm, i, row) for i, row in enumerate(rows) if i not in answered]
    start_s, tokens = time.perf_counter(), 0
    with (
        _writing(args.out),
        args.out.open("ab") as file,
        tqdm(total=len(rows), initial=len(answered), unit="prompt", disable=args.quiet or None) as bar,
    ):
        for result in llm.serve(requests):
            write(file, result, rows[result.index])
            tokens += sum(len(output.tokens) for output in result.outputs)
            bar.update()
    took_s = time.perf_counter() - start_s
    kept = f", {len(answered)} were there" if answered else ""
    print(f"{len(requests)} answers, {tokens} tokens, {took_s:.1f} s, {tokens / took_s:.0f} tokens/s: {args.out}{kept}")
    return 0


def _parser() -> argparse.ArgumentParser:
    default = SamplingParams()
    parser = Parser(
        prog="python -m lab.generate",
        description="Answer every prompt of a file, as many at a time as memory holds.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompts", type=Path, metavar="PROMPTS.jsonl", help="a prompt per line, see below (also .jsonl.gz)")
    add("--out", type=Path, required=True, metavar="ANSWERS.jsonl", help="where answers are added, one per line")
    add("--model", default="smollm2", help="smollm2 (default), a folder, a .safetensors or .gguf file, a Hub name")
    add("--max-tokens", type=int, default=256, metavar="N", help="of each answer, at most (default: 256)")
    add("--n", type=int, default=default.n, metavar="N", help="answers to each prompt (default: 1)")
    add("--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=default.top_k, metavar="K", help="draw among the K likeliest (0: all, default)")
    add("--top-p", type=float, default=default.top_p, metavar="P", help="or those that make up P (default: 1, all)")
    add("--seed", type=int, default=default.seed, metavar="N", help="of what is drawn (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer before this; may be repeated")
    add("--allocator", default="paged", metavar="NAME", help=f"one of {', '.join(ALLOCATORS.names())}")
    add("--scheduler", default="continuous", metavar="NAME", help=f"one of {', '.join(SCHEDULERS.names())}")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    memory = "for K and V: tokens (15728), bytes (12GiB), or a share of what is free (90%%: the default on a GPU)"
    add("--kv-memory", metavar="SIZE", help=f"{memory}; 512MiB on a CPU")
    add("--quiet", action="store_true", help="no progress bar; there is none either where stderr is no terminal")
    return parser


def read(path: Path, params: SamplingParams, model: str) -> list[Row]:
    """Every line that is not blank, checked."""
    lines = ((f"{path} line {i}", line) for i, line in enumerate(read_lines(path), start=1))
    rows = [_row(where, line, params, model) for where, line in lines if line.strip()]
    if not rows:
        raise InputError(f'{path} has no prompts: give an object such as {{"prompt": "Hello"}} on each line')
    return rows


def _row(where: str, line: str, params: SamplingParams, model: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(f'{where}: {line.strip()[:60]!r}: must be a JSON object such as {{"prompt": "Hello"}}')
    given = [kind for kind in KINDS if kind in row]
    if len(given) != 1:
        found = " and ".join(given) or f"keys {', '.join(row) or 'none'}"
        raise InputError(f"{where}: has {found}: give one of {', '.join(KINDS)}")
    prompt = row[given[0]]
    if not isinstance(prompt, KINDS[given[0]]) or not prompt:
        rule = {"prompt": "text", "messages": "a list of messages", "tokens": "a list of token ids"}[given[0]]
        raise InputError(f"{where}, key {given[0]}: {str(prompt)[:60]!r}: must be {rule}, and not empty")
    if row.get("max_tokens") is not None:
        try:
            params = replace(params, max_tokens=row["max_tokens"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    identity = json.dumps([model, prompt, asdict(params)], sort_keys=True)
    return Row(where, prompt, params, row.get("id"), hashlib.sha256(identity.encode()).hexdigest()[:16])


def request_of(llm: lab.LLM, index: int, row: Row) -> Request:
    try:
        return llm.request(index, row.prompt, row.params)
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None


def resume(path: Path, rows: list[Row]) -> set[int]:
    """Indices of the prompts that have been answered; a last line that was cut off is removed."""
    answered: set[int] = set()
    whole = 0  # bytes of complete lines
    with _writing(path), path.open("ab+") as file:
        file.seek(0)
        for i, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and line[: len(BEGINNING)] == BEGINNING[: len(line)]:
                file.truncate(whole)
                break
            answered.add(_index(f"{path} line {i}", line, rows))
            whole += len(line)
    return answered


def _index(where: str, line: bytes, rows: list[Row]) -> int:
    """Of the prompt that this line answers."""
    try:
        answer = json.loads(line)
        index, key = answer["index"], answer["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{where}: not an answer that this command wrote: choose another --out") from None
    if type(index) is not int or not 0 <= index < len(rows) or rows[index].key != key:
        raise InputError(f"{where}: answers another prompt, model or setting: choose another --out, or remove it")
    return index


def write(file: BinaryIO, result: Result, row: Row) -> None:
    """One line, at once: what is interrupted leaves whole lines, and the beginning of one at most."""
    outputs = [{"text": o.text, "finish_reason": o.finish_reason, "tokens": len(o.tokens)} for o in result.outputs]
    seconds = {name: round(value, 6) if value == value else None for name, value in result.timing._asdict().items()}
    answer: Mapping[str, Any] = {
        "index": result.index,
        **({} if row.id is None else {"id": row.id}),
        "outputs": outputs,
        "prompt_tokens": result.prompt_tokens,
        **seconds,
        **result.memory._asdict(),
        "key": row.key,
    }
    line = json.dumps(answer, ensure_ascii=False)
    file.write(line.encode(errors="backslashreplace") + b"\n")  # half of a surrogate pair, in an id, as JSON writes it
    file.flush()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: answers cannot be written there ({error.strerror}): choose another --out") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it: answers so far are kept
    sys.exit(main())
