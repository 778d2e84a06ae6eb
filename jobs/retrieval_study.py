#!/usr/bin/env python3
"""Does a retrieved memory mean anything? Cross-attention trained with retrieval in the loop, and its controls.

    ray job submit --working-dir . -- python jobs/retrieval_study.py --scale tiny --seeds 3 --corpus bbc
    python jobs/retrieval_study.py --scale micro --dry-run

A baseline is trained for every seed, if it is missing. It encodes the training text, finds neighbours, and gives its
weights to three models that learn on from them: with the right memories, with another window's, and without. Each is
then scored with the right memory, a shuffled one and none, on the same documents; ``--split test`` scores finished runs
on text that nothing was chosen on. Submitting the same study again runs and measures only what is missing.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.hardware import Hardware
from hrs.cluster.plan import Plan, format_plan, note_refused, plan_runs
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.progress import Pace
from hrs.cluster.study import Run, Study
from hrs.cluster.trial import TrialSpec, run_trial
from hrs.config import ExperimentConfig, parse_assignments
from hrs.data import TokenStore, open_tokens
from hrs.data.windows import Shown
from hrs.evaluation import AuditReport, Evaluation, evaluate
from hrs.export import open_model, open_text
from hrs.files import write_whole
from hrs.models.geometry import TokenGeometry
from hrs.report.retrieval_table import Reading, retrieval_table
from hrs.retrieval.bank import MemoryBank, open_bank, weights_fingerprint
from hrs.retrieval.bank.overlap import documents_that_share
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from hrs.training import Progress, Runtime, load_model, train
from jobs import ablation_sweep
from jobs.entry import run_entry
from jobs.options import Parser, whole

BASE = "dense_baseline"
VARIANTS = ("dense_retrieved", "dense_retrieved_shuffled", "dense_retrieved_none")
CONTROL = "dense_retrieved_none"
TITLE = "retrieval"
SHARED_TOKENS = 12
"""Tokens in a row that a window and its memory share, from which on the document counts as known."""
SHOWN: tuple[Shown, ...] = ("right", "shuffled", "none")
OWN_SPLIT = "validation"
"""What every run is scored on at its end, without memory."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/retrieval_study.py", description="What is a retrieved memory worth?")
    parser.add_argument(
        "--steps",
        type=whole(1),
        help="steps with memories, after the baseline's (default: as many)",
    )
    parser.add_argument(
        "--split", choices=(OWN_SPLIT, "test"), default=OWN_SPLIT, help=f"to score on (default {OWN_SPLIT})"
    )
    ablation_sweep.add_study_options(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and measure its finished runs; 0 if every run is finished, 1 if some are not."""
    options = parse(arguments)
    shared, own = overrides_of(options)
    base = argparse.Namespace(**vars(options) | {"set": [f"{name}={value}" for name, value in shared.items()]})
    sweep = ablation_sweep.sweep_arguments(base, [BASE], f"{TITLE}_base")
    bases, storage = ablation_sweep.study_of(ablation_sweep.parse(sweep)).runs(), open_storage()
    name = Study(title=TITLE, presets=VARIANTS, scale=options.scale, seeds=(0,), overrides=own).name
    # What cannot be composed had better fail now than after the baselines.
    some_base = {f"training.retrieval.{name}": "0" * 16 for name in ("base", "fingerprint")}
    Study(title=TITLE, presets=VARIANTS, scale=options.scale, seeds=(0,), overrides=own | some_base).runs()
    tracker = Tracker(storage)
    if options.dry_run:
        ablation_sweep.main(sweep)
        if tracker.finished([run.key for run in bases]) != {run.key for run in bases}:
            print(f"then {len(VARIANTS)} runs of {', '.join(VARIANTS)} for each seed, planned when these are finished")
            return 0
    elif status := ablation_sweep.main(sweep):
        return status
    runs = [run for base_run in bases for run in variants(base_run, options.scale, own, storage)]
    finished, runtime = tracker.finished([run.key for run in runs]), Runtime()
    hardware = Hardware.of_this_machine() if options.dry_run else Hardware.of_cluster(connect(storage))
    plan = plan_runs(runs, finished, hardware, storage, runtime)
    print(format_plan(plan), flush=True)
    if options.dry_run:
        return 0
    preflight(storage)
    study_id = tracker.open_study(name, {run.key: run.config for run in runs})
    note_refused(plan, study_id, tracker)
    run_and_measure(bases, plan, options.split, study_id, storage, runtime)
    tracker.reap(name)
    finished = tracker.finished([run.key for run in runs])
    finished &= {run.key for run in runs if is_measured(run, options.split, storage)}
    text = tables(bases, [run for run in runs if run.key in finished], options.split, storage)
    folder = storage.report(name)
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / ("retrieval.txt" if options.split == OWN_SPLIT else f"retrieval_{options.split}.txt")
    write_whole(report, text)
    tracker.log_study_artifact(study_id, folder)
    unfinished = len(runs) - len(finished)
    tracker.close_study(study_id, "failed" if unfinished else "finished", f"{unfinished} runs unfinished")
    print(f"\n{text}\nreport: {report}", flush=True)
    return 1 if unfinished else 0


# ---- which runs ------------------------------------------------------------------------------------------------------


def overrides_of(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command line overrides in baselines, and in what learns on from them.

    How memories are made is nothing to a baseline, which keeps its identity whatever is tried with it.
    """
    given: dict[str, Any] = dict(parse_assignments(options.set))
    shared = {n: v for n, v in given.items() if not n.startswith(("training.retrieval.", "model.engram."))}
    own = given | ({"data.corpus": options.corpus} if options.corpus else {})
    return shared, own | ({"training.steps": options.steps} if options.steps else {})


def variants(base: Run, scale: str, overrides: Mapping[str, Any], storage: Storage) -> list[Run]:
    """The runs that learn on from a finished baseline, with its seed."""
    model, _ = load_model(storage.run(base.key))
    named = {"training.retrieval.base": base.key, "training.retrieval.fingerprint": weights_fingerprint(model)}
    seeds = (base.config.seed,)
    return Study(title=TITLE, presets=VARIANTS, scale=scale, seeds=seeds, overrides={**overrides, **named}).runs()


def bank_of(config: ExperimentConfig, store: TokenStore, storage: Storage) -> MemoryBank:
    """The memories that a run reads."""
    return open_bank(config, store, storage.run(config.training.retrieval.base), storage.root / "memories")


# ---- training and measuring ------------------------------------------------------------------------------------------


def run_and_measure(
    bases: Sequence[Run], plan: Plan, split: str, study_id: str, storage: Storage, runtime: Runtime
) -> None:
    """Train and measure what is missing on whatever Ray offers. A run that fails says why and stops no other."""
    import ray

    from tune.sweep import trial_runtime, trial_spec

    lines: dict[Any, str] = {}  # labels by stream of lines
    for trial in plan.trials:
        if trial.state != "finished" or not is_measured(trial.run, split, storage):
            nodes = {"label_selector": {"ray.io/node-id": trial.nodes}} if trial.nodes else {}
            worker = ray.remote(num_cpus=trial.cpus, num_gpus=trial.gpu_frac, max_retries=2, **nodes)(follow)
            lines[worker.remote(trial_spec(trial, study_id, storage, runtime).to_json(), split)] = trial.run.label
    largest = max(plan.trials, key=lambda trial: trial.gpu_frac)
    for run in bases:
        if not is_measured(run, split, storage):
            scorer = ray.remote(num_cpus=1, num_gpus=largest.gpu_frac, max_retries=2)(measure)
            lines[scorer.remote(run, split, storage, trial_runtime(largest, runtime))] = run.label
    while lines:
        ready, _ = ray.wait(list(lines), num_returns=1)
        stream: Any = ready[0]
        try:
            print(ray.get(next(stream)), flush=True)
        except StopIteration:
            del lines[stream]
        except ray.exceptions.RayTaskError as error:
            print(f"{lines.pop(stream):<28} failed: {error.cause}", flush=True)


def follow(specification: str, split: str) -> Iterator[str]:
    """In a worker: bring one run to its end, and its evaluations; yields lines for people."""
    spec, pace = TrialSpec.from_json(specification), Pace()
    for progress in run_trial(spec, train_with_memories):
        if pace.lets_through(spec.run.label, progress, time.monotonic()):
            yield progress.line(spec.run.label)
    yield from measure(spec.run, split, open_storage(spec.storage_root), spec.runtime)


def train_with_memories(
    config: ExperimentConfig, store: TokenStore, directory: Path, runtime: Runtime, geometry: TokenGeometry | None
) -> Iterator[Progress]:
    """:func:`hrs.training.train` of a run that reads the memories of another run of the same storage."""
    bank = bank_of(config, store, Storage(directory.parent.parent))
    return train(config, store, directory, runtime, geometry, memories=bank)


def measure(run: Run, split: str, storage: Storage, runtime: Runtime) -> Iterator[str]:
    """Score a finished run with every memory it can read; a folder for each, and a metric of its run in MLflow."""
    opened = open_model(storage.run(run.key), storage.tokens)
    model, config, store = opened.model, opened.config, open_text(opened, storage.tokens)
    bank = bank_of(config, store, storage) if config.training.retrieval.base else None
    model, tracker = model.to(runtime.torch_device()), Tracker(storage)
    for shown in SHOWN if bank else ("none",):
        if (folder := _folder(run, split, shown, storage)).exists():
            continue
        partial = folder.with_name(f"{folder.name}.part")
        stride_frac = config.evaluation.stride_frac
        found = evaluate(model, store, split, stride_frac=stride_frac, memories=bank, shown=shown)
        found.save(partial)
        tracker.log_run_artifacts(run.key, sorted(partial.iterdir()), folder.name)
        tracker.log_run_metrics(run.key, {f"{folder.name}/bits_per_byte": found.bits_per_byte})
        partial.rename(folder)
        yield f"{run.label:<28} {split} with memory: {shown}  {found.bits_per_byte:.4f} bits per byte"


def is_measured(run: Run, split: str, storage: Storage) -> bool:
    """Whether all evaluations of a run on a split are there."""
    shown = SHOWN if run.config.training.retrieval.base else ("none",)
    return all(_folder(run, split, part, storage).exists() for part in shown)


def _folder(run: Run, split: str, shown: Shown, storage: Storage) -> Path:
    """Without memory and on its own split it is the run's own evaluation."""
    if split != OWN_SPLIT:
        return storage.run(run.key) / f"{split}_memory_{shown}"
    return storage.run(run.key) / (f"memory_{shown}" if shown != "none" else "")


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(bases: Sequence[Run], runs: Sequence[Run], split: str, storage: Storage) -> str:
    """What every model scores with every memory, over all documents and over those without text that is copied."""
    readings = [reading(bases, "", "none", split, storage)] if runs else []
    for preset, parts in ((CONTROL, ("none",)), (VARIANTS[1], SHOWN), (VARIANTS[0], SHOWN)):
        if chosen := [run for run in runs if run.config.preset == preset]:
            readings += [reading(chosen, part, part, split, storage) for part in parts]
    text = retrieval_table(readings, CONTROL, split)
    if not runs:
        return text
    config = runs[0].config
    store = open_tokens(config.data, storage.tokens, runs[0].data_fingerprint)
    stride = max(1, round(config.evaluation.stride_frac * config.model.max_seq_len))
    shares = documents_that_share(bank_of(config, store, storage), split, stride, SHARED_TOKENS)
    text += f"\n{shares.sum()} documents have {SHARED_TOKENS} tokens in a row that a memory of theirs has, too.\n"
    if 0 < shares.sum() < len(shares):
        text += f"Without them:\n\n{retrieval_table(readings, CONTROL, split, shares)}"
    return text


def reading(runs: Sequence[Run], label: str, part: Shown, split: str, storage: Storage) -> Reading:
    """One preset's evaluations with one kind of memory."""
    return Reading(
        preset=runs[0].config.preset,
        shown=label,
        documents={run.config.seed: Evaluation.load(_folder(run, split, part, storage)).documents for run in runs},
        causal=all(AuditReport.load(storage.run(run.key) / "audit.json").causal for run in runs),
    )


if __name__ == "__main__":
    run_entry(main)
