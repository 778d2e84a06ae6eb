"""What the queue costs: the makespan of a sweep against the same trainings run bare, and Tune without warm actors.

    python -m benchmarks.sweep_overhead                      # the eight tiny rows, some twenty minutes on two cores
    python -m benchmarks.sweep_overhead --set training.steps=60 --scale tiny

Prints, from one run: (1) the sum of the eight trainings, evaluations and audits run bare, one after the other, in one
process with all cores; (2) the makespan of the same eight as a sweep; their ratio; (3) scheduler time per trial, from
trials that do nothing, with warm actors as in the sweep and with plain Tune; (4) what logging costs a training step.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hrs.cluster.hardware import Hardware
from hrs.cluster.plan import plan_runs
from hrs.cluster.preflight import connect
from hrs.cluster.study import Run, Study
from hrs.config import parse_assignments
from hrs.data import open_tokens
from hrs.evaluation import audit, evaluate
from hrs.presets import get_study
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime, load_model, train

N_IDLE_TRIALS = {True: 200, False: 12}
"""With and without warm actors: enough for the difference to stand above the seconds a sweep takes to start."""


def bare(runs: list[Run], storage: Storage, folder: Path) -> float:
    """Seconds for all runs in this process, with all cores."""
    runtime = Runtime(threads=len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    for run in runs:
        store = open_tokens(run.config.data, storage.tokens)
        for _ in train(run.config, store, folder / run.key, runtime):
            pass
        model, _ = load_model(folder / run.key)
        evaluate(model, store, stride_frac=run.config.evaluation.stride_frac)
        audit(model)
        print(f"bare {run.label}: {time.perf_counter() - began:.0f} s so far", flush=True)
    return time.perf_counter() - began


def swept(runs: list[Run], storage: Storage) -> float:
    """Seconds for the same runs as a sweep on a connected Ray."""
    from tune.sweep import run_plan

    hardware = Hardware.of_this_machine()
    began = time.perf_counter()
    tracker = Tracker(storage)
    assert not tracker.finished([run.key for run in runs])
    study_id = tracker.open_study("overhead", {run.key: run.config for run in runs})
    run_plan(plan_runs(runs, set(), hardware, storage, Runtime()), study_id, storage, Runtime())
    elapsed = time.perf_counter() - began
    assert tracker.finished([run.key for run in runs]) == {run.key for run in runs}
    return elapsed


def idle_trials(warm: bool) -> float:
    """Scheduler seconds per trial that does nothing."""
    from ray import tune

    class Idle(tune.Trainable):
        def setup(self, config: dict[str, object]) -> None:
            import torch  # noqa: F401  (what every real trial has to import)

        def step(self) -> dict[str, object]:
            return {"done": True}

        def reset_config(self, new_config: dict[str, object]) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None: ...

        def load_checkpoint(self, checkpoint: object) -> None: ...

    def sweep(n: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            tune.Tuner(
                tune.with_resources(Idle, {"CPU": 1}),
                param_space={"n": tune.grid_search(list(range(n)))},
                tune_config=tune.TuneConfig(reuse_actors=warm),
                run_config=tune.RunConfig(storage_path=folder, verbose=0),
            ).fit()
            return time.perf_counter() - began

    short, long = (
        sweep(2),
        sweep(2 + N_IDLE_TRIALS[warm]),
    )  # the difference leaves out start and end of the sweep itself
    return (long - short) / N_IDLE_TRIALS[warm]


def logging_cost(storage: Storage, run: Run, steps: int = 2000) -> float:
    """Milliseconds of wall time that tracking adds to a step which logs a dozen metrics."""
    values = {f"metric_{i}": 1.0 for i in range(12)}
    tracker = Tracker(storage)
    study_id = tracker.open_study("logging", {run.key: run.config})

    def timed(log: Callable[[int], None]) -> float:
        began = time.perf_counter()
        for step in range(1, steps + 1):
            log(step)
            sum(i * i for i in range(20_000))  # a millisecond or so of work that holds the interpreter
        return time.perf_counter() - began

    with tracker.open_run(run.key, study_id, run.config, run.data_fingerprint) as logger:
        with_log = timed(lambda step: logger.log(step, values))
    without = timed(lambda step: None)
    return (with_log - without) / steps * 1000


def main() -> None:
    """Run all four and print them."""
    parser = argparse.ArgumentParser(description="What the queue costs.")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--presets", default=",".join(get_study("v1")))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--skip-trainings", action="store_true", help="only the idle trials and the logging")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hrs-overhead-"))
    storage = Storage(folder)
    study = Study(
        title="overhead", presets=tuple(options.presets.split(",")), scale=options.scale, seeds=(0,),
        overrides=parse_assignments(options.set),
    )  # fmt: skip
    runs = study.runs()
    open_tokens(runs[0].config.data, storage.tokens)
    elsewhere = Storage(folder / "logging")  # the sweep must not find this run finished
    print(
        f"logging: {statistics.median(logging_cost(elsewhere, runs[0]) for _ in range(3)):.3f} ms per step", flush=True
    )
    connect()
    import tune.sweep  # noqa: F401  (sets Tune's environment as a sweep does)

    print(f"scheduler, warm actors: {idle_trials(warm=True):.2f} s per trial", flush=True)
    print(f"scheduler, plain Tune: {idle_trials(warm=False):.2f} s per trial", flush=True)
    if not options.skip_trainings:
        alone = bare(runs, storage, folder / "bare")
        together = swept(runs, storage)
        print(f"bare {alone:.0f} s, sweep {together:.0f} s, ratio {together / alone:.2f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
