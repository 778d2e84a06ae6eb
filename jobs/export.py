#!/usr/bin/env python3
"""From a trained run to one small file, read back and scored: the best of a study, or the one of a directory.

    ray job submit --working-dir . -- python jobs/export.py v1-tiny --budget 600KB
    python jobs/export.py PATH/TO/RUN --bits 6 --calibrate 64 --output model.hrs

The best run of a study is the finished one with the fewest bits per byte whose model passed the causality audit. The
file lies in the run's directory, unless --output says otherwise, and a copy with the run in MLflow. Status 1 if the
rounding cost so much that it is an alarm.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.hardware import offers_gpus
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.workers import reserved_runtime
from hrs.export import ExportResult, export, format_result, open_model, open_text, parse_budget
from hrs.files import write_whole
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from hrs.tracking.naming import best_run, find_model
from jobs.entry import run_entry
from jobs.options import Parser, file, whole

FILE, RESULT = "model.hrs", "export.json"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/export.py", description="Export a trained model to one small file.")
    parser.add_argument(
        "source",
        metavar="MODEL",
        help="a study such as v1-tiny (its best causal run), PRESET@STUDY, the beginning of a run's key, or a path",
    )
    parser.add_argument("--budget", help="most bytes of the file: 16MB (decimal), 16MiB (binary) or a plain number")
    parser.add_argument(
        "--bits", type=whole(4, 8), help="width of the integers, 4 to 8 (default: 8, or what fits the budget)"
    )
    parser.add_argument(
        "--calibrate",
        type=whole(0),
        default=0,
        metavar="N",
        help="round with a look at N training windows (default 0)",
    )
    parser.add_argument("--output", type=file, help=f"the file to write (default {FILE} in the run's directory)")
    return parser.parse_args(arguments)


def export_run(directory: Path, target: Path, options: argparse.Namespace, storage: Storage) -> ExportResult:
    """What a worker does: open the run's data, then :func:`hrs.export.export`; keeps the result beside the file."""
    result = export(
        directory,
        target,
        store=open_text(open_model(directory, storage.tokens), storage.tokens),
        budget=None if options.budget is None else parse_budget(options.budget),
        bits=options.bits,
        calibrate=options.calibrate,
        device=reserved_runtime().torch_device(),
    )
    write_whole(target.with_name(RESULT), result.to_json())
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Export one run and print what it costs; 0, or 1 with the leak alarm."""
    options = parse(arguments)
    if options.budget is not None:
        parse_budget(options.budget)  # fails now, not on a worker
    storage = open_storage()
    preflight(storage)
    tracker = Tracker(storage)
    if not Path(options.source).exists() and options.source in tracker.studies():
        best = best_run(options.source, tracker.study_records(options.source, with_history=False))
        print(f"best causal run: {best.preset}/{best.seed}, {best.metrics['bits_per_byte']:.4f} bits per byte")
        directory = storage.run(best.key)
    else:
        directory = find_model(storage, options.source).resolve()
    target = (options.output or directory / FILE).resolve()

    gpus = float(offers_gpus(connect(storage)))
    import ray

    worker = ray.remote(num_cpus=1, num_gpus=gpus)(export_run)
    try:
        result = ray.get(worker.remote(directory, target, options, storage))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    print(format_result(result), flush=True)
    track(tracker, directory, [target, target.with_name(RESULT)], storage)
    return 1 if result.leak_alarm else 0


def track(tracker: Tracker, directory: Path, files: Sequence[Path], storage: Storage) -> None:
    """Copy the files to the finished run of this directory in MLflow, if there is one."""
    key = directory.name
    if directory != storage.run(key) or not tracker.finished([key]):
        print("not tracked: the directory is not that of a finished run of this storage")
        return
    tracker.log_run_artifacts(key, files, "export")


if __name__ == "__main__":
    run_entry(main)
