#!/usr/bin/env python3
"""Presets times seeds: plan, train, evaluate, audit, compare.

    ray job submit --working-dir . -- python jobs/ablation_sweep.py --study v1 --scale tiny --seeds 3
    python jobs/ablation_sweep.py --presets dense_baseline,full_hrs --set training.steps=100 --dry-run

Submitting the same study again runs only what is missing.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.hardware import Hardware, parse_gpus
from hrs.cluster.manifold import build_manifolds
from hrs.cluster.pages import write_page
from hrs.cluster.plan import Plan, format_plan, note_refused, plan_runs
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.study import Study
from hrs.config import parse_assignments
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.presets import STUDIES, get_study
from hrs.report import format_table
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from jobs.entry import run_entry
from jobs.options import CHECKPOINT_STEPS, MINUTES, SEEDS, Parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/ablation_sweep.py", description="Run a study and print its table.")
    parser.add_argument("--study", choices=list(STUDIES), default="v1", help="named list of presets (default v1)")
    parser.add_argument("--presets", help="comma-separated presets in place of --study; the first is the baseline")
    add_study_options(parser)
    parser.add_argument("--name", help="title of the study (default: the study, or 'custom')")
    parser.add_argument(
        "--checkpoint-minutes",
        type=MINUTES,
        help="minutes between checkpoints (default: 1 second per MB, 10 s to 10 min)",
    )
    parser.add_argument(
        "--checkpoint-every", type=CHECKPOINT_STEPS, help="steps between checkpoints, instead of minutes"
    )
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile models (default: on a GPU)")
    parser.add_argument(
        "--gpus",
        metavar="COUNTxGIB[:NAME],...",
        help="plan for GPUs that are not there, such as 4x24:A10G: those that an autoscaler brings, or with --dry-run "
        "those of another machine (each item is a machine of its own)",
    )
    return parser.parse_args(arguments)


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """The options of every job that runs a study through this one."""
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper (default tiny)")
    parser.add_argument("--seeds", type=SEEDS, default=1, help="number of seeds, 0..N-1 (default 1)")
    parser.add_argument("--corpus", help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override any config field")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop, without starting Ray")


def sweep_arguments(options: argparse.Namespace, presets: Sequence[str], title: str) -> list[str]:
    """This job's command line for a study of ``presets``, with the options that :func:`add_study_options` added."""
    arguments = ["--presets", ",".join(presets), "--name", title]
    arguments += ["--scale", options.scale, "--seeds", str(options.seeds)]
    arguments += ["--corpus", options.corpus] if options.corpus else []
    arguments += [part for override in options.set for part in ("--set", override)]
    return arguments + (["--dry-run"] if options.dry_run else [])


def study_of(options: argparse.Namespace) -> Study:
    """The study that the command line names.

    Raises:
        HRSError: for unknown presets, scales or fields.
    """
    presets = tuple(options.presets.split(",")) if options.presets else get_study(options.study)
    overrides = parse_assignments(options.set) | ({"data.corpus": options.corpus} if options.corpus else {})
    title = options.name or ("custom" if options.presets else options.study)
    return Study(
        title=title,
        presets=presets,
        scale=options.scale,
        seeds=tuple(range(options.seeds)),
        overrides=overrides,
        title_names_presets=bool(options.name or not options.presets),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; 0 if every run of it is finished, 1 if some are not."""
    options = parse(arguments)
    study, storage = study_of(options), open_storage()
    runtime = Runtime(
        checkpoint_minutes=options.checkpoint_minutes,
        checkpoint_every=options.checkpoint_every,
        activation_checkpointing=options.activation_checkpointing,
        compile=options.compile,
    )
    runs, tracker = study.runs(), Tracker(storage)
    keys = [run.key for run in runs]
    finished = tracker.finished(keys)
    if options.dry_run:
        described = parse_gpus(options.gpus) if options.gpus else ()
        cpus = sum(node.cpus for node in described)
        hardware = Hardware(cpus=cpus, nodes=described) if described else Hardware.of_this_machine()
        print(format_plan(plan_runs(runs, finished, hardware, storage, runtime)))
        return 0
    preflight(storage)
    store = open_tokens(runs[0].config.data, storage.tokens, runs[0].data_fingerprint)
    print(f"corpus {runs[0].config.data.corpus}: {len(store.train):,} training tokens, {store.licence}")
    nothing_to_do = finished == set(keys)
    if nothing_to_do:
        hardware = Hardware(cpus=len(os.sched_getaffinity(0)))  # nothing runs, so no GPU need be asked
    else:
        hardware = Hardware.of_cluster(connect(storage), parse_gpus(options.gpus) if options.gpus else ())
    plan = plan_runs(runs, finished, hardware, storage, runtime)
    print(format_plan(plan), flush=True)
    build_manifolds([trial.run.config for trial in plan.missing], storage, lambda line: print(line, flush=True))
    study_id = tracker.open_study(study.name, {run.key: run.config for run in runs}, command=shlex.join(sys.argv))
    note_refused(plan, study_id, tracker)
    interrupted = bool(plan.missing) and not run_missing(plan, study_id, storage, runtime)
    tracker.reap(study.name)
    return conclude(study.name, study_id, keys, tracker, storage, interrupted)


def run_missing(plan: Plan, study_id: str, storage: Storage, runtime: Runtime) -> bool:
    """Hand the missing trials to Ray Tune; False if interrupted."""
    from tune.sweep import run_plan  # imports Ray Tune, which a dry run does without

    return run_plan(plan, study_id, storage, runtime)


def conclude(
    study: str, study_id: str, keys: Sequence[str], tracker: Tracker, storage: Storage, interrupted: bool
) -> int:
    """Print the table of what was asked for, write the whole study's report, and say how to go on.

    Only the runs of ``keys`` decide what is returned: the study may have more, of another sweep that shares its name.
    """
    records = tracker.study_records(study, with_history=False, keys=keys)
    print(f"\n{format_table(records)}\n", flush=True)
    has_page = keep_page(study, study_id, tracker, storage)
    unfinished = sum(record.status != "finished" for record in records)
    if interrupted:
        sentence = f"interrupted with {unfinished} of {len(records)} runs unfinished: the same command goes on"
        tracker.close_study(study_id, "killed", sentence)
        raise HRSError(sentence)
    tracker.close_study(study_id, "failed" if unfinished else "finished", f"{unfinished} runs unfinished")
    return 1 if unfinished or not has_page else 0


def keep_page(study: str, study_id: str, tracker: Tracker, storage: Storage) -> bool:
    """Write a study's report and keep a copy with it; False, and one sentence, if that is not possible."""
    try:
        print(write_page(study, tracker.study_records(study), tracker, storage), flush=True)
        tracker.log_study_artifact(study_id, storage.report(study))
    except (HRSError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    return True


if __name__ == "__main__":
    run_entry(main)
