#!/usr/bin/env python3
"""Needle in a haystack: is a fact that nobody can guess found by a question, and does the model tell its value?

    ray job submit --working-dir . -- python jobs/needle.py mlflow:hrs@champion
    python jobs/needle.py PATH/TO/RUN --segment 32 --distractors 0,16,64 --trials 100
    python jobs/needle.py model.hrs --condition full_context --seed 1

Tables, heat map and all raw numbers lie below the storage and in MLflow, study "needles". The same measurement of the
same model is done once; submitting it again prints it.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.preflight import preflight
from hrs.config import ExperimentConfig
from hrs.files import read_json, write_whole
from hrs.retrieval.needle.plan import NeedlePlan
from hrs.retrieval.needle.report import HEAT_MAP, draw_heat_map, format_tables, page
from hrs.retrieval.needle.result import NeedleResult, measure_needles, measurement_key
from hrs.retrieval.segments import FEWEST_TOKENS, Cut, default_cut
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from jobs.entry import run_entry
from jobs.measuring import Measurement, open_subject, require_model, tell, track
from jobs.options import SEED, Parser, listed, number, whole

STUDY = "needles"
RESULT, TABLES, PAGE = "needle.json", "needle.txt", "needle.md"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/needle.py", description="Seek facts hidden in long texts.")
    parser.add_argument(
        "model", metavar="MODEL", help="a run's directory, a checkpoint, an artifact or mlflow:NAME@ALIAS"
    )
    parser.add_argument(
        "--split", default="validation", choices=("train", "validation", "test"), help="of the haystacks"
    )
    parser.add_argument(
        "--segment", type=whole(1), metavar="TOKENS", help="length of a segment (default half the context)"
    )
    parser.add_argument(
        "--condition", choices=("isolated", "full_context"), default="isolated", help="how they are read"
    )
    parser.add_argument(
        "--haystack",
        type=whole(1),
        default=16,
        metavar="SEGMENTS",
        help="length of a haystack (default 16)",
    )
    parser.add_argument(
        "--depths",
        type=listed(number(0.0, 1.0)),
        default="0,0.25,0.5,0.75,1",
        help="of the needle (default 0,0.25,0.5,0.75,1)",
    )
    parser.add_argument(
        "--distractors",
        type=listed(whole(0)),
        default="0,16,64,256",
        help="other segments in the store (default 0,16,64,256)",
    )
    parser.add_argument("--trials", type=whole(2), default=40, help="needles per depth (default 40)")
    parser.add_argument(
        "--block",
        type=whole(-1000, 999),
        help="mean output of this block as the engram (default: the final states)",
    )
    parser.add_argument("--new-tokens", type=whole(1), default=8, help="length of a continuation (default 8)")
    parser.add_argument("--seed", type=SEED, default=0)
    options = parser.parse_args(arguments)
    plan_of(options, Cut(length=FEWEST_TOKENS))  # a worker makes it again, with the model's own cut
    return options


def plan_of(options: argparse.Namespace, cut: Cut) -> NeedlePlan:
    """Return what is measured with segments of that cut.

    Raises:
        HRSError: if the options do not make a plan.
    """
    return NeedlePlan(
        cut=cut,
        split=options.split,
        haystack_segments=options.haystack,
        depths=options.depths,
        distractors=options.distractors,
        trials=options.trials,
        block=options.block,
        new_tokens=options.new_tokens,
        seed=options.seed,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a worker is told."""

    model: Path
    options: argparse.Namespace
    command: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What it tells at the end."""

    key: str
    folder: Path
    config: ExperimentConfig
    data_fingerprint: str
    causal: bool | None


def measure(task: Task, storage: Storage) -> Iterator[str | Measured]:
    """What a worker does; yields lines to print, and at last where the results are."""
    subject, options = open_subject(task.model, storage), task.options
    opened, tokens, model = subject.opened, subject.tokens, subject.opened.model
    plan = plan_of(options, default_cut(model, options.condition, options.segment))
    key = measurement_key(plan, subject.fingerprint, tokens.fingerprint)
    folder = storage.root / "needles" / key
    yield f"model {subject.fingerprint}: {opened.config.preset}, {opened.config.data.corpus}"
    if opened.causal is False:
        yield "warning: this model is not causal (hrs audit tells more)"
    if not (folder / RESULT).exists():
        result = yield from measure_needles(model, tokens, plan)
        title = f"Needles: {opened.config.preset}, {opened.config.scale}, seed {opened.config.seed}"
        save(result, folder, title, task.command)
    yield Measured(
        key=key,
        folder=folder,
        config=opened.config,
        data_fingerprint=tokens.fingerprint,
        causal=opened.causal,
    )


def save(result: NeedleResult, folder: Path, title: str, command: str) -> None:
    """Write everything; the numbers come last, so that where they stand all is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_heat_map(result, folder / HEAT_MAP)
    write_whole(folder / TABLES, format_tables(result) + "\n")
    write_whole(folder / PAGE, page(result, title, command))
    write_whole(folder / RESULT, result.to_json())


def measurement_of(measured: Measured) -> Measurement:
    """As MLflow keeps it."""
    config = measured.config
    return Measurement(
        key=measured.key,
        study=STUDY,
        name=f"needles {config.preset} {config.scale} seed {config.seed}",
        kind="needles",
        config=config,
        data_fingerprint=measured.data_fingerprint,
        causal=measured.causal,
        metrics=read_json(measured.folder / RESULT)["metrics"],
        files=[measured.folder / file for file in (RESULT, TABLES, PAGE, HEAT_MAP)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, track and print; always 0."""
    options = parse(arguments)
    storage = open_storage()
    model = require_model(storage, options.model)
    words = sys.argv[1:] if arguments is None else list(arguments)
    task = Task(model=model, options=options, command=f"python jobs/needle.py {shlex.join(words)}")
    preflight(storage)
    tracker = Tracker(storage)
    for told in tell(measure, [(task, storage)], storage):
        if isinstance(told, Measured):
            track(measurement_of(told), tracker)
            print(f"\n{(told.folder / TABLES).read_text(encoding='utf-8')}\nresults: {told.folder}", flush=True)
        else:
            print(told, flush=True)
    return 0


if __name__ == "__main__":
    run_entry(main)
