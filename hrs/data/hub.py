"""Corpora of the Hugging Face hub, or of a local folder of data files, through the ``datasets`` library."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hrs.data.documents import SPLITS, Corpus, Document, SplitName, split_of
from hrs.errors import HRSError

_COLUMNS = ("text", "title", "topic")
_ARTICLE_TITLE = re.compile(r" ?= (?!= )(.+?) = ?\n?")


class HubCorpus(Corpus):
    """``text`` (with ``title`` and ``topic`` if there are such columns) of the splits train, validation and test.

    WikiText comes by the line and is put together to articles. Documents of ``train`` fill a split the dataset lacks.
    """

    def __init__(self, name: str, dataset: str, config: str | None) -> None:
        self.name = name
        self._dataset = dataset
        self._splits = _load(name, dataset, config)
        self._is_wikitext = dataset.rstrip("/").endswith("wikitext")
        licence = next(iter(self._splits.values())).info.license
        self.licence = "CC BY-SA 3.0 and GFDL" if self._is_wikitext else licence or f"see the card of {dataset}"

    def documents(self) -> Iterator[Document]:
        for split, rows in self._splits.items():
            texts = articles(row["text"] for row in _rows(rows)) if self._is_wikitext else _titled(rows)
            for index, (title, text, topic) in enumerate(texts):
                title = title or f"{split} {index}"
                yield Document(title=title, text=text, topic=topic, split=self._split(split, title))

    def _split(self, own: SplitName, title: str) -> SplitName:
        wanted = split_of(title)
        return wanted if own == "train" and wanted not in self._splits else own

    def fingerprint(self) -> str:
        digest = hashlib.sha256(b"wikitext" if self._is_wikitext else b"hub")
        for split, rows in self._splits.items():
            digest.update(f"\0\0{split}".encode())
            for batch in rows.iter(batch_size=10_000):
                for column in sorted(batch):
                    digest.update("\0".join([column, *(value or "" for value in batch[column])]).encode())
        return digest.hexdigest()


def _load(name: str, dataset: str, config: str | None) -> dict[SplitName, Any]:
    """Splits by name, with the columns that matter."""
    import datasets  # takes a second to import, and only these corpora need it

    try:
        found = datasets.load_dataset(dataset, config)
    except Exception as error:  # datasets, the hub client and its transport raise a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HRSError(
            f"corpus {name} cannot be loaded ({reason.rstrip('.')}): check its name and the network, "
            "or use wiki-mini, which needs neither"
        ) from error
    splits: dict[SplitName, Any] = {split: found[split] for split in SPLITS if split in found}
    if "train" not in splits:
        raise HRSError(f"corpus {name} has no split 'train' (it has {', '.join(found)}): choose another dataset")
    for split, rows in splits.items():
        strings = {c for c, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")}
        if "text" not in strings:
            raise HRSError(
                f"corpus {name} has no text column 'text' (it has {', '.join(rows.column_names)}): "
                "save it as Parquet with that column and use parquet:PATH"
            )
        splits[split] = rows.select_columns([c for c in _COLUMNS if c in strings])
    return splits


def _rows(rows: Any) -> Iterator[dict[str, Any]]:
    """Rows by way of batches, several times as fast as iterating the dataset."""
    for batch in rows.iter(batch_size=1_000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _titled(rows: Any) -> Iterator[tuple[str, str, str | None]]:
    for row in _rows(rows):
        yield (row.get("title") or "").strip(), row["text"] or "", row.get("topic")


def articles(lines: Iterable[str]) -> Iterator[tuple[str, str, None]]:
    """Title and text of each WikiText article (Merity et al. 2016), from its lines.

    A title is `` = Title = `` between blank lines. The blank lines matter: legends of tables look just like titles.
    """
    title, body = "", list[str]()
    previous, line = "", ""
    for following in itertools.chain(lines, [""]):
        if not previous.strip() and not following.strip() and (match := _ARTICLE_TITLE.fullmatch(line)):
            if "".join(body).strip():
                yield title, "".join(body), None
            title, body = match[1], []
        body.append(line)
        previous, line = line, following
    yield title, "".join(body), None
