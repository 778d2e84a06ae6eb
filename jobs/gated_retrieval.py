#!/usr/bin/env python3
"""What entropy-gated retrieval is worth, in bits per byte: right memories against another text's and against none.

    ray job submit --working-dir . -- python jobs/gated_retrieval.py retrieval-tiny-378427 --mode text,slots
    python jobs/gated_retrieval.py PATH/TO/RUN --split validation --quantile 0.97 --documents 50
    python jobs/gated_retrieval.py mlflow:hrs@champion --threshold 4

Of a study all finished runs are measured, a worker for each. The gate is set on validation text, or opens above a fixed
number of bits; the memories are the segments of the training text. Results lie below the storage and in MLflow, study
"gated_retrieval". The same measurement of the same model is done once; submitting it again prints it.
"""

import argparse
import hashlib
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import numpy as np

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.preflight import preflight
from hrs.config import ExperimentConfig, canonical_json, to_dict
from hrs.errors import HRSError
from hrs.files import write_whole
from hrs.report.gated_table import GatedReading, Use, gated_table
from hrs.report.rows import without_seed
from hrs.retrieval.bank.slots import slot_maker
from hrs.retrieval.calibration import QUANTILE
from hrs.retrieval.gated import GatedPlan, GatedResult, measure_gated, relay, set_gate, training_memories
from hrs.retrieval.retriever import Mode, RetrievalOptions, Retriever, SlotMaker
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from jobs.entry import run_entry
from jobs.measuring import Measurement, Subject, find_model, open_subject, tell, track
from jobs.options import Parser, number

STUDY = "gated_retrieval"
MODES: tuple[Mode, ...] = ("text", "slots")
RESULT = "gated.json"
_FOLDER = "gated"

T = TypeVar("T")
Plans = Mapping[Mode, GatedPlan]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    default = RetrievalOptions()
    parser = Parser(prog="jobs/gated_retrieval.py", description="What is retrieval worth when a model is uncertain?")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="STUDY|MODEL",
        help="a study's name, a run's directory, a checkpoint, an artifact or mlflow:NAME@ALIAS",
    )
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="to score (test)")
    parser.add_argument("--mode", default="text", help="how memories are read: text, slots or text,slots (text)")
    gate = parser.add_mutually_exclusive_group()
    gate.add_argument(
        "--quantile",
        type=float,
        default=QUANTILE,
        help=f"of entropy on validation text, for the gate ({QUANTILE})",
    )
    gate.add_argument("--threshold", type=number(0.0, 1e6), metavar="BITS", help="a fixed threshold, without a release")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N documents (default all)")
    for name, kind, what in (
        ("k", int, "memories per firing, at most"),
        ("hold", int, "tokens that they are read for"),
        ("context-tokens", int, "tokens of retrieved text, at most"),
        ("min-similarity", float, "cosine below which a memory is left where it is"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=value, help=f"{what} (default {value})")
    return parser.parse_args(arguments)


def plans_of(options: argparse.Namespace) -> Plans:
    """What to measure, by mode.

    Raises:
        HRSError: if a mode is unknown or a number out of range.
    """
    modes = dict.fromkeys(options.mode.split(","))
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise HRSError(f"--mode must be {' or '.join(MODES)}, or both with a comma between them, got '{unknown[0]}'")
    numbers = {name: getattr(options, name) for name in ("k", "hold", "context_tokens", "min_similarity")}
    return {
        mode: GatedPlan(
            options=RetrievalOptions(mode=mode, **numbers),
            split=options.split,
            documents=options.documents,
            quantile=options.quantile,
            threshold_bits=options.threshold,
        )
        for mode in MODES
        if mode in modes
    }


def paths_of(sources: Sequence[str], storage: Storage, tracker: Tracker) -> list[Path]:
    """Where the models lie, each once; of a study those of all its finished runs.

    Raises:
        HRSError: if a name is neither a model's nor a study's, or a study has no finished run.
    """
    paths: list[Path] = []
    for source in sources:
        if (path := find_model(storage, source)) is not None:
            paths.append(path)
            continue
        keys = tracker.study_keys(source)
        finished = tracker.finished(keys)
        if not finished:
            raise HRSError(f"study '{source}' has no finished run to measure: finish one first")
        if len(finished) < len(keys):
            print(f"{source}: {len(keys) - len(finished)} of {len(keys)} runs are not finished and left out")
        paths += [storage.run(key) for key in keys if key in finished]
    return list(dict.fromkeys(paths))


# ---- in a worker -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a worker tells of a model in one mode when it is done."""

    path: Path
    """Of the model."""
    mode: Mode
    key: str
    folder: Path
    config: ExperimentConfig
    data_fingerprint: str
    causal: bool | None


def measure(path: Path, plans: Plans, storage: Storage) -> Iterator[str | Measured]:
    """What a worker does for one model; yields lines to print, and where the result of each mode is."""
    subject = open_subject(path, storage)
    opened, config = subject.opened, subject.opened.config
    label = f"{config.preset}/{config.seed}"
    yield f"{label}: model {subject.fingerprint}, {config.data.corpus}"
    if opened.causal is False:
        yield f"{label}: warning: this model is not causal (hrs audit tells more)"
    modes = [mode for mode in plans if mode != "slots" or opened.model.takes_memory]
    if len(modes) < len(plans):
        yield f"{label}: mode slots is left out, because the model reads none (engram.kind is not retrieved)"
    slots = canonical_json(config.training.retrieval)
    keys = {
        mode: plans[mode].key(subject.fingerprint, subject.tokens.fingerprint, slots if mode == "slots" else "")
        for mode in modes
    }
    root = storage.root / _FOLDER

    def told(mode: Mode) -> Measured:
        return Measured(
            path=path,
            mode=mode,
            key=keys[mode],
            folder=root / keys[mode],
            config=config,
            data_fingerprint=subject.tokens.fingerprint,
            causal=opened.causal,
        )

    missing = [mode for mode in modes if not (root / keys[mode] / RESULT).exists()]
    yield from (told(mode) for mode in modes if mode not in missing)
    if not missing:
        return
    maker = slots_of(subject, storage) if "slots" in missing else None  # refuses what cannot work before it takes time
    gate = set_gate(opened.model, subject.tokens, plans[missing[0]])  # the same in every mode
    yield (
        f"{label}: the gate opens above {gate.settings.threshold_bits:.3f} bits and fires on "
        f"{gate.share_fired:.2%} of the validation tokens"
    )
    memories = yield from labelled(label, training_memories(opened.model, subject.tokens, root / "stores"))
    yield f"{label}: {len(memories):,} memories"
    for mode in missing:
        retriever = Retriever(opened.model, opened.tokenizer, memories, slots=maker)
        result: GatedResult = yield from labelled(
            f"{label} {mode}", measure_gated(retriever, subject.tokens, plans[mode], gate, len(memories))
        )
        write_whole(root / keys[mode] / RESULT, result.to_json())
        yield f"{label} {mode}: measured in {result.seconds:.0f} s"
        yield told(mode)


def slots_of(subject: Subject, storage: Storage) -> SlotMaker | None:
    """What makes slots of memories as in the model's training."""
    opened = subject.opened
    base = opened.config.training.retrieval.base
    return slot_maker(opened.model, opened.config, opened.tokenizer, storage.run(base) if base else None)


def labelled(label: str, lines: Generator[str, None, T]) -> Generator[str, None, T]:
    """The same lines behind a label."""
    return relay(lines, lambda line: f"{label}: {line}")


# ---- in the job ------------------------------------------------------------------------------------------------------


def measurement_of(measured: Measured) -> Measurement:
    """As MLflow keeps it."""
    config, file = measured.config, measured.folder / RESULT
    return Measurement(
        key=measured.key,
        study=STUDY,
        name=f"gated {measured.mode} {config.preset} {config.scale} seed {config.seed}",
        kind="gated_retrieval",
        config=config,
        data_fingerprint=measured.data_fingerprint,
        causal=measured.causal,
        metrics=GatedResult.from_json(file.read_text(encoding="utf-8")).metrics(),
        files=[file],
    )


def reading_of(measured: Measured) -> GatedReading:
    """As the table takes it."""
    result = GatedResult.from_json((measured.folder / RESULT).read_text(encoding="utf-8"))
    report, names = result.report, ("share_injected", "n_events", "n_used", "similarity")
    return GatedReading(
        preset=measured.config.preset,
        mode=measured.mode,
        seed=measured.config.seed,
        causal=measured.causal,
        threshold_bits=result.gate.settings.threshold_bits,
        share_fired=result.gate.share_fired,
        n_bytes=np.array(report.document_bytes),
        bits={shown: np.array(bits) for shown, bits in report.documents.items()},
        use={
            shown: Use(n_tokens=report.n_tokens, **{name: getattr(found, name) for name in names})
            for shown, found in report.conditions.items()
        },
    )


def table_of(measured: Sequence[Measured], split: str) -> str:
    """All results in one table.

    Raises:
        HRSError: if models of one preset differ in more than their seed, or were measured on different documents.
    """
    settings: dict[str, dict[str, Any]] = {}
    for config in (one.config for one in measured):
        same = without_seed(to_dict(config))
        if settings.setdefault(config.preset, same) != same:
            raise HRSError(
                f"the models of {config.preset} differ in more than their seed: name those of one setting at a time "
                "(what was measured is kept)"
            )
    return gated_table([reading_of(one) for one in measured], split)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, track it and print the table; always 0."""
    options = parse(arguments)
    plans, storage = plans_of(options), open_storage()
    preflight(storage)
    tracker = Tracker(storage)
    paths = paths_of(options.models, storage, tracker)
    measured: list[Measured] = []
    failure: Exception | None = None
    try:
        for told in tell(measure, [(path, plans, storage) for path in paths], storage):
            if isinstance(told, Measured):
                track(measurement_of(told), tracker)
                measured.append(told)
            else:
                print(told, flush=True)
    except Exception as error:  # the others' results are told first
        failure = error
    if measured:
        measured.sort(key=lambda one: (paths.index(one.path), MODES.index(one.mode)))
        text = table_of(measured, options.split)
        path = storage.root / _FOLDER / "tables" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
        if not path.exists():
            write_whole(path, text)
            study_id = tracker.open_study(STUDY, {})
            tracker.log_study_artifact(study_id, path)
            tracker.close_study(study_id, "finished")
        print(f"\n{text}\ntable: {path}", flush=True)
    if failure is not None:
        raise failure
    if not measured:
        raise HRSError("none of these models reads slots (engram.kind is not retrieved): measure with --mode text")
    return 0


if __name__ == "__main__":
    run_entry(main)
