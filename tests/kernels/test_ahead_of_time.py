"""The kernels compile for GPUs that are not there, use their matrix instructions and fit into them.

In a process of its own: interpreted kernels cannot be compiled. With a fresh cache: a warm one would hide a failure.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64")
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "kernels.compile_ahead"]


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | changes


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    arguments = ["--json", "--dtype", "bfloat16", "--head-dim", "128", "--head-dim", "256"]
    changes = environment(TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, env=changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_compiles_and_fits(rows: list[dict], target: str) -> None:
    mine = [row for row in rows if row["target"] == target]
    names = "attention plan store copy_blocks norm rotate_and_store silu_and_mul row sample choose"
    assert {row["kernel"] for row in mine} == {f"{name}_kernel" for name in names.split()}
    assert {row["memory"] for row in mine} == {"paged", "contiguous", "all options", "-"}
    for row in mine:
        assert row["spills"] == 0, row
        assert row["shared"] <= row["shared_limit"], row


def test_attention_multiplies_with_matrix_instructions(rows: list[dict]) -> None:
    instructions = {"sm_90": ("wgmma", "mma.sync"), "gfx942": ("v_mfma",)}
    for row in rows:
        if row["kernel"] == "attention_kernel":
            assert row["matrix"].startswith(instructions[row["target"]]), row


def test_paged_and_contiguous_share_their_configuration(rows: list[dict]) -> None:
    """And the compiler keeps as much in flight for both: what waits in shared memory."""

    def configurations(memory: str) -> list[tuple]:
        columns = ("target", "head_dim", "tile", "warps", "stages", "shared")
        return [tuple(row[column] for column in columns) for row in rows if row["memory"] == memory]

    assert configurations("paged") == configurations("contiguous")


def test_decode_fits_into_less_shared_memory(tmp_path: Path) -> None:
    """99 KiB on sm_89."""
    script = """if True:
        from itertools import islice
        from kernels.compile_ahead import compile_all, parse_target, torch
        for row in islice(compile_all(parse_target("sm_89"), torch.bfloat16, [128]), 2):
            print(row.tile, row.memory, row.stages, row.shared <= row.shared_limit)
    """
    changes = environment(TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 x 16 x 64 paged 3 True", "1 x 16 x 64 contiguous 3 True"]


def test_it_says_why_it_cannot_run_in_the_interpreter() -> None:
    done = subprocess.run(COMMAND, cwd=ROOT, env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "unset it" in done.stderr
