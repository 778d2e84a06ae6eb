"""Seven stress tests of topic contexts, for any embedding of texts: no model is needed to run them.

    for result in stress_suite(embed, Thresholds.of(0.6)):
        print(result.name, result.together, result.apart, result.passed)

Each asks for two things at once: that texts of one topic share it, and that others do not. The second is the negative
control of the first; a test that asks for the first alone is passed by a threshold of minus one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hrs.retrieval.topics.contexts import TopicContexts
from hrs.retrieval.topics.stress_result import (
    Embed,
    StressResult,
    Thresholds,
    pair_rates,
    purity,
    route,
    summary,
)
from hrs.retrieval.topics.stress_texts import STORIES, TOPICS, text_about

PROMPT_WORDS = 30
OVERLAP_LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Share of words from a third topic that two topics have in common; at 1 they differ in name alone."""
SWEEP = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
"""Join thresholds. States that share a large mean are told apart near one alone."""
SWITCHES = 50
TOPIC_COUNTS = (2, 5, 10, 20, 50)
_SHUFFLES = 20


def stress_suite(
    embed: Embed, thresholds: Thresholds | None = None, *, draws: int = 10, seed: int = 0
) -> list[StressResult]:
    """All seven, with the same thresholds but for the sweep, which finds its own.

    Args:
        draws: texts drawn anew so many times, for the intervals; the adversarial test has its five stories.
    """
    chosen = thresholds or Thresholds()
    return [
        drift(embed, chosen, draws=draws, seed=seed),
        overlap(embed, chosen, draws=draws, seed=seed),
        adversarial_vocabulary(embed, chosen),
        fork(embed, chosen, draws=draws, seed=seed),
        threshold_sweep(embed, draws=draws, seed=seed),
        rapid_switching(embed, chosen, draws=max(1, draws // 2), seed=seed),
        scale(embed, chosen, draws=max(1, draws // 2), seed=seed),
    ]


# ---- seven tests -----------------------------------------------------------------------------------------------------


def drift(embed: Embed, thresholds: Thresholds, *, draws: int = 10, seed: int = 0) -> StressResult:
    """Ten prompts wander from one topic to another. Together: a new prompt of the first topic still finds the topic
    it began in. Apart: one of a topic never mentioned does not.

    Details: ``carried_away``, share of draws in which pure text of the *last* topic is in the first one's; ``steps``,
    how many topics the way made; ``cosine_to_start``, of the first prompt and the centroid it ended in.
    """
    rng, rates = np.random.default_rng([seed, 1]), []
    carried, steps, cosines = [], [], []
    for _ in range(draws):
        a, b, other = _topics(3, rng)
        vectors = [embed(_text({a: 1 - i / 9, b: i / 9}, rng)) for i in range(10)]
        topics, found = route(vectors, thresholds)

        def finds_home(topic: str, topics: TopicContexts = topics, home: str = found[0]) -> bool:
            return topics.match(embed(_text({topic: 1}, rng))).topic_id == home

        rates.append((float(finds_home(a)), float(not finds_home(other))))
        carried.append(finds_home(b))
        steps.append(len(topics))
        start = np.asarray(vectors[0], dtype=np.float64)
        cosines.append(float(topics.centroid(found[0]) @ start / np.linalg.norm(start)))
    details = {"carried_away": _mean(carried), "steps": _mean(steps), "cosine_to_start": _mean(cosines)}
    return summary("drift", rates, details)


def overlap(embed: Embed, thresholds: Thresholds, *, draws: int = 10, seed: int = 0) -> StressResult:
    """Five prompts of each of two topics in turn, which share more and more words of a third. The rates are means over
    the levels at which there is something to tell.

    Details, one number per level: ``together``, ``apart``, ``clusters``, ``purity`` and ``purity_shuffled``, which the
    same clusters reach with labels in random order. At the last level the labels mean nothing.
    """
    rng, labels = np.random.default_rng([seed, 2]), [0, 1] * 5
    table: dict[str, list[list[float]]] = {
        name: [[] for _ in OVERLAP_LEVELS] for name in ("together", "apart", "clusters", "purity", "purity_shuffled")
    }
    for _ in range(draws):
        *pair, shared = _topics(3, rng)
        for level, share in enumerate(OVERLAP_LEVELS):
            texts = [_text({pair[label]: 1 - share, shared: share}, rng) for label in labels]
            topics, found = route([embed(text) for text in texts], thresholds)
            together, apart = pair_rates(labels, found)
            shuffled = _mean([purity(rng.permutation(labels).tolist(), found) for _ in range(_SHUFFLES)])
            row = (together, apart, len(topics), purity(labels, found), shuffled)
            for name, value in zip(table, row, strict=True):
                table[name][level].append(value)
    told = [level for level, share in enumerate(OVERLAP_LEVELS) if share < 1]
    rates = [
        (_mean([table["together"][level][d] for level in told]), _mean([table["apart"][level][d] for level in told]))
        for d in range(draws)
    ]
    details = {"shared": list(OVERLAP_LEVELS)} | {name: [_mean(v) for v in rows] for name, rows in table.items()}
    return summary("overlap", rates, details)


def adversarial_vocabulary(embed: Embed, thresholds: Thresholds) -> StressResult:
    """Five subjects told in words of another one. Together: the borrowed telling finds a topic with a plain one.
    Apart: plain tellings of the two subjects share no topic, and the borrowed one finds none of the lender's.

    Details: ``nearer_subject``, share of stories whose borrowed telling has a higher cosine to its subject than to the
    lender of its words, whatever the thresholds; and both cosines.
    """
    rates, subject_cosines, lender_cosines = [], [], []
    for story in STORIES:
        own, lent = ([embed(text) for text in texts] for texts in (story.plain, story.lender))
        topics, found = route([own[0], lent[0], own[1], lent[1]], thresholds)
        subject, lender = set(found[::2]), set(found[1::2])
        borrowed = embed(story.borrowed)
        joined = topics.match(borrowed).topic_id
        _, plain_apart = pair_rates([0, 1, 0, 1], found)  # of four pairs
        rates.append((float(joined in subject), (4 * plain_apart + (joined not in lender)) / 5))
        subject_cosines.append(_cosine(borrowed, own))
        lender_cosines.append(_cosine(borrowed, lent))
    nearer = [s > other for s, other in zip(subject_cosines, lender_cosines, strict=True)]
    details = {
        "nearer_subject": _mean(nearer),
        "cosine_to_subject": subject_cosines,
        "cosine_to_lender": lender_cosines,
    }
    return summary("adversarial vocabulary", rates, details)


def fork(embed: Embed, thresholds: Thresholds, *, draws: int = 10, seed: int = 0) -> StressResult:
    """Three prompts on two topics at once, then three on each alone, in turn. Together: prompts of one branch, and
    those of an equally long conversation that does not fork. Apart: prompts of different branches.

    Details: ``clusters`` with the fork and ``unforked_clusters`` without.
    """
    rng, rates = np.random.default_rng([seed, 4]), []
    clusters, unforked_clusters = [], []
    for _ in range(draws):
        a, b = _topics(2, rng)
        stem = [embed(_text({a: 1, b: 1}, rng)) for _ in range(3)]
        branches = [embed(_text({topic: 1}, rng)) for topic in (a, b) * 3]
        goes_on = [embed(_text({a: 1, b: 1}, rng)) for _ in range(6)]
        topics, found = route(stem + branches, thresholds)
        unforked, stayed = route(stem + goes_on, thresholds)
        within, across = pair_rates([0, 1] * 3, found[3:])
        rates.append(((within + pair_rates([0] * 6, stayed[3:])[0]) / 2, across))
        clusters.append(len(topics))
        unforked_clusters.append(len(unforked))
    return summary("fork", rates, {"clusters": _mean(clusters), "unforked_clusters": _mean(unforked_clusters)})


def threshold_sweep(embed: Embed, *, draws: int = 10, seed: int = 0) -> StressResult:
    """The best of twenty join thresholds on five prompts of each of six topics, counted on six *other* topics.

    Details: ``chosen`` thresholds; per threshold ``together``, ``apart`` and ``clusters`` of the topics that count; and
    ``balanced_shuffled``: choosing and counting with labels in random order, which is one half if nothing is wrong.
    """
    rng, rates = np.random.default_rng([seed, 5]), []
    chosen, shuffled, curves = [], [], []
    for _ in range(draws):
        names = _topics(12, rng)
        halves = []
        for half in (names[:6], names[6:]):
            labels = rng.permutation(np.repeat(np.arange(6), 5))
            vectors = [embed(_text({half[label]: 1}, rng)) for label in labels]
            halves.append((labels, [route(vectors, Thresholds.of(join))[1] for join in SWEEP]))
        for known in (True, False):
            (fitted, held_out) = (
                np.array([pair_rates(labels if known else rng.permutation(labels), found) for found in by_threshold])
                for labels, by_threshold in halves
            )
            best = int(fitted.sum(axis=1).argmax())
            if known:
                rates.append((float(held_out[best, 0]), float(held_out[best, 1])))
                chosen.append(SWEEP[best])
                n_clusters = [len(set(found)) for found in halves[1][1]]
                curves.append(np.column_stack((held_out, n_clusters)))
            else:
                shuffled.append(float(held_out[best].mean()))
    together, apart, clusters = np.mean(curves, axis=0).T.tolist()
    details = {
        "chosen": chosen,
        "balanced_shuffled": _mean(shuffled),
        "join": list(SWEEP),
        "together": together,
        "apart": apart,
        "clusters": clusters,
    }
    return summary("threshold sweep", rates, details)


def rapid_switching(embed: Embed, thresholds: Thresholds, *, draws: int = 5, seed: int = 0) -> StressResult:
    """Fifty turns among five topics, never twice the same in a row.

    Details: ``context_own``, the share of the context's words that are of the turn's topic, over turns with a context
    whose topic was spoken of before; ``recent_own``, that of the last words whatever their topic, as many as the
    budget has; ``history_own``, that of all words before.
    """
    rng, rates, budget = np.random.default_rng([seed, 6]), [], 4 * PROMPT_WORDS
    own: dict[str, list[float]] = {"context_own": [], "recent_own": [], "history_own": []}
    clusters = []
    for _ in range(draws):
        names, labels = _topics(5, rng), [0]
        while len(labels) < SWITCHES:
            labels.append(int(rng.choice([label for label in range(5) if label != labels[-1]])))
        topics, ids, said = None, [], list[int]()
        for label in labels:
            vector = embed(_text({names[label]: 1}, rng))
            if topics is None:
                topics = TopicContexts(len(vector), join=thresholds.join, merge=thresholds.merge, budget=budget)
            context = topics.context(engram=vector)
            if label in said and context:
                for name, words in zip(own, (context, said[-budget:], said), strict=True):
                    own[name].append(words.count(label) / len(words))
            words = [label] * PROMPT_WORDS  # a word is told by its topic
            ids.append(topics.assign(vector, words, "").topic_id)
            said += words
        assert topics is not None
        rates.append(pair_rates(labels, [topics.resolve(topic) for topic in ids]))
        clusters.append(len(topics))
    details: dict[str, Any] = {name: _mean(shares) if shares else None for name, shares in own.items()}
    return summary("rapid switching", rates, details | {"clusters": _mean(clusters)})


def scale(embed: Embed, thresholds: Thresholds, *, draws: int = 5, seed: int = 0) -> StressResult:
    """Four prompts of each of 2 to 50 topics, in random order; the rates are means over the numbers of topics.

    Details, one number per number of topics: ``together``, ``apart`` and ``clusters``.
    """
    rng, rates = np.random.default_rng([seed, 7]), []
    table = np.zeros((draws, len(TOPIC_COUNTS), 3))
    for draw in range(draws):
        for place, count in enumerate(TOPIC_COUNTS):
            names = _topics(count, rng)
            labels = rng.permutation(np.repeat(np.arange(count), 4))
            topics, found = route([embed(_text({names[label]: 1}, rng)) for label in labels], thresholds)
            table[draw, place] = (*pair_rates(labels, found), len(topics))
        together, apart, _ = table[draw].mean(axis=0)
        rates.append((float(together), float(apart)))
    rows = zip(("together", "apart", "clusters"), table.mean(axis=0).T.tolist(), strict=True)
    return summary("scale", rates, {"topics": list(TOPIC_COUNTS)} | dict(rows))


# ---- texts and numbers -----------------------------------------------------------------------------------------------


def _topics(count: int, rng: np.random.Generator) -> list[str]:
    return rng.choice(list(TOPICS), count, replace=False).tolist()


def _text(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    return text_about(shares, PROMPT_WORDS, rng)


def _cosine(vector: Any, others: Sequence[Any]) -> float:
    """Mean cosine to others."""
    units = [np.asarray(v, dtype=np.float64) / np.linalg.norm(np.asarray(v, dtype=np.float64)) for v in others]
    return float(np.mean(units, axis=0) @ np.asarray(vector, dtype=np.float64) / np.linalg.norm(vector))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
