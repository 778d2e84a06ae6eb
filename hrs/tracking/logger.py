"""Logging one run without the training loop ever waiting for the store."""

import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hrs import strict_json
from hrs.errors import HRSError, reason_of
from hrs.files import write_whole
from hrs.tracking.owner import HEARTBEAT_SECONDS

if TYPE_CHECKING:
    from mlflow import MlflowClient

Outcome = Literal["finished", "failed", "killed", "stopped"]
"""``stopped``: ended early by a scheduler; ``killed``: by a signal, a cancel or a dead machine."""

TERMINAL_STATUS: dict[Outcome, str] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "killed": "KILLED",
    "stopped": "FINISHED",
}
FLUSH_SECONDS = 2.0
FLUSH_VALUES = 500
_VALUES_PER_REQUEST = 1000  # MLflow's limit
_LONGEST_PAUSE_SECONDS = 60.0
_FLUSH_SHARE = 0.02  # of the time at most: many writers of one busy SQLite file must not queue up behind each other
_PATIENCE_SECONDS = (0.5, 1, 2, 4, 8)  # waits between the attempts of the last flush
_METRIC_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")

_logger = logging.getLogger(__name__)


class RunLogger:
    """Metrics, tags and artifacts of one run; made by :meth:`hrs.tracking.Tracker.open_run`.

    :meth:`log` only appends to a buffer, which a thread sends every two seconds. A store that fails does not fail the
    run: values stay in the buffer and are sent again, and :meth:`finish` writes down what could not be sent.

    As a context manager it finishes the run as ``finished``, ``killed`` (Ctrl-C, SystemExit) or ``failed``.
    """

    def __init__(
        self, client: "MlflowClient", run_id: str, directory: Path, last_steps: Mapping[str, int], monitor: Any = None
    ) -> None:
        """``last_steps``: the last step the store has of each metric; what a resumed run repeats is not logged again.

        ``monitor``: a started MLflow SystemMetricsMonitor, or None.
        """
        self.run_id = run_id
        self._client = client
        self._monitor = monitor
        self._last_steps = dict(last_steps)
        self._names: set[str] = set()
        self._buffer: list[tuple[str, float, int, int]] = []  # name, value, milliseconds since the epoch, step
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._closed = False
        self._failing = False
        self._spill = directory / "unlogged_metrics.jsonl"
        self._take_back_spill()
        self._thread = threading.Thread(target=self._send_regularly, name=f"flush {run_id}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note the values of metrics at a step. Takes microseconds and never waits for the store.

        A metric has one value at a step, the first, and steps only go up: what comes again is left out.

        Infinity is noted as NaN: MLflow would store the largest number there is, and draw it.

        Raises:
            HRSError: for a name the store would refuse, or when the run is finished.
        """
        if not values.keys() <= self._names:
            self._check_names(values)
        now = int(time.time() * 1000)
        fresh = [(n, storable(v), now, step) for n, v in values.items() if step > self._last_steps.get(n, -1)]
        with self._changed:
            if self._closed:
                raise HRSError(f"run {self.run_id} is finished: open it again to log more")
            self._buffer += fresh
            self._last_steps.update((name, step) for name, *_ in fresh)
            if len(self._buffer) >= FLUSH_VALUES:
                self._changed.notify()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags of the run, now."""
        from mlflow.entities import RunTag

        self._insist("tags", lambda: self._client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in tags.items()]))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file, or of a directory under its own name, below ``folder`` of the run's artifacts."""
        if path.is_dir():
            target = f"{folder}/{path.name}" if folder else path.name
            self._insist(str(path), lambda: self._client.log_artifacts(self.run_id, str(path), target))
        else:
            self._insist(str(path), lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def finish(self, outcome: Outcome, reason: str = "") -> None:
        """Send what is left and close the run with its outcome and a line that says why. Only the first call counts.

        Raises:
            HRSError: if the store takes nothing for some 15 seconds. The values are then in ``unlogged_metrics.jsonl``
                of the run's directory and will be logged when the run is opened again.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._monitor is not None:
            self._monitor.finish()
        try:
            self._insist("its last values", self._send)
            self._insist("its outcome", lambda: close_run(self._client, self.run_id, outcome, reason))
        except HRSError:
            self._write_spill()
            raise

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish("finished")
            return
        outcome: Outcome = "failed" if isinstance(error, Exception) else "killed"
        try:
            self.finish(outcome, reason_of(error))
        except HRSError as unrecorded:  # must not hide what ended the run
            _logger.warning("%s", unrecorded)

    # ---- the sending thread ------------------------------------------------------------------------------------------

    def _send_regularly(self) -> None:
        pause, last_beat = FLUSH_SECONDS, time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or (len(self._buffer) >= FLUSH_VALUES and not self._failing), timeout=pause
                )
                if self._closed:
                    return
            started = time.monotonic()
            try:
                self._send()
                if started - last_beat >= HEARTBEAT_SECONDS:
                    self._client.set_tag(self.run_id, "hrs.heartbeat", f"{time.time():.0f}")
                    last_beat = started
            except Exception as error:  # whatever the store throws, the run goes on
                if not self._failing:
                    _logger.warning("tracking store fails (%s); values are kept and sent later", _first_line(error))
                self._failing = True
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                self._failing = False
                pause = min(max(FLUSH_SECONDS, (time.monotonic() - started) / _FLUSH_SHARE), _LONGEST_PAUSE_SECONDS)

    def _send(self) -> None:
        from mlflow.entities import Metric

        with self._sending:
            while batch := self._buffer[:_VALUES_PER_REQUEST]:
                # Times were taken when the values were noted: a batch that is sent twice is stored once.
                self._client.log_batch(self.run_id, metrics=[Metric(*value) for value in batch])
                with self._changed:
                    del self._buffer[: len(batch)]
            self._spill.unlink(missing_ok=True)

    def _insist(self, what: str, action: Callable[[], object]) -> None:
        for wait in (*_PATIENCE_SECONDS, None):
            try:
                action()
                return
            except Exception as error:
                if wait is None:
                    raise HRSError(
                        f"the tracking store did not take {what} of run {self.run_id} ({_first_line(error)}): "
                        "check the store and its disk, then start the run again"
                    ) from error
                time.sleep(wait)

    # ---- what could not be sent --------------------------------------------------------------------------------------

    def _write_spill(self) -> None:
        if self._buffer:
            write_whole(self._spill, "".join(strict_json.dumps(value) + "\n" for value in self._buffer))
            _logger.warning("%d values are kept in %s", len(self._buffer), self._spill)

    def _take_back_spill(self) -> None:
        if self._spill.exists():
            self._buffer = [v for v in _spilt(self._spill) if v[3] > self._last_steps.get(v[0], -1)]
            for name, _, _, step in self._buffer:
                self._last_steps[name] = max(step, self._last_steps.get(name, -1))

    def _check_names(self, values: Mapping[str, float]) -> None:
        wrong = [name for name in values if not _METRIC_NAME.fullmatch(name)]
        if wrong:
            raise HRSError(f"metric name {wrong[0]!r} must be words of letters, digits, '_', '.' or '-', joined by '/'")
        self._names |= values.keys()


def _spilt(path: Path) -> list[tuple[str, float, int, int]]:
    """Values that a run left behind; a line that is cut off or damaged is logged and left out."""
    values, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            name, value, milliseconds, step = json.loads(line)
            values.append((str(name), float(strict_json.number(value)), int(milliseconds), int(step)))
        except (ValueError, TypeError):
            damaged += 1
    if damaged:
        _logger.warning("%d lines of %s are damaged and left out", damaged, path)
    return values


def close_run(client: "MlflowClient", run_id: str, outcome: Outcome, reason: str) -> None:
    """Set the outcome, the reason (as one line) and MLflow's own status of a run."""
    from mlflow.entities import RunTag

    tags = [RunTag("hrs.outcome", outcome), RunTag("hrs.reason", " ".join(reason.split())[:1000])]
    client.log_batch(run_id, tags=tags)
    client.set_terminated(run_id, TERMINAL_STATUS[outcome])


def storable(value: float) -> float:
    """Return a metric as MLflow stores it: it has NaN, but the largest number there is for infinity."""
    return float(value) if math.isfinite(value) else math.nan


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
