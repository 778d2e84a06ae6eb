"""Run the missing trials of a plan on whatever Ray offers, and survive what happens to them."""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hrs.cluster.plan import Plan, TrialPlan
from hrs.cluster.preflight import FREE_BYTES
from hrs.cluster.study import Run
from hrs.cluster.trial import TrialSpec
from hrs.errors import HRSError
from hrs.storage import Storage
from hrs.tracking import Outcome, Tracker
from hrs.tracking.owner import claim_folder
from hrs.training import Runtime
from tune.progress import ProgressLines
from tune.trainable import Trial

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our tracker logs; Tune's files cost time and inodes
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints boxes for failed trials at any verbosity
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # interruptible() handles it
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

from ray import tune  # reads its environment when it is imported

_log = logging.getLogger(__name__)

RETRIES = 2
"""Times a trial whose process or node was lost is started again from its last checkpoint.

A trial that ended by itself (it diverged, it does not fit, its code has a fault) is not: it would end so again."""


def run_plan(plan: Plan, study_id: str, storage: Storage, runtime: Runtime) -> bool:
    """Run every missing trial; a failing one never stops the others, and is tracked with its reason.

    Returns:
        True if the sweep came to its end, False if it was interrupted.
    """
    specs = {trial_spec(t, study_id, storage, runtime).to_json(): t for t in plan.missing}
    endings = Endings(lambda config: specs[config["trial"]].run)
    lines = ProgressLines(lambda config: specs[config["trial"]].run.label, endings.add)
    with experiment_folder("ablation", storage) as name:
        tuner = tune.Tuner(
            tune.with_resources(Trial, lambda config: trial_resources(specs[config["trial"]])),
            param_space={"trial": tune.grid_search(list(specs))},
            tune_config=tune_config(lambda config: specs[config["trial"]].run.key),
            run_config=run_config(name, storage, [lines]),
        )
        completed = fit(tuner, storage)
    endings.record(study_id, storage)
    return completed


class Endings:
    """How trials ended that did not finish: some could not record it, since they had not begun or were killed."""

    def __init__(self, run_of: Callable[[Mapping[str, Any]], Run]) -> None:
        """``run_of`` gives the run of Tune's parameters."""
        self._run_of = run_of
        self._ended: list[tuple[Run, Outcome, str]] = []

    def add(self, parameters: Mapping[str, Any], outcome: Outcome, reason: str) -> None:
        """Note one end."""
        self._ended.append((self._run_of(parameters), outcome, reason))

    def record(self, study_id: str, storage: Storage) -> None:
        """Track what has no outcome yet."""
        tracker = Tracker(storage)
        with contextlib.suppress(HRSError):
            tracker.reap()  # knows more of a crash than Ray does
        for run, outcome, reason in self._ended:
            try:
                tracker.note_end(run.key, study_id, run.config, run.data_fingerprint, outcome, reason)
            except Exception as error:  # the table says "missing" then, and the line above said why
                _log.warning("the end of %s could not be recorded: %s", run.label, " ".join(str(error).split())[:200])


@contextlib.contextmanager
def experiment_folder(kind: str, storage: Storage) -> Iterator[str]:
    """Make a folder for Tune's own bookkeeping and remove it at the end: nothing reads it later. Yields its name."""
    folder = storage.root / "tune" / f"{kind}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    claim_folder(folder)
    try:
        yield folder.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fit(tuner: tune.Tuner, storage: Storage) -> bool:
    """Run Tune until all its trials ended; False if interrupted.

    Raises:
        HRSError: if the disk is full, which Tune's bookkeeping cannot bear.
    """
    with interruptible() as interrupted:
        try:
            tuner.fit()
        except Exception as error:
            storage.require_free(FREE_BYTES // 64)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise HRSError(f"the disk of {storage.root} is full: make room, then run the same command") from error
            raise
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


def run_config(name: str, storage: Storage, callbacks: list[tune.Callback]) -> tune.RunConfig:
    """Tune's own bookkeeping, below the storage root and silent: our lines say what happens."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    return tune.RunConfig(
        name=name,
        storage_path=str(storage.root / "tune"),
        verbose=0,
        progress_reporter=_Silent(),
        failure_config=tune.FailureConfig(max_failures=RETRIES),
        callbacks=callbacks,
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
