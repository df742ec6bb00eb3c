"""Every architecture gives transformers' ordinary logits when prompts and decodes are mixed in one packed batch."""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import pytest
import torch
from tiny import ALTERNATING, VOCAB, fused, ordinary_logits, pair, tiny_config

from lab.core import Group, InputError, Plan, Request, Sequence
from lab.executors.batch import lay_out
from lab.executors.cache import KVCache
from lab.models import LanguageModel
from lab.models.architectures import PROVEN, REFUSED, check_architecture
from lab.models.families import FAMILIES, covers
from lab.models.packed import PackedModel

BLOCK = 4
TOLERANCE = 1e-4
# tokens that A and B compute: a prompt's chunk alone and beside a shorter one, mixtures with decodes, and one alone
STEPS = ((0, 3), (17, 2), (1, 4), (1, 1), (2, 3), (1, 0))
PAGED = ([5, 2, 9, 0, 11, 3], [7, 1, 14, 4])
CONTIGUOUS = (range(6, 12), range(1, 5))


class Pool(NamedTuple):
    cache: KVCache
    tables: dict[Sequence, Seq[int]]

    def logits(self, model: LanguageModel, plan: Plan) -> torch.Tensor:
        """Of every token of the step, [T, V], not only of those that are sampled from."""
        batch = lay_out(plan, self.tables, BLOCK).on(model.device)
        everything = batch._replace(sampled=torch.arange(len(batch.token_ids)))
        return model.logits(everything, self.cache.k, self.cache.v)


def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (22, 13)]
    return [Group(Request(i, 0.0, prompt)).live[0] for i, prompt in enumerate(prompts)]


def pool(model: LanguageModel, tables: Seq[Seq[int]], two: list[Sequence]) -> Pool:
    cache = KVCache(model.kv, 16, BLOCK, dtype=model.dtype, device=model.device, poison=True)
    return Pool(cache, dict(zip(two, tables, strict=True)))


def error(model: LanguageModel, expected: list[torch.Tensor], tables: Seq[Seq[int]], padded: bool = False) -> float:
    """Largest difference over all steps; `padded`: every step is a rectangle, and A's row goes on when it has ended."""
    two = sequences()
    memory = pool(model, tables, two)
    worst = 0.0
    for counts in STEPS:
        plan = Plan({s: n for s, n in zip(two, counts, strict=True) if n})
        if padded:
            width = max(counts)
            plan.padding = {s: (width - n, 30 - s.computed) for s, n in zip(two, counts, strict=True)}
        logits = memory.logits(model, plan)
        at = 0
        for s, n in plan.work.items():
            difference = logits[at : at + n] - expected[two.index(s)][s.computed : s.computed + n]
            worst = max(worst, difference.abs().max().item())
            s.computed += n
            at += n
    return worst


@pytest.mark.parametrize("kind", PROVEN)
def test_logits_are_transformers_own(kind: str) -> None:
    theirs, ours = pair(kind)
    expected = [ordinary_logits(theirs, s.tokens) for s in sequences()]
    assert error(ours, expected, PAGED) < TOLERANCE
    assert error(ours, expected, CONTIGUOUS) < TOLERANCE
    assert error(ours, expected, PAGED, padded=True) < TOLERANCE
    assert error(ours, expected, CONTIGUOUS, padded=True) < TOLERANCE


@pytest.mark.parametrize("kind", PROVEN)
def test_logits_depend_on_what_attention_reads(kind: str) -> None:
    """Otherwise the test above would prove nothing: one block of the context taken for another is seen."""
    theirs, ours = pair(kind)
    two = sequences()
    memory = pool(ours, PAGED, two)
    expected = ordinary_logits(theirs, two[0].tokens)
    memory.logits(ours, Plan({two[0]: 20, two[1]: 13}))
    two[0].computed = 20
    memory.tables[two[0]] = [5, 2, 9, 0, 1, 3]  # 1 is the other's
    wrong = memory.logits(ours, Plan({two[0]: 1}))
    assert (wrong[0] - expected[20]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("falcon", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
        ("mistral", {"sliding_window": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0]} | ALTERNATING),
        ("phi3", {"sliding_window": 8}),
        ("mixtral", {"sliding_window": 8}),
        ("starcoder2", {"sliding_window": None}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("opt", {"do_layer_norm_before": False}),
    ],
)
def test_variants(kind: str, change: dict[str, object]) -> None:
    theirs, ours = pair(kind, **change)
    expected = [ordinary_logits(theirs, s.tokens) for s in sequences()]
    assert error(ours, expected, PAGED) < TOLERANCE


SCALED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, {}) for kind in FAMILIES),
        ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": SCALED | {"original_max_position_embeddings": 32}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"sliding_window": 4}),  # which transformers ignores
        ("opt", {"sliding_window": 4}),
        ("gpt2", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 1}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("opt", {"enable_bias": False, "activation_function": "gelu"}),
        ("opt", {"tie_word_embeddings": False}),
    ],
)
def test_the_decoder_gives_transformers_logits(kind: str, change: dict[str, object]) -> None:
    theirs, ours = fused(kind, **change)
    expected = [ordinary_logits(theirs, s.tokens) for s in sequences()]
    for tables in (PAGED, CONTIGUOUS):
        for padded in (False, True):
            assert error(ours, expected, tables, padded) < TOLERANCE


def test_the_decoder_takes_the_weights_and_keeps_no_second_copy() -> None:
    module = pair("qwen3")[1].module
    weights = sum({p.data_ptr(): p.nbytes for p in module.parameters()}.values())
    ours = fused("qwen3")[1]
    assert ours.weight_bytes == weights
    assert ours.kv == (2, 2, 16, 16)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}}),
        ("phi3", {}),
    ],
)
def test_what_the_table_cannot_say_is_left_to_transformers_modules(kind: str, change: dict[str, object]) -> None:
    assert not covers(tiny_config(kind, **change))


def test_dead_rows_leave_the_pool_as_it_is() -> None:
    _, ours = pair("llama")
    two = sequences()
    plain, padded = pool(ours, PAGED, two), pool(ours, PAGED, two)
    work = {two[0]: 5, two[1]: 2}
    without = plain.logits(ours, Plan(dict(work)))
    with_dead = padded.logits(ours, Plan(dict(work), padding={two[0]: (0, 9), two[1]: (3, 12)}))
    assert with_dead.shape[0] == 7 + 3
    torch.testing.assert_close(with_dead[:7], without, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded.cache.k, plain.cache.k, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(padded.cache.v, plain.cache.v, atol=1e-5, rtol=0, equal_nan=True)


def test_k_and_v_of_different_width() -> None:
    _, ours = pair("deepseek_v3")
    assert ours.kv == (2, 4, 24, 16)
    assert ours.kv.bytes_per_token(4) == 2 * 4 * (24 + 16) * 4


def test_the_wanted_rows_alone_go_through_the_head() -> None:
    _, ours = pair("llama")
    two = sequences()
    memory = pool(ours, PAGED, two)
    rows = lay_out(Plan({two[0]: 22, two[1]: 5}), memory.tables, BLOCK)
    assert rows.sampled == [two[0]]  # B's prompt goes on
    batch = rows.on(ours.device)
    assert batch.sampled.tolist() == [21]
    assert ours.logits(batch, memory.cache.k, memory.cache.v).shape == (1, VOCAB)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_by_name(kind: str) -> None:
    class Config:
        model_type = kind

    with pytest.raises(InputError, match=rf"architecture {kind} .*: choose one of llama") as caught:
        check_architecture(Config(), "somebody/theirs")
    assert "\n" not in str(caught.value)


def test_refused_for_what_the_configuration_says() -> None:
    with pytest.raises(InputError, match=r"'bert' is unknown: .*compared with transformers"):
        check_architecture(tiny_config("bert"), "mine")
    with pytest.raises(InputError, match="alibi=True"):
        check_architecture(tiny_config("falcon", new_decoder_architecture=False, alibi=True), "mine")
    with pytest.raises(InputError, match="use_bidirectional_attention=True"):
        check_architecture(tiny_config("gemma3_text", use_bidirectional_attention=True), "mine")
    config = tiny_config("llama")
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(InputError, match="chunked_attention"):
        check_architecture(config, "mine")


def test_transformers_must_take_our_attention() -> None:
    theirs, _ = pair("llama")
    with pytest.raises(AssertionError, match="kept the attention 'eager'"):
        PackedModel(theirs, "mine")
