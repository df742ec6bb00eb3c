"""`kernels` is also the import name of a distribution by Hugging Face, which transformers imports if it is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import for_device

ROOT = Path(__file__).parents[2]

GENERATE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
import kernels.reference
"""

FAKE = """
__version__ = "0.16.2"
from .layer import CUDAProperties
"""


def run(code: str, cwd: Path, *paths: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_transformers_generates_with_ours_on_the_path(place: str, tmp_path: Path) -> None:
    run(GENERATE, ROOT if place == "root" else tmp_path, ROOT)


def test_importing_ours_is_light() -> None:
    code = "import kernels, sys; print({'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules))"
    assert run(code, ROOT, ROOT).strip() == "set()"


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_theirs_and_ours_side_by_side(place: str, tmp_path: Path) -> None:
    """With theirs installed (a stand-in with the name transformers asks for), one import serves both."""
    theirs = tmp_path / "site"
    for name, content in (
        ("kernels/__init__.py", FAKE),
        ("kernels/layer.py", "class CUDAProperties: pass"),
        ("kernels-0.16.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.2\n"),
        ("kernels-0.16.2.dist-info/RECORD", "kernels/__init__.py,,\nkernels/layer.py,,\n"),
    ):
        path = theirs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    code = "from kernels import CUDAProperties, layer; import kernels; "
    code += "print(kernels.__file__, kernels.for_device('cpu').__file__)"
    init, reference = run(code, ROOT if place == "root" else tmp_path, ROOT, theirs).split()
    assert Path(init).parent == Path(reference).parent == ROOT / "kernels"


def test_a_device_without_kernels_is_named() -> None:
    with pytest.raises(ValueError, match=r"'mps'.*'cpu' and 'cuda'"):
        for_device("mps")
