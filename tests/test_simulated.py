"""Shapes against transformers and the paper's table 1; the virtual clock against steps computed by hand."""

import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lab.core import Group, InputError, Move, Plan, Request, Sampled, Sequence
from lab.executors import Executor
from lab.executors.simulated import CostModel, FittedCost, SimulatedExecutor, StepTimes, _non_negative
from lab.hardware import GIB, HARDWARE, POOLS, Calibration, Hardware, hardware, pool_tokens
from lab.shapes import SHAPES, ModelShape, shape

OPT = shape("opt-13b")
A100 = hardware("a100-40gb")


def sequence(computed: int, pending: int = 1) -> Sequence:
    """One in flight, with `computed` tokens in memory and `pending` to compute."""
    s = Group(Request(0, 0.0, range(computed + pending))).live[0]
    s.computed = computed
    return s


def seconds(plan: Plan, model: ModelShape = OPT, machine: Hardware = A100, block: int = 16) -> float:
    executor = SimulatedExecutor(model, machine, block)
    executor.launch(plan, {})
    return executor.now


def decodes(count: int, context: int) -> Plan:
    """`count` sequences of `context` tokens, the last of which is computed in the step."""
    return Plan({sequence(context - 1): 1 for _ in range(count)})


def prompt(tokens: int, computed: int = 0) -> Plan:
    return Plan({sequence(computed, tokens): tokens})


@pytest.mark.parametrize("name", ["opt-13b", "llama-13b", "llama-3-8b", "qwen3-0.6b", "smollm2-135m"])
def test_parameters_are_those_of_the_module_transformers_builds(name: str) -> None:
    model = shape(name)
    config = AutoConfig.for_model(model.family, **model.transformers_config())
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in module.parameters()) == model.parameters
    linear = [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m is not module.get_output_embeddings()]
    assert sum(m.weight.numel() for m in linear) == model.matrix_parameters
    keys = [m for path, m in module.named_modules() if path.endswith(("k_proj", "v_proj"))]
    assert 2 * sum(m.out_features for m in keys) == model.kv_bytes_per_token()


TABLE_1 = [  # GB in all, GB of parameters, GiB of K and V, slots in thousands
    ("opt-13b", "a100-40gb", 40, 26, 12, 15.7),
    ("opt-66b", "4xa100-40gb", 160, 132, 21, 9.7),
    ("opt-175b", "8xa100-80gb", 640, 346, 264, 60.1),
]


@pytest.mark.parametrize(("name", "machine", "memory", "parameters", "kv", "slots"), TABLE_1)
def test_table_1(name: str, machine: str, memory: int, parameters: int, kv: int, slots: float) -> None:
    model, gpus = shape(name), hardware(machine)
    assert gpus.gpus * gpus.memory_bytes == memory * GIB
    assert 2 * model.parameters / 1e9 == pytest.approx(parameters, rel=0.012)  # printed from 13, 66 and 173 billion
    pool = pool_tokens(gpus, model)
    assert pool % 16 == 0
    assert round(pool / 1000, 1) == slots
    assert round(pool * model.kv_bytes_per_token() / GIB) == kv


def test_kv_bytes_of_a_token() -> None:
    assert OPT.kv_bytes_per_token() == 819_200  # the paper's 800 KB, section 3.1
    assert shape("SmolLM2-135M").kv_bytes_per_token() == 23_040
    assert OPT.kv_bytes_per_token(dtype_bytes=1) == 409_600


def test_operations_of_causal_attention_add_up_over_chunks() -> None:
    model = shape("llama-3-8b")
    per_pair = 4 * 32 * 32 * 128
    assert model.attention_flops(1, 100) == 100 * per_pair
    assert model.attention_flops(3, 3) == (1 + 2 + 3) * per_pair
    assert model.attention_flops(300, 300) == model.attention_flops(200, 200) + model.attention_flops(100, 300)


@pytest.mark.parametrize(("look_up", "known"), [(shape, SHAPES), (hardware, HARDWARE)])
def test_names_are_found_in_any_case_and_a_typo_gets_a_hint(look_up: Callable, known: dict) -> None:
    for name, entry in known.items():
        assert look_up(name.upper()) is entry
        assert entry.name == name
        with pytest.raises(InputError, match=rf"^\S+.* is unknown: did you mean .*\b{name}\b.*$"):
            look_up(name.upper() + "x")


@pytest.mark.parametrize("machine", HARDWARE.values(), ids=lambda machine: machine.name)
def test_nothing_attains_more_than_its_data_sheet(machine: Hardware) -> None:
    attained = machine.calibrated
    for rate in ("flops", "bytes_per_s", "host_bytes_per_s", "link_bytes_per_s"):
        assert 0 < getattr(attained, rate) < getattr(machine, rate)
    assert "NVIDIA" in machine.source
    assert "ssumed" in attained.source
    assert attained.measured <= {field.name for field in fields(Calibration)}
    assert bool(attained.measured) == ("measured on" in attained.source)


def test_pools_outside_the_table_follow_the_rule() -> None:
    machine = hardware("h100-80gb")
    assert pool_tokens(machine, OPT) == POOLS["opt-13b", "a100-40gb"]  # capped on purpose
    llama = pool_tokens(machine, shape("llama-13b"))
    assert 0.9 * 80 * GIB < llama * 819_200 + 26e9 < 0.95 * 80 * GIB
    assert pool_tokens(A100, shape("llama-13b")) == pytest.approx(15_728, rel=0.03)
    with pytest.raises(InputError, match="131 GB of weights leave no room"):
        pool_tokens(A100, shape("opt-66b"))


def test_a_decode_step_by_hand() -> None:
    weights = 40 * (4 * 5120 * 5120 + 2 * 5120 * 20480)  # Q, K, V, output; two of the MLP
    vectors = 40 * (4 * 5120 + 20480 + 5120 + 2 * 2 * 5120) + 2 * 5120  # biases, norms
    head = 50272 * 5120
    read_s = 2 * (weights + vectors + head) / 1.2e12
    kv_s = 8 * 256 * 819_200 / 1.2e12
    assert seconds(decodes(8, context=256)) == pytest.approx(8e-3 + read_s + kv_s, rel=1e-9)
    assert seconds(decodes(8, context=256)) == pytest.approx(30.8e-3, rel=1e-3)


def test_a_prompt_step_by_hand() -> None:
    weights = 40 * (4 * 5120 * 5120 + 2 * 5120 * 20480)
    linear_s = (1000 * 2 * weights + 2 * 50272 * 5120) / 140e12  # logits of the last token only
    attention_s = 4 * 40 * 5120 * (1000 * 1001 / 2) / 140e12
    assert attention_s > 1000 * 819_200 / 1.2e12  # arithmetic, not traffic
    assert seconds(prompt(1000)) == pytest.approx(8e-3 + linear_s + attention_s, rel=1e-9)


def test_a_mixed_step_is_priced_as_one_batch() -> None:
    mixed = Plan(decodes(4, context=100).work | prompt(300, computed=50).work)
    cost = CostModel(OPT, A100)
    pairs = 4 * 100 + sum(range(51, 351))
    assert seconds(mixed) == cost.step(304, 5, pairs, 4 * 100 + 350)


def test_several_gpus_share_the_work_and_pay_for_sums() -> None:
    plan = decodes(8, context=256)
    cost = CostModel(OPT, hardware("4xa100-40gb"))
    sums_s = 2 * 40 * (20e-6 + 8 * 2 * 0.75 * 5120 * 2 / 230e9)
    shared_s = (seconds(plan) - 8e-3) / 4
    assert cost.step(8, 8, 8 * 256, 8 * 256) == pytest.approx(8e-3 + sums_s + shared_s, rel=1e-9)


@pytest.mark.parametrize("machine", HARDWARE.values(), ids=lambda machine: machine.name)
def test_more_work_never_takes_less(machine: Hardware) -> None:
    def increasing(plans: list[Plan]) -> bool:
        times = [seconds(plan, machine=machine) for plan in plans]
        return times == sorted(times) and times[0] < times[-1]

    assert increasing([decodes(n, context=300) for n in (1, 2, 8, 64, 256, 1024)])
    assert increasing([decodes(16, context=n) for n in (1, 2, 64, 256, 2048)])
    assert increasing([prompt(n) for n in (1, 16, 256, 257, 1024, 2048)])
    assert increasing([prompt(100, computed=n) for n in (0, 16, 1024, 1948)])


def sizes(tokens: int, positions: int, sequences: int) -> float:
    """A step time from which all three arguments can be read off."""
    return tokens + 1e4 * positions + 1e9 * sequences


@pytest.mark.parametrize("name", ["a100-40gb", "h100-80gb"])
@pytest.mark.parametrize("step_times", [None, sizes])
def test_padding_costs_what_live_tokens_cost(name: str, step_times: StepTimes | None) -> None:
    def cost(plan: Plan) -> float:
        executor = SimulatedExecutor(OPT, hardware(name), step_times=step_times)
        executor.launch(plan, {})
        return executor.now

    short = prompt(100)
    short.padding = dict.fromkeys(short.work, (600, 600))
    assert cost(short) == pytest.approx(cost(prompt(700)), rel=1e-12)
    narrow = decodes(2, context=100)
    narrow.padding = dict.fromkeys(narrow.work, (0, 800))
    assert cost(narrow) == pytest.approx(cost(decodes(2, context=900)), rel=1e-12)
    ended = sequence(70, pending=0)  # it still has a row, 900 positions wide
    narrow.padding[ended] = (1, 830)
    assert cost(narrow) == pytest.approx(cost(decodes(3, context=900)), rel=1e-12)
    assert cost(narrow) > cost(decodes(2, context=900))


def test_a_copy_reads_and_writes_device_memory() -> None:
    plan = decodes(8, context=256)
    before = seconds(plan)
    plan.moves = [Move("copy", 0, 1, 16), Move("copy", 2, 3, 5)]
    assert seconds(plan) - before == pytest.approx(2 * 21 * 819_200 / 1.2e12, rel=1e-9)


def test_moves_to_and_from_the_host() -> None:
    def swap(tokens: int, block: int) -> float:
        return seconds(Plan(moves=[Move("out", 0, 0, tokens), Move("in", 0, 0, tokens)]), block=block)

    transfers_s = 2 * 16 * 2 * 40 * 2.9e-6  # out and in, 16 blocks, K and V of 40 layers
    assert swap(256, block=16) == pytest.approx(transfers_s + 2 * 256 * 819_200 / 25e9, rel=1e-9)
    assert swap(250, block=16) == pytest.approx(transfers_s + 2 * 250 * 819_200 / 25e9, rel=1e-9)  # the last in part
    assert swap(256, block=1) == pytest.approx(0.135, rel=0.01)  # the paper's figure 19a, read off
    small_to_large = [swap(256, block) for block in (1, 2, 4, 16, 64, 256)]
    assert small_to_large == sorted(small_to_large, reverse=True)
    mapped_s = seconds(Plan(moves=[Move("map", 0, 0, 128), Move("unmap", 0, 0, 128)]))
    assert mapped_s == pytest.approx(transfers_s / 2, rel=1e-9)  # calls, no traffic


def test_the_clock_adds_steps_and_jumps() -> None:
    executor: Executor = SimulatedExecutor(OPT, A100)
    one, other = decodes(8, context=256), prompt(500)
    executor.launch(one, {})
    executor.collect()
    executor.launch(other, {})
    executor.collect()
    assert executor.now == pytest.approx(seconds(one) + seconds(other), rel=1e-12)
    executor.wait(3.0)
    assert executor.now == 3.0
    executor.wait(1.0)  # the past
    assert executor.now == 3.0
    executor.launch(Plan(), {})
    assert executor.now == 3.0
    assert executor.collect() == {}
    for never in (math.inf, math.nan):
        with pytest.raises(RuntimeError, match="nothing is left to wait for"):
            executor.wait(never)


def test_tokens_are_sampled_where_all_pending_ones_are_computed() -> None:
    executor = SimulatedExecutor(OPT, A100)
    decode, whole, chunk = sequence(255), sequence(0, 100), sequence(64, 200)
    executor.launch(Plan({decode: 1, whole: 100, chunk: 64}), {})
    executor.launch(Plan({chunk: 200}), {})
    first = executor.collect()
    assert first == {decode: [Sampled(0, 0.0)], whole: [Sampled(0, 0.0)]}
    assert executor.collect() == {chunk: [Sampled(0, 0.0)]}


def measured(count: int = 400) -> np.ndarray:
    """Sizes of steps with prompts and decodes: tokens, positions, sequences."""
    random = np.random.default_rng(0)
    sequences = random.integers(1, 64, count)
    prompts = np.where(random.random(count) < 0.3, random.integers(0, 2048, count), 0)
    return np.stack([sequences + prompts, sequences * random.integers(16, 1024, count) + prompts, sequences], axis=1)


def test_the_fit_recovers_known_coefficients() -> None:
    steps = measured()
    fitted = FittedCost.fit(np.column_stack([steps, 9e-3 + steps @ [30e-6, 0.3e-6, 20e-6]]))
    assert (fitted.position_s, fitted.sequence_s) == pytest.approx((0.3e-6, 20e-6), rel=1e-6)
    assert fitted.curve(700) == pytest.approx(9e-3 + 700 * 30e-6, rel=1e-6)
    assert fitted.residual_s < 1e-12
    assert fitted.steps == 400
    assert fitted(100, 5000, 20) == pytest.approx(9e-3 + 3e-3 + 1.5e-3 + 0.4e-3)
    assert fitted(9000, 0, 0) == pytest.approx(9e-3 + 270e-3)  # beyond all that was measured
    assert fitted(1, 0, 0) == fitted.curve_s[0]


def test_the_fit_reports_what_noise_leaves() -> None:
    steps = measured(4000)
    times = 20e-3 + steps @ [30e-6, 0.3e-6, 20e-6]
    noise = np.random.default_rng(1).normal(0, 1e-3, len(steps))
    fitted = FittedCost.fit(np.column_stack([steps, times + noise]))
    assert fitted.residual_s == pytest.approx(1e-3, rel=0.05)
    assert fitted.error == pytest.approx(1e-3 * math.sqrt(2 / math.pi) / times.mean(), rel=0.05)


def test_the_fit_follows_the_knee_of_the_cost_model() -> None:
    cost = CostModel(OPT, hardware("h100-80gb"))
    times = [cost.step(t, s, p, p) for t, p, s in measured(800).tolist()]
    half = measured(800)[::2]
    fitted = FittedCost.fit(np.column_stack([half, times[::2]]))
    assert fitted.error < 0.01
    held_out = [fitted(*step) for step in measured(800)[1::2].tolist()]
    assert held_out == pytest.approx(times[1::2], rel=0.05)
    knee = cost.weights_s / cost.token_s
    flat, steep = fitted.curve(knee / 2) - fitted.curve(knee / 8), fitted.curve(4 * knee) - fitted.curve(2 * knee)
    assert flat < 0.2 * steep


def stairs(tokens: np.ndarray) -> np.ndarray:
    """Of a CPU whose products of small matrices cost a third more from 4 rows on, as measured on one."""
    return 40e-3 + 3e-3 * tokens + 15e-3 * (tokens >= 4) + 1e-6 * np.maximum(0, tokens - 8)


def test_the_fit_follows_stairs() -> None:
    steps = measured(4000)
    decodes = steps[:, 0] == steps[:, 2]
    steps[decodes, 0] = steps[decodes, 2] = 1 + steps[decodes, 2] % 12
    fitted = FittedCost.fit(np.column_stack([steps, stairs(steps[:, 0])]))
    for tokens in (1, 2, 3, 4, 6, 8, 10):
        assert fitted(tokens, 0, tokens) == pytest.approx(stairs(np.array(tokens)), rel=0.01)


def test_a_few_large_steps_do_not_make_the_last_slope() -> None:
    steps = np.array([(t, 10 * t, 1) for t in range(1, 101)] + [(200, 2000, 1)] * 3)
    times = 1e-2 + 1e-4 * steps[:, 0]
    times[-3:] += 1.0  # disturbed
    fitted = FittedCost.fit(np.column_stack([steps, times]))
    assert fitted.knots[-1] == 200
    assert fitted.knots[-2] <= 64


def test_the_fit_has_no_negative_coefficient() -> None:
    steps = measured()
    fitted = FittedCost.fit(np.column_stack([steps, 50e-3 + steps @ [30e-6, 0, -10e-6]]))
    assert fitted.curve_s[0] >= 0
    assert np.diff(fitted.curve_s).min() >= 0
    assert fitted.position_s >= 0
    assert fitted.sequence_s == 0 < fitted.residual_s


@pytest.mark.parametrize("seed", range(20))
def test_the_solution_is_the_best_without_negatives(seed: int) -> None:
    """By the conditions of Karush, Kuhn and Tucker, with columns that repeat, add up, or are zero."""
    random = np.random.default_rng(seed)
    columns = np.abs(random.normal(size=(40, 12))) if seed % 2 else random.normal(size=(40, 12))
    columns[:, 3], columns[:, 5], columns[:, 7] = columns[:, 4], columns[:, 1] + columns[:, 2], 0
    target = random.normal(size=40) + seed % 3 * columns[:, :6].sum(axis=1)
    solution = _non_negative(columns, target)
    gradient = columns.T @ (target - columns @ solution)
    assert solution.min() >= 0
    assert gradient.max() < 1e-6
    assert gradient[solution > 0] == pytest.approx(0, abs=1e-6)


def test_steps_of_one_size_have_a_flat_curve() -> None:
    fitted = FittedCost.fit([(1, 10 * i, 1, 1e-2 + 1e-5 * i) for i in range(50)])
    assert fitted(1, 100, 1) == fitted(7, 100, 1) == pytest.approx(1e-2 + 1e-4)


@pytest.mark.parametrize("rows", [[], [(1, 2, 1, 0.1)] * 5, [(1, 2, 1, math.nan)] * 9, [(1, 2, 0.1)] * 9])
def test_the_fit_refuses_what_is_no_measurement(rows: list[tuple[float, ...]]) -> None:
    with pytest.raises(InputError, match="give at least 6"):
        FittedCost.fit(rows)


def test_measured_step_times_replace_the_model_but_not_the_moves() -> None:
    executor = SimulatedExecutor(OPT, A100, step_times=sizes)
    move = Move("in", 0, 1, 16)
    executor.launch(Plan(moves=[move]), {})
    moved_s = CostModel(OPT, A100).move(move)
    assert executor.now == moved_s
    executor.launch(decodes(8, context=250), {})
    assert executor.now == moved_s + sizes(8, 2000, 8)
