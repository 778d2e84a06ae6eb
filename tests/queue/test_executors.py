"""Every executor makes attempts in the same way; what dies, stops or does not fit ends as it should."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select
from waiting import wait_until

from hrs.queue import Outcome, Queue, Resources, RunSpec, StageSpec, State, StudySpec, Wanted, open_queue
from hrs.queue.admission import Gpu
from hrs.queue.attempts import LOG_FILE, read_result, stage_directory
from hrs.queue.commands import command_study
from hrs.queue.dispatcher import Dispatcher
from hrs.queue.executors import Executor, InlineExecutor, ProcessExecutor
from hrs.queue.schema import attempts, stages

GPUS = (Gpu(name="cuda:1", bytes=2**30),)


@pytest.fixture(autouse=True)
def _functions_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    queue = open_queue(tmp_path)
    yield queue
    queue.database.close()


Make = Callable[[Queue, Path], Executor]


def inline(queue: Queue, root: Path) -> Executor:
    return InlineExecutor(queue, root, gpus=GPUS)


def processes(queue: Queue, root: Path) -> Executor:
    return ProcessExecutor(queue, root, cpus=3, gpus=GPUS, lease_seconds=3)


EXECUTORS = pytest.mark.parametrize("make", [inline, processes])


def of(name: str, key: str = "", *inputs: str, resources: Resources | None = None, **payload: object) -> StageSpec:
    return StageSpec(
        key=key or name, kind="test", label=name, function=f"stage_functions:{name}", inputs=inputs, payload=payload,
        resources=resources or Resources(),
    )  # fmt: skip


def submit(queue: Queue, *specs: StageSpec) -> None:
    run = RunSpec(key="run", label="run", definition={}, stages=tuple(spec.key for spec in specs))
    queue.submit(StudySpec(title="s", definition={}, runs=(run,), stages=specs))


def found(queue: Queue) -> dict[str, tuple[str, str]]:
    with queue.database.read() as connection:
        return {row.key: (row.state, row.message) for row in connection.execute(select(stages))}


def settled(queue: Queue) -> bool:
    moving = {State.QUEUED, State.RUNNING}
    return not {state for state, _ in found(queue).values()} & moving


def work(queue: Queue, root: Path, make: Make) -> None:
    Dispatcher(queue, make(queue, root), root, lease_seconds=3).run(lambda: settled(queue), poll_seconds=0.02)


@EXECUTORS
def test_results_flow_from_stage_to_stage(queue: Queue, tmp_path: Path, make: Make) -> None:
    submit(queue, of("add", "x", a=1, b=2), of("add", "y", a=3, b=4), of("total", "t", "x", "y", keys=["x", "y"]))
    work(queue, tmp_path, make)
    assert {state for state, _ in found(queue).values()} == {State.FINISHED}
    assert read_result(tmp_path, "t") == 10


@EXECUTORS
def test_failures_by_kind(queue: Queue, tmp_path: Path, make: Make) -> None:
    large = Resources(gpu_bytes=2**40)
    missing = StageSpec(key="missing", kind="test", label="missing", function="nowhere:nothing")
    submit(queue, of("refuse"), of("bug"), of("too_large"), of("add", "large", resources=large, a=1, b=2), missing)
    work(queue, tmp_path, make)
    ended = found(queue)
    assert ended["refuse"] == (State.FAILED, "the config is wrong: mend it")
    state, message = ended["bug"]
    assert state == State.FAILED and re.fullmatch(r"KeyError: 'bug' \(stage_functions\.py:\d+\)", message)
    assert ended["too_large"] == (State.FINISHED, "") and read_result(tmp_path, "too_large") == 2
    needs = "it needs a GPU with 1024.0 GiB and the largest here has 1.0 GiB for it"
    assert ended["large"] == (State.INFEASIBLE, needs)
    assert ended["missing"][0] == State.FAILED and "cannot be imported" in ended["missing"][1]
    with queue.database.read() as connection:
        tries = [row.stage_key for row in connection.execute(select(attempts))]
    assert sorted(tries) == ["bug", "missing", "refuse", "too_large", "too_large", "too_large"]


def test_who_reserves_no_gpu_sees_none(queue: Queue, tmp_path: Path) -> None:
    one = Resources(gpu_bytes=2**29)
    submit(queue, of("count", "cpu", steps=1), of("count", "gpu", resources=one, steps=1))
    work(queue, tmp_path, processes)
    assert read_result(tmp_path, "cpu")["device"] == ""
    assert read_result(tmp_path, "gpu")["device"] == "1"


def test_a_process_that_dies_is_tried_again(queue: Queue, tmp_path: Path) -> None:
    submit(queue, of("die_once"))
    work(queue, tmp_path, processes)
    with queue.database.read() as connection:
        first, second = connection.execute(select(attempts).order_by(attempts.c.id)).all()
    assert (first.outcome, second.outcome) == (Outcome.LOST, Outcome.FINISHED)
    assert "ended by SIGKILL" in first.message
    assert read_result(tmp_path, "die_once") == "alive"


def test_pause_stops_and_resume_goes_on(queue: Queue, tmp_path: Path) -> None:
    submit(queue, of("count", steps=10**6))
    executor = processes(queue, tmp_path)
    dispatcher = Dispatcher(queue, executor, tmp_path)
    step = stage_directory(tmp_path, "count") / "step"
    wait_until(lambda: dispatcher.step() >= 0 and step.exists() and step.read_text() > "")
    queue.want(Wanted.PAUSE, queue.target("s"))
    wait_until(lambda: dispatcher.step() >= 0 and found(queue)["count"][0] == State.PAUSED)
    reached = int(step.read_text())
    queue.want(Wanted.RUN, queue.target("s"))
    wait_until(lambda: dispatcher.step() >= 0 and int(step.read_text() or 0) > reached)
    queue.want(Wanted.CANCEL, queue.target("s"))
    wait_until(lambda: dispatcher.step() >= 0 and found(queue)["count"][0] == State.CANCELLED)
    executor.close()


def test_closing_keeps_what_was_computed(queue: Queue, tmp_path: Path) -> None:
    submit(queue, of("count", steps=10**6))
    executor = processes(queue, tmp_path)
    dispatcher = Dispatcher(queue, executor, tmp_path)
    step = stage_directory(tmp_path, "count") / "step"
    wait_until(lambda: dispatcher.step() >= 0 and step.exists())
    executor.close()
    assert found(queue)["count"][0] == State.QUEUED
    with queue.database.read() as connection:
        assert connection.execute(select(attempts)).one().outcome == Outcome.PREEMPTED


def test_work_outlives_its_dispatcher_and_the_next_one_counts_it(queue: Queue, tmp_path: Path) -> None:
    whole = Resources(gpu_bytes=2**30)
    submit(queue, of("count", steps=10**6, resources=whole), of("add", a=1, b=2, resources=whole))
    first = Dispatcher(queue, processes(queue, tmp_path), tmp_path)
    wait_until(lambda: first.step() >= 0 and found(queue)["count"][0] == State.RUNNING)
    executor = processes(queue, tmp_path)
    second = Dispatcher(queue, executor, tmp_path)
    for _ in range(5):
        assert second.step() == 0, "the GPU is taken"
    queue.want(Wanted.CANCEL, queue.target("count"))  # heard by the attempt itself
    wait_until(lambda: found(queue)["count"][0] == State.CANCELLED)
    wait_until(lambda: second.step() >= 0 and found(queue)["add"][0] == State.FINISHED)
    executor.close()


# ---- any program -----------------------------------------------------------------------------------------------------


def add_command(queue: Queue, code: str, *, gpu_bytes: int = 0) -> str:
    study = command_study(
        [sys.executable, "-u", "-c", code], name="mine", cwd=Path.cwd(), environment={"MINE": "yes"},
        resources=Resources(gpu_bytes=gpu_bytes),
    )  # fmt: skip
    queue.submit(study, extend=True)
    return study.stages[0].key


def test_a_program_gives_numbers_and_a_log(queue: Queue, tmp_path: Path) -> None:
    key = add_command(
        queue,
        "import os; print('hello', os.environ['MINE']); print('{\"step\": 1, \"loss\": 2.5}'); print('{\"loss\": 2.0}')"
        '; print(\'{"bad": NaN, "word": "x"}\'); print(\'{broken\')',
    )
    work(queue, tmp_path, processes)
    assert found(queue)[key] == (State.FINISHED, "")
    result = read_result(tmp_path, key)
    assert result["metrics"] == {"step": 1, "loss": 2.0}
    assert result["peak_resident_bytes"] > 0
    assert "hello yes" in (stage_directory(tmp_path, key) / LOG_FILE).read_text()


@pytest.mark.parametrize(
    ("code", "gpu_bytes", "state", "message"),
    [
        ("raise SystemExit(3)", 0, State.FAILED, "the command ended with status 3: it printed nothing"),
        ("raise ValueError('no such file')", 0, State.FAILED, "ValueError: no such file"),
        ("raise RuntimeError('CUDA error: out of memory')", 2**29, State.INFEASIBLE, "it needs a GPU with 1."),
        ("raise MemoryError('out of memory')", 0, State.INFEASIBLE, "status 1: MemoryError: out of memory"),
    ],
)
def test_programs_fail_by_kind(
    queue: Queue, tmp_path: Path, code: str, gpu_bytes: int, state: State, message: str
) -> None:
    key = add_command(queue, code, gpu_bytes=gpu_bytes)
    work(queue, tmp_path, processes)
    assert found(queue)[key][0] == state
    assert message in found(queue)[key][1]


def test_a_program_that_is_missing_is_one_sentence(queue: Queue, tmp_path: Path) -> None:
    study = command_study(["/nowhere/x"], name="x", cwd=tmp_path, environment={}, resources=Resources())
    queue.submit(study)
    work(queue, tmp_path, processes)
    ((state, message),) = found(queue).values()
    assert state == State.FAILED and message.startswith("command /nowhere/x cannot be started")


def test_a_program_saves_on_sigterm_and_goes_on(queue: Queue, tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "if mark.exists(): print('{\"resumed\": 1}'); sys.exit(0)\n"
        "def save(*_): mark.touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(600)\n"
    )
    key = add_command(queue, code)
    executor = processes(queue, tmp_path)
    dispatcher = Dispatcher(queue, executor, tmp_path)
    wait_until(lambda: dispatcher.step() >= 0 and (tmp_path / "ready").exists())
    queue.want(Wanted.PAUSE, queue.target(key))
    wait_until(lambda: dispatcher.step() >= 0 and found(queue)[key][0] == State.PAUSED)
    queue.want(Wanted.RUN, queue.target(key))
    wait_until(lambda: dispatcher.step() >= 0 and found(queue)[key][0] == State.FINISHED)
    assert read_result(tmp_path, key)["metrics"] == {"resumed": 1}
    executor.close()


def test_a_program_that_does_not_stop_is_killed_with_all_it_started(queue: Queue, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid) + ' ')\n"
        "time.sleep(600)\n"
    )
    key = add_command(queue, code)
    executor = ProcessExecutor(queue, tmp_path, cpus=3, lease_seconds=3, grace_seconds=0.5)
    dispatcher = Dispatcher(queue, executor, tmp_path)
    path = tmp_path / "pid"
    wait_until(lambda: dispatcher.step() >= 0 and path.exists() and path.read_text().endswith(" "))
    queue.want(Wanted.CANCEL, queue.target(key))
    wait_until(lambda: dispatcher.step() >= 0 and found(queue)[key][0] == State.CANCELLED)
    executor.close()

    def gone() -> bool:
        try:
            os.kill(int(path.read_text()), 0)
        except ProcessLookupError:
            return True
        return "\nState:\tZ" in Path(f"/proc/{path.read_text().strip()}/status").read_text()

    wait_until(gone)
