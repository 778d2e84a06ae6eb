"""Topic contexts: prompts grouped online by what they are about, and the text a model is given of earlier ones.

Every prompt joins the nearest topic, or opens one. A topic's centroid is the mean of its unit engrams, normalised
again; two topics that grow close become one. The topics used last are *active*: their text shares a budget of tokens.

    topics = TopicContexts(width, join=0.5, merge=0.8)
    context = topics.context(engram=engram)              # what there is to say before the prompt is known to topics
    assignment = topics.assign(engram, tokens, text)     # only now does it belong to one

A cosine of 0.5 is near for one model and far for another, whose states share a large mean: fit ``join`` to the model
(``jobs/topic_study.py``), or hand over engrams without that mean.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hrs import strict_json
from hrs.errors import HRSError
from hrs.retrieval.topics.records import Assignment, Match, Prompt, Topic, TopicInfo, shares

_FORMAT = 1

Floats = NDArray[np.float64]


class TopicContexts:
    """Topics of one conversation, or of one user. Not for several threads at once.

    Args:
        width: d of the engrams, which must come from one model.
        join: least cosine between an engram and a centroid for a prompt to join the topic.
        merge: least cosine between two centroids for the topics to become one; above ``join``, or every prompt near
            two topics would melt them. A topic that is switched off never merges with one that is on, nor do two that
            the user has named.
        active: topics, 2 to 7, whose text may be in a context: those used last. A disabled one keeps its place.
        budget: tokens of a context.

    Raises:
        HRSError: for values outside these bounds.
    """

    def __init__(
        self, width: int, *, join: float = 0.5, merge: float = 0.8, active: int = 3, budget: int = 384
    ) -> None:
        if width < 1 or budget < 1:
            raise HRSError(f"topics need a width and a budget of at least 1, got {width} and {budget}")
        if not -1 < join < merge <= 1:
            raise HRSError(
                f"the join threshold {join} must lie above -1 and below the merge threshold {merge}, at most 1"
            )
        if not 2 <= active <= 7:
            raise HRSError(f"active topics must be 2 to 7, got {active}")
        self.width, self.join, self.merge, self.active, self.budget = width, join, merge, active, budget
        self._topics: list[Topic] = []
        self._sums: Floats = np.zeros((0, width))
        """[n_topics, d], sums of unit engrams; a topic's row has its index in the list."""
        self._centroids: Floats = np.zeros((0, width))
        """[n_topics, d], those sums normalised."""
        self._aliases: dict[str, str] = {}
        self._n_created = 0
        self._n_prompts = 0

    def __len__(self) -> int:
        return len(self._topics)

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def match(self, engram: ArrayLike) -> Match:
        """Where a prompt with this engram [d] would go, without adding it.

        Raises:
            HRSError: if it has another width, is zero or not finite.
        """
        return self._match(self._unit(engram))

    def assign(self, engram: ArrayLike, tokens: Sequence[int], text: str) -> Assignment:
        """Add a prompt to the nearest topic or to a new one, which becomes the most recent; then merge what has become
        near enough. Only the centroid that moved can come near another, so a prompt costs O(n_topics d) and as much
        per merge.

        Args:
            engram: [d], the prompt's mean hidden state; of any length.
            tokens: ids that a context repeats, with whatever should stand between prompts, such as end of text.
            text: for the topic's title alone.

        Raises:
            HRSError: as :meth:`match`.
        """
        unit = self._unit(engram)
        match = self._match(unit)
        if match.topic_id is None:
            self._n_created += 1
            self._topics.append(Topic(id=f"topic-{self._n_created}"))
            self._sums = np.vstack((self._sums, np.zeros(self.width)))
            self._centroids = np.vstack((self._centroids, np.zeros(self.width)))
        index = len(self._topics) - 1 if match.topic_id is None else self._index(match.topic_id)
        topic, number = self._topics[index], self._n_prompts
        self._n_prompts += 1
        topic.add(Prompt(number=number, tokens=[int(token) for token in tokens]), text)
        self._sums[index] += unit
        self._centroids[index] = _normalised(self._sums[index])
        survivor, merged = self._merge_around(topic)
        return Assignment(
            topic_id=survivor.id,
            similarity=match.similarity,
            created=match.topic_id is None,
            merged=merged,
            prompt=number,
        )

    def context(
        self,
        *,
        topic: str | None = None,
        engram: ArrayLike | None = None,
        budget: int | None = None,
        exclude: Collection[int] = (),
    ) -> list[int]:
        """Token ids of earlier prompts: the newest ones of every active, enabled topic, in the order they came,
        the most recent topic last, next to what follows.

        :func:`hrs.retrieval.topics.records.shares` says how the budget is split. The oldest prompt that is used may be
        cut at its front.

        Args:
            topic: id of the topic to treat as the most recent one; default is the one that is.
            engram: the same by an engram [d]: its topic, or a new one without text, as if the prompt had been assigned.
            budget: most tokens, default that of the constructor.
            exclude: numbers of prompts to leave out: the present one, if it has been assigned already.

        Raises:
            HRSError: for an unknown topic, for both a topic and an engram, or an engram as in :meth:`match`.
        """
        if topic is not None and engram is not None:
            raise HRSError("a context is for a topic or for an engram, not for both: leave one out")
        recent, slots = self._by_recency(), self.active
        if engram is not None:
            topic = self.match(engram).topic_id
            slots -= topic is None  # the new topic would take a place
        if topic is not None:
            first = self._topics[self._index(topic)]
            recent = [first, *(other for other in recent if other is not first)]
        sharing = [t for t in recent[:slots] if t.enabled]
        room = shares([t.n_tokens(exclude) for t in sharing], self.budget if budget is None else budget)
        parts = [sharer.newest(share, exclude) for sharer, share in zip(sharing, room, strict=True)]
        return [token for part in reversed(parts) for token in part]

    # ---- what users see and change -----------------------------------------------------------------------------------

    def topics(self) -> list[TopicInfo]:
        """All topics, the most recent first."""
        recent = self._by_recency()
        return [topic.info(active=place < self.active) for place, topic in enumerate(recent)]

    def get(self, topic_id: str) -> TopicInfo:
        """One topic, by its id or by that of a topic that became part of it.

        Raises:
            HRSError: for an unknown topic.
        """
        wanted = self.resolve(topic_id)
        return next(info for info in self.topics() if info.id == wanted)

    def resolve(self, topic_id: str) -> str:
        """The id of the topic that an id stands for today.

        Raises:
            HRSError: for an unknown topic.
        """
        return self._topics[self._index(topic_id)].id

    def enable(self, topic_id: str, enabled: bool = True) -> str:
        """Let a topic into contexts, or keep it out; returns its id, another one if it merged with an equal.

        Raises:
            HRSError: for an unknown topic.
        """
        topic = self._topics[self._index(topic_id)]
        topic.enabled = enabled
        return self._merge_around(topic)[0].id

    def rename(self, topic_id: str, name: str | None) -> str:
        """Give a topic a name, or None for the automatic one; returns its id, another one if it merged with an equal.

        Raises:
            HRSError: for an unknown topic or a name without a letter.
        """
        topic = self._topics[self._index(topic_id)]
        if name is not None and not name.strip():
            raise HRSError("a topic's name cannot be empty: give some letters, or None for the automatic title")
        topic.name = name
        return self._merge_around(topic)[0].id

    def centroid(self, topic_id: str) -> Floats:
        """[d], of length one, a copy.

        Raises:
            HRSError: for an unknown topic.
        """
        return self._centroids[self._index(topic_id)].copy()

    def forget(self, max_topics: int) -> tuple[str, ...]:
        """Drop what no context of the present budget can reach, so that what is kept does not grow for ever.

        Of every topic the prompts behind its newest ``budget`` tokens go. Of topics that the user neither named nor
        switched off the ``max_topics`` used last stay, and the others go with all they had; those that the user did
        stay too and are not counted. Contexts remain what they were, unless ``exclude`` or a larger ``budget`` asks
        for more. The ids of merged topics stay with their topic, for memories carry them.

        Returns:
            Ids of the topics that went; they stand for nothing any more, and no other topic will get them.

        Raises:
            HRSError: if fewer topics would stay than may be active.
        """
        if max_topics < self.active:
            raise HRSError(f"{self.active} topics may be active, so {max_topics} are too few to keep: keep more")
        for topic in self._topics:
            topic.forget(self.budget)
        gone = [topic for topic in self._by_recency() if not topic.touched][max_topics:]
        self._drop(gone)
        return tuple(topic.id for topic in gone)

    def delete(self, topic_id: str) -> None:
        """Drop a topic with its prompts; its ids stand for nothing any more, and no other topic will get them.

        Raises:
            HRSError: for an unknown topic.
        """
        self._drop([self._topics[self._index(topic_id)]])

    def join_into(self, topic_id: str, into: str) -> str:
        """Make a topic part of another one, which keeps its name and its switch; returns the id of that one.

        Raises:
            HRSError: for an unknown topic, or if both are the same.
        """
        small, large = self._index(topic_id), self._index(into)
        if small == large:
            raise HRSError(f"{topic_id} and {into} are the same topic: name two different ones")
        survivor = self._topics[large]
        self._absorb(large, small)
        return survivor.id

    def _drop(self, gone: Sequence[Topic]) -> None:
        if gone:
            stay = [i for i, topic in enumerate(self._topics) if topic not in gone]
            self._topics = [self._topics[i] for i in stay]
            self._sums, self._centroids = self._sums[stay], self._centroids[stay]  # [n_topics, d]
            lost = {topic.id for topic in gone}
            self._aliases = {old: new for old, new in self._aliases.items() if new not in lost}

    def restarted(self, join: float, merge: float) -> "TopicContexts":
        """Return topics with other thresholds and no prompt, none of which gets an id that one of these had.

        Raises:
            HRSError: for thresholds that :class:`TopicContexts` refuses.
        """
        made = TopicContexts(self.width, join=join, merge=merge, active=self.active, budget=self.budget)
        made._n_created, made._n_prompts = self._n_created, self._n_prompts
        return made

    # ---- storage -----------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything, so that :meth:`from_json` goes on where this stands, to the last bit."""
        return strict_json.dumps(
            {
                "format": _FORMAT,
                "width": self.width,
                "join": self.join,
                "merge": self.merge,
                "active": self.active,
                "budget": self.budget,
                "n_created": self._n_created,
                "n_prompts": self._n_prompts,
                "topics": [asdict(t) | {"sum": s.tolist()} for t, s in zip(self._topics, self._sums, strict=True)],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "TopicContexts":
        """What :meth:`to_json` wrote.

        Raises:
            HRSError: if it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']}")
            made = cls(values["width"], **{k: values[k] for k in ("join", "merge", "active", "budget")})
            for row in values["topics"]:
                made._sums = np.vstack((made._sums, np.array(row.pop("sum"), dtype=np.float64)))
                prompts = [Prompt(**prompt) for prompt in row.pop("prompts")]
                made._topics.append(Topic(**row, prompts=prompts))
                made._aliases |= dict.fromkeys(row["merged_ids"], row["id"])
            made._centroids = np.array([_normalised(row) for row in made._sums]).reshape(-1, made.width)
            made._n_created, made._n_prompts = values["n_created"], values["n_prompts"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HRSError(f"these are not topics as to_json wrote them ({error}): start with none") from error
        return made

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _unit(self, engram: ArrayLike) -> Floats:
        vector = np.asarray(engram, dtype=np.float64)
        if vector.shape != (self.width,):
            raise HRSError(f"an engram of shape {vector.shape} cannot join topics of width {self.width}: use one model")
        if not np.isfinite(vector).all() or not vector.any():
            raise HRSError("an engram that is zero or not finite has no direction: was the text empty?")
        return _normalised(vector / np.abs(vector).max())  # scaled first, so that no square over- or underflows

    def _match(self, unit: Floats) -> Match:
        if not self._topics:
            return Match(topic_id=None, similarity=None)
        cosines = self._centroids @ unit
        nearest = int(cosines.argmax())
        similarity = float(cosines[nearest])
        return Match(topic_id=self._topics[nearest].id if similarity >= self.join else None, similarity=similarity)

    def _index(self, topic_id: str) -> int:
        wanted = self._aliases.get(topic_id, topic_id)
        for index, topic in enumerate(self._topics):
            if topic.id == wanted:
                return index
        raise HRSError(f"there is no topic '{topic_id}': list them with topics()")

    def _by_recency(self) -> list[Topic]:
        return sorted(self._topics, key=lambda topic: -topic.last_used)

    def _merge_around(self, topic: Topic) -> tuple[Topic, tuple[str, ...]]:
        """Merge a topic with the nearest one that it may merge with, as long as there is one."""
        merged: list[str] = []
        while True:
            index = self._topics.index(topic)
            cosines = self._centroids @ self._centroids[index]
            allowed = [topic.may_merge(other) for other in self._topics]
            cosines[~np.array(allowed)] = -np.inf
            other = int(cosines.argmax())
            if cosines[other] < self.merge:
                return topic, tuple(merged)
            large, small = index, other
            if self._topics[small].n_prompts > self._topics[large].n_prompts:
                large, small = small, large
            topic = self._topics[large]
            merged.append(self._topics[small].id)
            self._absorb(large, small)

    def _absorb(self, large: int, small: int) -> None:
        topic, gone = self._topics[large], self._topics[small]
        topic.absorb(gone)
        self._aliases |= dict.fromkeys((gone.id, *gone.merged_ids), topic.id)
        self._sums[large] += self._sums[small]
        self._centroids[large] = _normalised(self._sums[large])
        del self._topics[small]
        self._sums, self._centroids = np.delete(self._sums, small, axis=0), np.delete(self._centroids, small, axis=0)


def _normalised(vector: Floats) -> Floats:
    length = np.linalg.norm(vector)
    return vector / length if length > 0 else vector  # unit engrams may cancel: then no direction is near
