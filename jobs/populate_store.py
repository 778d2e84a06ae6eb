#!/usr/bin/env python3
"""Fill an engram store: every segment of a corpus split as a memory, with the model's mean state for a key.

    ray job submit --working-dir . -- python jobs/populate_store.py mlflow:hrs@champion train
    python jobs/populate_store.py PATH/TO/RUN validation --keep-above 0.5 --condition full_context
    python jobs/populate_store.py model.hrs train --condition both --segment 64

The corpus is the one that the model was trained on, unless --corpus says otherwise. A job that was cut off goes on
where it was, and one that is done adds nothing when it runs again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.preflight import preflight
from hrs.cluster.workers import reserved_runtime
from hrs.data import absolute_corpus
from hrs.errors import HRSError
from hrs.export import open_model, open_text
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.populate import QUANTILES, Filled, Population, populate
from hrs.retrieval.segments import Condition, default_cut
from hrs.retrieval.store import EngramStore, Normalisation
from hrs.storage import Storage, open_storage
from jobs.entry import run_entry
from jobs.measuring import require_model, tell
from jobs.options import Parser, folder, number, whole


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/populate_store.py", description="Fill an engram store from a corpus.")
    parser.add_argument(
        "model", metavar="MODEL", help="a run's directory, a checkpoint, an artifact or mlflow:NAME@ALIAS"
    )
    parser.add_argument("split", choices=("train", "validation", "test"), help="part of the corpus")
    parser.add_argument("--corpus", help="other text than the model was trained on, in the model's own tokenizer")
    parser.add_argument("--store", type=folder, help="folder of the store (default below the storage, see the output)")
    parser.add_argument(
        "--segment", type=whole(1), metavar="TOKENS", help="length of a segment (default half the context)"
    )
    parser.add_argument(
        "--condition",
        choices=(*get_args(Condition), "both"),
        default="isolated",
        help="read segments alone, behind the text in front of them, or fill a store with each (default isolated)",
    )
    parser.add_argument(
        "--keep-above",
        type=number(0.0, 0.999999),
        default=0.0,
        metavar="Q",
        help="keep segments above this entropy quantile (default 0: all)",
    )
    parser.add_argument(
        "--block",
        type=whole(-1000, 999),
        help="mean output of this block as the key (default: the final states)",
    )
    parser.add_argument(
        "--normalisation", choices=get_args(Normalisation), default="centred", help="of keys (default centred)"
    )
    return parser.parse_args(arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a worker is told."""

    model: Path
    split: str
    corpus: str | None
    store: Path | None
    segment: int | None
    conditions: tuple[Condition, ...]
    keep_above: float
    block: int | None
    normalisation: Normalisation


def task_of(options: argparse.Namespace, storage: Storage) -> Task:
    """The command line with the model found.

    Raises:
        HRSError: if there is no such model, a number is out of range, or one store is to hold two kinds of keys.
    """
    conditions: tuple[Condition, ...] = get_args(Condition) if options.condition == "both" else (options.condition,)
    if options.store is not None and len(conditions) > 1:
        raise HRSError("--condition both fills two stores, and --store names one: leave one of the two out")
    return Task(
        model=require_model(storage, options.model),
        split=options.split,
        corpus=None if options.corpus is None else absolute_corpus(options.corpus),
        store=None if options.store is None else options.store.resolve(),
        segment=options.segment,
        conditions=conditions,
        keep_above=options.keep_above,
        block=options.block,
        normalisation=options.normalisation,
    )


def fill(task: Task, storage: Storage) -> Iterator[str]:
    """What a worker does; yields lines to print."""
    opened = open_model(task.model, storage.tokens)
    config, model = opened.config, opened.model.to(reserved_runtime().torch_device())
    tokens = open_text(opened, storage.tokens, task.corpus)
    fingerprint = model_fingerprint(model)
    yield f"model {fingerprint}: {config.preset}, {task.corpus or config.data.corpus}, {task.split} split"
    if opened.causal is False:
        yield "warning: this model is not causal (hrs audit tells more): its entropies say little about text"
    for condition in task.conditions:
        cut = default_cut(model, condition, task.segment)
        population = Population(cut=cut, split=task.split, keep_above=task.keep_above)
        block = "" if task.block is None else f"-block{task.block % len(model.blocks)}"
        path = task.store or storage.root / "engrams" / f"{fingerprint}-{task.split}-{condition}{block}"
        memories = EngramStore.open(
            path,
            fingerprint=fingerprint,
            width=model.d_model,
            normalisation=task.normalisation,
            block=task.block,
        )
        front = f", {cut.previous} tokens in front" if cut.previous else ""
        yield f"{condition}: segments of {cut.length} tokens{front}"
        for state in populate(model, tokens, population, memories, storage.root / "engrams" / "readings"):
            yield progress(condition, state)
        yield f"store: {path}"


def progress(condition: str, state: Filled) -> str:
    """One line; several at the end."""
    if state.stage != "done":
        return f"{condition}: {state.stage} {state.done:,} of {state.total:,} segments"
    quantiles = ", ".join(f"{q:g}: {v:.2f}" for q, v in zip(QUANTILES, state.quantiles_bits, strict=True))
    threshold = "all kept" if state.threshold_bits is None else f"above {state.threshold_bits:.3f} bits"
    return (
        f"{condition}: mean entropy of a segment {state.mean_bits:.3f} bits per token (quantiles {quantiles})\n"
        f"{condition}: {state.n_segments:,} segments, {state.n_kept:,} kept ({threshold}), "
        f"{state.n_added:,} added now, {state.n_in_store:,} in the store"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the stores and say what is in them; always 0."""
    options = parse(arguments)
    storage = open_storage()
    task = task_of(options, storage)
    preflight(storage)
    for line in tell(fill, [(task, storage)], storage):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    run_entry(main)
