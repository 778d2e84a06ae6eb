"""Where everything that must survive lives: one absolute folder, never the working directory of a job.

<root>/mlflow/        mlflow.db and artifacts/ of the default tracking store
<root>/tokens/<key>/  token stores, one per (corpus, tokenizer, code)
<root>/manifolds/<key>/  geometries of tokens, one per (definition, token store, code)
<root>/runs/<key>/    checkpoints and results of one run
<root>/studies/<name>/report/
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hrs.errors import HRSError


@dataclass(frozen=True, slots=True)
class Storage:
    """Paths below one storage root."""

    root: Path

    @property
    def tokens(self) -> Path:
        return self.root / "tokens"

    @property
    def manifolds(self) -> Path:
        return self.root / "manifolds"

    @property
    def tracking_uri(self) -> str:
        """``MLFLOW_TRACKING_URI`` if set, else SQLite below the root."""
        if chosen := os.environ.get("MLFLOW_TRACKING_URI"):
            return chosen
        from sqlalchemy.engine import URL  # takes a while to import, and few commands need it

        # With the driver, because MLflow makes a folder of the undecoded path of "sqlite:///".
        return URL.create("sqlite+pysqlite", database=str(self.tracking_database)).render_as_string()

    @property
    def tracking_database(self) -> Path:
        """The file of the default tracking store."""
        return self.root / "mlflow" / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        return self.root / "mlflow" / "artifacts"

    def run(self, key: str) -> Path:
        return self.root / "runs" / key

    def report(self, study: str) -> Path:
        return self.root / "studies" / study / "report"

    def require_free(self, n_bytes: int) -> None:
        """Raises HRSError if fewer than ``n_bytes`` bytes are free below the root."""
        free = shutil.disk_usage(self.root).free
        if free < n_bytes:
            raise HRSError(
                f"storage {self.root} has {free / 2**30:.1f} GiB free and this needs {n_bytes / 2**30:.1f} GiB: "
                "free some space or set HRS_STORAGE to another folder"
            )


def open_storage(root: str | Path | None = None, *, writable: bool = True) -> Storage:
    """The storage at ``root``, else ``$HRS_STORAGE``, else ``~/.local/share/hrs``; created if missing.

    With ``writable=False``, for what only reads, nothing is created and a read-only disk will do.

    Raises:
        HRSError: if the folder cannot be created or written to.
    """
    chosen = root or os.environ.get("HRS_STORAGE") or Path.home() / ".local" / "share" / "hrs"
    try:
        path = Path(chosen).expanduser().resolve()
    except RuntimeError as error:  # ~NAME of nobody, or a circle of links
        raise HRSError(f"storage {chosen} cannot be found ({error}): set HRS_STORAGE to a writable folder") from error
    if not writable:
        return Storage(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HRSError(
            f"storage {path} cannot be created ({error.strerror}): set HRS_STORAGE to a writable folder"
        ) from error
    if not os.access(path, os.W_OK):
        raise HRSError(f"storage {path} is not writable: set HRS_STORAGE to a writable folder")
    return Storage(path)
