"""Topic contexts against slow, obvious references, and what must hold whatever is said in whatever order."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from properties import examples

from hrs.errors import HRSError
from hrs.retrieval.topics import TopicContexts, shares
from hrs.retrieval.topics.titles import content_words, title_of

Floats = NDArray[np.float64]

WIDTH = 4


def at(*degrees: float) -> list[Floats]:
    """Vectors of growing length in a plane of the four dimensions."""
    return [(1.0 + i) * np.array([np.cos(a), np.sin(a), 0.0, 0.0]) for i, a in enumerate(np.deg2rad(np.array(degrees)))]


def filled(*lengths: int, active: int = 3, budget: int = 20) -> TopicContexts:
    """One topic per length, at right angles, with one prompt of so many tokens 100, 101, ... or 200, 201, ..."""
    topics = TopicContexts(WIDTH, active=active, budget=budget)
    for i, length in enumerate(lengths):
        topics.assign(np.eye(WIDTH)[i], range(100 * (i + 1), 100 * (i + 1) + length), "")
    return topics


# ---- what must hold always -------------------------------------------------------------------------------------------

turns = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 12), st.sampled_from(["assign"] * 6 + ["toggle", "rename"])),
    min_size=1,
    max_size=25,
)
thresholds = st.tuples(st.floats(-0.5, 0.95), st.floats(0.01, 0.6)).map(lambda t: (t[0], min(1.0, t[0] + t[1])))


class Played:
    """A conversation, and a reference of it by bookkeeping alone: which prompts each topic ought to hold."""

    def __init__(self, turns: list[tuple[int, int, str]], thresholds: tuple[float, float], active: int, budget: int):
        self.topics = TopicContexts(WIDTH, join=thresholds[0], merge=thresholds[1], active=active, budget=budget)
        self.engrams: list[Floats] = []
        self.members: dict[str, list[int]] = {}
        for seed, length, action in turns:
            rng = np.random.default_rng(seed)
            known = self.topics.topics()
            if action == "assign" or not known:
                engram = rng.normal(size=WIDTH) * 10.0 ** rng.integers(-5, 6)
                number, nearest = len(self.engrams), self.topics.match(engram).topic_id
                made = self.topics.assign(engram, [number] * length, f"word{'abc'[seed % 3] * 3} text")
                assert made.prompt == number and made.created == (nearest is None)
                self.engrams.append(engram)
                # The id it joined, or the next new one, leads to the topic it is said to be in.
                joined = nearest or f"topic-{len(self.members) + 1}"
                assert self.topics.resolve(joined) == made.topic_id and joined in (made.topic_id, *made.merged)
                self.members.setdefault(joined, []).append(number)
            else:
                chosen = known[seed % len(known)]
                if action == "toggle":
                    self.topics.enable(chosen.id, not chosen.enabled)
                else:
                    self.topics.rename(chosen.id, None if chosen.renamed else f"name {seed}")
            self.check()

    def current(self) -> dict[str, list[int]]:
        """Prompts by present topic: those of every id that leads there."""
        held: dict[str, list[int]] = {}
        for old, prompts in self.members.items():
            held.setdefault(self.topics.resolve(old), []).extend(prompts)
        return {topic: sorted(prompts) for topic, prompts in held.items()}

    def check(self) -> None:
        infos, held = self.topics.topics(), self.current()
        assert {info.id: info.n_prompts for info in infos} == {t: len(p) for t, p in held.items()}
        assert [info.active for info in infos] == [i < self.topics.active for i in range(len(infos))]
        assert [max(held[info.id]) for info in infos] == sorted((max(p) for p in held.values()), reverse=True)
        for info in infos:
            units = [self.engrams[i] / np.linalg.norm(self.engrams[i]) for i in held[info.id]]
            mean = np.mean(units, axis=0)
            np.testing.assert_allclose(
                self.topics.centroid(info.id), mean / np.linalg.norm(mean), atol=1e-7 / np.linalg.norm(mean)
            )
            assert {info.id, *info.merged_ids} == {old for old in self.members if self.topics.resolve(old) == info.id}
            for other in infos:  # nothing is left to merge, though only one centroid is looked at per prompt
                near = self.topics.centroid(info.id) @ self.topics.centroid(other.id) >= self.topics.merge + 1e-9
                spoken = info.enabled != other.enabled or (info.renamed and other.renamed)
                assert other.id == info.id or not near or spoken


played = st.builds(Played, turns, thresholds, st.integers(2, 7), st.integers(1, 60))


@examples(50)
@given(played)
def test_topics_hold_the_mean_of_their_prompts_and_every_id_leads_to_one(played: Played) -> None:
    """All the checks are made after every turn."""
    assert sum(info.n_prompts for info in played.topics.topics()) == len(played.engrams)


@examples(50)
@given(played, st.data())
def test_a_context_keeps_its_budget_and_holds_no_present_and_no_disabled_prompt(
    played: Played, data: st.DataObject
) -> None:
    topics = played.topics
    budget = data.draw(st.none() | st.integers(0, 100))
    exclude = data.draw(st.sets(st.integers(0, len(played.engrams))))
    found = topics.context(budget=budget, exclude=exclude)
    assert len(found) <= (topics.budget if budget is None else budget)
    held = played.current()
    allowed = {n for info in topics.topics() if info.enabled and info.active for n in held[info.id]} - exclude
    assert set(found) <= allowed
    # Prompts of one topic stand in the order they came; and topics the other way round than they were used.
    order = [
        n for info in reversed(topics.topics()) if info.active and info.enabled for n in held[info.id] if n in found
    ]
    assert list(dict.fromkeys(found)) == order
    everything = topics.context(budget=10**6, exclude=exclude)
    assert len(everything) <= 10**6 and set(everything) <= allowed
    assert len(found) == min(len(everything), topics.budget if budget is None else budget), "no room is wasted"


@examples(50)
@given(played, st.integers(0, 2**32 - 1))
def test_asking_before_a_prompt_is_added_tells_what_excluding_it_afterwards_does(played: Played, seed: int) -> None:
    topics, engram = played.topics, np.random.default_rng(seed).normal(size=WIDTH)
    before, unchanged = topics.context(engram=engram), topics.to_json()
    match = topics.match(engram)
    assert topics.to_json() == unchanged, "asking must change nothing"
    made = topics.assign(engram, [-1] * 5, "the present prompt")
    assert (made.similarity, made.created) == (match.similarity, match.topic_id is None)
    after = topics.context(exclude=[made.prompt])
    assert -1 not in before and -1 not in after
    if not made.merged:
        assert before == after
    if topics.get(made.topic_id).enabled:
        assert topics.context()[-1] == -1, "without exclude the prompt is in its own context, at its end"


@examples(25)
@given(played, turns)
def test_what_is_stored_goes_on_as_what_was_not(played: Played, more: list[tuple[int, int, str]]) -> None:
    again = TopicContexts.from_json(json.dumps(json.loads(played.topics.to_json())))
    assert again.to_json() == played.topics.to_json()
    for seed, length, _ in more:
        engram = np.random.default_rng(seed).normal(size=WIDTH)
        assert again.assign(engram, [1] * length, "so") == played.topics.assign(engram, [1] * length, "so")
    assert again.topics() == played.topics.topics()
    assert again.context() == played.topics.context()


# ---- joining and merging ---------------------------------------------------------------------------------------------


def test_a_prompt_joins_the_nearest_topic_or_opens_one() -> None:
    topics = TopicContexts(WIDTH, join=0.5, merge=0.99)
    near, far, between = at(0, 90, 31)
    assert topics.match(near).similarity is None
    first = topics.assign(near, [1], "")
    assert (first.created, first.similarity, first.topic_id) == (True, None, "topic-1")
    second = topics.assign(far, [2], "")
    assert second.created and second.similarity == pytest.approx(0, abs=1e-12)
    third = topics.assign(between, [3], "")
    assert (third.created, third.topic_id) == (False, "topic-1")
    assert third.similarity == pytest.approx(np.cos(np.deg2rad(31)))
    assert topics.centroid("topic-1") == pytest.approx(at(15.5)[0]), "its length does not count, its direction does"


def degrees(cosine_of: float) -> float:
    return float(np.cos(np.deg2rad(cosine_of)))


def test_the_smaller_topic_ends_in_the_larger_with_its_prompts_in_their_order() -> None:
    topics = TopicContexts(WIDTH, join=degrees(29), merge=degrees(24))
    first, second = (topics.assign(v, [i], "").topic_id for i, v in enumerate(at(0, 30)))
    topics.assign(at(30)[0], [2], "")
    topics.assign(at(30)[0], [3], "")
    made = topics.assign(at(14)[0], [4], "")  # joins the first, now at 7: 23 from the second
    assert (made.topic_id, made.merged, made.created) == (second, (first,), False)
    assert topics.resolve(first) == second and topics.get(first) == topics.get(second)
    assert topics.get(first).merged_ids == (first,)
    assert topics.context(topic=first) == [0, 1, 2, 3, 4]
    total = sum((v / np.linalg.norm(v) for v in at(0, 30, 30, 30, 14)), np.zeros(WIDTH))
    assert topics.centroid(first) == pytest.approx(total / np.linalg.norm(total))


def test_ids_stay_valid_through_a_merge_of_what_was_merged() -> None:
    topics = TopicContexts(WIDTH, join=degrees(29), merge=degrees(24))
    first, second, third = (topics.assign(v, [0], "").topic_id for v in at(0, 30, 75))
    for _ in range(99):
        topics.assign(at(75)[0], [0], "")
    assert topics.assign(at(14)[0], [0], "").merged == (second,)
    merged: tuple[str, ...] = ()
    while not merged:  # it wanders until it is near the large one
        x, y, *_ = topics.centroid(first)
        merged = topics.assign(at(np.rad2deg(np.arctan2(y, x)) + 12)[0], [0], "").merged
    assert merged == (first,)
    assert [topics.resolve(topic) for topic in (first, second, third)] == [third] * 3
    assert set(topics.get(second).merged_ids) == {first, second}
    again = TopicContexts.from_json(topics.to_json())
    assert [again.resolve(topic) for topic in (first, second, third)] == [third] * 3


def test_one_prompt_may_merge_three_topics() -> None:
    """A topic at the pole moves towards two at 30 degrees from it and 33 from each other."""
    pole = np.array([0.0, 0.0, 1.0, 0.0])

    def place(polar: float, azimuth: float) -> Floats:
        p, a = np.deg2rad((polar, azimuth))
        return np.array([np.sin(p) * np.cos(a), np.sin(p) * np.sin(a), np.cos(p), 0.0])

    topics = TopicContexts(WIDTH, join=degrees(29), merge=degrees(28))
    sides = [topics.assign(place(30, azimuth), [1], "").topic_id for azimuth in (0, 70)]
    middle = [topics.assign(pole, [1], "") for _ in range(4)][-1].topic_id
    assert topics.assign(place(12, 35), [1], "").merged == ()
    made = topics.assign(place(12, 35), [1], "")
    assert made.topic_id == middle and sorted(made.merged) == sides
    assert len(topics) == 1 and {topics.resolve(side) for side in sides} == {middle}


def test_what_the_user_said_is_not_undone_by_a_merge() -> None:
    def two() -> tuple[TopicContexts, str, str]:
        topics = TopicContexts(WIDTH, join=degrees(29), merge=degrees(24))
        one, other = (topics.assign(v, [1], "").topic_id for v in at(0, 30))
        assert one != other
        return topics, one, other

    topics, one, other = two()
    assert topics.assign(at(14)[0], [1], "").merged == (other,), "left alone, they merge"

    topics, one, other = two()
    topics.enable(other, False)
    assert topics.assign(at(14)[0], [1], "").merged == ()
    assert topics.enable(other) == one == topics.resolve(other), "equal again, so they merge now"

    topics, one, other = two()
    topics.rename(one, "tea"), topics.rename(other, "coffee")
    assert topics.assign(at(14)[0], [1], "").merged == ()
    assert topics.rename(other, None) == one and topics.get(other).name == "tea"


# ---- contexts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "budget", "given"),
    [
        ([50, 50, 50], 20, [10, 5, 5]),
        ([50, 50, 50, 50], 21, [11, 5, 3, 2]),
        ([4, 50, 50], 20, [4, 8, 8]),
        ([50, 4, 2], 20, [14, 4, 2]),  # 10, 4 and 2 by halves; the rest goes to the first, which has more
        ([50, 7, 0], 20, [15, 5, 0]),
        ([3, 2, 1], 20, [3, 2, 1]),
        ([5, 5], 1, [1, 0]),
        ([5, 5], 0, [0, 0]),
        ([], 20, []),
    ],
)
def test_the_budget_is_halved_and_none_of_it_is_wasted(available: list[int], budget: int, given: list[int]) -> None:
    assert shares(available, budget) == given


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((50, 50, 50), [*range(145, 150), *range(245, 250), *range(340, 350)]),  # 5, 5 and 10 of 20
        ((50, 50, 4), [*range(142, 150), *range(242, 250), *range(300, 304)]),  # 8 of 16 left, then all 8
        ((3, 50, 50), [*range(100, 103), *range(245, 250), *range(338, 350)]),  # two that nobody else can use
        ((50,), [*range(130, 150)]),
        ((), []),
    ],
)
def test_the_budget_is_halved_from_the_most_recent_topic_on(lengths: tuple[int, ...], expected: list[int]) -> None:
    assert filled(*lengths).context() == expected[-20:]


def test_a_topic_asked_for_stands_last_and_takes_the_largest_share() -> None:
    topics = filled(50, 50, 50)
    assert topics.context(topic="topic-1") == [*range(245, 250), *range(345, 350), *range(140, 150)]
    assert topics.context() == filled(50, 50, 50).context(), "asking did not make it the most recent"


def test_old_topics_leave_the_slots_and_come_back() -> None:
    topics = filled(5, 5, 5, active=2)
    assert [(info.id, info.active) for info in topics.topics()] == [
        ("topic-3", True),
        ("topic-2", True),
        ("topic-1", False),
    ]
    assert topics.context() == [*range(200, 205), *range(300, 305)]
    topics.assign(np.eye(WIDTH)[0], [7], "")
    assert topics.context() == [*range(300, 305), *range(100, 105), 7]


def test_a_disabled_topic_keeps_its_place_and_is_silent() -> None:
    topics = filled(5, 5, 5, active=2)
    topics.enable("topic-3", False)
    assert topics.context() == [*range(200, 205)], "not topic 1, which is no longer active"
    assert topics.context(topic="topic-3") == [*range(200, 205)]
    topics.enable("topic-3")
    assert topics.context() == [*range(200, 205), *range(300, 305)]


def test_the_oldest_prompt_that_is_used_loses_its_front() -> None:
    topics = TopicContexts(WIDTH, budget=5)
    for tokens in ([1, 2, 3, 4], [5], [], [6, 7]):
        made = topics.assign(at(0)[0], tokens, "")
    assert topics.context() == [3, 4, 5, 6, 7]
    assert topics.context(exclude=[made.prompt]) == [1, 2, 3, 4, 5]
    assert topics.context(exclude=[made.prompt, 0], budget=0) == []


# ---- forgetting ------------------------------------------------------------------------------------------------------


@examples(50)
@given(turns, thresholds, st.integers(2, 7), st.integers(1, 30))
def test_what_is_forgotten_is_what_no_context_could_reach(
    turns: list[tuple[int, int, str]], thresholds: tuple[float, float], active: int, budget: int
) -> None:
    """One that forgets after every turn against one that never does."""
    options = {"join": thresholds[0], "merge": thresholds[1], "active": active, "budget": budget}
    whole, forgetful = TopicContexts(WIDTH, **options), TopicContexts(WIDTH, **options)  # type: ignore[arg-type]
    for number, (seed, length, action) in enumerate(turns):
        engram = np.random.default_rng(seed).normal(size=WIDTH)
        known = whole.topics()
        for topics in (whole, forgetful):
            if action == "assign" or not known:
                topics.assign(engram, [number] * length, f"word{'abc'[seed % 3] * 3} text")
            elif action == "toggle":
                topics.enable(known[seed % len(known)].id, not known[seed % len(known)].enabled)
            else:
                topics.rename(known[seed % len(known)].id, f"name {seed}")
        assert forgetful.forget(len(turns) + 7) == ()
        assert forgetful.context() == whole.context()
        assert forgetful.context(engram=engram) == whole.context(engram=engram)
        kept = [dataclasses.replace(info, n_tokens=0) for info in forgetful.topics()]
        assert kept == [dataclasses.replace(info, n_tokens=0) for info in whole.topics()]
        longest = max(length for _, length, _ in turns)
        assert all(info.n_tokens < budget + longest for info in forgetful.topics())


def test_what_is_kept_stops_growing() -> None:
    topics = TopicContexts(64, active=2, budget=10)
    sizes = []
    for number in range(300):
        topics.assign(np.eye(64)[number % 64], [number % 10] * 4, f"unheard{'abcdefghij'[number % 10]} tide")
        topics.forget(5)
        sizes.append(len(topics.to_json()))
    assert len(topics) == 5
    assert max(sizes[200:]) < 1.1 * max(sizes[50:100])
    words = TopicContexts(WIDTH)
    for number in range(3000):
        words.assign(at(0)[0], [1], "tide w" + "".join(chr(97 + int(digit)) for digit in f"{number:04}"))
        words.forget(7)
    assert len(json.loads(words.to_json())["topics"][0]["words"]) <= 400
    assert words.topics()[0].name.startswith("tide / ")


def test_the_topic_used_longest_ago_goes_first_and_those_users_touched_stay() -> None:
    topics = TopicContexts(8, active=2)
    for number in range(6):
        topics.assign(np.eye(8)[number], [number], f"word{'abcdef'[number] * 3}")
    topics.rename("topic-1", "mine")
    topics.enable("topic-2", False)
    topics.assign(np.eye(8)[2], [2], "")  # the third is used again
    assert topics.forget(2) == ("topic-5", "topic-4")
    assert [info.id for info in topics.topics()] == ["topic-3", "topic-6", "topic-2", "topic-1"]
    assert topics.get("topic-1").name == "mine" and not topics.get("topic-2").enabled
    for kept in ("topic-1", "topic-3", "topic-6"):
        np.testing.assert_array_equal(topics.centroid(kept), np.eye(8)[int(kept[-1]) - 1])
    with pytest.raises(HRSError, match="there is no topic 'topic-4'"):
        topics.get("topic-4")
    assert topics.assign(np.eye(8)[3], [9], "").topic_id == "topic-7", "no id is given twice"
    topics.rename("topic-1", None)
    assert topics.forget(2) == ("topic-6", "topic-1"), "without its name it is as the others"
    with pytest.raises(HRSError, match="2 topics may be active, so 1 are too few to keep"):
        topics.forget(1)


def test_the_former_ids_of_a_topic_go_with_it() -> None:
    topics = TopicContexts(WIDTH, join=degrees(29), merge=degrees(24), active=2)
    first, second = (topics.assign(v, [1], "").topic_id for v in at(0, 30))
    assert topics.assign(at(14)[0], [1], "").merged == (second,)
    for axis in (2, 3):
        topics.assign(np.eye(WIDTH)[axis], [1], "")
    assert topics.forget(2) == (first,)
    for gone in (first, second):
        with pytest.raises(HRSError, match="there is no topic"):
            topics.resolve(gone)
    again = TopicContexts.from_json(topics.to_json())
    assert again.to_json() == topics.to_json()


def test_topics_that_were_written_before_any_forgot_are_read() -> None:
    stored = json.loads(filled(5, 5).to_json())
    for row in stored["topics"]:
        del row["n_forgotten"]
    assert TopicContexts.from_json(json.dumps(stored)).to_json() == filled(5, 5).to_json()


def test_a_topic_that_is_deleted_leaves_nothing_behind() -> None:
    topics, never = filled(3, 4, 5), filled(3, 4, 5)
    topics.delete("topic-2")
    assert [info.id for info in topics.topics()] == ["topic-3", "topic-1"]
    assert topics.context() == [*range(100, 103), *range(300, 305)]
    with pytest.raises(HRSError, match="there is no topic 'topic-2'"):
        topics.get("topic-2")
    assert topics.assign(np.eye(WIDTH)[1], [7], "").topic_id == "topic-4"
    assert np.array_equal(topics.centroid("topic-3"), never.centroid("topic-3"))
    for info in topics.topics():
        topics.delete(info.id)
    assert len(topics) == 0 and topics.context() == []
    assert topics.assign(np.eye(WIDTH)[0], [8], "").created


def test_a_topic_becomes_part_of_the_one_that_is_named() -> None:
    topics = filled(3, 4, 5)
    topics.rename("topic-1", "small")
    topics.rename("topic-2", "large")
    topics.enable("topic-2", False)
    assert topics.join_into("topic-1", "topic-2") == "topic-2"
    info = topics.get("topic-1")
    assert (info.id, info.name, info.enabled, info.n_prompts) == ("topic-2", "large", False, 2)
    assert topics.centroid("topic-2") == pytest.approx(np.array([1, 1, 0, 0]) / np.sqrt(2))
    assert TopicContexts.from_json(topics.to_json()).to_json() == topics.to_json()
    with pytest.raises(HRSError, match="are the same topic"):
        topics.join_into("topic-1", "topic-2")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_titles_are_the_most_frequent_words_that_say_something() -> None:
    text = "The tide and the harbour: with the tide, ships leave. It is an ÉTÉ of 1999; the été at sea, ox-cart"
    assert content_words(text) == ["tide", "harbour", "tide", "ships", "leave", "été", "été", "sea", "cart"]
    topics = TopicContexts(WIDTH)
    made = topics.assign(at(0)[0], [1], text)
    assert topics.get(made.topic_id).name == "tide / été / harbour / ships"
    topics.assign(at(0)[0], [1], "Ships! More ships")
    assert topics.get(made.topic_id).name == "ships / tide / été / harbour"
    assert title_of({}) == ""
    assert topics.get(topics.assign(at(90)[0], [1], "42 is it").topic_id).name == "topic-2"


def test_a_user_renames_a_topic_and_takes_it_back() -> None:
    topics = TopicContexts(WIDTH)
    made = topics.assign(at(0)[0], [1], "harbour")
    topics.rename(made.topic_id, "the sea")
    assert dataclasses.astuple(topics.get(made.topic_id))[1:3] == ("the sea", True)
    topics.rename(made.topic_id, None)
    assert dataclasses.astuple(topics.get(made.topic_id))[1:3] == ("harbour", False)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"join": 0.8, "merge": 0.8}, "join threshold 0.8 must lie above -1 and below the merge threshold 0.8"),
        ({"join": 0.9}, "below the merge threshold 0.8"),
        ({"merge": 1.1}, "at most 1"),
        ({"active": 1}, "active topics must be 2 to 7, got 1"),
        ({"active": 8}, "active topics must be 2 to 7, got 8"),
        ({"budget": 0}, "at least 1, got 4 and 0"),
    ],
)
def test_values_out_of_bounds_are_one_sentence(values: dict[str, float], said: str) -> None:
    with pytest.raises(HRSError, match=said):
        TopicContexts(WIDTH, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("engram", [np.ones(3), np.ones((1, 4)), np.zeros(4), [1, 2, 3, np.nan], [np.inf, 0, 0, 0]])
def test_an_engram_without_direction_or_of_another_model_is_refused(engram: object) -> None:
    topics = filled(5)
    stored = topics.to_json()
    for call in (topics.match, lambda e: topics.assign(e, [1], ""), lambda e: topics.context(engram=e)):
        with pytest.raises(HRSError, match=r"cannot join topics of width 4|has no direction"):
            call(engram)  # type: ignore[arg-type]
    assert topics.to_json() == stored


def test_tiny_and_huge_engrams_have_a_direction() -> None:
    topics = TopicContexts(WIDTH)
    ids = {topics.assign(np.array([1, 1, 0, 0]) * size, [1], "").topic_id for size in (1e-300, 1.0, 1e300)}
    assert ids == {"topic-1"}


def test_other_mistakes_are_one_sentence() -> None:
    topics = filled(5)
    for call in (topics.get, topics.enable, topics.centroid, topics.resolve, lambda i: topics.context(topic=i)):
        with pytest.raises(HRSError, match="there is no topic 'topic-9'"):
            call("topic-9")
    with pytest.raises(HRSError, match="not for both"):
        topics.context(topic="topic-1", engram=at(0)[0])
    with pytest.raises(HRSError, match="name cannot be empty"):
        topics.rename("topic-1", "  ")
    good = json.loads(topics.to_json())
    for bad in ("{", "[]", "{}", json.dumps(good | {"format": 2}), json.dumps(good | {"join": 0.9})):
        with pytest.raises(HRSError):
            TopicContexts.from_json(bad)
