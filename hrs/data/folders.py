"""The files of a corpus in a folder: links are followed, hidden files are not read, what cannot be read is named."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from hrs.errors import HRSError, shown

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_SPARK_MARK = "_SUCCESS"  # Spark writes it beside the parts of a finished data set
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def files_below(root: Path, suffix: str, *, hidden: tuple[str, ...] = (".",)) -> list[Path]:
    """Return the files below a folder whose names end in ``suffix``, or in it and a compression, in order of paths.

    In a folder that Spark wrote, every ``part-*`` is one. A folder that links reach twice is read once.

    Args:
        hidden: beginnings of the names of files and folders that are left out.

    Raises:
        HRSError: for a folder that cannot be listed, a link to nothing, and what is no regular file.
    """
    found = [path for path in _walk(root, hidden) if _matches(path, suffix)]
    for path in found:
        require_file(path)
    return sorted(found)


def _walk(root: Path, hidden: tuple[str, ...]) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse):
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((*hidden, "_temporary")))
        yield from (Path(folder, name) for name in names if not name.startswith(hidden))


def _refuse(error: OSError) -> None:
    raise HRSError(f"{error.filename} cannot be listed ({error.strerror}): change its permissions, or move it away")


def _matches(path: Path, suffix: str) -> bool:
    name = without_compression(path).name
    if name.endswith(suffix) or (not path.suffix and path.is_symlink() and not path.exists()):
        return True
    return name.startswith("part-") and (path.parent / _SPARK_MARK).exists()


def require_file(path: Path) -> None:
    """Raise HRSError unless ``path`` is a regular file, or a link to one."""
    try:
        about = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise HRSError(f"{path} is a link to {os.readlink(path)}, which is not there: mend or remove it") from None
        raise HRSError(f"{path} cannot be read ({error.strerror}): check the path and its permissions") from None
    if not stat.S_ISREG(about.st_mode):
        raise HRSError(f"{path} is not a regular file, and a corpus is read more than once: write it to a file")


def without_compression(path: Path) -> Path:
    """Return the path without the ending of its compression."""
    return path.with_suffix("") if path.suffix in COMPRESSIONS else path


def partition_values(path: Path, root: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the columns that folders of a partitioned data set spell, such as ``split=train``, out of ``names``."""
    pairs = (part.partition("=") for part in path.relative_to(root).parent.parts)
    return {name: unquote(value) for name, sign, value in pairs if sign and name in names and value != _NO_VALUE}


def title_of(path: Path, root: Path) -> str:
    """Return the path below ``root`` without its endings; bytes that are not UTF-8 are spelt ``\\xNN``."""
    relative = without_compression(path).relative_to(root).with_suffix("")
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def require_utf8_path(path: Path) -> None:
    """Raise HRSError for a path that is not UTF-8: configs and the tracking store hold it as text."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise HRSError(f"the path {shown(str(path))} is not UTF-8: rename it, or use a UTF-8 locale") from None
