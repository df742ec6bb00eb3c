"""`python -m lab.generate`: answers to a file of prompts, resumed where it stopped, whatever state it was left in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talking import tiny_llama

import lab.llm
from lab.core import SamplingParams
from lab.generate import main
from lab.llm import LLM

ROOT = Path(__file__).parents[1]
ROWS: list[dict[str, Any]] = [
    {"prompt": "The quick", "id": "fox"},
    {"messages": [{"role": "user", "content": "Who comes in?"}], "id": 7, "note": "kept for people"},
    {"tokens": [30, 40, 50], "max_tokens": 3},
    {"prompt": "ça va"},
    {"prompt": "A door", "max_tokens": None},
]
Call = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama(folder)
    return str(folder)


@pytest.fixture
def call(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command, in a folder of its own with a file of prompts."""
    monkeypatch.chdir(tmp_path)
    put("prompts.jsonl", ROWS)

    def run(*options: str, prompts: str = "prompts.jsonl") -> int:
        fixed = ["--model", model, "--device", "cpu", "--kv-memory", "1024", "--max-tokens", "8"]
        return main([prompts, "--out", "answers.jsonl", *fixed, *options])

    return run


def put(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def answers(name: str = "answers.jsonl") -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line for line in lines}


def outputs() -> dict[int, Any]:
    return {index: answer["outputs"] for index, answer in answers().items()}


def test_every_prompt_is_answered(call: Call, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        call("--n", "2", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "4", "--stop", "e") == 0
    )
    out, err = capsys.readouterr()
    assert out.startswith("5 answers, ")
    assert not err, "no bar where there is no terminal"
    found = answers()
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert [found[i].get("id") for i in range(5)] == ["fox", 7, None, None, None]
    params = [
        SamplingParams(max_tokens=n, n=2, temperature=0.9, top_k=50, top_p=0.95, seed=4, stop=("e",))
        for n in (8, 8, 3, 8, 8)
    ]
    prompts = [row.get("prompt") or row.get("messages") or row.get("tokens") for row in ROWS]
    for i, result in enumerate(LLM(model, device="cpu", kv_memory=1024).generate(prompts, params)):  # type: ignore[arg-type]
        assert found[i]["outputs"] == [
            {"text": o.text, "finish_reason": o.finish_reason, "tokens": len(o.tokens)} for o in result.outputs
        ]
        assert found[i]["prompt_tokens"] == result.prompt_tokens
        assert found[i]["blocks"] == result.memory.blocks
        assert 0 <= found[i]["queue_s"] < found[i]["ttft_s"] <= found[i]["e2e_s"]


@pytest.mark.parametrize("options", [(), ("--temperature", "1")])
def test_it_goes_on_where_it_stopped(
    call: Call, options: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of whole lines and any part of the next, and under other policies: the same text."""
    assert call(*options) == 0
    whole, expected = Path("answers.jsonl").read_bytes(), outputs()
    lines = whole.splitlines(keepends=True)
    served: list[int] = []
    submit = LLM._submit

    def counted(self: LLM, request: Any, *rest: Any) -> int:
        served.append(request.id)
        return submit(self, request, *rest)

    monkeypatch.setattr(lab.llm.LLM, "_submit", counted)
    for kept in range(5):
        for cut in (0, 1, len(lines[kept]) // 2, len(lines[kept]) - 1):
            served.clear()
            Path("answers.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
            assert call(*options, "--allocator", "contiguous-need", "--kv-memory", "512") == 0
            assert outputs() == expected
            assert Path("answers.jsonl").read_bytes().startswith(b"".join(lines[:kept]))
            assert sorted(served) == sorted(expected.keys() - {json.loads(line)["index"] for line in lines[:kept]})
    capsys.readouterr()
    monkeypatch.setattr(lab.llm.LLM, "__init__", lambda *_, **__: pytest.fail("there is nothing to do"))
    assert call(*options) == 0
    assert capsys.readouterr().out == "answers.jsonl has all 5 answers already\n"


def test_an_id_is_given_back_whatever_it_is(call: Call) -> None:
    Path("prompts.jsonl").write_text(r'{"tokens": [7], "id": "\ud83d é"}' + "\n")
    assert call() == 0
    assert answers()[0]["id"] == "\ud83d é"
    assert call() == 0, "it has read what it wrote"


def test_answers_are_written_as_they_come(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies after some: what it wrote is there, and counts."""
    end = lab.llm.Answers.end

    def dies(self: Any, group: Any) -> None:
        if answers():
            raise KeyboardInterrupt
        end(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(lab.llm.Answers, "end", dies)
        assert call() == 130
    assert 0 < len(answers()) < 5
    assert call() == 0
    assert len(answers()) == 5


def test_it_ends_by_a_signal_and_goes_on(call: Call, model: str, tmp_path: Path) -> None:
    put("many.jsonl", [{"prompt": "A door"} for _ in range(3000)])
    command = [sys.executable, "-m", "lab.generate", "many.jsonl", "--out", "many.out", "--model", model]
    command += ["--device", "cpu", "--kv-memory", "512", "--max-tokens", "50"]
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    written = tmp_path / "many.out"
    while process.poll() is None and not (written.exists() and written.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted: answers so far are kept, and the same command goes on from there"
    assert 0 < len(answers("many.out")) < 3000


@pytest.fixture
def refused(call: Call, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line said about a command that must not come to any work."""

    def run(*options: str, prompts: str = "prompts.jsonl") -> str:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(lab.llm.LLM, "_submit", lambda *_: pytest.fail("it began to work"))
            assert call(*options, prompts=prompts) == 2
        out, err = capsys.readouterr()
        assert not out
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Hello", "prompts.jsonl line 3: 'Hello': must be a JSON object such as"),
        ("[1, 2]", "line 3: '[1, 2]': must be a JSON object"),
        ('{"prompt": "cut', "must be a JSON object"),
        ("{}", "line 3: has keys none: give one of prompt, messages, tokens"),
        ('{"text": "x"}', "line 3: has keys text: give one of"),
        ('{"prompt": "x", "tokens": [1]}', "line 3: has prompt and tokens: give one of"),
        ('{"prompt": ""}', "line 3, key prompt: '': must be text, and not empty"),
        ('{"prompt": 7}', "line 3, key prompt: '7': must be text"),
        (r'{"prompt": "\ud83d"}', "line 3: prompt 1: '\\ud83d' has half of a surrogate pair"),
        ('{"tokens": [1, 100000]}', "line 3: prompt 1: token 100000: the model has 0 to"),
        ('{"tokens": "1 2"}', "line 3, key tokens: '1 2': must be a list of token ids"),
        ('{"messages": [{"role": "user"}]}', "line 3: prompt 1: message"),
        ('{"prompt": "x", "max_tokens": 0}', "line 3: max_tokens=0: must be at least 1"),
        ('{"prompt": "x", "max_tokens": "9"}', "line 3: max_tokens='9': must be a whole number"),
        ('{"prompt": "' + "The fox. " * 400 + '"}', "line 3: request 1: "),
    ],
)
def test_a_wrong_line(refused: Callable[..., str], line: str, said: str) -> None:
    Path("prompts.jsonl").write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    assert said in refused()
    assert not Path("answers.jsonl").exists() or not Path("answers.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-tokens", "0"), "max_tokens=0: must be at least 1"),
        (("--max-tokens", "many"), "argument --max-tokens: invalid int value: 'many'; --help says what there is"),
        (("--temperature", "-1"), "temperature=-1.0: must be a finite number"),
        (("--stop", ""), "stop=('',): must be token ids, and strings that are not empty"),
        (("--n", "500"), "request 0: 500 x "),
        (("--allocator", "pagd"), "allocator 'pagd' is unknown: did you mean paged"),
        (("--scheduler", "lucky"), "scheduler 'lucky' is unknown"),
        (("--kv-memory", "lots"), "pool size 'lots'"),
        (("--device", "tpu"), "device 'tpu'"),
        (("--model", "smolm2"), "did you mean smollm2"),
        (("--out", "nowhere/answers.jsonl"), "nowhere/answers.jsonl: answers cannot be written there (No such file"),
        (("--out", "."), ".: answers cannot be written there (Is a directory)"),
        (("--depth", "1"), "unrecognized arguments: --depth 1"),
    ],
)
def test_a_wrong_option(refused: Callable[..., str], options: tuple[str, ...], said: str) -> None:
    assert said in refused(*options)


def test_a_wrong_file_of_prompts(refused: Callable[..., str]) -> None:
    assert "none.jsonl does not exist" in refused(prompts="none.jsonl")
    Path("empty.jsonl").write_text("\n\n")
    assert "empty.jsonl has no prompts" in refused(prompts="empty.jsonl")
    Path("latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert "is not UTF-8 text" in refused(prompts="latin.jsonl")


def test_a_file_that_is_not_of_answers_is_left_alone(refused: Callable[..., str]) -> None:
    for content in ('{"prompt": "x"}\n', "my notes", '{"index": 0}\n', "[]\n", '{"index": 0, "key": "x"'):
        Path("answers.jsonl").write_text(content + "\n" * (content[-1] == '"'))
        before = Path("answers.jsonl").read_bytes()
        assert "answers.jsonl line 1: not an answer that this command wrote: choose another --out" in refused()
        assert Path("answers.jsonl").read_bytes() == before


def test_answers_of_other_settings_are_not_mixed(call: Call, refused: Callable[..., str]) -> None:
    assert call() == 0
    before = Path("answers.jsonl").read_bytes()
    said = "answers another prompt, model or setting: choose another --out, or remove it"
    assert said in refused("--seed", "1")
    assert said in refused("--max-tokens", "9")
    put("prompts.jsonl", ROWS[:2])
    assert said in refused()
    put("prompts.jsonl", [*ROWS[:4], {"prompt": "Another door"}])
    assert said in refused()
    assert Path("answers.jsonl").read_bytes() == before
    put("prompts.jsonl", [*ROWS, {"prompt": "One more"}])
    assert call() == 0
    assert Path("answers.jsonl").read_bytes().startswith(before)
    assert len(answers()) == 6


def test_help_teaches_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from lab.generate import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ('{"prompt":', '{"messages":', "--stop", "paged", "goes on where it was interrupted"):
        assert word in done.stdout
