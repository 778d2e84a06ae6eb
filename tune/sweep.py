"""Run the missing trials of a plan on whatever Ray offers, and survive what happens to them."""

import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hrs.cluster.plan import Plan, TrialPlan
from hrs.cluster.trial import TrialSpec
from hrs.storage import Storage
from hrs.training import Runtime
from tune.progress import ProgressLines
from tune.trainable import Trial

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our tracker logs; Tune's files cost time and inodes
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints boxes for failed trials at any verbosity
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # interruptible() handles it
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

from ray import tune  # reads its environment when it is imported

RETRIES = 2
"""Times a trial is started again from its last checkpoint before it is reported as failed."""


def run_plan(plan: Plan, study_id: str, storage: Storage, runtime: Runtime) -> bool:
    """Run every missing trial; a failing one never stops the others.

    Returns:
        True if the sweep came to its end, False if it was interrupted.
    """
    specs = {trial_spec(t, study_id, storage, runtime).to_json(): t for t in plan.missing}
    tuner = tune.Tuner(
        tune.with_resources(Trial, lambda config: trial_resources(specs[config["trial"]])),
        param_space={"trial": tune.grid_search(list(specs))},
        tune_config=tune_config(lambda config: specs[config["trial"]].run.key),
        run_config=run_config("ablation", storage, ProgressLines(lambda config: specs[config["trial"]].run.label)),
    )
    with interruptible() as interrupted:
        tuner.fit()
    return not interrupted


def trial_spec(t: TrialPlan, study_id: str, storage: Storage, runtime: Runtime) -> TrialSpec:
    """The planned trial as a worker gets it."""
    return TrialSpec(
        run=t.run,
        study_id=study_id,
        storage_root=str(storage.root),
        runtime=dataclasses.replace(trial_runtime(t, runtime), micro_batch_limit=t.micro_batch),
        card_frac=t.memory_frac,
        tenants=t.tenants,
    )


def trial_runtime(t: TrialPlan, runtime: Runtime) -> Runtime:
    """Return the runtime of a planned trial: on the CPU if it reserves no GPU.

    A trial that reserves one must find it: on a node without a driver it fails instead of taking weeks.
    """
    reserved = runtime.reserving(t.gpu_frac)
    return dataclasses.replace(reserved, device="cuda") if reserved.device == "auto" else reserved


def trial_resources(t: TrialPlan) -> tune.PlacementGroupFactory:
    """Return what Ray reserves: cores and the planned share of one GPU, on a node of the planned kind."""
    bundle = {"CPU": t.cpus} | ({"GPU": t.gpu_frac} if t.gpu_frac else {})
    if not t.nodes:
        return tune.PlacementGroupFactory([bundle])
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[{"ray.io/node-id": t.nodes}])


def tune_config(name: Callable[[Mapping[str, Any]], str], **options: Any) -> tune.TuneConfig:
    """Warm actors, and trials called by our own keys."""
    return tune.TuneConfig(
        reuse_actors=True,
        trial_name_creator=lambda trial: name(trial.config),
        trial_dirname_creator=lambda trial: trial.trial_id,
        **options,
    )


def run_config(name: str, storage: Storage, lines: ProgressLines) -> tune.RunConfig:
    """Tune's own bookkeeping, below the storage root and silent: our lines say what happens."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    return tune.RunConfig(
        name=name,
        storage_path=str(storage.root / "tune"),
        verbose=0,
        progress_reporter=_Silent(),
        failure_config=tune.FailureConfig(max_failures=RETRIES),
        callbacks=[lines],
    )


class _Silent(tune.ProgressReporter):
    """Tune prints a status box even at verbosity 0."""

    def should_report(self, trials: list[Any], done: bool = False) -> bool:
        return False

    def report(self, trials: list[Any], done: bool, *sys_info: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Answer Ctrl-C, and SIGTERM, which is how a submitted job is stopped, by letting Tune stop its trials in order.

    Yields:
        A list that holds the signals that have arrived.
    """
    seen: list[int] = []

    def stop(number: int, frame: Any) -> None:
        seen.append(number)
        os.kill(os.getpid(), signal.SIGUSR1)  # Tune's own request to stop; it has no handler for SIGTERM

    signals = {signal.SIGINT: stop, signal.SIGTERM: stop, signal.SIGUSR1: lambda number, frame: None}
    before = {number: signal.signal(number, handler) for number, handler in signals.items()}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
