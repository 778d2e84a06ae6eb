"""Files that survive a crash: on the disk before they count, checked when read, and built once."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import filelock

from hrs.errors import HRSError

T = TypeVar("T")

_log = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk: rename alone does not order them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def built_once(folder: Path, read: Callable[[Path], T | None], build: Callable[[], T], what: str) -> T:
    """What ``folder`` holds, built first if ``read`` gives None. Of many processes at once, one builds and others wait.

    Raises:
        HRSError: if the disk refuses; ``what`` names the thing in its sentence.
    """
    if (found := read(folder)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
            found = read(folder)
            return build() if found is None else found
    except OSError as error:
        raise HRSError(f"{what} {folder} cannot be built ({error}): is the disk full, or not writable?") from error


@contextmanager
def whole_folder(folder: Path, what: str) -> Iterator[Path]:
    """A folder to fill, which is renamed to ``folder`` at the end: a folder of that name is always whole.

    For the ``build`` of :func:`built_once`, whose lock says that no other builder is alive. A damaged ``folder`` is
    removed, and so is what killed builders left beside it.
    """
    if folder.exists():
        _log.warning("%s %s is damaged and is built again", what, folder)
        shutil.rmtree(folder)
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        building = Path(scratch, "building")
        building.mkdir()
        yield building
        building.rename(folder)
