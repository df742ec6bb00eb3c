"""Weights on disk, looked at before they are loaded: what is missing, truncated or corrupt is said in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lab.core import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
GGUF_VERSIONS = (2, 3)


def check_folder(folder: Path) -> None:
    """A folder as transformers saves one: `config.json`, and safetensors in one file or in shards with an index."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model {str(folder)!r}: has no config.json: give a folder saved by transformers, or a GGUF file"
        )
    read_json(folder / "config.json")
    if (folder / INDEX).is_file():
        _check_shards(folder)
    elif (folder / SINGLE).is_file():
        tensor_names(folder / SINGLE)
    else:
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        rule = f"holds {found}, but neither {SINGLE} nor {INDEX}"
        raise InputError(f"model {str(folder)!r}: {rule}: convert it with transformers' save_pretrained")


def _check_shards(folder: Path) -> None:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{str(folder / INDEX)!r}: has no weight_map, so the shards cannot be found: fetch it again")
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise InputError(f"{str(folder / shard)!r}: named in {INDEX} but missing: fetch this shard")
        there = tensor_names(folder / shard)
        absent = sorted(name for name, at in weight_map.items() if at == shard and name not in there)
        if absent:
            raise InputError(
                f"{str(folder / shard)!r}: lacks {absent[0]!r}, which {INDEX} puts there: fetch this shard again"
            )


def tensor_names(path: Path) -> set[str]:
    """Of a safetensors file, whose header and length are checked by reading it."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{str(path)!r}: not a whole safetensors file ({first_line(error)}): fetch it again"
        ) from error


def read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{str(path)!r}: not readable as JSON ({first_line(error)}): fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r}: holds a {type(content).__name__}, not an object: fetch it again")
    return content


def first_line(error: BaseException) -> str:
    """Of an error's message, short enough to stand inside another line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else ""
    return text[:160] or type(error).__name__


def check_gguf(path: Path) -> None:
    """The first 8 bytes: what else is wrong shows while the file is parsed."""
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8 or head[:4] != b"GGUF":
        raise InputError(f"model {str(path)!r}: does not start with 'GGUF', as GGUF files do: fetch it again")
    (version,) = struct.unpack("<I", head[4:])
    if version not in GGUF_VERSIONS:
        raise InputError(f"model {str(path)!r}: GGUF version {version}, but only 2 and 3 can be read: convert it again")
