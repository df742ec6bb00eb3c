"""Workloads: repeatable to the bit, true to their distributions and to the paper's recipe, strict about bad input."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.core import InputError, Request, SamplingParams
from lab.workloads import WORKLOADS, describe, digest, workload
from lab.workloads.builtin import DATA
from lab.workloads.lengths import quantile_table

ROOT = Path(__file__).parent.parent
AUTHORS = ROOT.parent / "shared" / "data" / "sharegpt_opt_lengths.csv.gz"
HEADER = "arrival_s,prompt_tokens,output_tokens\n"
SYNTHETIC = "uniform:prompt=1-100,output=10-50"


def encode(text: str) -> list[int]:
    return list(text.encode())


def lengths(requests: Iterable[Request]) -> list[tuple[int, int | None]]:
    return [(len(r.prompt), r.output) for r in requests]


def times(requests: Iterable[Request]) -> list[float]:
    return [r.arrival_s for r in requests]


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- the same seed gives the same requests, on every machine

GOLDEN = {
    ("sharegpt", "poisson"): ("b18ea7e0eaca1ef5", "e05b7785d221cb2b"),
    ("alpaca", "gamma"): ("f28edca96df98d41", "f22c273c6730002f"),
    ("opt13b-256", "poisson"): ("4ef119bab30568a1", "36d1c343436099c1"),
    (SYNTHETIC, "poisson"): ("cc754b950601992f", "02f06ef1155be339"),
    ("lognormal:prompt=161+-299,output=338+-284", "gamma"): ("06e0bfa05dfc5e6c", "651dd6dbb6a844f2"),
    ("adversarial:n=3", "poisson"): ("b47a90db546e0828", "a61c6b4daa667c2f"),
    ("prompts", "gamma"): ("706d0f3cfb97aa91", "75abcdbc05e52fc7"),
    ("conversations:users=4", "poisson"): ("be9430fcc4ae7b49", "945f6a79ff22115a"),
}


@pytest.mark.parametrize(("spec", "arrivals"), GOLDEN)
def test_same_seed_same_requests(spec: str, arrivals: str) -> None:
    def draw(seed: int) -> str:
        kwargs: dict[str, Any] = {"rate_per_s": 4.0, "count": 100, "arrivals": arrivals, "burstiness": 0.5}
        return digest(workload(spec, seed=seed, encode=encode, **kwargs))

    assert (draw(0), draw(1)) == GOLDEN[spec, arrivals]
    assert draw(0) == draw(0)


def test_every_name_has_a_golden_digest() -> None:
    assert {spec.partition(":")[0] for spec, _ in GOLDEN} == set(WORKLOADS)


def test_digest_depends_on_all_that_matters() -> None:
    base = Request(0, 0.0, range(3), 2)
    others = [
        Request(1, 0.0, range(3), 2),
        Request(0, 0.1, range(3), 2),
        Request(0, 0.0, range(4), 2),
        Request(0, 0.0, (0, 1, 3), 2),
        Request(0, 0.0, range(3), 3),
        Request(0, 0.0, range(3), 2, SamplingParams(max_tokens=17)),
        Request(0, 0.0, range(3), 2, SamplingParams(n=2)),
    ]
    assert len({digest([r]) for r in [base, *others]}) == len(others) + 1


def test_lengths_do_not_depend_on_arrivals_and_a_shorter_run_is_the_beginning_of_a_longer_one() -> None:
    long = workload("sharegpt", rate_per_s=5, count=300)
    short = workload("sharegpt", rate_per_s=5, duration_s=20)
    bursts = workload("sharegpt", rate_per_s=9, count=300, arrivals="gamma", burstiness=0.2)
    assert 50 < len(short) < 300
    assert list(short) == list(long)[: len(short)]
    assert lengths(long) == lengths(bursts)
    assert times(long) != times(bursts)


def test_importable_anywhere_with_numpy_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from lab.workloads import workload; assert workload('sharegpt', count=9, arrivals='all');"
        "print(sorted({'torch', 'pandas', 'pyarrow', 'transformers'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---- lengths


@pytest.mark.parametrize(("name", "prompt", "output"), [("sharegpt", 158.4, 337.8), ("alpaca", 18.9, 57.8)])
def test_measured_means_and_limit(name: str, prompt: float, output: float) -> None:
    requests = workload(name, count=40_000, arrivals="all")
    spread = describe(requests)
    assert spread["prompt_tokens"]["mean"] == pytest.approx(prompt, rel=0.025)
    assert spread["output_tokens"]["mean"] == pytest.approx(output, rel=0.015)
    assert all(len(r.prompt) + (r.output or 0) < 2048 and len(r.prompt) >= 1 for r in requests)
    assert all(r.sampling.max_tokens == r.output for r in requests)


@pytest.mark.parametrize(("name", "bins"), [("sharegpt", 80), ("alpaca", 24)])
def test_measured_is_the_stated_recipe(name: str, bins: int) -> None:
    table = np.genfromtxt(DATA / f"{name}_joint_quantiles.csv", delimiter=",", skip_header=1)
    draw = random.Random(5)
    expected: list[tuple[int, int]] = []
    while len(expected) < 500:
        curves = table[table[:, 0] == int(draw.random() * bins)]
        pair = [max(1, int(np.interp(draw.random(), curves[:, 1], curves[:, i]) + 0.5)) for i in (2, 3)]
        if sum(pair) < 300:
            expected.append((pair[0], pair[1]))
    assert lengths(workload(name, count=500, arrivals="all", seed=5, limit=300)) == expected
    assert len(quantile_table(DATA / f"{name}_joint_quantiles.csv")) == bins


def test_correlation_survives_the_table() -> None:
    requests = workload("sharegpt", count=40_000, arrivals="all")
    long = [r.output or 0 for r in requests if len(r.prompt) > 500]
    all_outputs = [r.output or 0 for r in requests]
    assert abs(np.mean(long) / np.mean(all_outputs) - 1) > 0.05


def test_opt13b_256_is_the_file_in_its_order() -> None:
    rows = [tuple(map(int, line.split(","))) for line in (DATA / "opt13b_256_lengths.csv").read_text().split()[1:]]
    assert lengths(workload("opt13b-256", arrivals="all", seed=3)) == rows
    again = lengths(workload("opt13b-256", arrivals="all", count=300))
    assert again == rows + rows[:44]


def test_uniform_reaches_both_ends_evenly() -> None:
    requests = workload("uniform:prompt=3-6,output=2", count=4000, arrivals="all")
    counts = np.bincount([len(r.prompt) for r in requests])
    assert {r.output for r in requests} == {2}
    assert counts[:3].sum() == 0
    assert len(counts) == 7
    assert all(abs(c - 1000) < 150 for c in counts[3:])


def test_lognormal_has_the_stated_moments() -> None:
    requests = workload("lognormal:prompt=161+-299,output=338+-0", count=60_000, arrivals="all", limit=10**6)
    prompts = np.array([len(r.prompt) for r in requests])
    assert prompts.mean() == pytest.approx(161, rel=0.03)
    assert prompts.std() == pytest.approx(299, rel=0.1)
    assert np.median(prompts) == pytest.approx(161 / (1 + (299 / 161) ** 2) ** 0.5, rel=0.03)
    assert {r.output for r in requests} == {338}


# ---- arrivals


def test_numbered_in_order_of_arrival() -> None:
    for arrivals in ("poisson", "gamma"):
        requests = workload("alpaca", rate_per_s=200, duration_s=10, arrivals=arrivals, burstiness=0.3)
        assert [r.id for r in requests] == list(range(len(requests)))
        assert times(requests) == sorted(times(requests))
        assert times(requests)[-1] < 10
        assert len(requests) == pytest.approx(2000, rel=0.2)


def test_poisson_counts_per_quantum_are_numpys_legacy_ones() -> None:
    found = times(workload(SYNTHETIC, rate_per_s=300, duration_s=95.5, seed=9))
    counts = np.random.RandomState(9).poisson(3.0, 9550)
    assert found == [i * 0.01 for i, count in enumerate(counts) for _ in range(count)]
    assert max(counts) > 1


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_stated_mean_and_variation(burstiness: float) -> None:
    requests = workload(SYNTHETIC, rate_per_s=2, count=20_000, arrivals="gamma", burstiness=burstiness)
    gaps = np.diff(times(requests))
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert times(requests) == [round(t, 6) for t in times(requests)]


def test_all_at_once_takes_the_count_or_the_file(tmp_path: Path) -> None:
    assert times(workload("sharegpt", count=5, arrivals="all")) == [0.0] * 5
    assert len(workload(write(tmp_path, HEADER + ",3,4\n,5,6\n"), arrivals="all")) == 2


def test_whichever_comes_first_ends_it() -> None:
    assert len(workload("alpaca", rate_per_s=10, duration_s=1000, count=7)) == 7
    assert len(workload("alpaca", rate_per_s=10, duration_s=1, count=7000)) < 30
    assert len(workload("opt13b-256", rate_per_s=10)) == 256


# ---- traces


def test_trace_is_read_as_it_stands(tmp_path: Path) -> None:
    header = "\ufeffrequest_id,arrival_s,prompt_tokens,output_tokens,max_tokens\r\n"
    text = header + "7,1.5,10,3,8\r\n9,1.5,20,4,\r\n\r\n3,4,5,6,6\r\n"
    requests = workload(write(tmp_path, text), arrivals="trace")
    assert [(r.id, r.arrival_s, r.prompt, r.output) for r in requests] == [
        (0, 1.5, range(10), 3),
        (1, 1.5, range(20), 4),
        (2, 4.0, range(5), 6),
    ]
    assert [r.sampling.max_tokens for r in requests] == [8, 4, 6]


def test_trace_is_scaled_and_cut(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "".join(f"{t},1,1\n" for t in (1, 2, 3, 7, 9)))
    assert times(workload(path, arrivals="trace", rate_per_s=2)) == pytest.approx([0.25, 0.5, 0.75, 1.75, 2.25])
    assert describe(workload(path, arrivals="trace", rate_per_s=2))["rate_per_s"] == pytest.approx(2)
    assert times(workload(path, arrivals="trace", duration_s=7)) == [1, 2, 3]
    assert times(workload(path, arrivals="trace", count=2)) == [1, 2]


def test_trace_lengths_under_other_arrivals_are_recycled_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "output_tokens,prompt_tokens\n1,10\n2,20\n3,30\n")
    requests = workload(path, rate_per_s=1, count=7)
    assert [r.output for r in requests] == [1, 2, 3, 1, 2, 3, 1]


def test_rows_that_reach_the_limit_are_left_out_with_their_times(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "1,10,5\n2,60,40\n3,60,39\n")
    requests = workload(path, arrivals="trace", limit=100)
    assert list(zip(times(requests), lengths(requests), strict=True)) == [(1.0, (10, 5)), (3.0, (60, 39))]
    assert requests.dropped == describe(requests)["dropped"] == 1


def test_compressed_csv_and_parquet_read_alike(tmp_path: Path) -> None:
    text = HEADER + "0.5,3,4\n1.25,5,6\n"
    plain = list(workload(write(tmp_path, text), arrivals="trace"))
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert list(workload(str(packed), arrivals="trace")) == plain
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    columns = {"arrival_s": [0.5, 1.25], "prompt_tokens": [3, 5], "output_tokens": [4, 6]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "trace.parquet")
    assert list(workload(str(tmp_path / "trace.parquet"), arrivals="trace")) == plain
    parquet.write_table(pyarrow.table({**columns, "output_tokens": [4, None]}), tmp_path / "bad.parquet")
    refused(str(tmp_path / "bad.parquet"), "bad.parquet row 2", "output_tokens", "''", "at least 1", arrivals="trace")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 but nothing more")
    refused(str(tmp_path / "no.parquet"), "no.parquet", "no readable Parquet file", arrivals="trace")
    refused(str(tmp_path / "none.parquet"), "none.parquet", "does not exist", arrivals="trace")


# ---- the paper's own trace


def recipe(pairs: list[tuple[int, int]], rate: float, duration: int, seed: int) -> list[tuple[float, int, int]]:
    """The artifact's recipe with numpy's and Python's own global generators, as its authors used them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        counts = np.random.poisson(rate * 0.01, duration * 100)
        arrivals_s = [i * 0.01 for i in range(duration * 100) for _ in range(counts[i])]
        rows = list(itertools.islice(itertools.cycle([p for p in pairs if sum(p) < 2048]), len(arrivals_s)))
        random.shuffle(rows)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return [(t, *row) for t, row in zip(arrivals_s, rows, strict=True)]


@pytest.mark.parametrize("seed", [0, 3])
def test_paper_recipe_on_a_small_file(tmp_path: Path, seed: int) -> None:
    pairs = [(1 + 37 * i % 1900, 1 + 91 * i % 1500) for i in range(50)]
    assert 0 < sum(sum(p) >= 2048 for p in pairs) < 50
    path = write(tmp_path, "prompt_tokens,output_tokens\n" + "".join(f"{p},{o}\n" for p, o in pairs))
    requests = workload(f"paper:{path}", rate_per_s=4.0, duration_s=60, seed=seed)
    assert [(r.arrival_s, len(r.prompt), r.output) for r in requests] == recipe(pairs, 4.0, 60, seed)
    assert len(requests) > 100  # so that the file is recycled twice
    assert requests.dropped == sum(sum(p) >= 2048 for p in pairs)


@pytest.mark.skipif(not AUTHORS.exists(), reason="the authors' file of lengths is third-party and not carried here")
def test_paper_numbers_from_the_authors_file() -> None:
    every = workload(f"paper:{AUTHORS}", count=79_725, arrivals="all")
    spread = describe(every)
    assert len(every) + every.dropped == 84_226
    assert spread["prompt_tokens"]["mean"] == pytest.approx(161.18, abs=0.005)
    assert spread["output_tokens"]["mean"] == pytest.approx(338.00, abs=0.005)
    with gzip.open(AUTHORS, "rt") as file:
        pairs = [(int(p), int(o)) for p, o in (line.split(",") for line in file.read().split()[1:])]
    requests = workload(f"paper:{AUTHORS}", rate_per_s=4.0, duration_s=900)
    assert [(r.arrival_s, len(r.prompt), r.output) for r in requests] == recipe(pairs, 4.0, 900, 0)
    spread = describe(requests)
    assert (len(requests), spread["prompt_tokens"]["sum"], spread["output_tokens"]["sum"]) == (3604, 547_150, 1_200_908)


# ---- real prompts


def test_prompts_are_tokenised_by_the_caller_and_shuffled_by_the_seed() -> None:
    requests = workload("prompts:max_tokens=32", arrivals="all", encode=encode, limit=10**6)
    with gzip.open(DATA / "prompts_sample.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    assert len(requests) == len(texts) == 491
    found = [bytes(r.prompt).decode() for r in requests]
    assert sorted(found) == sorted(texts)
    assert found != texts
    assert {(r.output, r.sampling.max_tokens) for r in requests} == {(None, 32)}
    other = workload("prompts:max_tokens=32", arrivals="all", encode=encode, limit=10**6, seed=1)
    assert list(requests)[:24] != list(other)[:24]


def test_prompt_file_keeps_its_order_and_its_lengths(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a\u2028b", "source": 1}',
        "",
        '{"prompt": "cd", "output_tokens": 7}\r',
        '{"prompt": "e", "max_tokens": 9}',
    ]
    requests = workload(write(tmp_path, "\n".join(lines), "p.jsonl"), arrivals="all", encode=encode)
    assert [bytes(r.prompt).decode() for r in requests] == ["a\u2028b", "cd", "e"]
    assert [(r.output, r.sampling.max_tokens) for r in requests] == [(None, 64), (7, 7), (None, 9)]


# ---- adversarial


def test_adversarial_requests_are_what_they_claim() -> None:
    block = 8
    requests = workload(f"adversarial:block={block},blocks=4,n=3,vocabulary=50", count=200, arrivals="all")
    prompts = [tuple(r.prompt) for r in requests]

    def cut(prompt: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [prompt[i : i + block] for i in range(0, len(prompt), block)]

    pairs = list(itertools.combinations(set(prompts), 2))
    assert any(sorted(cut(a)) == sorted(cut(b)) for a, b in pairs)  # the same blocks in another order
    assert len(set(prompts)) < len(prompts)  # whole prompts again
    for i in range(4, 200, 5):  # an earlier prompt with one token changed
        assert any(len(a) == len(prompts[i]) and sum(map(int.__ne__, a, prompts[i])) == 1 for a in prompts[:i])
    assert {len(p) % block for p in prompts} >= {0, 1, block - 1}  # full, one more, one less
    assert 1 in map(len, prompts)
    assert any(a == b[: len(a)] and len(a) < len(b) for pair in pairs for a, b in (pair, pair[::-1]))  # prefixes
    ends = [(len(r.prompt) + (r.output or 0)) % block for r in requests]
    assert min(ends.count(0), ends.count(1)) > 50  # the text ends with a block, or its K and V do: one token less
    assert {r.sampling.n for r in requests} == {1, 2, 3}
    assert max(map(len, prompts)) <= 4 * block + 1
    assert all(1 <= (r.output or 0) <= 2 * block for r in requests)
    assert all(0 <= token < 50 for p in prompts for token in p)


def test_adversarial_smallest_sizes() -> None:
    requests = workload("adversarial:block=1,blocks=1,vocabulary=2", count=50, arrivals="all")
    assert {len(r.prompt) for r in requests} <= {1, 2}
    assert {r.output for r in requests} == {1, 2}


# ---- headers


def test_describe() -> None:
    requests = [Request(0, 1.0, range(10), 4), Request(1, 2.0, range(20), 8), Request(2, 5.0, range(60), 6)]
    found = describe(requests)
    assert json.loads(json.dumps(found)) == found
    assert (found["requests"], found["outputs"], found["rate_per_s"], found["forced"]) == (3, 3, 0.5, True)
    assert found["prompt_tokens"] == {"sum": 90, "mean": 30, "min": 10, "p50": 20, "p90": 52, "p99": 59.2, "max": 60}
    assert found["output_tokens"]["mean"] == 6


# ---- bad input: one line, with the value, the rule and the remedy


def refused(spec: str, *fragments: str, **kwargs: Any) -> None:
    with pytest.raises(InputError) as caught:
        workload(spec, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("sharegtp", "did you mean sharegpt?"),
        ("notes.txt", ".csv.gz"),
        ("", "known are sharegpt"),
        ("paper:", "paper:PATH"),
        ("sharegpt:limit=3", "takes no parameters"),
        ("uniform:prompt=1-9", "'output' is missing"),
        ("uniform:prompt=1-9,outptu=3", "did you mean output"),
        ("uniform:prompt=1-9,output", "KEY=VALUE"),
        ("uniform:prompt=1-9,prompt=1-9", "twice"),
        ("uniform:prompt=9-1,output=3", "prompt=9-1: must be LO-HI"),
        ("uniform:prompt=0-1,output=3", "prompt=0-1: must be LO-HI"),
        ("uniform:prompt=-5,output=3", "prompt=-5: must be LO-HI"),
        ("uniform:prompt=1-9,output=1.5", "output=1.5: must be LO-HI"),
        ("uniform:prompt=4000,output=3", "limit of 2048 tokens"),
        ("lognormal:prompt=161,output=338+-284", "prompt=161: must be MEAN+-DEVIATION"),
        ("lognormal:prompt=0+-3,output=338+-284", "MEAN above 0"),
        ("lognormal:prompt=9999999+-1,output=338+-284", "raise the limit"),
        ("adversarial:block=0", "block=0: must be a whole number, at least 1"),
        ("adversarial:vocabulary=1", "at least 2"),
        ("adversarial:block=512", "longest request has 3585 tokens"),
        ("prompts", "tokenises"),
        ("prompts:max_tokens=x", "max_tokens=x"),
    ],
)
def test_bad_spec(spec: str, fragment: str) -> None:
    refused(spec, fragment, count=100, arrivals="all")


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"arrivals": "poison", "count": 1}, "did you mean poisson?"),
        ({"count": 1}, "need a rate"),
        ({"rate_per_s": 0, "count": 1}, "rate 0: must be above 0"),
        ({"rate_per_s": -2.0, "count": 1}, "rate -2.0: must be above 0"),
        ({"rate_per_s": float("nan"), "count": 1}, "rate nan"),
        ({"rate_per_s": float("inf"), "count": 1}, "rate inf"),
        ({"rate_per_s": 1e-9, "count": 5}, "raise it or take fewer"),
        ({"rate_per_s": 1e6, "duration_s": 1e6}, "lower it"),
        ({"rate_per_s": 1}, "has no end: give a duration or a count"),
        ({"rate_per_s": 1, "count": 0}, "count 0"),
        ({"rate_per_s": 1, "duration_s": 0}, "duration 0"),
        ({"rate_per_s": 1, "duration_s": float("inf")}, "duration inf"),
        ({"rate_per_s": 0.1, "duration_s": 0.5}, "nothing arrives within 0.5 s"),
        ({"rate_per_s": 1, "count": 1, "seed": -1}, "seed -1"),
        ({"rate_per_s": 1, "count": 1, "arrivals": "gamma", "burstiness": 0}, "burstiness 0"),
        ({"rate_per_s": 1, "count": 1, "limit": 2}, "limit 2"),
        ({"arrivals": "all"}, "has no end: give a count"),
        ({"arrivals": "all", "rate_per_s": 1, "count": 1}, "leave rate and duration out"),
        ({"arrivals": "trace"}, "has no arrival times"),
        ({"count": 1, "arrivals": "all", "limit": 3}, "limit of 3 tokens"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], fragment: str) -> None:
    refused(SYNTHETIC, fragment, **kwargs)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("", ("'prompt_tokens' is missing",)),
        (HEADER, ("no rows",)),
        ("prompt_tokens\n3\n", ("'output_tokens' is missing",)),
        ("prompt_tokens,output_token\n3,4\n", ("'output_token' is unknown", "did you mean output_tokens")),
        ("prompt_tokens,output_tokens,output_tokens\n3,4,5\n", ("twice",)),
        (HEADER + "0,3,4\n1,3\n", ("line 3", "'1,3'", "2 fields", "3")),
        (HEADER + "0,3,4\n1,0,4\n", ("line 3", "prompt_tokens", "'0'", "at least 1")),
        (HEADER + "0,3,-4\n", ("line 2", "output_tokens", "'-4'", "at least 1")),
        (HEADER + "0,3,4.5\n", ("line 2", "output_tokens", "'4.5'", "whole number")),
        (HEADER + "0,3,\n", ("line 2", "output_tokens", "''")),
        (HEADER + "soon,3,4\n", ("line 2", "arrival_s", "'soon'", "seconds")),
        (HEADER + "nan,3,4\n", ("line 2", "arrival_s", "'nan'")),
        (HEADER + "-1,3,4\n", ("line 2", "arrival_s", "'-1'", "0 or later")),
        (HEADER + "1,3,4\n2,3,4\n1.5,3,4\n", ("line 4", "arrival_s", "'1.5'", "comes after 2.0", "sort")),
        (HEADER + "2,3,4\n,3,4\n", ("line 3", "arrival_s", "''", "each row")),
        (HEADER + ",3,4\n2,3,4\n", ("line 3", "arrival_s", "'2'", "each row")),
        (HEADER + "2,3000,4\n", ("each of its 1 rows", "2048")),
        ("prompt_tokens,output_tokens,max_tokens\n3,4,3\n", ("line 2", "max_tokens", "at least output_tokens")),
        ("prompt_tokens,output_tokens\n3,4\n", ("has no arrival times",)),
        (HEADER + "2,3,4\n2,3,4\n", ("all arrivals are at 2.0 s", "leave the rate out")),
    ],
)
def test_bad_trace(tmp_path: Path, text: str, fragments: tuple[str, ...]) -> None:
    refused(write(tmp_path, text), "trace.csv", *fragments, arrivals="trace", rate_per_s=1)


def test_trace_with_too_few_rows(tmp_path: Path) -> None:
    refused(write(tmp_path, HEADER + "1,3,4\n2,3,4\n"), "count 3", "has 2 arrivals", arrivals="trace", count=3)


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("gone.csv", None, "does not exist"),
        ("gone.jsonl", None, "does not exist"),
        ("plain.csv.gz", b"prompt_tokens,output_tokens\n1,2\n", "no complete gzip file"),
        ("cut.csv.gz", gzip.compress(HEADER.encode() * 9, mtime=0)[:-12], "no complete gzip file"),
        ("latin.csv", b"prompt_tokens,output_tokens\n\xe9,2\n", "not UTF-8"),
        ("nul.csv", b"prompt_tokens,output_tokens\n3,\x00\n", "nul.csv line 2"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes | None, fragment: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(str(tmp_path / name), name, fragment, count=1, arrivals="all", encode=encode)
    refused(f"paper:{tmp_path / name}", name, count=1, arrivals="all")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    refused(str(tmp_path / "folder.csv"), "folder.csv", "cannot be read", count=1, arrivals="all")


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("Hello", ("'Hello'", "JSON object")),
        ("[" * 100_000, ("JSON object",)),
        ('["Hello"]', ("JSON object",)),
        ('{"text": "Hello"}', ("key prompt", "None")),
        ('{"prompt": ""}', ("key prompt", "''")),
        ('{"prompt": "Hello", "max_tokens": 0}', ("key max_tokens", "0", "at least 1")),
        ('{"prompt": "Hello", "output_tokens": true}', ("key output_tokens", "True")),
        ('{"prompt": "Hello", "output_tokens": 9, "max_tokens": 8}', ("key max_tokens", "8", "9")),
    ],
)
def test_bad_prompts(tmp_path: Path, line: str, fragments: tuple[str, ...]) -> None:
    path = write(tmp_path, '{"prompt": "first"}\n' + line + "\n", "p.jsonl")
    refused(path, "p.jsonl line 2", *fragments, arrivals="all", encode=encode)


@pytest.mark.parametrize(("text", "fragment"), [("\n", "no rows"), ('{"prompt": "x"}\n', "gives no token")])
def test_prompts_that_give_nothing(tmp_path: Path, text: str, fragment: str) -> None:
    nothing: Callable[[str], list[int]] = lambda text: []  # noqa: E731
    refused(write(tmp_path, text, "p.jsonl"), "p.jsonl", fragment, arrivals="all", encode=nothing)


def test_nothing_is_tokenised_before_the_whole_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "first"}\n{"prompt": 3}\n', "p.jsonl")
    seen: list[str] = []
    refused(path, "line 2", arrivals="all", encode=lambda text: seen.append(text) or [1])  # type: ignore[func-returns-value]
    assert not seen
