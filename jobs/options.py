"""Command lines of jobs: a value that cannot be meant is one sentence before anything is started."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from hrs.config.checks import LARGEST_SEED, LARGEST_SIZE
from hrs.errors import HRSError, shown
from hrs.threads import MOST_THREADS

T = TypeVar("T")

MOST_SEEDS = 10_000


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence, as that of everything else."""

    def error(self, message: str) -> NoReturn:
        """Raise HRSError in place of printing the usage."""
        raise HRSError(f"{message}: see `python {self.prog} --help`")


def whole(low: int, high: int = LARGEST_SIZE) -> Callable[[str], int]:
    """Return the type of an option that takes an integer between two bounds."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also for thousands of digits
            raise argparse.ArgumentTypeError(f"must be an integer, got {shown(text)}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie between {low:,} and {high:,}, got {shown(value)}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that takes a finite number between two bounds."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a number between {low:g} and {high:g}, got {shown(text)}")
        return value

    return read


def listed(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Return the type of an option that takes values of another type with commas between them."""
    return lambda text: tuple(kind(part) for part in text.split(","))


def folder(text: str) -> Path:
    """Return the path of a folder to write into, which need not be there yet: a type of options."""
    path = Path(text).absolute()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(text)} is a file, name a folder")
    _require_writable(path)
    return Path(text)


def file(text: str) -> Path:
    """Return the path of a file to write, which need not be there yet: a type of options."""
    path = Path(text).absolute()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(text)} is a folder, name a file")
    _require_writable(path.parent)
    return Path(text)


def _require_writable(path: Path) -> None:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"nothing can be written below {there}, name another place")


SEED = whole(0, LARGEST_SEED)
SEEDS = whole(1, MOST_SEEDS)
MINUTES = number(0.001, 1e6)
THREADS = whole(1, MOST_THREADS)
CHECKPOINT_STEPS = whole(1, 10**8)
