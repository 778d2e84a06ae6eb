"""Real MLflow on SQLite; the store is made once and copied for each test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hrs.config import ExperimentConfig
from hrs.storage import Storage, open_storage
from hrs.tracking import RunLogger, Tracker


@pytest.fixture(scope="session")
def template_storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = open_storage(tmp_path_factory.mktemp("template"))
    Tracker(storage).connect()
    return storage


@pytest.fixture
def storage(template_storage: Storage, tmp_path: Path) -> Storage:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(template_storage.root / "mlflow" / "mlflow.db", tmp_path / "mlflow" / "mlflow.db")
    return open_storage(tmp_path)


@pytest.fixture
def tracker(storage: Storage) -> Tracker:
    return Tracker(storage)


@pytest.fixture
def open_run(tracker: Tracker) -> Callable[..., RunLogger]:
    """Opens the run of a key in the study ``demo``."""

    def open_one(key: str = "k0", config: ExperimentConfig | None = None, **options: bool) -> RunLogger:
        config = config or ExperimentConfig()
        return tracker.open_run(key, tracker.open_study("demo", {key: config}), config, "data", **options)

    return open_one
