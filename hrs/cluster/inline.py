"""Runs one after the other, driven by this process: what ``hrs train`` does."""

import shlex
import sys
import time

from hrs.cluster.progress import Pace
from hrs.cluster.study import Study
from hrs.cluster.trial import Trainer, TrialSpec, run_trial
from hrs.report import format_table
from hrs.storage import open_storage
from hrs.tracking import Tracker
from hrs.training import Runtime, train


def train_inline(study: Study, runtime: Runtime, trainer: Trainer = train) -> None:
    """Train, evaluate and audit what is missing of a study, one run after the other, and print the table."""
    storage = open_storage()
    tracker = Tracker(storage)
    runs = study.runs()
    keys = [run.key for run in runs]
    study_id = tracker.open_study(study.name, {run.key: run.config for run in runs}, command=shlex.join(sys.argv))
    finished, pace = tracker.finished(keys), Pace(every_seconds=5.0)
    for run in runs:
        if run.key in finished:
            print(f"{run.label:<28} finished before")
            continue
        spec = TrialSpec(run=run, study_id=study_id, storage_root=str(storage.root), runtime=runtime)
        for progress in run_trial(spec, trainer):
            if pace.lets_through(run.label, progress, time.monotonic()):
                print(progress.line(run.label), flush=True)
    tracker.close_study(study_id, "finished")
    print("\n" + format_table(tracker.study_records(study.name, with_history=False, keys=keys)))
    print("\n".join(f"run {run.label}: {storage.run(run.key)}" for run in runs))
