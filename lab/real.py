"""What a run on a real device needs: the model, loaded once for all runs of a process, its tokenizer, the device.

Imported only when a run asks for torch.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable
from functools import lru_cache

import torch

from lab.core import InputError
from lab.executors.cache import free_bytes
from lab.executors.torch import TorchExecutor
from lab.models import LanguageModel
from lab.models.device import check_device
from lab.models.loading import load, load_tokenizer
from lab.pool import PoolSize, pool_size

__all__ = ["TorchExecutor", "device_name", "encoder", "free_gpu_bytes", "gpus", "model", "pool", "release"]


@lru_cache(maxsize=1)
def model(name: str, device: str, dtype: str) -> LanguageModel:
    return load(name, device=device, dtype=getattr(torch, dtype))


def release() -> None:
    """Give back the memory of the model, which whoever asks next loads again."""
    model.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def encoder(name: str) -> Callable[[str], list[int]]:
    """Text of a user's turn to token ids, with the model's chat template where it has one."""
    if name.startswith("random"):
        raise InputError(f"model {name!r} has no tokenizer: take a workload of lengths (sharegpt), or a real model")
    tokenizer = load_tokenizer(name)

    def encode(text: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer.encode(text)
        turn = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=False)

    return encode


def pool(size: str, name: str, device: str, dtype: str, block: int) -> PoolSize:
    loaded = model(name, device, dtype)
    return pool_size(size, loaded.kv.bytes_per_token(loaded.dtype.itemsize), block, free_bytes(loaded.device))


def device_name(device: str) -> str:
    checked = check_device(device)
    if checked.type == "cuda":
        return torch.cuda.get_device_name(checked)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def free_gpu_bytes() -> int:
    """Free memory of the first GPU; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]
