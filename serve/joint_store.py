"""Memories of one user together with those that all users read."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike

from hrs.retrieval.store import EngramStore, Hit, Memory, NewMemory
from serve.errors import ApiError

Memories = list[Memory]
Hits = list[list[Hit]]


class JointStore:
    """A store that is read and written, and another that is only read; see :class:`EngramStore` for the methods.

    Ids of two stores differ, so a memory is found by its id without a word on where it lies.
    """

    def __init__(self, own: EngramStore, common: EngramStore) -> None:
        self._own, self._common = own, common
        self.fingerprint, self.width, self.block = own.fingerprint, own.width, own.block

    def __len__(self) -> int:
        return len(self._own) + len(self._common)

    def get(self, ids: Sequence[str]) -> Memories:
        """Return the memories with these ids that there are."""
        return self._own.get(ids) + self._common.get(ids)

    def list(self, *, topic: str | None, source: str | None, limit: int, offset: int) -> Memories:
        """Return a page of the memories, first those that all read, each the oldest first."""
        found = self._common.list(topic=topic, source=source, limit=limit, offset=offset)
        if len(found) == limit:
            return found
        n_before = self._common.count(topic=topic, source=source) if offset else len(found)
        return found + self._own.list(
            topic=topic, source=source, limit=limit - len(found), offset=max(offset - n_before, 0)
        )

    def count(self, *, topic: str | None, source: str | None) -> int:
        """Return the number of memories of a topic and a source in both."""
        return sum(store.count(topic=topic, source=source) for store in (self._common, self._own))

    def search(self, queries: ArrayLike, k: int, **conditions: Any) -> Hits:
        """Return the k nearest of both for each query, best first."""
        both = zip(
            self._own.search(queries, k, **conditions), self._common.search(queries, k, **conditions), strict=True
        )
        return [sorted((*own, *common), key=lambda hit: -hit.similarity)[:k] for own, common in both]

    def add(self, memories: Sequence[NewMemory], keys: ArrayLike) -> Memories:
        """Remember texts as the user's own."""
        return self._own.add(memories, keys)

    def delete(self, ids: Sequence[str]) -> int:
        """Forget memories of the user's own.

        Raises:
            ApiError: 403 if one of them is read by all.
        """
        if self._common.get(ids):
            raise ApiError(403, "this memory belongs to all users of the endpoint: it cannot be deleted here")
        return self._own.delete(ids)
