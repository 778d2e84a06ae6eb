"""What a topic is and what is told of it: plain records, which :mod:`.contexts` keeps and hands out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from hrs.retrieval.topics.titles import content_words, title_of

_KEPT_WORDS = 200
"""Words of a topic that are counted on when it forgets; four make its title."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Where a prompt would go; nothing has changed."""

    topic_id: str | None
    """None: none is near enough, it would open a topic."""
    similarity: float | None
    """Cosine to the nearest centroid, near enough or not; None without any topic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Where a prompt went."""

    topic_id: str
    """After the merges it caused."""
    similarity: float | None
    """As in :class:`Match`, before the prompt moved the centroid."""
    created: bool
    merged: tuple[str, ...]
    """Topics that ended in another one because of this prompt. Their ids remain valid names of it."""
    prompt: int
    """Number of the prompt, for ``exclude`` of :meth:`TopicContexts.context`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicInfo:
    """A topic as a user sees it."""

    id: str
    name: str
    """What the user called it, else the most frequent words of its prompts."""
    renamed: bool
    n_prompts: int
    """All it ever got, the forgotten ones included."""
    n_tokens: int
    """Of the prompts that are kept."""
    enabled: bool
    active: bool
    """Among those used last, so that its text is in a context if it is enabled."""
    merged_ids: tuple[str, ...]
    """Former topics that are part of it now."""


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One text of the user."""

    number: int
    """Counts all prompts of a conversation, from 0."""
    tokens: list[int]


@dataclass(kw_only=True, slots=True, eq=False)
class Topic:
    """Prompts about one thing."""

    id: str
    name: str | None = None
    """What the user called it."""
    enabled: bool = True
    last_used: int = -1
    """Number of the last prompt."""
    prompts: list[Prompt] = field(default_factory=list)
    """In the order they came."""
    words: dict[str, int] = field(default_factory=dict)
    """How often each word occurred that may be in the title."""
    merged_ids: list[str] = field(default_factory=list)
    n_forgotten: int = 0
    """Prompts that are not kept any more; the centroid and the title still tell of them."""

    @property
    def n_prompts(self) -> int:
        """All it ever got."""
        return len(self.prompts) + self.n_forgotten

    @property
    def touched(self) -> bool:
        """Whether the user said something of it: gave it a name or switched it off."""
        return self.name is not None or not self.enabled

    def add(self, prompt: Prompt, text: str) -> None:
        """Append a prompt, the newest of all."""
        self.prompts.append(prompt)
        self.last_used = prompt.number
        for word in content_words(text):
            self.words[word] = self.words.get(word, 0) + 1

    def may_merge(self, other: "Topic") -> bool:
        """Whether nothing the user said speaks against it: one is off and one on, or both have a name."""
        return self is not other and self.enabled == other.enabled and not (self.name and other.name)

    def absorb(self, other: "Topic") -> None:
        """Take over all that another one has."""
        self.prompts = sorted(self.prompts + other.prompts, key=lambda prompt: prompt.number)
        for word, count in other.words.items():
            self.words[word] = self.words.get(word, 0) + count
        self.name = self.name or other.name
        self.last_used = max(self.last_used, other.last_used)
        self.merged_ids += [other.id, *other.merged_ids]
        self.n_forgotten += other.n_forgotten

    def forget(self, reach: int) -> None:
        """Drop the prompts behind the newest ``reach`` tokens, and of very many words the rarest."""
        kept, room = 0, reach
        for prompt in reversed(self.prompts):
            if room <= 0:
                break
            room -= len(prompt.tokens)
            kept += 1
        n_gone = len(self.prompts) - kept
        self.prompts, self.n_forgotten = self.prompts[n_gone:], self.n_forgotten + n_gone
        if len(self.words) > 2 * _KEPT_WORDS:  # not one by one, so that a new word has time to become frequent
            frequent = set(sorted(self.words, key=lambda word: -self.words[word])[:_KEPT_WORDS])
            self.words = {word: count for word, count in self.words.items() if word in frequent}

    def n_tokens(self, exclude: Collection[int] = ()) -> int:
        """Tokens of all its prompts but those numbers."""
        return sum(len(prompt.tokens) for prompt in self.prompts if prompt.number not in exclude)

    def newest(self, room: int, exclude: Collection[int]) -> list[int]:
        """At most ``room`` tokens of the newest prompts, in the order they came; the oldest may lose its front."""
        parts: list[list[int]] = []
        for prompt in reversed(self.prompts):
            if room <= 0:
                break
            if prompt.number not in exclude:
                parts.append(prompt.tokens[-room:])
                room -= len(parts[-1])
        return [token for part in reversed(parts) for token in part]

    def info(self, active: bool) -> TopicInfo:
        """What a user is shown."""
        return TopicInfo(
            id=self.id,
            name=self.name or title_of(self.words) or self.id,
            renamed=self.name is not None,
            n_prompts=self.n_prompts,
            n_tokens=self.n_tokens(),
            enabled=self.enabled,
            active=active,
            merged_ids=tuple(self.merged_ids),
        )


def shares(available: Sequence[int], budget: int) -> list[int]:
    """How many of ``budget`` tokens each topic gives that has so many, the most recent one first.

    Each gets half of what is left, rounded up, and the last one all of it. What then remains because some have little
    to tell goes to the others in the same order, so that no room is wasted.
    """
    given, left = [], budget
    for place, n in enumerate(available):
        given.append(min(n, left if place == len(available) - 1 else (left + 1) // 2))
        left -= given[-1]
    for place, n in enumerate(available):
        extra = min(n - given[place], left)
        given[place] += extra
        left -= extra
    return given
