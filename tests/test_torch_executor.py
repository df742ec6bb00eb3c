"""The real executor: Moves, batches, rectangles, texts, time; on a GPU where there is one."""

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lab.allocators.paged import Paged
from lab.core import Group, InputError, Limits, Move, Plan, Request, SamplingParams, Sequence
from lab.engine import Engine
from lab.executors.batch import lay_out
from lab.executors.cache import HOST_SLAB, BlockMove, KVCache, free_bytes, independent, split
from lab.executors.torch import TorchExecutor, compile_counter
from lab.models import KVShape, LanguageModel
from lab.models.checkpoints import fuse
from lab.models.packed import PackedModel, implementation
from lab.schedulers.continuous import Continuous

torch.set_num_threads(1)
BLOCK = 4
SHAPE = KVShape(2, 1, 3, 2)
CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where texts are computed


def model_of(attention: str) -> Any:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return model_of("eager")


@pytest.fixture(scope="module", params=["modules", "fused", "replayed"])
def model(theirs: Any, request: pytest.FixtureRequest) -> LanguageModel:
    """transformers' modules; our decoder; our decoder in steps that are prepared once, as on a GPU."""
    if request.param == "modules":
        return PackedModel(model_of(implementation(theirs.config)).to(DEVICE), "tiny")
    return fuse(model_of("eager").to(DEVICE), request.param)


def executor_for(model: LanguageModel, tokens: int, poison: bool = False) -> TorchExecutor:
    return TorchExecutor(model, tokens, BLOCK, poison=poison, replays=model.name == "replayed")


# -- moves ------------------------------------------------------------------------------------------------------------


def marked_cache(num_blocks: int) -> KVCache:
    """Every block holds a number of its own."""
    cache = KVCache(SHAPE, num_blocks, BLOCK, dtype=torch.float32, device=CPU)
    numbers = torch.arange(1.0, num_blocks + 1).view(1, -1, 1, 1, 1)
    cache.k += numbers
    cache.v -= numbers
    return cache


def one_at_a_time(moves: Seq[Move], num_blocks: int) -> tuple[list[float], dict[int, float]]:
    """The number in each block, and in each host block, when each move is over before the next begins."""
    device = [float(i + 1) for i in range(num_blocks)]
    host: dict[int, float] = {}
    for move in moves:
        n = -(-move.tokens // BLOCK)
        sources, targets = range(move.src, move.src + n), range(move.dst, move.dst + n)
        held = [host[i] if move.kind == "in" else device[i] for i in sources]
        for i, number in zip(targets, held, strict=True):
            if move.kind == "out":
                host[i] = number
            else:
                device[i] = number
    return device, host


@st.composite
def move_lists(draw: st.DrawFn) -> list[Move]:
    moves: list[Move] = []
    on_host: set[int] = set()
    for _ in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from(["copy", "out", "in"] if on_host else ["copy", "out"]))
        n = draw(st.integers(1, 4))
        src, dst = draw(st.integers(0, 12 - n)), draw(st.integers(0, 12 - n))
        if kind == "in":
            src = draw(st.sampled_from(sorted(on_host)))
            n = next(i for i in range(1, 99) if i == n or src + i not in on_host)
            dst = min(dst, 12 - n)
        if kind == "out":
            dst += draw(st.sampled_from([0, HOST_SLAB - 6, 3 * HOST_SLAB]))
            on_host.update(range(dst, dst + n))
        moves.append(Move(kind, src, dst, n * BLOCK - draw(st.integers(0, BLOCK - 1))))  # type: ignore[arg-type]
    return moves


@given(move_lists())
def test_moves_have_the_effect_of_one_after_the_other(moves: list[Move]) -> None:
    cache = marked_cache(12)
    cache.perform(moves)
    device, host = one_at_a_time(moves, 12)
    assert cache.k.amax((0, 2, 3, 4)).tolist() == cache.k.amin((0, 2, 3, 4)).tolist() == device
    assert (-cache.v).amax((0, 2, 3, 4)).tolist() == (-cache.v).amin((0, 2, 3, 4)).tolist() == device
    before = cache.k.clone(), cache.v.clone()
    for block_id, number in host.items():  # bring each back to see it
        cache.perform([Move("in", block_id, 0, BLOCK)])
        assert set(cache.k[:, 0].flatten().tolist()) == {number}
        assert set(cache.v[:, 0].flatten().tolist()) == {-number}
    assert torch.equal(cache.k[:, 1:], before[0][:, 1:])
    assert torch.equal(cache.v[:, 1:], before[1][:, 1:])


@given(move_lists())
def test_no_batch_depends_on_its_own_order(moves: list[Move]) -> None:
    batches = list(independent(split(moves, BLOCK)))
    assert [move for batch in batches for move in batch] == list(split(moves, BLOCK))
    assert all(batches)
    for batch in batches:
        written = [move.written for move in batch]
        assert len(set(written)) == len(written)
        assert not set(written) & {move.read for move in batch}


def test_moves_are_batched_as_far_as_they_can_be() -> None:
    moves = [Move("copy", 0, 4, 3 * BLOCK), Move("out", 7, 0, 1), Move("copy", 4, 8, 1), Move("in", 0, 9, 2)]
    sizes = [len(batch) for batch in independent(split(moves, BLOCK))]
    assert sizes == [4, 2]  # block 4 was written, and so was host block 0
    assert list(split([Move("copy", 0, 1, 2 * BLOCK)], BLOCK)) == [BlockMove("copy", 1, 2), BlockMove("copy", 0, 1)]
    assert list(split([Move("copy", 3, 3, BLOCK)], BLOCK)) == []  # nothing to do


def test_host_memory_is_made_when_needed() -> None:
    cache = marked_cache(4)
    assert cache.host_nbytes == 0
    per_block = cache.nbytes // 4
    cache.perform([Move("out", 0, 1000 * HOST_SLAB, BLOCK)])
    assert cache.host_nbytes == HOST_SLAB * per_block
    assert cache.nbytes == 4 * BLOCK * SHAPE.bytes_per_token(4)


def test_free_memory_is_unknown_on_a_cpu() -> None:
    assert free_bytes(CPU) is None


def test_what_torch_keeps_for_itself_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 60 bytes is gone, of which the GPU was told nothing; 10 are the model's."""
    gpu = torch.device("cuda:1")
    held = {"mem_get_info": (30, 100), "memory_reserved": 70, "memory_allocated": 10}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, {gpu: value}.__getitem__)
    assert free_bytes(gpu) == 90


class Staged(TorchDispatchMode):
    """Notes how many blocks each gather and each scatter takes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[str, list[int]] = {"index_select": [], "index_copy_": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.overloadpacket.__name__) in self.blocks:
            self.blocks[name].append(len(args[2]))
        return func(*args, **(kwargs or {}))


def test_swapping_stages_a_slab_at_a_time() -> None:
    cache = marked_cache(40)
    before = cache.k.clone()
    first = 3 * HOST_SLAB - 1
    with Staged() as staged:
        cache.perform([Move("out", 0, first, 40 * BLOCK)])
        cache.k.zero_()
        cache.perform([Move("in", first, 0, 40 * BLOCK)])
    expected = [blocks for blocks in (1, 16, 16, 7) for _ in ("K", "V")]
    assert staged.blocks == {"index_select": expected, "index_copy_": expected}
    assert torch.equal(cache.k, before)


# -- batches ----------------------------------------------------------------------------------------------------------


def sequence(prompt: Seq[int], request: int = 0, computed: int = 0, **sampling: Any) -> Sequence:
    s = Group(Request(request, 0.0, prompt, sampling=SamplingParams(**sampling))).live[0]
    s.computed = computed
    return s


def test_a_rectangle() -> None:
    """The picture in lab/executors/batch.py, and an ended row that is in no work."""
    a, b, ended = sequence([11, 12, 13, 14]), sequence([1, 2, 3, 4, 5, 6], computed=5), sequence([9] * 7, computed=6)
    tables = {a: [3], b: [7, 2], ended: [4, 5]}
    rows = lay_out(Plan({a: 3, b: 1}, padding={b: (2, 4), ended: (3, 5)}), tables, BLOCK)
    packed = rows.on(CPU)
    ragged = packed.ragged
    assert packed.token_ids.tolist() == [11, 12, 13, 6] + [0] * 5
    assert packed.positions.tolist() == [0, 1, 2, 5] + [0] * 5
    assert packed.slots.tolist() == [12, 13, 14, 2 * BLOCK + 1] + [-1] * 5
    assert ragged.starts.tolist() == [0, 3, 4, 6, 9]
    assert ragged.firsts.tolist() == [0, 5, 6, 6]
    assert ragged.lengths.tolist() == [3, 6, 6, 6]
    assert ragged.dead.tolist() == [0, 4, 4, 5]
    assert ragged.paged
    assert rows.sampled == [b]
    assert packed.sampled.tolist() == [3]


def test_extents_need_no_table() -> None:
    a, b = sequence([1, 2, 3]), sequence([4, 5])
    batch = lay_out(Plan({a: 3, b: 2}), {a: range(2, 4), b: range(7, 8)}, BLOCK).on(CPU)
    mixed = lay_out(Plan({a: 3, b: 2}), {a: range(2, 4), b: [7]}, BLOCK).on(CPU)
    assert not batch.ragged.paged
    assert mixed.ragged.paged
    assert batch.slots.tolist() == mixed.slots.tolist() == [8, 9, 10, 28, 29]


def test_a_plan_without_work() -> None:
    assert not lay_out(Plan(), {}, BLOCK).rows


# -- texts ------------------------------------------------------------------------------------------------------------


def tables_for(sequences: Seq[Sequence], blocks: int = 8) -> dict[Sequence, Seq[int]]:
    order = torch.randperm(len(sequences) * blocks, generator=torch.Generator().manual_seed(0)).tolist()
    return {s: order[i * blocks : (i + 1) * blocks] for i, s in enumerate(sequences)}


def step(executor: TorchExecutor, tables: dict[Sequence, Seq[int]], work: dict[Sequence, int], **plan: Any) -> None:
    executor.launch(Plan(work, **plan), tables)
    for s, tokens in work.items():
        s.computed += tokens
    for s, sampled in executor.collect().items():
        s.tokens += [one.token for one in sampled]


def prompts() -> list[list[int]]:
    return [[5, 9, 33, 71, 8], [44, 2, 17], [3, 3, 90, 12, 60, 61, 62, 7, 1]]


def generate(theirs: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def run(model: LanguageModel, cap: int, later: int, padded: bool = False, **sampling: Any) -> list[list[int]]:
    """Twelve tokens for each prompt, at most `cap` a step, each prompt starting `later` steps after the one before."""
    executor = executor_for(model, 24 * BLOCK, poison=True)
    sequences = [sequence(prompt, i, **sampling) for i, prompt in enumerate(prompts())]
    tables = tables_for(sequences)
    steps = 0
    while any(s.outputs < 12 for s in sequences):
        ready = [s for i, s in enumerate(sequences) if s.outputs < 12 and steps >= i * later]
        work = {s: min(cap, s.pending) for s in ready}
        padding = {s: (1, 3) for s in sequences if s.computed} if padded else {}
        step(executor, tables, work, padding=padding)
        steps += 1
    return [s.tokens for s in sequences]


@pytest.mark.parametrize(("cap", "later", "padded"), [(100, 0, False), (100, 3, True), (2, 1, False), (1, 2, True)])
def test_greedy_text_is_that_of_generate(model: LanguageModel, theirs: Any, cap: int, later: int, padded: bool) -> None:
    assert run(model, cap, later, padded) == [generate(theirs, prompt, 12) for prompt in prompts()]


def test_sampled_text_is_the_same_in_any_company(model: LanguageModel) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "seed": 11}
    first = run(model, 100, 0, **settings)
    assert run(model, 2, 5, True, **settings) == first
    assert run(model, 100, 0, **settings | {"seed": 12}) != first


def test_text_survives_copies_and_a_stay_in_host_memory(model: LanguageModel, theirs: Any) -> None:
    executor = executor_for(model, 24 * BLOCK, poison=True)
    s = sequence(prompts()[2])
    other = sequence([1] * 20, 1)
    tables: dict[Sequence, Seq[int]] = {s: [5, 6, 7, 8], other: [9, 10, 11, 12, 13]}
    step(executor, tables, {s: 9})
    tables[s] = [0, 1, 2, 3]
    step(executor, tables, {s: 1}, moves=[Move("copy", 5, 0, 9)])
    tables[other] = [0, 1, 2, 3, 4, 17]  # over what s had
    step(executor, tables, {other: 20}, moves=[Move("out", 0, 30, 10)])
    tables[s] = [20, 14, 15, 16]
    moves = [Move("in", 31, 14, 6), Move("in", 30, 20, 4)]
    step(executor, tables, {s: 1, other: 1}, moves=moves)
    for _ in range(4):
        step(executor, tables, {s: 1})
    assert s.tokens == generate(theirs, prompts()[2], 7)


def test_two_steps_in_flight(model: LanguageModel, theirs: Any) -> None:
    """The second is launched before the first's tokens are known; they stand as -1."""
    executor = executor_for(model, 24 * BLOCK, poison=True)
    sequences = [sequence(prompt, i) for i, prompt in enumerate(prompts())]
    tables = tables_for(sequences)
    work = {s: s.pending for s in sequences}
    executor.launch(Plan(dict(work)), tables)
    for _ in range(6):
        for s, tokens in work.items():
            s.computed += tokens
            s.tokens.append(-1)
        work = dict.fromkeys(reversed(sequences), 1)
        executor.launch(Plan(dict(work)), tables)
        for s, sampled in executor.collect().items():
            s.tokens[-1] = sampled[0].token
    assert set(executor.collect()) == set(sequences)
    assert [s.tokens for s in sequences] == [generate(theirs, prompt, 6) for prompt in prompts()]


def served(model: LanguageModel, preemption: str, depth: int) -> tuple[dict[int, list[list[int]]], int, int]:
    """The outputs of requests in tight memory, how often one was preempted, and most steps in flight."""
    memory = Paged(16 * BLOCK, BLOCK, Limits(tokens=16, length=60))
    scheduler = Continuous(memory, watermark=0.0, preemption=preemption)
    executor = executor_for(model, memory.capacity, poison=True)
    drawn = {"max_tokens": 14, "temperature": 1.0, "seed": 3, "stop": tuple(range(8))}
    kinds: list[dict[str, Any]] = [{"max_tokens": 20}, drawn, drawn | {"n": 3}, {"max_tokens": 6, "beams": 2, "n": 2}]
    requests = [Request(i, 0.0, prompts()[i % 3], None, SamplingParams(**kinds[i % 4])) for i in range(12)]
    groups: list[Group] = []
    engine = Engine(scheduler, executor, on_end=groups.append, eos=(90, 91, 92), depth=depth)
    in_flight: list[int] = []
    engine.run(requests, go_on=lambda: in_flight.append(len(engine.flights)) or True)  # type: ignore[func-returns-value]
    assert memory.idle().free == memory.capacity
    return {g.request.id: g.outputs() for g in groups}, sum(g.preemptions for g in groups), max(in_flight)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_text_is_the_same_with_a_step_in_flight(model: LanguageModel, preemption: str) -> None:
    texts, preemptions, in_flight = served(model, preemption, depth=0)
    assert in_flight == 0
    assert preemptions
    assert len({len(output) for outputs in texts.values() for output in outputs}) > 5, "some are stopped, some not"
    again, preemptions, in_flight = served(model, preemption, depth=1)
    assert in_flight == 1
    assert preemptions
    assert again == texts


def test_tables_are_read_at_launch_only(model: LanguageModel) -> None:
    executor = executor_for(model, 24 * BLOCK, poison=True)
    s = sequence(prompts()[0])
    tables: dict[Sequence, Seq[int]] = {s: [3, 4]}
    executor.launch(Plan({s: 5}), tables)
    tables.clear()
    assert list(executor.collect()) == [s]


def test_logprobs_are_those_of_the_model(model: LanguageModel, theirs: Any) -> None:
    executor = executor_for(model, 24 * BLOCK)
    s, other = sequence(prompts()[0], logprobs=3, temperature=0.7), sequence(prompts()[1], 1, logprobs=1)
    executor.launch(Plan({s: 5, other: 3}), {s: [1, 2], other: [3]})
    (sampled,), (of_other,) = executor.collect().values()
    assert of_other.top == ((of_other.token, of_other.logprob),)
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompts()[0]])).logits[0, -1].log_softmax(-1)
    assert sampled.logprob == pytest.approx(expected[sampled.token].item(), abs=1e-4)
    best = expected.topk(3)
    assert [token for token, _ in sampled.top] == best.indices.tolist()
    assert [logprob for _, logprob in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_steps_that_sample_nothing(model: LanguageModel) -> None:
    executor = executor_for(model, 24 * BLOCK)
    s = sequence(prompts()[0])
    executor.launch(Plan({s: 2}), {s: [1, 2]})
    executor.launch(Plan(moves=[Move("out", 1, 0, 2)]), {})
    assert executor.collect() == {}
    assert executor.collect() == {}


# -- the executor itself ----------------------------------------------------------------------------------------------


def test_memory_and_compilations(model: LanguageModel) -> None:
    executor = executor_for(model, 50)
    assert executor.memory[:2] == (model.weight_bytes, 12 * BLOCK * model.kv.bytes_per_token(4))
    assert executor.memory.activations == (0 if DEVICE == "cuda" else None)
    assert not executor.compiled


def test_one_hook_counts_compilations_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64").knobs.runtime
    seen: list[str] = []
    monkeypatch.setattr(runtime, "jit_post_compile_hook", lambda key: seen.append(key))
    compile_counter.cache_clear()
    counter = compile_counter()
    assert compile_counter() is counter
    runtime.jit_post_compile_hook(key="kernel")
    assert counter.count == 1
    assert seen == ["kernel"]  # who listened before still does
    compile_counter.cache_clear()  # its hook goes with this test


class Event:
    def record(self, stream: str) -> None:
        self.stream = stream


def test_a_step_is_awaited_on_its_own_device(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_for(model, 50)
    executor.device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert vars(executor._mark()) == {"stream": "stream of cuda:1"}


@pytest.mark.parametrize(("tokens", "rule"), [(3, "smaller than one block of 4"), (2**50, r"more than \S+ has free")])
def test_pools_that_cannot_be(model: LanguageModel, tokens: int, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        executor_for(model, tokens)


def test_a_step_for_which_memory_is_short(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    executor = executor_for(model, 50)
    monkeypatch.setattr(model, "logits", full)
    rule = (
        r"^a step of 5 tokens in 1 rows: \S+ has no memory left for it beside weights .* GB, pool .* GB: make the pool"
    )
    s = sequence([1, 2, 3, 4, 5])
    with pytest.raises(InputError, match=rule):
        executor.launch(Plan({s: 5}), {s: [0, 1]})


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_waiting(model: LanguageModel) -> None:
    executor = executor_for(model, 50)
    assert timed(lambda: executor.wait(executor.now + 0.05)) >= 0.05
    assert timed(lambda: executor.wait(0.0)) < 1
    alarm = threading.Timer(0.05, executor.wake)
    alarm.start()
    assert timed(lambda: executor.wait(float("inf"))) < 5
    executor.wake()  # before anybody waits
    assert timed(lambda: executor.wait(executor.now + 5)) < 4
    assert timed(lambda: executor.wait(executor.now + 0.05)) >= 0.05  # one wake ends one wait


def test_the_clock_starts_again(model: LanguageModel) -> None:
    executor = executor_for(model, 50)
    executor.wait(0.02)
    before = executor.now
    executor.reset_clock()
    assert 0 <= executor.now < before
