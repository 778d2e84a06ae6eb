"""One environment and fixed seeds for every test, one local Ray for those that need it, one small corpus."""

import json
import os
import random
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType

# Before any import of Ray, MLflow or torch: they read these once, and Ray's workers inherit them.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="600",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)
if not Path("/proc/driver/nvidia").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels on CPU tensors; read when a kernel is defined
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "HRS_STORAGE", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)

import httpx
import hypothesis
import numpy as np
import pytest
import torch
from properties import DEFAULT_EXAMPLES, FUZZ_TIMES

from hrs.config import DataConfig
from hrs.data import TokenStore, open_tokens

torch.set_num_threads(1)

# The default timeout that all functions of httpx share is 5 s, which a loaded machine needs now and then.
_default = httpx.Client.__init__.__kwdefaults__["timeout"]
_default.connect = _default.read = _default.write = _default.pool = None

SLOW_SECONDS = 900


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let slow tests take up to ``SLOW_SECONDS`` unless they or the command line say otherwise."""
    if config.getoption("timeout") is None:
        for item in items:
            if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


# ---- draws -----------------------------------------------------------------------------------------------------------


class TorchGenerator:
    """Torch's global generator with the methods of ``random.Random`` that Hypothesis calls."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_GENERATOR = TorchGenerator()  # Hypothesis holds a weak reference
hypothesis.register_random(TORCH_GENERATOR)

# No deadline and no check for slow data: both would measure the load of the machine.
ALWAYS = hypothesis.settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("test", ALWAYS, derandomize=True, max_examples=DEFAULT_EXAMPLES)
hypothesis.settings.register_profile("fuzz", ALWAYS, derandomize=False, max_examples=DEFAULT_EXAMPLES * FUZZ_TIMES)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


def seed_by(name: str) -> None:
    """Seed the global generators of Python, NumPy and torch with a checksum of ``name``."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    """Seed what a test module draws while it is imported."""
    if isinstance(collector, pytest.Module):
        seed_by(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed every test by its name: its draws do not depend on the tests before it."""
    seed_by(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Seed shared fixtures by their own name: their draws do not depend on the test that asks first."""
    if fixturedef.scope == "function":
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_by(f"{fixturedef.baseid}::{fixturedef.argname}[{request.param_index}]")
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# ---- shared fixtures -------------------------------------------------------------------------------------------------


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Give torch its number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[ModuleType]:
    """A private Ray with four logical CPUs and two logical GPUs."""
    from hrs.cluster.private import start_private_ray

    stop = start_private_ray(num_cpus=4, num_gpus=2, object_store_memory=150 * 2**20)
    import ray

    yield ray
    stop()


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
