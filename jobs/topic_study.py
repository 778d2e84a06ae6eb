#!/usr/bin/env python3
"""What a model's engrams know of topics: pairs of pieces of new articles at two scales, and seven stress tests.

    ray job submit --working-dir . -- python jobs/topic_study.py v1-tiny
    python jobs/topic_study.py PATH/TO/RUN --seeds 5 --draws 20

Of a study the best run is measured: the finished one with the fewest bits per byte that passed the causality audit. The
trained model stands beside itself with the mean of its engrams taken away, itself before its first step, its
embeddings, counts of token ids, and random vectors. ``topics.json`` and ``topics.md`` go to the study's report folder,
or beside the model, and copies with the run to MLflow.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import numpy as np

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs import strict_json
from hrs.cluster.preflight import preflight
from hrs.cluster.workers import reserved_runtime
from hrs.data import TokenStore
from hrs.evaluation.separation import Segments
from hrs.evaluation.topic_pairs import Bounds, Engrams, PairScores, score_pairs
from hrs.evaluation.topic_pieces import (
    SCALES,
    EngramSource,
    Pieces,
    Scale,
    article_pieces,
    piece_engrams,
    sentence_pieces,
    sources_and_chance,
)
from hrs.export import open_model, open_text
from hrs.files import write_whole
from hrs.models import LanguageModel
from hrs.report.statistics import Interval
from hrs.report.table import with_bounds
from hrs.retrieval.topics.stress import stress_suite
from hrs.retrieval.topics.stress_result import Embed, StressResult, Thresholds, random_embed
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from hrs.tracking.naming import best_run
from jobs.entry import run_entry
from jobs.measuring import find_model, tell
from jobs.options import SEEDS, Parser, whole

FITTED, HELD_OUT = "train", "validation"
CENTRED = "trained, centred"


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicStudy:
    """What was measured of one model."""

    pairs: Mapping[Scale, Mapping[str, PairScores]]
    """By scale and kind of engram."""
    stress: Mapping[str, Sequence[StressResult]]
    """By kind of engram."""
    joins: Mapping[str, float]
    """The join threshold each kind of engram had in the stress tests: the one fitted on training articles."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "pairs": {scale: {n: s.to_dict() for n, s in scores.items()} for scale, scores in self.pairs.items()},
            "joins": dict(self.joins),
            "stress": {name: [result.to_dict() for result in results] for name, results in self.stress.items()},
        }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/topic_study.py", description="Measure what engrams know of topics.")
    parser.add_argument(
        "source",
        metavar="STUDY|MODEL",
        help="a study's name such as v1-tiny, a run's directory, a checkpoint, an artifact or mlflow:NAME@ALIAS",
    )
    parser.add_argument(
        "--seeds", type=SEEDS, default=3, help="classifiers trained for each kind of engram (default 3)"
    )
    parser.add_argument("--draws", type=whole(1), default=10, help="texts drawn anew for each stress test (default 10)")
    return parser.parse_args(arguments)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(path: Path, storage: Storage, n_seeds: int, draws: int) -> Iterator[str | TopicStudy]:
    """What a worker does: open the model and its data, score pairs at both scales, then run the stress tests.

    Yields lines to print, and at last what was measured.
    """
    opened = open_model(path, storage.tokens)
    model, config = opened.model.to(reserved_runtime().torch_device()), opened.config
    store = open_text(opened, storage.tokens)
    sources = sources_and_chance(model, config)
    pairs: dict[Scale, dict[str, PairScores]] = {}
    means: dict[Scale, Any] = {}
    for scale in SCALES:
        fitted, held_out = (
            {
                name: Engrams(vectors=piece_engrams(source, cut), documents=cut.documents)
                for name, source in sources.items()
            }
            for cut in (pieces_of(scale, store, model, split) for split in (FITTED, HELD_OUT))
        )
        means[scale] = fitted["trained"].vectors.mean(axis=0)
        for part in (fitted, held_out):
            own = part["trained"]
            part[CENTRED] = Engrams(vectors=own.vectors - means[scale], documents=own.documents)
        pairs[scale] = score_pairs(fitted, held_out, tuple(range(n_seeds)))
        yield f"scored pairs at {scale} scale"
    embeds = {name: embed_text(source, store, model) for name, source in sources.items()}
    embeds["random"] = random_embed(model.d_model, config.seed)
    embeds[CENTRED] = lambda text: embeds["trained"](text) - means["article"]
    joins = {name: join_threshold(score.threshold) for name, score in pairs["article"].items()}
    stress = {name: stress_suite(embeds[name], Thresholds.of(join), draws=draws) for name, join in joins.items()}
    yield TopicStudy(pairs=pairs, stress=stress, joins=joins)


def pieces_of(scale: Scale, store: TokenStore, model: LanguageModel, split: str) -> Pieces:
    """Segments or sentences of a split."""
    if scale == "article":
        return article_pieces(store.split(split), model.max_seq_len)
    return sentence_pieces(store.split(split), store.tokenizer, model.max_seq_len)


def embed_text(source: EngramSource, store: TokenStore, model: LanguageModel) -> Embed:
    """Engrams of texts, which are cut at the model's context."""

    def embed(text: str) -> Any:
        ids = np.array([store.tokenizer.encode(text).ids[: model.max_seq_len]])
        none = np.zeros(1, dtype=np.int64)
        return source(Segments(tokens=ids, documents=none, topics=none - 1))[0]

    return embed


def join_threshold(fitted: float) -> float:
    """A fitted cosine as :class:`hrs.retrieval.topics.TopicContexts` accepts it: one that says always or never "same"
    lies outside of what cosines can be."""
    return float(np.clip(fitted, -0.99, 0.999))


# ---- telling ---------------------------------------------------------------------------------------------------------

_PAIR_HEADS = (
    "engrams",
    "AUC [95%]",
    "minus trained [95%]",
    "threshold",
    "right [95%]",
    "classifier [95%]",
    "gain [95%]",
    "majority",
)
_KINDS = {"article": "segments of half the context", "sentence": "sentences of 8 to 40 words"}


def page(study: TopicStudy, name: str) -> str:
    """The study as markdown, which also reads well in a terminal."""
    parts = [f"# Topics: {name}\n"]
    for scale, scores in study.pairs.items():
        one = next(iter(scores.values()))
        rows = [
            (
                source,
                _told(score.auc),
                "" if score.above_trained is None else _told(score.above_trained, signed=True),
                f"{score.threshold:.3f}",
                _told(score.accuracy),
                _told(score.accuracy_classifier),
                _told(score.difference, signed=True),
                f"{score.majority:.3f}",
            )
            for source, score in scores.items()
        ]
        parts.append(
            f"## {scale.capitalize()} scale: {_KINDS[scale]}\n\n{_markdown(_PAIR_HEADS, rows)}\n"
            f"Two pieces of one article or of two? {one.n_same:,} pairs against {one.n_different:,}, each kind "
            f"weighing one half, of {one.n_documents} {HELD_OUT} articles. Threshold and classifier were fitted on "
            f"{one.n_fitted_documents} articles of the {FITTED} split. Intervals are over held-out "
            "articles; * excludes 0. 0.5 is chance for every share here.\n"
        )
    tests = [result.name for result in next(iter(study.stress.values()))]
    rows = [(source, f"{study.joins[source]:.3f}", *map(_rates, results)) for source, results in study.stress.items()]
    parts.append(
        f"## Stress tests\n\n{_markdown(('engrams', 'join', *tests), rows)}\n"
        "Share of what belongs together that shares a topic / of what does not that is apart; * both are 0.8 or more. "
        "The second is the control of the first: 1.00/0.00 is one topic for everything, 0.00/1.00 one for every "
        "prompt, and labels without meaning give rates that sum to one. The join threshold is the cosine fitted at "
        "article scale; the threshold sweep chooses its own.\n"
    )
    return "\n".join(parts)


def _told(bounds: Bounds, signed: bool = False) -> str:
    interval = Interval(value=bounds.value, low=bounds.low, high=bounds.high)
    if not signed:
        return with_bounds(interval)
    return with_bounds(interval, sign="+", mark="*" if interval.excludes_zero else "")


def _rates(result: StressResult) -> str:
    return f"{result.together:.2f}/{result.apart:.2f}{'*' if result.passed else ''}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


# ---- the job ---------------------------------------------------------------------------------------------------------


def places(source: str, storage: Storage, tracker: Tracker) -> tuple[Path, Path]:
    """Where the model lies, and where its report goes.

    Raises:
        HRSError: if there is no such file or directory and no such study, or the study has no run to measure.
    """
    if (path := find_model(storage, source)) is not None:
        # A checkpoint's own folder holds what was saved and nothing else.
        home = path.parent.parent if path.parent.name == "checkpoints" else path.parent if path.is_file() else path
        return path, home / "topics"
    best = best_run(source, tracker.study_records(source, with_history=False))
    print(f"best causal run: {best.preset}/{best.seed}, {best.metrics['bits_per_byte']:.4f} bits per byte")
    return storage.run(best.key), storage.report(source)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one model, print the tables and keep them; 0."""
    options = parse(arguments)
    storage = open_storage()
    preflight(storage)
    tracker = Tracker(storage)
    path, folder = places(options.source, storage, tracker)
    for told in tell(measure, [(path, storage, options.seeds, options.draws)], storage):
        if isinstance(told, TopicStudy):
            report(told, options.source, path, folder, storage, tracker)
        else:
            print(told, flush=True)
    return 0


def report(study: TopicStudy, source: str, path: Path, folder: Path, storage: Storage, tracker: Tracker) -> None:
    """Print the tables and keep them, with a copy in MLflow if the model is a finished run's."""
    text = page(study, source)
    files = [folder / "topics.json", folder / "topics.md"]
    write_whole(files[0], strict_json.dumps({"model": str(path)} | study.to_dict(), indent=1))
    write_whole(files[1], text)
    print(f"\n{text}\ntopics: {files[0]}", flush=True)
    key = path.name
    if path == storage.run(key) and tracker.finished([key]):
        tracker.log_run_artifacts(key, files, "topics")
    else:
        print("not tracked: this is not the directory of a finished run of this storage")


if __name__ == "__main__":
    run_entry(main)
