#!/usr/bin/env python3
"""Search the learning-rate schedule of one preset: Optuna's TPE proposes, ASHA stops what lags behind.

    ray job submit --working-dir . -- python jobs/lr_search.py --preset full_hrs --scale tiny --samples 16
    python jobs/lr_search.py --preset dense_baseline --scale micro --samples 4 --dry-run

Ends with the best schedule as a plot and as the overrides to paste.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.hardware import Hardware
from hrs.cluster.plan import format_plan, plan_runs
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.study import Study
from hrs.config import parse_assignments
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.report.schedule_plots import plot_schedule
from hrs.storage import open_storage
from hrs.tracking import Tracker
from hrs.training import Runtime
from jobs.entry import run_entry


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = argparse.ArgumentParser(
        prog="jobs/lr_search.py", description="Search the learning-rate schedule of a preset."
    )
    parser.add_argument("--preset", required=True, help="any name that `hrs presets` lists")
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper (default tiny)")
    parser.add_argument("--samples", type=int, default=16, help="schedules to try (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs and of the search (default 0)")
    parser.add_argument("--corpus", help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override any config field")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop, without starting Ray")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        raise HRSError("--samples must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the search; 0 if a best schedule was found, 1 if no run came to its end."""
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
    storage, runtime = open_storage(), Runtime()
    tracker = Tracker(storage)
    if options.dry_run:
        plan = plan_runs(study.runs(), (), Hardware.of_this_machine(), storage, runtime, copies=options.samples)
        print(format_plan(plan) + f"\n(up to {options.samples} trials like this one; early stopping ends most sooner)")
        return 0
    preflight(storage)
    (run,) = study.runs()
    open_tokens(run.config.data, storage.tokens)
    hardware = Hardware.of_cluster(connect(storage))
    plan = plan_runs([run], (), hardware, storage, runtime, copies=options.samples)
    print(format_plan(plan), flush=True)

    from tune.schedule_search import search_schedules

    study_id = tracker.open_study(study.name, {}, extend=True)
    outcome = search_schedules(plan, study_id, storage, runtime, samples=options.samples, seed=options.seed)
    tracker.open_study(study.name, {trial.key: trial.config for trial in outcome.trials}, extend=True)
    tracker.reap(study.name)
    print("\n" + outcome.table())
    best = outcome.best
    tracker.close_study(study_id, "finished" if best else "failed", "" if best else "no trial came to its end")
    if best is None:
        raise HRSError("no trial came to the end of its schedule: the same command goes on from there")
    directory = storage.report(study.name)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / "best_schedule.png"
    plot_schedule(best.config, picture)
    tracker.log_study_artifact(study_id, directory)
    print(
        f"\nbest schedule ({best.validation_loss:.4f} nats per token at the end), plotted in {picture}\n"
        "Curves of different schedules cross late: what ends close together is a tie until seeds say otherwise.\n"
        + " ".join(f"--set '{name}={value}'" for name, value in best.overrides.items())
    )
    return 0


if __name__ == "__main__":
    run_entry(main)
