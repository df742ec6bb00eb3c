"""Records on disk: written whole or not at all, refused where damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from recording import Shelf, group, serve, step

from lab.core import InputError, Plan, Sampled
from lab.record import FORMAT, Record, Recorder, describe
from lab.tables import COLUMNS

TABLES = list(COLUMNS)


@pytest.fixture(scope="module")
def served() -> Record:
    recorder = Recorder(None, {"model": "m"})
    serve(recorder)
    recorder.close()
    return recorder.record()


def test_streaming_equals_memory(served: Record, tmp_path: Path) -> None:
    with Recorder(tmp_path / "run", {"model": "m"}, chunk_rows=1) as recorder:
        serve(recorder)
    saved = tmp_path / "saved"
    served.save(saved)
    for record in (recorder.record(), Record.load(tmp_path / "run"), Record.load(saved)):
        assert record.header == served.header
        for name in TABLES:
            pd.testing.assert_frame_equal(record.table(name), served.table(name))
    assert sorted(f.name for f in saved.iterdir()) == sorted([*(f"{name}.parquet" for name in TABLES), "header.json"])


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Recorder(tmp_path / "deep" / "run", {}, chunk_rows=1) as recorder:
            serve(recorder)
            assert not (tmp_path / "deep" / "run").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []


def test_replaces_a_record_and_nothing_else(served: Record, tmp_path: Path) -> None:
    served.save(tmp_path / "run")
    with Recorder(tmp_path / "run", {"model": "new"}):
        assert Record.load(tmp_path / "run").header["model"] == "m"  # the old one, until the new one is whole
    assert Record.load(tmp_path / "run").header["model"] == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["run"]
    (tmp_path / "thesis").mkdir()
    with pytest.raises(InputError, match=r"thesis exists and is not a record: choose another"):
        Recorder(tmp_path / "thesis", {})


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def run() -> None:
        with Recorder(tmp_path / "run", {}, chunk_rows=1) as recorder:
            monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
            serve(recorder)

    with pytest.raises(InputError, match=r"run: the record cannot be written .*No space left.*: free some space"):
        run()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path / "file" / "run", {})


def damage(path: Path, how: str) -> None:
    header, table = path / "header.json", path / "samples.parquet"
    if how == "empty folder":
        for f in path.iterdir():
            f.unlink()
    elif how == "truncated header":
        header.write_text(header.read_text()[:20])
    elif how == "not a header":
        header.write_text("[]")
    elif how == "other version":
        header.write_text(json.dumps({**json.loads(header.read_text()), "format": FORMAT + 1}))
    elif how == "table missing":
        table.unlink()
    elif how == "table empty":
        table.write_bytes(b"")
    elif how == "table truncated":
        table.write_bytes(table.read_bytes()[:-9])
    elif how == "other columns":
        table.write_bytes((path / "tokens.parquet").read_bytes())
    elif how == "flipped bits":
        content = bytearray(table.read_bytes())
        content[40:60] = bytes(255 - b for b in content[40:60])
        table.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty folder", r"header\.json: No such file"),
        ("truncated header", r"header\.json: not the header of a record"),
        ("not a header", r"header\.json: not the header of a record"),
        ("other version", rf"header\.json: record format {FORMAT + 1}, this version reads {FORMAT}"),
        ("table missing", r"samples\.parquet: missing"),
        ("table empty", r"samples\.parquet: damaged"),
        ("table truncated", r"samples\.parquet: damaged"),
        ("other columns", r"samples\.parquet: its columns"),
        ("flipped bits", r"samples\.parquet: damaged"),
    ],
)
def test_damaged_records(served: Record, tmp_path: Path, how: str, says: str) -> None:
    served.save(tmp_path / "run")
    damage(tmp_path / "run", how)
    with pytest.raises(InputError, match=says + r".*run it again$") as caught:
        _ = Record.load(tmp_path / "run").samples
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    pool, s = Shelf(), group().live[0]
    with Recorder(tmp_path / "run", {}) as recorder:
        for i in range(4000):
            step(recorder, i, i, Plan(), {s: [Sampled(i, -math.sqrt(i))]}, pool, [], [], 0, 0)
    file = tmp_path / "run" / "tokens.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"tokens\.parquet: damaged"):
        _ = Record.load(tmp_path / "run").tokens


def test_missing_record(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such record"):
        Record.load(tmp_path / "nowhere")


def test_header_says_what_ran() -> None:
    header = describe(model="opt-13b", workload="sharegpt", seed=3, simulated=True, hardware="a100-40gb")
    assert (header["clock"], header["seed"], header["hardware"]) == ("virtual", 3, "a100-40gb")
    assert header["command"].startswith("python ")
    assert {"python", "numpy"} <= header["versions"].keys()
    assert json.loads(json.dumps(header)) == header
