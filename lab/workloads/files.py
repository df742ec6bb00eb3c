"""Reading what a user names: text, compressed or not, with one line for whatever is wrong with the file."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lab.core import InputError


def read_text(path: Path) -> str:
    """The whole file as UTF-8, decompressed where its name ends in .gz, line ends as they are."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return str(file.read())
    except FileNotFoundError:
        raise InputError(f"workload file {path} does not exist: check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"workload file {path} is no complete gzip file ({error}): fetch or compress it again"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"workload file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"workload file {path} cannot be read ({error.strerror}): name a readable file") from None
