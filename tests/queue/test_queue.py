"""Every database keeps the queue's promises: states, claims, tokens, what is wanted, and what is shared."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
from queue_studies import Clock, stage, study
from sqlalchemy import URL, select

from hrs.errors import HRSError
from hrs.queue.database import Database
from hrs.queue.queue import FIRST_BACK_OFF_SECONDS, MOST_LOST, LeaseLost, Queue
from hrs.queue.records import Resources, StudySpec
from hrs.queue.schema import attempts, events, meta, stages
from hrs.queue.states import Outcome, State, Wanted
from hrs.queue.transitions import AGEING_SECONDS, TransitionRefused


def states(queue: Queue) -> dict[str, str]:
    with queue.database.read() as connection:
        return {row.key: row.state for row in connection.execute(select(stages))}


def keys(queue: Queue) -> list[str]:
    return [spec.key for spec in queue.candidates()]


def work(queue: Queue, worker: str, *names: str) -> None:
    """Claim and finish stages."""
    for name in names:
        queue.finish(queue.claim(name, worker))


@pytest.fixture
def worker(queue: Queue) -> str:
    return queue.add_worker("host", 1)


def test_stages_are_queued_when_their_inputs_are_finished(queue: Queue, worker: str) -> None:
    submitted = queue.submit(study("s", "a", "b"))
    assert (submitted.new, submitted.shared, submitted.finished) == (6, 0, 0)
    assert keys(queue) == ["tokens"]
    work(queue, worker, "tokens")
    assert sorted(keys(queue)) == ["train-a", "train-b"]
    work(queue, worker, "train-a", "train-b", "evaluate-a")
    assert keys(queue) == ["evaluate-b"]
    assert states(queue)["report-s"] == State.WAITING
    work(queue, worker, "evaluate-b", "report-s")
    assert set(states(queue).values()) == {State.FINISHED}


def test_two_studies_share_stages(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    work(queue, worker, "tokens")
    submitted = queue.submit(study("t", "a", "b"))
    assert (submitted.new, submitted.shared, submitted.finished) == (3, 2, 1)
    assert sorted(keys(queue)) == ["train-a", "train-b"]


def test_a_study_is_submitted_twice_without_effect(queue: Queue) -> None:
    first = queue.submit(study("s", "a"))
    again = queue.submit(study("s", "a"))
    assert again.study_id == first.study_id
    assert (again.new, again.shared) == (0, 4)


def test_submitting_lets_a_study_run_again_with_all_its_stages(queue: Queue) -> None:
    queue.submit(study("s", "a"))
    queue.want(Wanted.PAUSE, queue.target("s"))
    queue.submit(study("s", "b"), extend=True)
    assert State.PAUSED not in states(queue).values()
    assert states(queue)["train-a"] == State.WAITING


def test_a_title_is_extended_or_refused_and_never_replaced(queue: Queue) -> None:
    queue.submit(study("s", "a"))
    with pytest.raises(HRSError, match="study 's' exists with other runs"):
        queue.submit(study("s", "b"))
    assert "train-b" not in states(queue)
    queue.submit(study("s", "b"), extend=True)
    target = queue.target("s")
    with queue.database.read() as connection:
        assert set(target.stage_keys(connection)) >= {"train-a", "train-b"}


def test_a_stage_is_claimed_once(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    claim = queue.claim("tokens", worker)
    assert claim.token == 1
    with pytest.raises(TransitionRefused, match="stage tokens is running, so it cannot become running"):
        queue.claim("tokens", worker)
    with pytest.raises(TransitionRefused, match="stage train-a is waiting"):
        queue.claim("train-a", worker)
    with pytest.raises(TransitionRefused, match="there is no stage nothing"):
        queue.claim("nothing", worker)


def _claim_all(url: URL, name: str, results: "multiprocessing.Queue[tuple[str, str]]") -> None:
    queue = Queue(Database(url))
    worker = queue.add_worker("host", 1)
    while candidates := queue.candidates(limit=3):
        for candidate in candidates:
            try:
                queue.claim(candidate.key, worker)
            except TransitionRefused:
                continue
            results.put((candidate.key, name))


def test_of_many_processes_one_claims_a_stage(queue: Queue, url: URL) -> None:
    names = [f"{i:02}" for i in range(20)]
    flat = [stage(name) for name in names]
    queue.submit(StudySpec(title="s", definition={}, runs=(), stages=tuple(flat), own_stages=tuple(names)))
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[str, str]] = context.Queue()
    processes = [context.Process(target=_claim_all, args=(url, f"p{i}", results)) for i in range(3)]
    for process in processes:
        process.start()
    claimed = [results.get(timeout=120) for _ in names]
    for process in processes:
        process.join()
    assert sorted(key for key, _ in claimed) == names
    with queue.database.read() as connection:
        assert len(connection.execute(select(attempts)).all()) == len(names)


def test_who_lost_a_claim_can_neither_renew_nor_publish(queue: Queue, worker: str, clock: Clock) -> None:
    queue.submit(study("s", "a"))
    first = queue.claim("tokens", worker)
    assert queue.renew(first, {"step": 3}) is Wanted.RUN
    assert queue.give_up(first, Outcome.LOST, "gone") is State.QUEUED
    clock.time += FIRST_BACK_OFF_SECONDS
    second = queue.claim("tokens", worker)
    assert second.token == 2
    published: list[str] = []
    for call in (
        lambda: queue.renew(first),
        lambda: queue.finish(first, lambda: published.append("zombie")),
        lambda: queue.give_up(first, Outcome.FAILED, "late"),
    ):
        with pytest.raises(LeaseLost, match="attempt 1 at stage tokens was given up"):
            call()
    queue.finish(second, lambda: published.append("owner"))
    assert published == ["owner"]
    assert states(queue)["tokens"] == State.FINISHED


def test_what_raises_while_publishing_leaves_the_claim(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    claim = queue.claim("tokens", worker)

    def full() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        queue.finish(claim, full)
    assert states(queue)["tokens"] == State.RUNNING
    queue.finish(claim)


def test_a_lost_stage_comes_back_later_and_later_and_fails_in_the_end(queue: Queue, worker: str, clock: Clock) -> None:
    queue.submit(study("s", "a"))
    for n in range(MOST_LOST):
        assert queue.give_up(queue.claim("tokens", worker), Outcome.LOST, "killed") is State.QUEUED
        clock.time += FIRST_BACK_OFF_SECONDS * 2**n - 0.5
        assert keys(queue) == []
        clock.time += 1
        assert keys(queue) == ["tokens"]
    assert queue.give_up(queue.claim("tokens", worker), Outcome.LOST, "killed") is State.FAILED
    assert queue.retry(queue.target("s")) == 1
    assert keys(queue) == ["tokens"]


def test_a_stage_that_gets_further_each_time_may_be_lost_any_number_of_times(
    queue: Queue, worker: str, clock: Clock
) -> None:
    queue.submit(study("s", "a"))
    for step in range(1, 3 * MOST_LOST):
        claim = queue.claim("tokens", worker)
        queue.renew(claim, {"step": step})
        assert queue.give_up(claim, Outcome.LOST, "killed") is State.QUEUED
        clock.time += FIRST_BACK_OFF_SECONDS
    for _ in range(MOST_LOST - 1):
        assert queue.give_up(queue.claim("tokens", worker), Outcome.LOST, "killed") is State.QUEUED
        clock.time += 1000
    assert queue.give_up(queue.claim("tokens", worker), Outcome.LOST, "killed") is State.FAILED


@pytest.mark.parametrize(
    ("outcome", "resources", "state"),
    [
        (Outcome.FAILED, None, State.FAILED),
        (Outcome.TOO_LARGE, Resources(gpu_bytes=7), State.QUEUED),
        (Outcome.TOO_LARGE, None, State.INFEASIBLE),
        (Outcome.PREEMPTED, None, State.QUEUED),
    ],
)
def test_what_follows_an_attempt(
    queue: Queue, worker: str, outcome: Outcome, resources: Resources | None, state: State
) -> None:
    queue.submit(study("s", "a"))
    assert queue.give_up(queue.claim("tokens", worker), outcome, "why", resources=resources) is state
    assert states(queue)["tokens"] == state
    if resources:
        claim = queue.claim("tokens", worker)
        assert (claim.rung, claim.stage.resources) == (1, resources)
    elif state is not State.QUEUED:
        assert queue.retry(queue.target("s")) == 1
        assert queue.claim("tokens", worker).rung == 0


def test_pause_resume_and_cancel(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a", "b"))
    work(queue, worker, "tokens")
    claim = queue.claim("train-a", worker)
    queue.want(Wanted.PAUSE, queue.target("s"))
    assert keys(queue) == []
    assert states(queue)["train-b"] == State.PAUSED
    assert queue.renew(claim) is Wanted.PAUSE
    assert queue.give_up(claim, Outcome.PREEMPTED, "paused") is State.PAUSED
    queue.want(Wanted.RUN, queue.target("s"))
    assert sorted(keys(queue)) == ["train-a", "train-b"]
    queue.want(Wanted.CANCEL, queue.target("b@s"))
    assert keys(queue) == ["train-a"]
    assert states(queue)["evaluate-b"] == State.CANCELLED
    queue.want(Wanted.PAUSE, queue.target("train-a"))
    assert keys(queue) == []


def test_a_paused_study_does_not_stop_what_another_needs(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    queue.submit(study("t", "a", "b"))
    work(queue, worker, "tokens")
    queue.want(Wanted.PAUSE, queue.target("t"))
    assert keys(queue) == ["train-a"]
    queue.want(Wanted.CANCEL, queue.target("s"))
    assert keys(queue) == []
    assert states(queue)["train-a"] == State.PAUSED


def test_priority_comes_before_age_and_age_grows(queue: Queue, worker: str, clock: Clock) -> None:
    queue.submit(StudySpec(title="old", definition={}, runs=(), stages=(stage("x"),), own_stages=("x",)))
    clock.time += 10
    queue.submit(StudySpec(title="new", definition={}, runs=(), stages=(stage("y"),), own_stages=("y",)))
    assert keys(queue) == ["x", "y"]
    queue.prioritise(1, queue.target("new"))
    assert keys(queue) == ["y", "x"]
    queue.prioritise(-1, queue.target("y"))
    assert keys(queue) == ["x", "y"]
    queue.prioritise(1, queue.target("y"))
    clock.time += 2 * AGEING_SECONDS
    late = StudySpec(title="late", definition={}, runs=(), stages=(stage("z"),), own_stages=("z",), priority=2)
    queue.submit(late)
    assert keys(queue) == ["y", "x", "z"], "two hours of age are worth two of priority, and older wins a tie"


def test_results_that_are_there_are_adopted_and_missing_ones_computed_again(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    queue.adopt("tokens")
    assert keys(queue) == ["train-a"]
    queue.disown("tokens", "the file is gone")
    assert keys(queue) == ["tokens"]
    assert states(queue)["train-a"] == State.WAITING
    work(queue, worker, "tokens", "train-a")
    assert keys(queue) == ["evaluate-a"]


def test_names_lead_to_one_thing_or_say_what_there_is(queue: Queue) -> None:
    queue.submit(study("s", "a", "ab"))
    assert queue.target("s").study
    assert queue.target("a@s").run == "run-a"
    assert queue.target("run-ab@s").run == "run-ab"
    assert queue.target("tok").stage == "tokens"
    for name, sentence in {
        "c@s": "study s has no run named c",
        "run-@s": "study s has 2 runs named run-",
        "train": "more than one stage",
        "nowhere": "nothing in the queue is named nowhere: studies are s",
        "%": "nothing in the queue is named %",
    }.items():
        with pytest.raises(HRSError, match=sentence):
            queue.target(name)


def test_a_study_is_removed_with_what_nobody_else_needs(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    queue.submit(study("t", "b"))
    claim = queue.claim("tokens", worker)
    with pytest.raises(HRSError, match="study s is running: cancel it first"):
        queue.remove("s")
    queue.finish(claim)
    queue.remove("s")
    assert sorted(states(queue)) == ["evaluate-b", "report-t", "tokens", "train-b"]
    assert keys(queue) == ["train-b"]


def test_every_change_is_an_event(queue: Queue, worker: str) -> None:
    queue.submit(study("s", "a"))
    work(queue, worker, "tokens")
    with queue.database.read() as connection:
        told = [(row.stage_key, row.kind) for row in connection.execute(select(events).order_by(events.c.id))]
    assert [kind for key, kind in told if key == "tokens"] == ["added", "running", "finished"]
    assert told[-1] == ("train-a", "queued")


def test_measurements_come_back_newest_first(queue: Queue) -> None:
    for peak in (5, 7):
        queue.measure("shape", "RTX", 4, peak_bytes=peak * 2**30)
    assert [row.peak_bytes for row in queue.measured("shape", "RTX")] == [7 * 2**30, 5 * 2**30]
    assert queue.measured("shape", "T4") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.execute(meta.update().values(version=99)), "was written by a newer version of hrs"),
        (lambda c: c.execute(meta.delete()) and meta.drop(c), "holds tables of something else"),
    ],
)
def test_databases_of_others_are_refused(url: URL, change: Callable[[object], object], sentence: str) -> None:
    database = Database(url)
    with database.write() as connection:
        change(connection)
    database.close()
    with pytest.raises(HRSError, match=sentence):
        Database(url)


def test_a_damaged_file_and_a_wrong_url_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.db").write_bytes(b"not a database" * 500)
    with pytest.raises(HRSError, match="is damaged"):
        Database(URL.create("sqlite", database=str(tmp_path / "queue.db")))
    with pytest.raises(HRSError, match="needs a driver that is missing"):
        Database(URL.create("postgresql+nothing", database="x"))
    with pytest.raises(HRSError, match="cannot be used"):
        Database(URL.create("postgresql+psycopg", host="127.0.0.1", port=1, database="x"))
