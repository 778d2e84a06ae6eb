"""Files that survive a crash: on the disk before they count, checked when read, and built once."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock

from hrs import strict_json
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


def absolute_path(text: str | Path) -> Path:
    """Return a path that means the same in every working directory: ``~`` is expanded, links stay what they are.

    Raises:
        HRSError: for ``~NAME`` of nobody, or without a home directory.
    """
    try:
        return Path(os.path.abspath(Path(text).expanduser()))
    except RuntimeError as error:
        raise HRSError(f"path {text} cannot be found ({str(error).rstrip('.')}): write it without ~") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file, with the folders above it: whoever reads ``path`` finds the old content or all of the new.

    Raises:
        HRSError: if the disk refuses; what stood there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise HRSError(f"{path} could not be written ({error.strerror}): make room, or give another place") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        HRSError: naming the file if it is missing, cut off or something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HRSError(f"{path} is missing or damaged ({error})") from error


# ---- folders with a manifest -----------------------------------------------------------------------------------------

_SIZES, _SUMS, _OWN = "files", "sha256", "manifest_sha256"
_known_sums: dict[tuple[str, int, int, int], str] = {}


def write_manifest(path: Path, facts: Mapping[str, Any]) -> None:
    """Write ``path``: ``facts`` as JSON, and size and SHA-256 of every other file of its folder and of the facts."""
    files = sorted(file for file in path.parent.iterdir() if file != path)
    document = {
        **facts,
        _SIZES: {file.name: file.stat().st_size for file in files},
        _SUMS: {file.name: sha256_of(file) for file in files},
    }
    write_whole(path, strict_json.dumps(document | {_OWN: _sha256_of_json(document)}, indent=1))


def read_manifest(path: Path) -> dict[str, Any]:
    """Return what :func:`write_manifest` wrote, after a look at every file: SHA-256 is taken once per process and file.

    A manifest of an earlier version holds sizes only, and only these are checked.

    Raises:
        HRSError: naming what is missing or is not what was written.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes, sums = dict(document[_SIZES]), dict(document.get(_SUMS, {}))
        own = document.pop(_OWN, None)
        if own not in (None, _sha256_of_json(document)):
            raise ValueError("its checksum differs")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise HRSError(f"{path} is missing or damaged ({error})") from error
    for name, size in sizes.items():
        file = path.with_name(name)
        if not file.is_file() or file.stat().st_size != size or sums.get(name) not in (None, _known_sum(file)):
            raise HRSError(f"{file} is missing, cut off or not what was written")
    return document


def _known_sum(path: Path) -> str:
    """SHA-256 of a file, taken again only if the file has changed since this process took it."""
    facts = path.stat()
    key = (str(path.absolute()), facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if key not in _known_sums:
        _known_sums[key] = sha256_of(path)
    return _known_sums[key]


def _sha256_of_json(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(document, sort_keys=True).encode()).hexdigest()


# ---- built once ------------------------------------------------------------------------------------------------------


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
