"""One environment for every test, one local Ray for those that need it, one small corpus."""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Before any import of Ray, MLflow or torch: they read these once, and Ray's workers inherit them.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "HRS_STORAGE", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)

import pytest
import torch

from hrs.config import DataConfig
from hrs.data import TokenStore, open_tokens

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[ModuleType]:
    """A private Ray with four logical CPUs and two logical GPUs; give every ``ray.get`` a timeout."""
    import ray

    folder = tempfile.mkdtemp(prefix="hrs-", dir="/tmp")  # unix sockets allow a path of 107 bytes
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=folder,
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 120 short documents in three topics, each with words of its own."""
    draw = random.Random(0)
    topics = {
        "sea": "wave tide ship harbour storm sail anchor deck",
        "sky": "cloud star moon wind plane comet orbit dawn",
        "farm": "wheat barn plough sheep orchard field hen mill",
    }
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(120):
            topic = list(topics)[i % 3]
            split = "validation" if i % 10 == 8 else "test" if i % 10 == 9 else "train"
            words = [draw.choice(topics[topic].split()) for _ in range(40)]
            row = {"title": f"{topic} {i}", "text": f"The {' and the '.join(words)}.", "topic": topic, "split": split}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def small_store(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The small corpus as a token store with a byte-level BPE of 300 ids."""
    data = DataConfig(corpus=f"jsonl:{small_corpus}", tokenizer="bpe:300")
    return open_tokens(data, tmp_path_factory.mktemp("tokens"))
