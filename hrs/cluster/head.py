"""A Ray head of one's own on this machine: started as a child, used for real job submission, gone without a trace.

Every port and folder is its own, so it lives beside other clusters and never touches them: ``ray stop`` kills every
Ray process of the machine by name, so nothing here calls it. Nobody else can use it: see :mod:`hrs.cluster.private`.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from hrs.cluster.private import private_environment, private_folder, ray_folder
from hrs.errors import HRSError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

START_SECONDS = 180.0
"""Longest wait for a head to answer: 10 s on a quiet machine, a minute on a busy one."""
AGENT_SECONDS = 60.0
"""Longest time that "No available agent" may be a head that is still waking up."""
STOP_SECONDS = 60
"""Longest time a job may take, once told to stop, to write its checkpoints and its report."""

_CHATTY = (
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
"""Ray's loggers that report every ignored file, every upload and every closed socket."""


class LocalHead:
    """Context manager around one Ray head; GPUs are found by Ray itself unless ``num_gpus`` is given.

    Ends with the block, with its process (even by SIGKILL: see :mod:`hrs.cluster.supervisor`), or by :meth:`kill`.

    Raises:
        HRSError: if the head does not come up.
    """

    def __init__(self, *, num_cpus: int | None = None, num_gpus: int | None = None) -> None:
        self._resources = {"--num-cpus": num_cpus, "--num-gpus": num_gpus}
        self._token = secrets.token_hex(32)
        self._private = private_environment() | {"RAY_AUTH_TOKEN": self._token}
        self._supervisor: subprocess.Popen[bytes] | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._port, dashboard, agent, client = _free_ports(4)
        self.dashboard_address = f"http://127.0.0.1:{dashboard}"
        self._agent_address = f"http://127.0.0.1:{agent}"
        self._folder = private_folder()
        options = {
            "--port": self._port,
            "--dashboard-port": dashboard,
            "--dashboard-agent-listen-port": agent,
            "--ray-client-server-port": client,
            "--min-worker-port": 0,  # any free port: the default range is shared with every other cluster here
            "--max-worker-port": 0,
            "--temp-dir": ray_folder(self._folder),
            **self._resources,
        }
        flags = [f"{name}={value}" for name, value in options.items() if value is not None]
        ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags]
        supervisor = Path(__file__).with_name("supervisor.py")
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", str(supervisor), str(self._folder), *ray_start],
            stdin=subprocess.PIPE,
            env=self._head_environment(),
            start_new_session=True,  # Ctrl-C in a terminal must reach the owner only
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the head gently and wait until all its processes and its folder are gone. May be called twice."""
        if self._supervisor and self._supervisor.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._supervisor.stdin.close()
            self._supervisor.wait()

    def kill(self) -> None:
        """SIGKILL everything of this head at once, as a power cut would; other clusters are not touched."""
        if self._supervisor and self._supervisor.poll() is None:
            self._supervisor.send_signal(signal.SIGUSR1)
            self._supervisor.wait()

    @property
    def environment(self) -> dict[str, str]:
        """What another process (``ray status``, ``ray job submit``, ``ray.init()``) exports to reach this head."""
        return self._private | {
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_API_SERVER_ADDRESS": self.dashboard_address,
        }

    def _head_environment(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            # A venv without .pyc files would be compiled anew by every worker if writing them is off.
            if not name.startswith(("RAY_ADDRESS", "RAY_API_SERVER", "RAY_AUTH", "RAY_JOB", "PYTHONDONTWRITE"))
        }
        more = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
            # `python` in an entrypoint must be this Python, not the first one of the login shell.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        }
        return inherited | self._private | more

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        waiting_for = [f"{self.dashboard_address}/api/version", f"{self._agent_address}/api/local_raylet_healthz"]
        while waiting_for:
            if _answers(waiting_for[0], self._token):
                waiting_for.pop(0)
                continue
            if self._supervisor and self._supervisor.poll() is not None:
                raise HRSError("the Ray head stopped while starting: is something calling `ray stop` on this machine?")
            if time.monotonic() > deadline:
                tail = (
                    (self._folder / "output.log")
                    .read_text(encoding="utf-8", errors="replace")
                    .strip()
                    .splitlines()[-1:]
                )
                raise HRSError(f"the Ray head did not answer within {START_SECONDS:.0f} s; its last words: {tail}")
            time.sleep(0.2)

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        entrypoint: str,
        working_dir: Path | None = None,
        env_vars: Mapping[str, str] | None = None,
        output: TextIO | None = None,
    ) -> int:
        """Run ``entrypoint`` as a Ray job; see :func:`run_job`."""
        from ray.job_submission import JobSubmissionClient

        for chatty in _CHATTY:
            logging.getLogger(chatty).setLevel(logging.ERROR)
        client = JobSubmissionClient(self.dashboard_address, headers={"Authorization": f"Bearer {self._token}"})
        return run_job(client, entrypoint, working_dir, env_vars, output)


def run_job(
    client: "JobSubmissionClient",
    entrypoint: str,
    working_dir: Path | None = None,
    env_vars: Mapping[str, str] | None = None,
    output: TextIO | None = None,
) -> int:
    """Submit a shell command, follow its log to ``output`` (default standard output) and return its exit status.

    ``working_dir`` is uploaded and becomes the job's working directory; without it that is the head's. The job gets
    ``env_vars`` and not this process's environment. An exception here (Ctrl-C above all) stops the job first.

    Raises:
        HRSError: if the job cannot be submitted, or the head goes away while it runs.
    """
    runtime_env: dict[str, object] = {"env_vars": dict(env_vars or {})}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    job = _submit_when_awake(client, entrypoint, runtime_env)
    log = _JobLog(client, job, output or sys.stdout)
    try:
        asyncio.run(log.follow())
        # The log ends a moment before the status is written.
        while not client.get_job_status(job).is_terminal():
            time.sleep(0.1)
        info = client.get_job_info(job)
    except (RuntimeError, OSError) as error:
        raise HRSError(f"the Ray head went away while job {job} ran ({_first_line(error)})") from error
    except BaseException:
        log.say("stopping the job; another Ctrl-C ends it at once")
        with contextlib.suppress(RuntimeError, OSError):
            client.stop_job(job)  # SIGTERM, and time to write down where it is
            asyncio.run(asyncio.wait_for(log.follow(), STOP_SECONDS + 15))
        raise
    if info.driver_exit_code is None and info.status != "SUCCEEDED":
        raise HRSError(f"job {job} never ran: {_first_line(info.message)}")
    return info.driver_exit_code or 0


def _submit_when_awake(client: "JobSubmissionClient", entrypoint: str, runtime_env: dict[str, object]) -> str:
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
        except RuntimeError as error:
            asleep = "No available agent" in str(error) or "head node agent" in str(error)
            if not asleep or time.monotonic() > deadline:
                raise HRSError(f"the job could not be submitted: {_first_line(error)}") from error
            time.sleep(1)


class _JobLog:
    """Copies a job's log as it grows; followed once more, it goes on where it was interrupted."""

    def __init__(self, client: "JobSubmissionClient", job: str, output: TextIO) -> None:
        self._client, self._job, self._output = client, job, output
        self._n_shown = 0

    async def follow(self) -> None:
        position = 0
        async for lines in self._client.tail_job_logs(self._job):  # always from the beginning
            fresh = lines[max(0, self._n_shown - position) :]
            position += len(lines)
            self._n_shown = max(self._n_shown, position)
            self._output.write(fresh)
            self._output.flush()

    def say(self, line: str) -> None:
        self._output.write(line + "\n")
        self._output.flush()


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_ports(n: int) -> list[int]:
    """``n`` ports free on all interfaces, between Ray's range for workers (to 19999) and the system's own (32768-)."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_768), 2000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == n:
            return ports
    raise HRSError("no free network port between 20000 and 32767: something on this machine holds them all")
