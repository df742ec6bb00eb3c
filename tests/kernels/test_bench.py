"""The benchmark needs a GPU; what it would run there is tried at a small size, its clock taken out."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kernels import bench, bench_layers, timing

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tries what happens where there is no GPU")


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("queries", "padded"), [(1, False), (1, True), (32, False)], ids=["decode", "padded decode", "prompt"]
)
def test_what_is_measured_is_right(monkeypatch: pytest.MonkeyPatch, queries: int, padded: bool) -> None:
    def once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    for module, clock in ((bench, "median_us"), (bench_layers, "median_us"), (bench_layers, "graph_us")):
        monkeypatch.setattr(module, clock, once)
    floors, rows = timing.measure_floors("cpu", size=2**10, side=8, clock=once)
    rows += bench.bench_attention("attention", bench.Shape(2, 4, 2, 32, 16, padded=padded), queries, floors, "cpu")
    rows += bench.bench_moves(bench.Shape(2, 2, 2, 32, 16), 2, floors, "cpu")
    rows += bench_layers.bench_fused(floors, "cpu", 4, (8, 16, 64))
    rows += bench_layers.bench_row(floors, "cpu", [(8, 16)])
    rows += bench_layers.bench_chain(floors, "cpu", 2, (8, 24, 16, 12))
    variants = [row.variant for row in rows]
    assert variants[3:5] == ["paged", "contiguous"]
    assert rows[4].error is not None
    assert rows[4].error < 0.01
    moves = ["store", "copy_blocks", "norm", "norm", "rotate_and_store", "silu_and_mul", "silu_and_mul"]
    assert [row.name for row in rows[-14:]] == [*moves, "sample", "sample", *["row product"] * 3, *["row products"] * 2]
    assert rows[-1].bytes == rows[-2].bytes == 2 * 2 * 8 * (24 + 16 + 24 + 12)
    assert all(len(row.line()) >= 60 for row in rows)


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(device: str) -> Iterator[timing.Measured]:
        yield timing.Measured("one", "1 x 1", "paged", 2.0, bytes=3)
        raise RuntimeError("no room")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(RuntimeError, match="no room"):
        bench.main(["--out", str(tmp_path)])
    assert [row["name"] for row in json.loads((tmp_path / "kernels.json").read_text())["rows"]] == ["one"]
    assert "one" in (tmp_path / "kernels.txt").read_text()
