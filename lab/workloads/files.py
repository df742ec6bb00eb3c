"""Reading what a user names: text, compressed or not, with one line for whatever is wrong with the file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from lab.core import InputError


def read_text(path: Path) -> str:
    """The whole file as UTF-8, decompressed where its name ends in .gz, line ends as they are."""
    return "".join(read_lines(path))


def read_lines(path: Path) -> Iterator[str]:
    """The same line by line: no more than a buffer of it is in memory."""
    try:
        with (
            gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file,
            TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
        ):
            try:
                yield from text
            except UnicodeDecodeError as error:
                place = file.tell() - len(error.object) + error.start
                raise InputError(f"workload file {path} is not UTF-8 text (byte {place}): save it as UTF-8") from None
    except FileNotFoundError:
        raise InputError(f"workload file {path} does not exist: check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"workload file {path} is no complete gzip file ({error}): fetch or compress it again"
        ) from None
    except OSError as error:
        raise InputError(f"workload file {path} cannot be read ({error.strerror}): name a readable file") from None
