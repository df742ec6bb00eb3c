"""What commands have in common: whatever is wrong is said in one line, with exit status 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from lab.core import InputError


class Parser(argparse.ArgumentParser):
    """Complains like everything else here: in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help says what there is")


def status(work: Callable[[], int], interrupted: str) -> int:
    """The exit status of a command; `interrupted` is said where somebody ends it (Ctrl-C, or SIGTERM made the same).

    Whoever reads may go before the end, as `head` does: then there is nobody to tell.
    """
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest of it goes at exit
        return 128 + signal.SIGPIPE


def write(file: Path, pieces: Iterable[str]) -> int:
    """Write a text, whole or not at all; returns its size in bytes. InputError where the system will not have it."""
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8") as opened:
                opened.writelines(pieces)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}): choose another --out") from None
    return file.stat().st_size
