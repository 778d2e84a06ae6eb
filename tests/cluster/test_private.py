"""A Ray of our own is closed: every server of it listens on the loopback interface and demands the token."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from hrs.cluster.head import LocalHead
from tests.strangers import listeners, require_closed

CONNECTED = """
import os, sys, urllib.request
os.environ["RAY_AUTH_MODE"] = "disabled"  # as somebody's shell may have it
import ray  # before the environment of the private Ray is set
from hrs.cluster.preflight import connect
connect()
print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)
if sys.stdin.read():
    os.kill(os.getpid(), 9)
"""


def only_mine(folder: Path) -> bool:
    """True if nobody but this user can reach an existing folder."""
    return folder.is_dir() and any(stat.S_IMODE(above.stat().st_mode) == 0o700 for above in (folder, *folder.parents))


@pytest.mark.slow
def test_private_ray_is_closed_even_if_the_environment_says_otherwise(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONNECTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        folder = Path(process.stdout.readline().strip())
        assert only_mine(folder)
        refused = require_closed(psutil.Process(process.pid), tmp_path / "mark")
        assert refused >= {"gcs_server", "raylet", "object manager", "worker", "agent", "http"}
        process.stdin.close()
    assert process.returncode == 0
    assert not folder.exists()


@pytest.mark.slow
def test_private_ray_leaves_nothing_behind_if_its_owner_is_killed() -> None:
    command = [sys.executable, "-c", CONNECTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        folder = Path(process.stdout.readline().strip())
        family = psutil.Process(process.pid).children(recursive=True)
        assert {"gcs_server", "raylet", "ray::DashboardAgent"} <= {member.name() for member in family}
        process.stdin.write("die")
        process.stdin.close()
    assert process.returncode == -signal.SIGKILL
    assert not psutil.wait_procs(family, timeout=30)[1], "Ray's agents alone try for a minute to reach the GCS"
    assert not folder.exists()


@pytest.mark.slow
def test_head_is_closed(tmp_path: Path) -> None:
    with LocalHead(num_cpus=1, num_gpus=0) as head:
        assert only_mine(head._folder / "ray")
        supervisor = psutil.Process(head._supervisor.pid)
        while not any("ray.util.client.server" in process.cmdline() for process, *_ in listeners(supervisor)):
            time.sleep(0.2)  # it comes last, and nothing else waits for it
        refused = require_closed(supervisor, tmp_path / "mark")
        assert refused >= {"gcs_server", "raylet", "object manager", "agent", "client server", "http"}
        assert head.submit("true") == 0


def test_the_tests_own_ray_is_private(ray_local: ModuleType) -> None:
    assert {node["NodeManagerAddress"] for node in ray_local.nodes()} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_there_is_one_place_that_starts_a_ray() -> None:
    root = Path(__file__).parents[2]
    starts = {
        path.relative_to(root).as_posix()
        for folder in ("hrs", "jobs", "tune", "serve", "benchmarks", "tests")
        for path in (root / folder).rglob("*.py")
        if re.search(r"""address["']?[=:]\s*["']local["']""", path.read_text(encoding="utf-8"))
    }
    assert starts == {"hrs/cluster/private.py"}
