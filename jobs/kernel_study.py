#!/usr/bin/env python3
"""One model per attention kernel: train, evaluate, audit and compare; then, how well mean states tell topics apart.

    ray job submit --working-dir . -- python jobs/kernel_study.py --kernels dot,exponential --scale tiny --seeds 3
    python jobs/kernel_study.py --kernels all --scale micro --dry-run

The first table is that of any study. The second is the topic separation of every finished run beside its controls:
docs/kernels.md says how to read it. Submitting the same study again runs and measures only what is missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs import strict_json
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.study import Run
from hrs.config import AttentionConfig
from hrs.data import open_tokens
from hrs.errors import HRSError
from hrs.evaluation.separation import Separations, from_dict, measure_separation, segment_length, segments_of, to_dict
from hrs.export import open_model, open_text
from hrs.files import read_json, write_whole
from hrs.report.separation_table import separation_tables
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker
from jobs import ablation_sweep
from jobs.entry import run_entry
from jobs.options import Parser

KERNELS: tuple[str, ...] = get_args(get_type_hints(AttentionConfig)["kernel"])
TITLE = "kernels"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/kernel_study.py", description="Compare attention kernels.")
    parser.add_argument(
        "--kernels",
        default="dot,exponential",
        help=f"comma-separated, the first is the baseline, or all: {', '.join(KERNELS)} (default dot,exponential)",
    )
    ablation_sweep.add_study_options(parser)
    return parser.parse_args(arguments)


def sweep_arguments(options: argparse.Namespace) -> list[str]:
    """The command line of jobs/ablation_sweep.py for this study: a kernel is a preset.

    Raises:
        HRSError: for an unknown kernel.
    """
    kernels = KERNELS if options.kernels == "all" else tuple(options.kernels.split(","))
    if unknown := [kernel for kernel in kernels if kernel not in KERNELS]:
        raise HRSError(f"unknown kernel '{unknown[0]}': choose out of {', '.join(KERNELS)}, or all")
    presets = ["dense_baseline" if kernel == "dot" else f"kernel_{kernel}" for kernel in kernels]
    return ablation_sweep.sweep_arguments(options, presets, TITLE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and measure its finished runs; 0 if every run is finished, 1 if some are not."""
    options = parse(arguments)
    sweep = sweep_arguments(options)
    if options.dry_run:
        return ablation_sweep.main(sweep)
    study, storage = ablation_sweep.study_of(ablation_sweep.parse(sweep)), open_storage()
    runs = study.runs()
    preflight(storage)
    config = runs[0].config  # kernels change nothing of what follows, which had better fail now than after the training
    store = open_tokens(config.data, storage.tokens, runs[0].data_fingerprint)
    segments_of(store.validation, segment_length(config.model.max_seq_len))
    status = ablation_sweep.main(sweep)
    tracker = Tracker(storage)
    finished = tracker.finished([run.key for run in runs])
    scores = measure([run for run in runs if run.key in finished], storage)
    text = separation_tables(
        [(run.config.preset, run.config.seed, scores[run.key]) for run in runs if run.key in scores]
    )
    folder = storage.report(study.name)
    write_whole(folder / "separation.txt", text)
    by_run = {run.label: to_dict(scores[run.key]) for run in runs if run.key in scores}
    write_whole(folder / "separation.json", strict_json.dumps(by_run, indent=1))
    study_id = tracker.open_study(study.name, {})
    tracker.log_study_artifact(study_id, folder)
    unfinished = f"{len(runs) - len(finished)} runs unfinished"
    tracker.close_study(study_id, "failed" if status else "finished", unfinished)
    print(f"\n{text}\nseparation: {folder / 'separation.json'}", flush=True)
    return status


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(runs: Sequence[Run], storage: Storage) -> dict[str, Separations]:
    """Topic separation of finished runs by key: those that have none yet are measured by workers, one core each."""
    missing = [run for run in runs if _measured(run, storage) is None]
    if missing:
        connect(storage)
        import ray

        worker = ray.remote(num_cpus=1)(measure_run)
        try:
            ray.get([worker.remote(run, storage) for run in missing])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
    found = {run.key: _measured(run, storage) for run in runs}
    return {key: separations for key, separations in found.items() if separations is not None}


def _measured(run: Run, storage: Storage) -> Separations | None:
    """What was measured of a run; None if it was not, or the file is damaged."""
    try:
        return from_dict(read_json(_file(run, storage)))
    except (HRSError, LookupError, TypeError, ValueError):
        return None


def measure_run(run: Run, storage: Storage) -> None:
    """Write ``separation.json`` of a finished run, from its last checkpoint, on the CPU."""
    opened = open_model(storage.run(run.key), storage.tokens)
    found = measure_separation(opened.model, opened.config, open_text(opened, storage.tokens))
    write_whole(_file(run, storage), strict_json.dumps(to_dict(found)))


def _file(run: Run, storage: Storage) -> Path:
    return storage.run(run.key) / "separation.json"


if __name__ == "__main__":
    run_entry(main)
