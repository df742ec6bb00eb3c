"""The README's server and its curl, as printed, with SmolLM2."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from running import ROOT, Running

OWN = {"id", "created"}  # of each reply


def test_the_example_answers_as_printed(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition("<!-- serve -->")[2].partition("<!-- end -->")[0]
    start, curl, printed = (block.partition("\n")[2] for block in section.split("```")[1::2])
    assert start.split()[1:4] == ["-m", "lab.serve", "smollm2"]
    with Running(tmp_path, "smollm2", "--name", "smollm2", "--block", "16") as server:
        command = curl.replace("http://127.0.0.1:8000", server.url)
        told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=300).stdout
    assert shown(told) == shown(printed)


def shown(reply: str) -> Any:
    """What of it is the same each time."""
    told = json.loads(reply)
    assert told["usage"].pop("timing").keys() == {"queue_s", "ttft_s", "tpot_s", "e2e_s"}
    return {key: value for key, value in told.items() if key not in OWN}
