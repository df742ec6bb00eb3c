"""The sweep needs a GPU; how it chooses does not."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it is on Linux x86-64")
from kernels import tune, tuning
from kernels.ragged import TILE_TOKENS


@pytest.mark.skipif(torch.cuda.is_available(), reason="tries what happens where there is no GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_kind_that_is_unknown_is_refused_with_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--only", "decodes"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --only 'decodes'")
    assert all(kind.name() in error for kind in tune.KINDS)


def test_the_fastest_wins_if_it_is_right_on_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = tune.KINDS[0]._replace(shapes=tune.KINDS[0].shapes[:2])
    wrong, even, fast_once, slow = tune.candidates(kind)[:4]
    paged = {wrong: [1, 1], even: [6, 12], fast_once: [2, 40], slow: [9, 18]}
    monkeypatch.setattr(tune, "candidates", lambda _: list(paged))
    monkeypatch.setattr(tune, "Problem", lambda shape, *_: kind.shapes.index(shape))

    def try_out(shape: int, tried: tuning.Tuning) -> dict[str, float] | str:
        return "wrong by 0.1" if tried is wrong and shape == 1 else {"paged": paged[tried][shape], "contiguous": 1.0}

    monkeypatch.setattr(tune, "try_out", try_out)
    assert tune.sweep(kind) == even


def test_candidates_and_entries_cut_tiles_evenly() -> None:
    kinds = {kind.name(): kind for kind in tune.KINDS}
    assert len(kinds) == len(tune.KINDS)
    found = [(kinds[name], entry) for shapes in tuning.tuned().values() for name, entry in shapes.items()]
    found += [(kind, entry) for kind in tune.KINDS for entry in tune.candidates(kind)]
    for kind, entry in found:
        assert kind.tile in TILE_TOKENS
        assert kind.tile % entry.tokens == 0
        assert entry.heads >= 16 or kind.tile > 1
    assert all(len(tune.candidates(kind)) <= 24 for kind in tune.KINDS)
