"""The whole interface of an engram store against a list, by random programs of two views."""

import itertools
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from engram_stores import WIDTH, opened
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from properties import examples

from hrs.retrieval.store import Hit, Memory, NewMemory, records, rewrite

SOURCES = st.sampled_from(["wiki", "talk", ""])
TOPICS = st.sampled_from([None, "sea", "sky"])
# Few whole numbers: many keys are equal or parallel, and some are zero.
KEY = st.lists(st.integers(-2, 2), min_size=WIDTH, max_size=WIDTH)
NAMES = st.none() | st.lists(st.sampled_from(["wiki", "talk", "", "sea", "sky", "unheard of"]), max_size=2)


class StoreAgainstList(RuleBasedStateMachine):
    """Two views of one folder, either of which may write, against a list of memories and keys."""

    @initialize(rows=st.integers(1, 12))
    def open(self, rows: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=os.environ["STORE_TEST_FOLDER"]))
        self.rows = rows
        self.views = [opened(self.folder, segment_rows=rows) for _ in range(2)]
        self.kept: list[tuple[Memory, list[int]]] = []
        self.deleted: list[str] = []

    @rule(
        which=st.integers(0, 1),
        new=st.lists(st.tuples(st.text(max_size=5), st.none() | st.floats(0, 9), SOURCES, TOPICS, KEY), max_size=9),
    )
    def add(self, which: int, new: list[tuple[str, float | None, str, str | None, list[int]]]) -> None:
        keys = np.array([key for *_, key in new]).reshape(len(new), WIDTH)
        added = self.views[which].add([NewMemory(*fields) for *fields, _ in new], keys)
        assert [(m.text, m.entropy, m.source, m.topic) for m in added] == [tuple(fields) for *fields, _ in new]
        self.kept += zip(added, [key for *_, key in new], strict=True)

    @rule(which=st.integers(0, 1), data=st.data())
    def delete(self, which: int, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from([m.id for m, _ in self.kept]), max_size=9)) if self.kept else []
        gone = data.draw(st.sampled_from(self.deleted)) if self.deleted else "no such id"
        assert self.views[which].delete([*chosen, gone]) == len(set(chosen))
        self.kept = [(m, key) for m, key in self.kept if m.id not in chosen]
        self.deleted += set(chosen)

    @rule(which=st.integers(0, 1))
    def compact(self, which: int) -> None:
        self.views[which].compact()

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.views[which] = opened(self.folder, segment_rows=self.rows)

    @rule(
        which=st.integers(0, 1),
        source=st.none() | SOURCES,
        topic=TOPICS,
        offset=st.integers(0, 9),
        limit=st.none() | st.integers(0, 9),
    )
    def look(self, which: int, source: str | None, topic: str | None, offset: int, limit: int | None) -> None:
        view = self.views[which]
        asked = [m for m, _ in self.kept if source in (None, m.source) and topic in (None, m.topic)]
        end = None if limit is None else offset + limit
        assert view.list(source=source, topic=topic, offset=offset, limit=limit) == asked[offset:end]
        assert len(view) == len(self.kept)
        backwards = [m for m, _ in reversed(self.kept)]
        assert view.get([*(m.id for m in backwards), *self.deleted, "other-0"]) == backwards

    @rule(
        which=st.integers(0, 1),
        queries=st.lists(KEY, min_size=1, max_size=3),
        k=st.integers(1, 6),
        least=st.sampled_from([-1.0, 0.0, 0.5]),
        topics=NAMES,
        sources=NAMES,
        exclude_topics=NAMES,
        exclude_sources=NAMES,
    )
    def search(
        self,
        which: int,
        queries: list[list[int]],
        k: int,
        least: float,
        topics: list[str] | None,
        sources: list[str] | None,
        exclude_topics: list[str] | None,
        exclude_sources: list[str] | None,
    ) -> None:
        found = self.views[which].search(
            np.array(queries),
            k,
            min_similarity=least,
            topics=topics,
            sources=sources,
            exclude_topics=exclude_topics,
            exclude_sources=exclude_sources,
        )
        asked = [
            (m, key)
            for m, key in self.kept
            if any(key)
            and (topics is None or m.topic in topics)
            and (sources is None or m.source in sources)
            and (exclude_topics is None or m.topic not in exclude_topics)
            and (exclude_sources is None or m.source not in exclude_sources)
        ]
        assert len(found) == len(queries)
        for query, hits in zip(queries, found, strict=True):
            check_hits(query, hits, asked, k, least)


def check_hits(query: list[int], hits: list[Hit], asked: list[tuple[Memory, list[int]]], k: int, least: float) -> None:
    """Whole numbers make cosines that are equal or far apart, so ranks by rounded cosine and age are certain."""

    def cosine(key: list[int]) -> float:
        dot = sum(a * b for a, b in zip(query, key, strict=True))
        return dot / math.sqrt(sum(a * a for a in query) * sum(b * b for b in key))

    if not any(query):
        assert not hits
        return
    ranked = sorted(((-cosine(key), age, m, key) for age, (m, key) in enumerate(asked)), key=lambda row: row[:2])
    # Cosines of a few whole numbers are off by some ten roundings, 1e-15.
    near = [row for row in ranked if -row[0] >= least + 1e-9]
    at_bound = [row for row in ranked if abs(-row[0] - least) < 1e-9]
    assert min(len(near), k) <= len(hits) <= min(len(near) + len(at_bound), k)
    expected = [-row[0] for row in ranked[: len(hits)]]
    np.testing.assert_allclose([hit.similarity for hit in hits], expected, rtol=0, atol=1e-12)
    by_id = {m.id: (age, m, key) for _, age, m, key in ranked}
    for hit in hits:
        assert -1 <= hit.similarity <= 1 and hit.similarity >= least
        age, memory, key = by_id[hit.memory.id]
        assert hit.memory == memory and hit.key.tolist() == key
        assert math.isclose(hit.similarity, cosine(key), abs_tol=1e-12)
    chosen = {hit.memory.id for hit in hits}
    for one, other in itertools.pairwise(hits):
        assert one.similarity > other.similarity or by_id[one.memory.id][0] < by_id[other.memory.id][0]
    for hit in hits:  # of equal keys the older ones are taken
        age, _, key = by_id[hit.memory.id]
        assert all(m.id in chosen for _, other, m, same in ranked if same == key and other < age)


@pytest.mark.hypothesis
def test_two_views_against_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TEST_FOLDER", str(tmp_path))
    # Small segments, so that they are merged, split and thinned out.
    monkeypatch.setattr(rewrite, "LARGEST_SEGMENT", 20)
    monkeypatch.setattr(records, "LARGEST_SEGMENT", 20)
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        StoreAgainstList,
        settings=settings(
            examples(12),
            stateful_step_count=25,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
