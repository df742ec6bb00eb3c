"""What a user can get wrong: one line that names value, rule and remedy, status 2, no traceback, finished runs kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import lab.harness
import lab.processes
from experiments import fragmentation
from lab.allocators import Idle
from lab.allocators.paged import Paged
from lab.check import check
from lab.core import InputError
from lab.experiment import main
from lab.record import Record
from lab.run import Run

ROOT = Path(__file__).parents[1]
Refused = Callable[..., str]
TRACE = "arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,10,5\n"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The one line said about a command that must not come to any work."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        with monkeypatch.context() as patch:
            for module in (lab.harness, lab.processes, fragmentation):
                patch.setattr(module, "carry_out", lambda *_: pytest.fail("it began to work"))
            status = main(["fragmentation", *arguments])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert not out
        assert "Traceback" not in err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line.partition("error: ")[2]

    return call


SIMULATED = ["--executor", "simulated"]
REAL = ["--executor", "torch", "--device", "cpu"]

NUMBERS = [
    ("--block-size 0", "block size 0: must be at least 1"),
    ("--block-size -16", "block size -16: must be at least 1"),
    ("--pool 0", "pool size '0': must be above zero"),
    ("--pool=-1", "pool size '-1': must be above zero"),
    ("--pool 15", "no block of 16 tokens"),
    ("--pool 12parsecs", "pool size '12parsecs': give tokens"),
    ("--pool 99TB", "pool size '99TB': give tokens"),
    ("--pool 99GB", "a100-40gb has 17.2 GB free"),
    ("--rate 0", "rate 0.0: must be a number above zero"),
    ("--rate -4", "rate -4.0: must be a number above zero"),
    ("--rate nan", "rate nan: must be"),
    ("--rate inf", "rate inf: must be"),
    ("--rate four", "invalid float value: 'four'"),
    ("--duration 0", "duration 0.0: must be"),
    ("--duration -1", "duration -1.0: must be"),
    ("--duration 0.001", "nothing arrives within 0.001 s"),
    ("--count 0", "count 0: must be"),
    ("--count -1", "count -1: must be"),
    ("--count 1.5", "invalid int value: '1.5'"),
    ("--steps 0", "steps 0: must be"),
    ("--depth 1", "depth 1: the virtual clock plans in no time, so there is nothing to hide; leave --depth out"),
    ("--depth 2", "depth 2: must be 0 (collect a step, then plan) or 1"),
    ("--depth=-1", "depth -1: must be 0"),
    ("--depth deep", "invalid int value: 'deep'"),
    ("--batch 0 --scheduler static", "batch of 0 requests: must be at least 1"),
    ("--timeout=-1 --scheduler dynamic", "time-out of -1.0 s: must be 0 or more"),
    ("--watermark 1.5", "watermark 1.5: must be a share of the pool"),
    ("--burstiness 0 --arrivals gamma", "burstiness 0.0"),
    ("--length 0", "length 0: model 'opt-13b' takes 3 to 2048 tokens a sequence"),
    ("--length 4096", "length 4096: model 'opt-13b' takes 3 to 2048 tokens a sequence"),
    ("--seeds=-1", "seeds '-1': give whole numbers from 0 on"),
    ("--quick --duration -1", "duration -1.0: must be"),
    ("--quick --duration 0", "duration 0.0: must be"),
    ("--seeds a", "seeds 'a': give whole numbers"),
    ("--seeds 5-1", "seeds '5-1': give whole numbers"),
    ("--seeds 0-1000", "seeds '0-1000': give whole numbers from 0 on, 1000 at most"),
    ("--seeds 0-99999999999999999999", "seeds '0-99999999999999999999': give whole numbers"),
    ("--seeds 9999999999", "seed 9999999999: must be from 0"),
]

NAMES = [
    ("--allocator pagd", "allocator 'pagd' is unknown: did you mean paged"),
    ("--allocator paged,", "allocator '' is unknown"),
    ("--allocator nowhere:Mine", "allocator 'nowhere:Mine' cannot be imported"),
    ("--allocator json:Mine", "allocator 'json:Mine' cannot be imported"),
    ("--scheduler continous", "scheduler 'continous' is unknown: did you mean continuous"),
    ("--preemption swop", "invalid choice: 'swop'"),
    ("--executor simulation", "invalid choice: 'simulation'"),
    ("--arrivals never", "invalid choice: 'never'"),
    ("--model opt-14b", "model shape 'opt-14b' is unknown: did you mean opt-13b"),
    ("--hardware a100", "hardware 'a100' is unknown: did you mean"),
    ("--hardware missing.json", "hardware 'missing.json': no file of fitted step times"),
    ("--workload sharegtp", "workload 'sharegtp' is unknown: did you mean sharegpt"),
    ("--workload uniform:prompt=0,output=5", "prompt=0: must be LO-HI"),
    ("--workload uniform:promt=5,output=5", "did you mean prompt"),
    ("--workload missing.csv", "workload file missing.csv does not exist"),
    ("--workload missing.jsonl", "workload file missing.jsonl does not exist"),
    ("--workload paper:missing.csv", "missing.csv"),
    ("--workload prompts", "nothing here tokenises it: run a real model"),
    ("--frob", "unrecognized arguments: --frob"),
]


def test_a_setting_that_its_record_does_not_depend_on_is_refused_beside_the_record(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*SIMULATED, "--allocator", "paged", "--duration", "20", "--out", str(tmp_path)]
    assert main(["fragmentation", *small]) == 0
    capsys.readouterr()
    assert refused(*small, "--max-tokens", "0") == "max_tokens=0: must be at least 1"


@pytest.mark.parametrize(("arguments", "said"), NUMBERS + NAMES)
def test_a_wrong_value(arguments: str, said: str, refused: Refused, tmp_path: Path) -> None:
    assert said in refused(*SIMULATED, *arguments.split())
    assert not list(tmp_path.glob("results/*"))


def test_an_unknown_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fragmentaton"]) == 2
    assert "error: experiment 'fragmentaton' is unknown: did you mean fragmentation?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (Run(executor="quantum"), "executor 'quantum' is unknown"),
        (Run(dtype="float3"), "dtype 'float3' is unknown: did you mean float32"),
        (Run(arrivals="poison"), "arrivals 'poison' is unknown: did you mean poisson"),
        (Run(preemption="swop"), "preemption 'swop' is unknown: did you mean swap"),
    ],
)
def test_a_wrong_field_of_a_run(run: Run, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--hardware h200 --executor torch", "hardware 'h200': a real device keeps its own pace"),
        ("--hardware h200 --device cpu", "hardware 'h200': a real device keeps its own pace"),
        ("--device cpu --executor simulated", "device 'cpu': the virtual clock has none"),
        ("--arrivals all --rate 5 --executor simulated", "rate 5.0: requests that come all at once have none"),
        ("--device tpu", "device 'tpu': unknown: give cpu, cuda or cuda:N"),
        ("--device mps --executor torch", "device 'mps': there are kernels for cpu and cuda only"),
        ("--device cuda:99", "CUDA devices: give cpu, or one that exists"),
    ],
)
def test_options_that_contradict_each_other_or_the_machine(arguments: str, said: str, refused: Refused) -> None:
    assert said in refused(*arguments.split())


# -- requests that can never run


@pytest.mark.parametrize("allocator", ["paged", "contiguous-max", "contiguous-oracle", "paged-oracle"])
def test_requests_longer_than_the_pool(allocator: str, refused: Refused) -> None:
    workload = ["--workload", "uniform:prompt=300,output=100", "--pool", "320", "--allocator", allocator]
    line = refused(*SIMULATED, *workload)
    assert line.startswith(f"allocator '{allocator}': none of the 3604 requests can ever run; request 0: ")
    assert "pool of 320 tokens" in line
    assert "enlarge it" in line


def test_requests_longer_than_the_model(refused: Refused) -> None:
    line = refused(*SIMULATED, "--workload", "uniform:prompt=2000,output=100")
    assert "reach the limit of 2048 tokens" in line


def test_an_oracle_of_unknown_lengths(refused: Refused, tmp_path: Path) -> None:
    """Also where all but one of the lengths are known."""
    known, unknown = {"prompt": [1, 2, 3], "output_tokens": 4}, {"prompt": [1, 2, 3]}
    for name, lines in (("none", [unknown]), ("last", [known] * 20 + [unknown])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        for allocator in ("contiguous-oracle", "paged-pow2"):
            line = refused(*SIMULATED, "--allocator", allocator, "--workload", str(file), "--count", "50")
            assert "has no known output length" in line
            assert "take max, max-tokens, double or need" in line


# -- broken files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is missing"),
        ("arrival_s,prompt_tokens,output_tokens\n", "has no rows"),
        (TRACE + "2,ten,5\n", "trace.csv line 4, column prompt_tokens: 'ten': must be a whole number"),
        (TRACE + "2,10,0\n", "trace.csv line 4, column output_tokens: '0': must be a whole number"),
        (TRACE + "2,10,-3\n", "trace.csv line 4, column output_tokens: '-3'"),
        (TRACE + "0.5,10,5\n", "trace.csv line 4, column arrival_s: '0.5': comes after 1.0"),
        (TRACE + "2,10\n", "trace.csv line 4: '2,10': has 2 fields"),
        ("prompt_tokens,outputs\n1,2\n", "column 'outputs' is unknown: did you mean output_tokens"),
    ],
)
def test_a_broken_trace(text: str, said: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(text)
    assert said in refused(*SIMULATED, "--workload", "trace.csv")


def test_a_broken_file_of_step_times(refused: Refused, tmp_path: Path) -> None:
    for text in ("", "[]", '{"hardware": "h200"}', '{"hardware": "h200", "fit": {"base_s": 1}}'):
        (tmp_path / "pace.json").write_text(text)
        assert "hardware 'pace.json': no file of fitted step times" in refused("--hardware", "pace.json")


def model_files(folder: Path) -> dict[str, str]:
    """Models that cannot be read, by name, and what is to be said about each."""
    whole = (8).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    for name in ("truncated", "corrupt", "weightless"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    (folder / "truncated" / "model.safetensors").write_bytes(whole[:20])
    (folder / "corrupt" / "model.safetensors").write_bytes(b"\xff" * 100)
    (folder / "short.gguf").write_bytes(b"GGUF")
    (folder / "corrupt.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
    (folder / "other.gguf").write_bytes(b"PK\3\4" + b"\0" * 100)
    return {
        "truncated": "not a whole safetensors file",
        "corrupt": "not a whole safetensors file",
        "weightless": "holds no weights",
        "truncated/model.safetensors": "not a whole safetensors file",
        "short.gguf": "does not start with 'GGUF', as GGUF files do",
        "other.gguf": "does not start with 'GGUF'",
        "corrupt.gguf": "cannot be read",
        "missing.gguf": "no such file or folder",
        "./missing": "no such file or folder",
        "smolm2": "did you mean smollm2",
        "random:opt-14b": "model shape 'opt-14b' is unknown",
    }


def test_broken_models(refused: Refused, tmp_path: Path) -> None:
    for name, said in model_files(tmp_path).items():
        line = refused(*REAL, "--model", name)
        assert said in line, name
        assert name.removeprefix("random:").removeprefix("./") in line


def test_sequences_longer_than_a_real_model_takes(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="a real model")
    shape: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    config = transformers.AutoConfig.for_model("llama", **shape, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny")
    capsys.readouterr()
    numbers = ["--model", "tiny", "--workload", "uniform:prompt=20,output=20"]
    assert "length 256: model 'tiny' takes 3 to 64 tokens a sequence" in refused(*REAL, *numbers)
    assert "reach the limit of 32 tokens" in refused(*REAL, *numbers, "--length", "32")


# -- no room for results


def small(tmp_path: Path, *arguments: str) -> int:
    return main(["fragmentation", *SIMULATED, "--duration", "20", "--out", str(tmp_path / "results"), *arguments])


def test_a_full_disk_before_any_work(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    free = types.SimpleNamespace(free=20 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "results: 20 MiB free, 6 records may take 96: make room or choose another --out" in refused(*SIMULATED)


def test_a_place_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below", "/proc/results"):
        line = refused(*SIMULATED, "--out", out)
        assert line.startswith(f"{out}: results cannot be written there (")
        assert "choose another --out" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_in_a_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert small(tmp_path, "--allocator", "paged") == 0
    kept = set((tmp_path / "results" / "runs").iterdir())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    capsys.readouterr()
    assert small(tmp_path, "--allocator", "paged,paged-max,paged-pow2", "--fresh") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert "No space left on device" in err[0]
    assert "free some space or give --out" in err[0]
    assert set((tmp_path / "results" / "runs").iterdir()) == kept, "neither lost nor half written"
    assert Record.load(kept.pop()).table("steps").size


def test_a_disk_that_fills_up_under_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pandas.DataFrame.to_csv", full)
    assert small(tmp_path, "--allocator", "paged") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "results cannot be written there (No space left on device); make room" in line


def test_a_worker_that_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.processes, "carry_out", lambda *_: __import__("os")._exit(9))
    assert small(tmp_path, "--allocator", "paged") == 2
    assert "error: a process was killed in the midst of its run: free some memory" in capsys.readouterr().err


# -- damaged records


@pytest.mark.parametrize(("asked", "status"), [("--help", 0), ("fragmentation --quick", 128 + signal.SIGPIPE)])
def test_a_reader_who_goes_before_the_end(asked: str, status: int, tmp_path: Path) -> None:
    """As `head` does: nobody is left to complain to."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lab.experiment", *asked.split(), "--out", str(tmp_path)]
    with os.fdopen(writing, "w") as gone:
        done = subprocess.run(command, cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == status


@pytest.mark.parametrize("harm", ["end", "middle", "header", "table"])
def test_a_damaged_record(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small(tmp_path, "--allocator", "paged") == 0
    (record,) = (tmp_path / "results" / "runs").iterdir()
    samples = record / "samples.parquet"
    content = samples.read_bytes()
    if harm == "end":
        samples.write_bytes(content[: len(content) // 2])
    elif harm == "middle":
        samples.write_bytes(content[:200] + bytes(200) + content[400:])
    else:
        (record / {"header": "header.json", "table": "events.parquet"}[harm]).unlink()
    capsys.readouterr()
    assert small(tmp_path, "--allocator", "paged") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(record) in line
    assert "run it again (--fresh does, or remove" in line
    assert small(tmp_path, "--allocator", "paged", "--fresh") == 0
    assert samples.read_bytes() == content


# -- policies of somebody else's that are wrong


class AdmitsTrue(Paged):
    def admit(self, group, spare=0):  # type: ignore[no-untyped-def]
        return super().admit(group, spare) is not None


class AdmitsNobody(Paged):
    def admit(self, group, spare=0):  # type: ignore[no-untyped-def]
        return None


class Leaks(Paged):
    def release(self, s):  # type: ignore[no-untyped-def]
        self.tables.pop(s, None)


class HasNoTable(Paged):
    def admit(self, group, spare=0):  # type: ignore[no-untyped-def]
        return 0

    def extend(self, s, length):  # type: ignore[no-untyped-def]
        return True


class Forgets(Paged):
    def idle(self):  # type: ignore[no-untyped-def]
        return Idle(0, 0, 0)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (AdmitsTrue, "admit() returned True: must be the number of prompt tokens found in memory"),
        (AdmitsNobody, "admit() returned None"),
        (Leaks, "free and cached must sum to the capacity"),
        (Forgets, "after release() idle() is (0, 0, 0)"),
        (HasNoTable, "tables or asked lack what"),
    ],
)
def test_an_allocator_that_answers_nonsense(policy: type, said: str, refused: Refused) -> None:
    name = f"{__name__}:{policy.__name__}"
    line = refused(*SIMULATED, "--duration", "20", "--allocator", name)
    assert line.startswith(f"allocator {name!r}, with one request in an empty pool: ")
    assert said in line


BROKEN = """
from lab.allocators.paged import Paged
from lab.schedulers.continuous import Continuous

class Raises(Paged):
    def extend(self, s, length):
        if len(s.tokens) > len(s.group.request.prompt) + 20:
            raise ZeroDivisionError("my own mistake")
        return super().extend(s, length)

class HasNoCapacity:
    def __init__(self, capacity, block, limits):
        self.grows = True

class Nonsense(Continuous):
    def schedule(self, now, more):
        return None
"""


@pytest.mark.parametrize(
    ("policy", "error", "where"),
    [
        ("--allocator broken:Raises", "ZeroDivisionError: my own mistake", "in step "),
        ("--allocator broken:HasNoCapacity", "AttributeError", "before any work: "),
        ("--scheduler broken:Nonsense", "AttributeError", "in step 0: "),
    ],
)
def test_a_policy_that_fails_keeps_its_traceback(policy: str, error: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    arguments = ["--hardware", "h200", "--duration", "20", *policy.split()]
    arguments += [] if "--allocator" in arguments else ["--allocator", "paged"]
    done = subprocess.run(
        [sys.executable, "-m", "lab.experiment", "fragmentation", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert done.returncode == 1
    assert error in done.stderr
    assert "Traceback" in done.stderr
    assert where in done.stderr.splitlines()[-1]
    assert policy.split()[1] in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("results/runs/*"))
