"""A head of one's own: jobs really run, two heads do not meet, and nothing is left whatever ends them."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from hrs.cluster.head import LocalHead
from hrs.errors import HRSError

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "hrs" / "cluster" / "supervisor.py"
OWNER = """
import time
from hrs.cluster.head import LocalHead
with LocalHead(num_cpus=1, num_gpus=0) as head:
    print(head._folder, flush=True)
    time.sleep(600)
"""


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process of this machine that names a head's folder on its command line or in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(folder) in word for word in words):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    this = psutil.Process()
    others = this.children(recursive=True)  # another module's Ray may run beside it
    with contextlib.chdir(ROOT), LocalHead(num_cpus=2, num_gpus=0) as running:
        yield running
        children = [child for child in this.children(recursive=True) if child not in others]
    assert not psutil.wait_procs(children, timeout=0)[1], "processes of the head outlived it"
    assert not running._folder.exists()


@pytest.mark.slow
def test_job_runs_in_an_uploaded_copy_with_this_python_and_reports_its_status(head: LocalHead, tmp_path: Path) -> None:
    (tmp_path / "hrs").mkdir()
    (tmp_path / "hrs" / "__init__.py").write_text("MARK = 'uploaded'\n")
    (tmp_path / "job.py").write_text(
        "import hrs, os, ray, sys\n"
        "ray.init()\n"
        "@ray.remote\n"
        "def look():\n"
        "    import hrs\n"
        "    return hrs.MARK\n"
        "print('driver', hrs.MARK, 'worker', ray.get(look.remote()))\n"
        "print('python', sys.executable, 'wish', os.environ['WISH'])\n"
        "print('bytecode', os.environ.get('PYTHONDONTWRITEBYTECODE'))\n"
        "sys.exit(7)\n"
    )
    output = io.StringIO()
    status = head.submit("python job.py", working_dir=tmp_path, env_vars={"WISH": "granted"}, output=output)
    assert status == 7
    assert "driver uploaded worker uploaded" in output.getvalue()
    assert f"python {sys.executable} wish granted" in output.getvalue()
    assert "bytecode None" in output.getvalue()


@pytest.mark.slow
def test_job_file_named_alone_runs_on_a_head_started_from_the_repository(
    head: LocalHead, small_corpus: Path, tmp_path: Path
) -> None:
    """A bare ``ray job submit jobs/ablation_sweep.py``: by its shebang line, in place, in this Python."""
    options = ["--presets", "dense_baseline", "--scale", "micro", "--corpus", f"jsonl:{small_corpus}", "--dry-run"]
    variables = json.dumps({"env_vars": {"HRS_STORAGE": str(tmp_path)}})
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--runtime-env-json", variables]
    done = subprocess.run(
        [*submit, "--", "jobs/ablation_sweep.py", *options],
        env=os.environ | head.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dense_baseline/0" in done.stdout


@pytest.mark.slow
def test_exception_while_following_stops_the_job_with_sigterm(head: LocalHead, tmp_path: Path) -> None:
    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            if "working" in text:
                raise KeyboardInterrupt
            return super().write(text)

    script = (
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'told')!r}).write_text('SIGTERM')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('working', flush=True)\n"
        "time.sleep(300)\n"
    )
    (tmp_path / "job.py").write_text(script)
    with pytest.raises(KeyboardInterrupt):
        head.submit(f"python {tmp_path / 'job.py'}", output=Interrupting())
    assert (tmp_path / "told").read_text() == "SIGTERM"


@pytest.mark.slow
def test_stranger_without_the_token_is_refused(head: LocalHead) -> None:
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.dashboard_address]
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    refused = subprocess.run([*submit, "--", "true"], env=without | {"RAY_AUTH_MODE": "disabled"}, capture_output=True)
    assert refused.returncode != 0
    allowed = subprocess.run([*submit, "--", "true"], env=without | head.environment, capture_output=True)
    assert allowed.returncode == 0, allowed.stderr.decode()
    join = "from hrs.cluster.preflight import connect\nconnect()"
    wrong = without | head.environment | {"RAY_AUTH_TOKEN": "wrong"}
    failed = subprocess.run([sys.executable, "-c", join], env=wrong, capture_output=True, text=True)
    assert "HRSError: the Ray cluster" in failed.stderr and "most likely its token" in failed.stderr


@pytest.mark.slow
def test_second_head_is_killed_without_harm_to_the_first(head: LocalHead) -> None:
    with LocalHead(num_cpus=1, num_gpus=0) as second:
        assert second.dashboard_address != head.dashboard_address
        folder = second._folder
        job = subprocess.Popen(
            [sys.executable, "-c", "import sys; from ray.job_submission import JobSubmissionClient as C; "
             "C(sys.argv[1]).submit_job(entrypoint='sleep 100')", second.dashboard_address],
            env=os.environ | second.environment,
        )  # fmt: skip
        assert job.wait() == 0
        wait_until(lambda: any("sleep" in p.name() for p in psutil.Process().children(recursive=True)))
        before = psutil.Process(second._supervisor.pid).children(recursive=True)
        second.kill()
        assert not psutil.wait_procs(before, timeout=0)[1]
        assert not processes_of(folder)
        assert not folder.exists()
    assert head.submit("true", output=io.StringIO()) == 0


@pytest.mark.slow
def test_head_does_not_outlive_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    folder = Path(owner.stdout.readline().strip())
    processes = psutil.Process(owner.pid).children(recursive=True)
    assert len(processes) > 5
    owner.kill()
    owner.wait()
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))
    wait_until(lambda: not folder.exists())
    assert not processes_of(folder)


@pytest.mark.slow
def test_head_that_dies_under_a_job_is_one_sentence() -> None:
    class KillsTheHead(io.StringIO):
        def write(self, text: str) -> int:
            if "working" in text:
                doomed.kill()
            return super().write(text)

    with LocalHead(num_cpus=1, num_gpus=0) as doomed, pytest.raises(HRSError, match="head went away"):
        doomed.submit("echo working; sleep 300", output=KillsTheHead())


def test_supervisor_buries_orphans_while_it_runs(tmp_path: Path) -> None:
    """An unburied orphan looks alive to Ray, which then waits a minute for a job that has stopped."""
    folder, note = tmp_path / "folder", tmp_path / "pid"
    folder.mkdir()
    orphan = f"(sleep 0.2 & echo $! > {note}); sleep 300"
    running = subprocess.Popen(
        [sys.executable, "-P", str(SUPERVISOR), str(folder), "sh", "-c", orphan], stdin=subprocess.PIPE
    )
    wait_until(lambda: note.exists() and note.read_text().strip() != "")
    wait_until(lambda: not psutil.pid_exists(int(note.read_text())))
    assert running.poll() is None
    running.stdin.close()
    assert running.wait() == 0


def test_supervisor_leaves_no_daemon_behind(tmp_path: Path) -> None:
    """A grandchild in a session of its own, whose parent is gone, is still found and killed."""
    folder, note = tmp_path / "folder", tmp_path / "pid"
    folder.mkdir()
    daemon = f"(setsid sleep 300 & echo $! > {note}); trap '' TERM; sleep 300"
    running = subprocess.Popen(
        [sys.executable, "-P", str(SUPERVISOR), str(folder), "sh", "-c", daemon], stdin=subprocess.PIPE
    )
    wait_until(lambda: note.exists() and note.read_text().strip() != "")
    pid = int(note.read_text())
    assert psutil.pid_exists(pid)
    running.send_signal(signal.SIGUSR1)
    assert running.wait() == 0
    assert not psutil.pid_exists(pid)
    assert not folder.exists()
