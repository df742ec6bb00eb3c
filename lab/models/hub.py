"""Models from the Hugging Face Hub, or from the copy of it that an earlier visit left on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from lab.core import InputError
from lab.models.files import check_folder, first_line

FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # no weights in other formats


def from_hub(name: str) -> Path:
    """The folder of `organisation/name`."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # of the network, of the Hub, of the name
        reason = f"cannot be had from the Hub ({first_line(error)})"
        raise InputError(f"model {name!r}: {reason}: check name and network, or give a local folder") from error
    check_folder(folder)
    return folder
