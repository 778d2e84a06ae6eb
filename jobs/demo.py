#!/usr/bin/env python3
"""The whole system once, on this machine: a Ray head of its own, the v1 study submitted as a real job, its report.

    make demo
    python jobs/demo.py --seeds 3 --set training.steps=100

Arguments are handed on to jobs/ablation_sweep.py. Results stay in the storage folder, so a second call starts where
the first one ended.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.head import LocalHead
from hrs.cluster.preflight import ROOT, preflight
from hrs.storage import open_storage
from jobs import ablation_sweep
from jobs.entry import run_entry

FORWARDED = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Variables of this shell that the job is given too: a Ray job does not inherit them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study on a head of its own; the job's exit status."""
    extra = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "jobs/ablation_sweep.py", "--study", "v1", "--scale", "tiny", *extra])
    if "--dry-run" in extra:
        return ablation_sweep.main(["--study", "v1", "--scale", "tiny", *extra])
    storage = open_storage()
    os.environ.pop("RAY_ADDRESS", None)  # the demo has a cluster of its own, whatever this shell points at
    preflight(storage)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it as cleanly as Ctrl-C
    env_vars = {
        "HRS_STORAGE": str(storage.root),  # absolute: a job's working directory is a copy that is thrown away
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **{name: os.environ[name] for name in FORWARDED if name in os.environ},
    }
    print(f"storage: {storage.root}\nstarting a Ray head ...", flush=True)
    with LocalHead() as head:
        print(f"dashboard: {head.dashboard_address}\nsubmitting: {command}", flush=True)
        return head.submit(command, working_dir=ROOT, env_vars=env_vars)


if __name__ == "__main__":
    run_entry(main)
