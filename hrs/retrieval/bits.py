"""What retrieval is worth on held-out text, in bits per byte: right memories against another text's and against none.

Nothing is generated. Each document is walked through token by token as if the model had sampled it: the gate watches
the entropies at the true tokens, and what it sets off is read from the next token on, in the very windows that
:class:`hrs.retrieval.engine.RetrievalEngine` would read. All text of the split is scored, also where nothing was
retrieved, so the three conditions are paired document by document::

    report = measure_retrieval(retriever, store.test, RetrievalOptions(mode="text"))
    print(report.right_minus_off, report.right_minus_shuffled)

``shuffled`` retrieves at the same calls of the gate, with the text of another document for a query: what it gains over
``off`` is not the merit of finding the right memory.
"""

import dataclasses
import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from hrs import strict_json
from hrs.data.store import TokenSplit
from hrs.errors import HRSError
from hrs.report.statistics import Interval, Scores, bootstrap
from hrs.retrieval.retriever import RetrievalOptions, Retriever
from hrs.retrieval.store import Hit
from hrs.retrieval.walk import Walk

Control = Literal["right", "shuffled", "off"]

_QUERIES_PER_DOCUMENT = 4

Floats = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetrievalBits:
    """One walk over a split. D documents."""

    control: Control
    bits: Floats
    """[D], of each document's text, without its end-of-text token."""
    n_bytes: NDArray[np.int64]
    """[D], length in UTF-8."""
    n_tokens: NDArray[np.int64]
    """[D], tokens scored."""
    n_injected: NDArray[np.int64]
    """[D], those of them that were predicted with retrieved memory or text."""
    n_events: int
    """Firings of the gate."""
    n_used: int
    """Those after which the model read something retrieved."""
    similarity: float | None
    """Mean cosine of the best memory with its query; None if none was found."""

    @property
    def bits_per_byte(self) -> float:
        return float(self.bits.sum() / self.n_bytes.sum())

    @property
    def share_injected(self) -> float:
        return float(self.n_injected.sum() / self.n_tokens.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One walk in numbers."""

    bits_per_byte: Interval
    """95 % bootstrap over documents."""
    share_injected: float
    """Share of the tokens that were predicted with retrieved memory or text."""
    n_events: int
    n_used: int
    similarity: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Walked:
    """How far a walk is."""

    control: Control
    done: int
    total: int
    """Documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalReport:
    """Three walks over one split, and their differences paired by document: below 0 is better."""

    options: dict[str, Any]
    """Of :class:`RetrievalOptions`."""
    n_documents: int
    n_bytes: int
    n_tokens: int
    conditions: dict[Control, Condition]
    right_minus_off: Interval
    """Bits per byte that retrieval adds."""
    shuffled_minus_off: Interval
    """The same with memories of other texts."""
    right_minus_shuffled: Interval
    """What it adds that the right memories are found."""
    documents: dict[Control, list[float]]
    """Bits of each document."""
    document_bytes: list[int]
    """Length of each document in UTF-8."""

    def to_json(self) -> str:
        return strict_json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RetrievalReport":
        """What :meth:`to_json` wrote.

        Raises:
            HRSError: if it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            for name in ("right_minus_off", "shuffled_minus_off", "right_minus_shuffled"):
                values[name] = Interval(**values[name])
            values["conditions"] = {
                control: Condition(**found | {"bits_per_byte": Interval(**found["bits_per_byte"])})
                for control, found in values["conditions"].items()
            }
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HRSError(f"this is no report of retrieval ({error}): measure it again") from error


def measure_retrieval(
    retriever: Retriever,
    text: TokenSplit,
    options: RetrievalOptions,
    *,
    sources: Sequence[str] | None = None,
    keep: int | None = None,
    documents: int | None = None,
    seed: int = 0,
) -> RetrievalReport:
    """Walk over a split three times, see :func:`retrieval_bits`, and compare.

    Raises:
        HRSError: see there.
    """
    return _returned(
        follow_retrieval(retriever, text, options, sources=sources, keep=keep, documents=documents, seed=seed)
    )


def follow_retrieval(
    retriever: Retriever,
    text: TokenSplit,
    options: RetrievalOptions,
    *,
    sources: Sequence[str] | None = None,
    keep: int | None = None,
    documents: int | None = None,
    seed: int = 0,
) -> Generator[Walked, None, RetrievalReport]:
    """The same, telling after each document how far it is: ``report = yield from follow_retrieval(...)``."""
    walks: dict[Control, RetrievalBits] = {}
    for control in get_args(Control):
        walks[control] = yield from _follow(retriever, text, options, sources, control, keep, documents, seed)
    right, shuffled, off = (
        Scores(seeds=(0,), numerators=walks[c].bits[None], denominators=walks[c].n_bytes.astype(np.float64))
        for c in get_args(Control)
    )
    to_off = bootstrap([off, right, shuffled], seed=seed)
    to_shuffled = bootstrap([shuffled, right], seed=seed)
    scores: dict[Control, Interval] = {
        "right": to_off[1].score,
        "shuffled": to_off[2].score,
        "off": to_off[0].score,
    }
    gaps = [estimate.difference for estimate in (to_off[1], to_off[2], to_shuffled[1])]
    assert gaps[0] is not None and gaps[1] is not None and gaps[2] is not None
    return RetrievalReport(
        options=json.loads(strict_json.dumps(dataclasses.asdict(options))),
        n_documents=len(walks["off"].bits),
        n_bytes=int(walks["off"].n_bytes.sum()),
        n_tokens=int(walks["off"].n_tokens.sum()),
        conditions={
            control: Condition(
                bits_per_byte=scores[control],
                share_injected=walk.share_injected,
                n_events=walk.n_events,
                n_used=walk.n_used,
                similarity=walk.similarity,
            )
            for control, walk in walks.items()
        },
        right_minus_off=gaps[0],
        shuffled_minus_off=gaps[1],
        right_minus_shuffled=gaps[2],
        documents={control: walk.bits.tolist() for control, walk in walks.items()},
        document_bytes=walks["off"].n_bytes.tolist(),
    )


def retrieval_bits(
    retriever: Retriever,
    text: TokenSplit,
    options: RetrievalOptions,
    *,
    sources: Sequence[str] | None = None,
    control: Control = "right",
    keep: int | None = None,
    documents: int | None = None,
    seed: int = 0,
) -> RetrievalBits:
    """Walk over the documents of a split with retrieval, with another text's retrievals, or with none.

    Documents without text are passed over. A document is predicted from an end of text on, alone.

    Args:
        sources: [n_docs], what :attr:`hrs.retrieval.store.Memory.source` is called for memories of each document: none
            of those are retrieved for it. Default the titles, as :mod:`hrs.retrieval.segments` has it.
        keep: tokens a new window starts with when the context is full, see :func:`hrs.generation.generate`.
        documents: only the first so many that have text; None for all.
        seed: of the queries that ``shuffled`` takes.

    Raises:
        HRSError: if there is no gate, the model cannot read memories as the mode says, ``sources`` do not fit the
            split, the split has no text, ``documents`` is below 1, or ``shuffled`` has no other document to take
            queries from.
    """
    return _returned(_follow(retriever, text, options, sources, control, keep, documents, seed))


def _follow(
    retriever: Retriever,
    text: TokenSplit,
    options: RetrievalOptions,
    sources: Sequence[str] | None,
    control: Control,
    keep: int | None,
    documents: int | None,
    seed: int,
) -> Generator[Walked, None, RetrievalBits]:
    if control not in get_args(Control):
        raise HRSError(f"unknown control '{control}': choose one of {', '.join(get_args(Control))}")
    sources = text.titles if sources is None else sources
    if len(sources) != len(text.n_bytes):
        raise HRSError(
            f"there are {len(sources)} sources for {len(text.n_bytes)} documents: name the source of every document, "
            "so that none is given its own text"
        )
    if documents is not None and documents < 1:
        raise HRSError(f"retrieval is measured on 1 document or more, got {documents}")
    retriever.gate(options)  # refuses what cannot work, before anything is computed
    written = [int(i) for i in np.flatnonzero(text.n_bytes)[:documents]]
    if not written:
        raise HRSError("this split has no text to measure retrieval on: give another")
    strangers = _Strangers(retriever, text, written, sources, seed) if control == "shuffled" else None

    walks: list[Walk] = []
    for document in written:
        excluded = dataclasses.replace(options, exclude_sources=(*options.exclude_sources, sources[document]))

        def find(own: list[int], document: int = document, excluded: RetrievalOptions = excluded) -> tuple[Hit, ...]:
            if strangers is not None:
                return strangers.find(document, excluded)
            return retriever.find(retriever.queries([retriever.segment(own)])[0], excluded)

        start, end = int(text.document_starts[document]) - 1, int(text.document_starts[document + 1]) - 1
        ids = text.tokens[start:end].tolist()
        walk = Walk(retriever, ids, excluded, None if control == "off" else find, keep)
        walk.run()
        walks.append(walk)
        yield Walked(control=control, done=len(walks), total=len(written))
    similarities = [s for walk in walks for s in walk.similarities]
    return RetrievalBits(
        control=control,
        bits=np.array([math.fsum(walk.nats) for walk in walks]) / math.log(2),
        n_bytes=text.n_bytes[written].astype(np.int64),
        n_tokens=np.array([len(walk.nats) for walk in walks]),
        n_injected=np.array([walk.n_injected for walk in walks]),
        n_events=sum(len(walk.fired) for walk in walks),
        n_used=sum(walk.n_used for walk in walks),
        similarity=float(np.mean(similarities)) if similarities else None,
    )


def _returned(steps: Generator[Any, None, T]) -> T:
    """What a generator returns at its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            returned: T = end.value
            return returned


class _Strangers:
    """Queries from all documents of a split, for each other's firings."""

    def __init__(
        self, retriever: Retriever, text: TokenSplit, written: list[int], sources: Sequence[str], seed: int
    ) -> None:
        self._retriever, self._source_of, self._seed = retriever, sources, seed
        self._random: dict[int, np.random.Generator] = {}
        segments, owners = [], []
        for document in written:
            start, end = int(text.document_starts[document]), int(text.document_starts[document + 1]) - 1
            count = min(_QUERIES_PER_DOCUMENT, end - start)
            for stop in np.linspace(end, start, count, endpoint=False).astype(int):
                segments.append(retriever.segment(text.tokens[start:stop].tolist()))
                owners.append(sources[document])
        self._queries, self._owners = retriever.queries(segments), np.array(owners)

    def find(self, document: int, options: RetrievalOptions) -> tuple[Hit, ...]:
        """What another document, drawn at random, would be given; nothing of this one, nor of that one."""
        random = self._random.setdefault(document, np.random.default_rng([self._seed, document]))
        others = np.flatnonzero(self._owners != self._source_of[document])
        if len(others) == 0:
            raise HRSError("the control 'shuffled' needs a document of another source: give a split with several")
        chosen = int(random.choice(others))
        excluded = (*options.exclude_sources, str(self._owners[chosen]))
        return self._retriever.find(self._queries[chosen], dataclasses.replace(options, exclude_sources=excluded))
