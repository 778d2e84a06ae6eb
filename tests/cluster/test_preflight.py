"""Every circumstance that spoils a job is one sentence with a way out, before any work starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hrs.cluster import preflight as module
from hrs.cluster.preflight import ROOT, connect, explain, preflight, require_equal_nodes
from hrs.errors import HRSError
from hrs.identity import code_version
from hrs.storage import Storage


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a submitted job that was started from the repository's root."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.chdir(ROOT)


def test_job_in_the_repository_passes(in_job: None, tmp_path: Path) -> None:
    preflight(Storage(tmp_path))


def test_job_submitted_from_the_wrong_folder_is_told_how_to_submit(
    in_job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HRSError, match=r"does not hold the repository: submit from .* --working-dir \."):
        preflight(Storage(tmp_path))


def test_installed_code_in_place_of_the_uploaded_is_refused(
    in_job: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hrs").mkdir()
    shutil.copy(ROOT / "hrs" / "storage.py", tmp_path / "hrs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HRSError, match=f"imported from {ROOT} and not from the job's working directory {tmp_path}"):
        preflight(Storage(tmp_path))


def test_working_directory_does_not_matter_outside_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    preflight(Storage(tmp_path))


def test_token_mode_without_a_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(HRSError, match=f"there is no token at {tmp_path / 'token'}"):
        preflight(Storage(tmp_path))
    (tmp_path / "token").write_text("secret")
    preflight(Storage(tmp_path))


def test_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="free some space or set HRS_STORAGE"):
        preflight(Storage(tmp_path), free_bytes=2**70)


def test_dashboard_in_ray_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(HRSError, match="put that into RAY_API_SERVER_ADDRESS"):
        connect()


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.50"), "another Python or Ray"),
        (
            RuntimeError("Token authentication is enabled but no authentication token was found"),
            "most likely its token",
        ),
        (ConnectionError("Could not find any running Ray instance"), "cannot be reached"),
    ],
)
def test_what_ray_raises_becomes_one_line(raised: Exception, sentence: str) -> None:
    message = str(explain(raised))
    assert sentence in message
    assert "\n" not in message


def test_all_nodes_of_a_cluster_see_the_storage_and_run_this_code(ray_local: ModuleType, tmp_path: Path) -> None:
    require_equal_nodes(Storage(tmp_path))
    assert not list(tmp_path.iterdir()), "the marker file stayed behind"


def test_node_with_other_code_is_named(ray_local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "code_version", lambda: "of the job")  # workers import the real one
    with pytest.raises(HRSError, match=r"node \d.* runs other code \(\w{12}\) than this job \(of the job\)"):
        require_equal_nodes(Storage(tmp_path))


def test_node_that_does_not_see_the_storage_is_named(
    ray_local: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_look", lambda marker: (False, code_version()))
    with pytest.raises(HRSError, match=r"node \d.* does not see the storage"):
        require_equal_nodes(Storage(tmp_path))


CONNECT = """
import os, sys
sys.path.insert(0, {root!r})
from hrs.cluster.preflight import connect
resources = connect()
import ray
@ray.remote
def where():
    import hrs
    return hrs.__file__
print(resources["CPU"] > 0, ray.get(where.remote()), os.environ["RAY_AUTH_MODE"])
print(ray._private.worker._global_node.get_temp_dir_path())
"""


@pytest.mark.slow
def test_private_cluster_runs_this_code_and_leaves_nothing(tmp_path: Path) -> None:
    """From a foreign folder, without any settings: a token of its own, nothing in the home folder, no folder left."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT.format(root=str(ROOT))],
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen, folder = done.stdout.strip().splitlines()
    assert seen == f"True {ROOT / 'hrs' / '__init__.py'} token"
    assert not Path(folder).exists()
    assert not (tmp_path / ".ray").exists()


def test_head_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # another test may have connected this process
    with pytest.raises(HRSError, match=r"the Ray cluster 127\.0\.0\.1:1 cannot be reached \(.*refused"):
        connect()


def test_job_on_a_python_without_the_packages_says_which_python() -> None:
    """The first lines of a job file, run with no packages in reach."""
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(ROOT / "jobs" / "ablation_sweep.py")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the job runs with {sys.executable}")
    assert len(done.stderr.splitlines()) == 1
