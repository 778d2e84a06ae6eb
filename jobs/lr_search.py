#!/usr/bin/env python3
"""Search the learning-rate schedule of one preset: Optuna's TPE proposes, ASHA stops what lags behind.

    ray job submit --working-dir . -- python jobs/lr_search.py --preset full_hrs --scale tiny --samples 16
    python jobs/lr_search.py --preset dense_baseline --scale micro --samples 4 --dry-run

Ends with the best schedule as a plot and as the overrides to paste. The same command again changes nothing; with more
``--samples`` it goes on.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.hardware import Hardware
from hrs.cluster.plan import format_plan, plan_runs
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.study import Run, Study
from hrs.config import ExperimentConfig, from_dict, parse_assignments
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.files import write_whole
from hrs.identity import code_version
from hrs.report.records import RunRecord
from hrs.report.schedule_plots import plot_schedule
from hrs.report.search_table import as_overrides, best_of, final_loss, is_over, search_table
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from jobs.entry import run_entry
from jobs.options import SEED, Parser, whole


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/lr_search.py", description="Search the learning-rate schedule of a preset.")
    parser.add_argument("--preset", required=True, help="any name that `hrs presets` lists")
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper (default tiny)")
    parser.add_argument("--samples", type=whole(1, 100_000), default=16, help="schedules to try (default 16)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the runs and of the search (default 0)")
    parser.add_argument("--corpus", help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override any config field")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop, without starting Ray")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search, or what is left of it; 0 if all schedules are over, 1 if some were lost."""
    options = parse(arguments)
    overrides = {"training.validations": 8} | parse_assignments(options.set)
    overrides |= {"data.corpus": options.corpus} if options.corpus else {}
    study = Study(
        title=f"lr-{options.preset}",
        presets=(options.preset,),
        scale=options.scale,
        seeds=(options.seed,),
        overrides=overrides,
    )
    (run,) = study.runs()
    if run.config.training.validations < 1:
        raise HRSError("a search compares validation losses: training.validations must be at least 1")
    storage, runtime = open_storage(), Runtime()
    tracker = Tracker(storage)
    if options.dry_run:
        plan = plan_runs([run], (), Hardware.of_this_machine(), storage, runtime, copies=options.samples)
        print(format_plan(plan) + f"\n(up to {options.samples} trials like this one; early stopping ends most sooner)")
        return 0
    preflight(storage)
    open_tokens(run.config.data, storage.tokens, run.data_fingerprint)
    study_id = tracker.open_study(study.name, {}, command=shlex.join(sys.argv))
    known = searched(tracker, study.name)
    n_over = sum(map(is_over, known))
    if known:
        print(f"{n_over} of {options.samples} schedules were tried before", flush=True)
    if n_over >= options.samples:
        return conclude(study.name, study_id, tracker, storage, options.samples, interrupted=False)
    hardware = Hardware.of_cluster(connect(storage))
    plan = plan_runs([run], (), hardware, storage, runtime, copies=options.samples - n_over)
    print(format_plan(plan), flush=True)

    from tune.schedule_search import search_schedules

    def note(drawn: Run, sample: dict[str, Any]) -> None:
        Tracker(storage).open_study(study.name, {drawn.key: drawn.config}, samples={drawn.key: sample})

    completed = search_schedules(
        plan, study_id, storage, runtime, samples=options.samples, seed=options.seed, known=known, note=note
    )
    tracker.reap(study.name)
    return conclude(study.name, study_id, tracker, storage, options.samples, interrupted=not completed)


def searched(tracker: Tracker, study: str) -> list[RunRecord]:
    """Return the runs that a search drew so far, with this code."""
    if code_version() not in tracker.study_versions(study):
        return []
    return tracker.study_records(study, code_version=code_version())


def conclude(study: str, study_id: str, tracker: Tracker, storage: Storage, samples: int, *, interrupted: bool) -> int:
    """Print every schedule that was tried and the best; 0 if all of them are over, 1 if some were lost.

    Raises:
        HRSError: if the search was interrupted, or nothing came to its end.
    """
    records = searched(tracker, study)
    n_over = sum(map(is_over, records))
    best = best_of(records)
    if records:
        print("\n" + search_table(records), flush=True)
    if interrupted or best is None:
        happened = "interrupted" if interrupted else "no schedule came to its end with a finite loss"
        sentence = f"{happened}: {n_over} of {samples} schedules are over and none is chosen; the same command goes on"
        tracker.close_study(study_id, "killed" if interrupted else "failed", sentence)
        raise HRSError(sentence)
    directory = storage.report(study)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "search.txt", search_table(records) + "\n")
    picture = directory / "best_schedule.png"
    plot_schedule(from_dict(ExperimentConfig, best.config), picture)
    tracker.log_study_artifact(study_id, directory)
    lost = max(0, samples - n_over)
    tracker.close_study(study_id, "failed" if lost else "finished", f"{lost} schedules lost" if lost else "")
    print(
        f"\nbest of {n_over} schedules ({final_loss(best):.4f} nats per token at the end), plotted in {picture}\n"
        + (f"{lost} schedules were lost: the same command tries them again\n" if lost else "")
        + "Curves of different schedules cross late: what ends close together is a tie until seeds say otherwise.\n"
        + as_overrides(best)
    )
    return 1 if lost else 0


if __name__ == "__main__":
    run_entry(main)
