"""Waiting for a SQLite file that another process has locked, instead of failing or of giving wrong advice."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from hrs.errors import HRSError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

LOCK_SECONDS = 300.0
"""Longest wait for a lock."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 10.0

_log = logging.getLogger(__name__)


def patiently(action: Callable[[], T], store: str) -> T:
    """Return what ``action`` returns, done again while another process has ``store`` locked.

    Raises:
        HRSError: if the lock is held for ``LOCK_SECONDS``.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except Exception as error:
            if not is_locked(error):
                raise
            waited = time.monotonic() - began
            if waited > LOCK_SECONDS:
                raise HRSError(
                    f"tracking store {store} has been locked by another process for {waited:.0f} s: end that process "
                    "(`fuser` on the file names it) and run the same command again; the file itself is whole"
                ) from error
            if pause == _FIRST_PAUSE_SECONDS:
                _log.warning("tracking store %s is locked by another process: waiting", store)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def is_locked(error: BaseException | None) -> bool:
    """Return True if an error, or what caused it, says that a database is locked."""
    return any("database is locked" in str(e) or "database table is locked" in str(e) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class PatientClient:
    """An MlflowClient whose calls wait while another process has its SQLite file locked."""

    def __init__(self, client: "MlflowClient", store: str) -> None:
        self._client, self._store = client, store

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        if not callable(value):
            return value
        return lambda *args, **options: patiently(functools.partial(value, *args, **options), self._store)
