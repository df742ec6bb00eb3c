"""The tables of a record and where they lie: a folder with `header.json` and one Parquet file per table."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lab.core import InputError, Sequence

FORMAT = 1  # of the tables below; a record of another format is refused
HEADER = "header.json"

TYPES = {"i": pa.int32(), "q": pa.int64(), "f": pa.float32(), "d": pa.float64(), "b": pa.bool_(), "t": pa.string()}
COLUMNS = {  # name:type; memory in tokens, time in seconds of the run's clock
    # the plan (rows, tokens computed, padding), tokens drawn; groups waiting, sequences running; the pool's idle() and
    # host memory; what the blocked head of the queue asked for; tokens moved; groups preempted; was a kernel compiled
    "steps": "step:q start_s:d end_s:d seqs:q tokens:q dead_tokens:q dead_positions:q sampled:q waiting:q running:q"
    " free:q cached:q largest:q host:q blocked:q copied:q swapped_out:q swapped_in:q preempted:q compiled:b",
    "tokens": "step:i request:q output:i value:i logprob:f",  # the time of a token is end_s of its step
    "events": "time_s:d step:q request:q output:i kind:t tokens:q detail:t",  # output -1: the whole group
    "samples": "step:i request:q output:i skip:i computed:i asked:i held:i ended:b",  # [skip, held) are the row's own
    "tenures": "first:i count:i request:q output:i from_step:i to_step:i",  # consecutive blocks; to_step is exclusive
    "requests": "request:q arrival_s:d prompt_tokens:q output_tokens:q forced:b max_tokens:q n:q temperature:d",
}
SCHEMAS = {
    name: pa.schema([(column, TYPES[code]) for column, code in (c.split(":") for c in columns.split())])
    for name, columns in COLUMNS.items()
}


@dataclass(frozen=True)
class Record:
    """One run. Tables are pandas DataFrames with the columns of `COLUMNS`, read when first asked for."""

    header: Mapping[str, Any]
    path: Path | None = None
    frames: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Header and columns are checked now, pages when a table is read; InputError where anything is off."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such record: give the folder that a run wrote, or run it again")
        header = _read_header(path / HEADER)
        for name, schema in SCHEMAS.items():
            file = path / f"{name}.parquet"
            with _reading(file):
                if not pq.read_schema(file).equals(schema):
                    raise InputError(f"{file}: its columns are not those of format {FORMAT}: run it again")
        return cls(header, path)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        sink = Sink(Path(path))
        for name, schema in SCHEMAS.items():
            sink.write(name, [self.table(name)[column].to_numpy() for column in schema.names])
        sink.close(self.header)

    def table(self, name: str) -> pd.DataFrame:
        if name not in self.frames:
            assert self.path is not None
            file = self.path / f"{name}.parquet"
            with _reading(file):
                self.frames[name] = pq.read_table(file, page_checksum_verification=True).to_pandas()
        return self.frames[name]

    @property
    def steps(self) -> pd.DataFrame:
        return self.table("steps")

    @property
    def tokens(self) -> pd.DataFrame:
        return self.table("tokens")

    @property
    def events(self) -> pd.DataFrame:
        return self.table("events")

    @property
    def samples(self) -> pd.DataFrame:
        return self.table("samples")

    @property
    def tenures(self) -> pd.DataFrame:
        return self.table("tenures")

    @property
    def requests(self) -> pd.DataFrame:
        """Output tokens: the forced ones, else the most that one of its outputs had at its end (0: never ended)."""
        return self.table("requests")


class Columns:
    """Rows not yet written of a table that starts with step, request, output: compact arrays, one `add` per step.

    `codes` are the types of the further columns; "n" is a number of blocks, which becomes tokens when it is taken.
    """

    def __init__(self, codes: str) -> None:
        self.codes = codes
        self.first = 0  # step of counts[0]
        self.clear()
        self.name([])

    def clear(self) -> None:
        self.counts = array("q")  # rows of each step
        self.requests = array("q")
        self.outputs = array("i")
        self.rest = [array(code.replace("n", "i")) for code in self.codes]

    def __len__(self) -> int:
        return max(len(self.counts), len(self.requests))

    def name(self, owners: list[Sequence]) -> None:
        """Whose rows the next ones are, until told otherwise: most steps have the batch of the step before."""
        self.request = array("q", [s.group.request.id for s in owners])
        self.output = array("i", [s.index for s in owners])

    def add(self, *columns: Iterable[Any]) -> None:
        self.counts.append(len(self.request) if columns else 0)
        if columns:
            self.requests += self.request
            self.outputs += self.output
            for column, values in zip(self.rest, columns, strict=True):
                column += values if isinstance(values, array) else array(column.typecode, values)

    def take(self, now: int, block: int) -> list[np.ndarray]:
        """All columns of the steps before `now`, which are forgotten."""
        steps = np.repeat(np.arange(self.first, now, dtype=np.int32), np.frombuffer(self.counts, np.int64))
        taken = [steps, *(np.frombuffer(c, c.typecode) for c in (self.requests, self.outputs, *self.rest))]
        for i, code in enumerate(self.codes, 3):
            if code == "n":
                taken[i] = taken[i] * np.int32(block)
            elif code == "b":
                taken[i] = taken[i].astype(bool)
        self.first = now
        self.clear()
        return taken


class Sink:
    """Where rows go in chunks: Parquet files in a hidden folder, renamed when complete; with no path, memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.chunks: dict[str, list[pa.Table]] = {name: [] for name in SCHEMAS}
        self.writers: dict[str, pq.ParquetWriter] = {}
        if path is None:
            return
        if path.exists() and not (path / HEADER).is_file():
            raise InputError(f"{path} exists and is not a record: choose another name or remove it")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            for name, schema in SCHEMAS.items():
                file = self.folder / f"{name}.parquet"
                self.writers[name] = pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)

    def write(self, name: str, columns: Iterable[Any]) -> None:
        schema = SCHEMAS[name]
        chunk = pa.table([pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        if self.path is None:
            self.chunks[name].append(chunk)
            return
        with _writing(self.path):
            self.writers[name].write_table(chunk)

    def close(self, header: Mapping[str, Any]) -> None:
        """The folder gets its name. A record of that name is replaced."""
        if self.path is None:
            return
        with _writing(self.path):
            for writer in self.writers.values():
                writer.close()
            (self.folder / HEADER).write_text(json.dumps(header, indent=1, default=str) + "\n")
            if self.path.exists():
                self.path.rename(self.folder / "replaced")
            self.folder.chmod(0o755)
            self.folder.rename(self.path)
        shutil.rmtree(self.path / "replaced", ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        if self.path is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def record(self, header: Mapping[str, Any]) -> Record:
        if self.path is not None:
            return Record.load(self.path)
        frames = {
            name: pa.concat_tables([SCHEMAS[name].empty_table(), *c]).to_pandas() for name, c in self.chunks.items()
        }
        return Record(dict(header), None, frames)


def describe(*, model: str, workload: str, seed: int, simulated: bool, hardware: str, gpu: str = "") -> dict[str, Any]:
    """The header of a record: what ran, on what, from which source. `hardware` is what the clock stands for."""
    root = Path(__file__).parents[1]
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "revision": os.environ.get("KVLAB_REVISION") or _git(root, "rev-parse", "HEAD"),  # a copy without .git is told
        "dirty": bool(_git(root, "status", "--porcelain")),
        "versions": {"python": platform.python_version(), **_versions("numpy", "torch", "triton", "transformers")},
        "machine": {"platform": platform.platform(), "cpu": _cpu(), "gpu": gpu},
        "hardware": hardware,
        "model": model,
        "workload": workload,
        "seed": seed,
        "simulated": simulated,
        "clock": "virtual" if simulated else "wall",
    }


def _git(root: Path, *words: str) -> str:
    """Its answer; empty outside a checkout."""
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _versions(*names: str) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def _read_header(file: Path) -> dict[str, Any]:
    try:
        header = json.loads(file.read_text())
        found = header["format"]
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}: not a complete record; run it again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not the header of a record ({error}): run it again") from None
    if found != FORMAT:
        raise InputError(f"{file}: record format {found}, this version reads {FORMAT}: run it again")
    return header


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file}: missing from the record: run it again") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: damaged ({_line(error)}): run it again") from None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: the record cannot be written ({_line(error)}): free some space or give --out"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
