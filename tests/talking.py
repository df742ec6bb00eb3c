"""Models that talk, for the tests of what users see: a tiny random Llama with a tokenizer, and a parrot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab.models import KVShape, Packed

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Füchse springen über träge Hunde; là-bas, l'été, ça brûle.",
    "A door opens. A door closes. Nobody comes in, nobody goes out.",
    "def f(x):\n    return x + 1\n\n",
]
END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'clown' %}{{ raise_exception('no clowns') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's: an emoji is four tokens or fewer, none of them a character."""
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=special[1:])
    fast.chat_template = TEMPLATE
    return fast


def sentencepiece() -> PreTrainedTokenizerFast:
    """BPE with bytes to fall back on and spaces that belong to the word behind them, as Llama's."""
    trained = Tokenizer(kinds.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(SENTENCES[:3], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    vocabulary = {END: 0, "<unk>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for token in trained.get_vocab():
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(kinds.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")


def tiny_llama(folder: Path) -> LlamaForCausalLM:
    """Saved with its tokenizer, so that the folder's name is a model's name."""
    tokenizer = byte_level()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


class Parrot:
    """Whatever the prompt says, position p + 1 is the token `script[p + 1]`: a text that a test has written."""

    name = "parrot"
    kv = KVShape(1, 1, 4, 4)
    dtype = torch.float32
    device = torch.device("cpu")
    weight_bytes = 0
    capturable = False

    def __init__(self, tokenizer: Any, script: list[int]) -> None:
        self.script = torch.tensor(script)
        self.vocab_size = len(tokenizer)
        self.max_length = len(script)
        self.eos = (tokenizer.eos_token_id,)

    def logits(self, batch: Packed, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        following = self.script[(batch.positions[batch.sampled] + 1) % len(self.script)]
        return torch.nn.functional.one_hot(following, self.vocab_size).float() * 9
