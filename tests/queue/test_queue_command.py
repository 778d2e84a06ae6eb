"""`hrs queue ...` as a user types it."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hrs.cli import app
from hrs.errors import HRSError
from hrs.queue import Outcome, open_queue

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("HRS_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> str:
        app(["queue", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def stages(run: Run) -> list[dict[str, Any]]:
    return json.loads(run("list", "--all", "--json"))["stages"]  # type: ignore[no-any-return]


def test_an_empty_queue_says_what_to_do(run: Run) -> None:
    assert run("list") == "the queue is empty: put something in with 'hrs queue add -- COMMAND'\n"
    assert json.loads(run("list", "--json")) == {"studies": [], "stages": []}


def test_a_command_from_adding_to_its_numbers(run: Run) -> None:
    code = 'print("hello"); print(\'{"loss": 1.5}\')'
    assert "added" in run("add", "--name", "first", "--", sys.executable, "-c", code)
    assert "is in the queue already" in run("add", "--name", "first", "--", sys.executable, "-c", code)
    listed = run("list")
    assert "commands  run     0         1     1 queued" in listed and "first" in listed
    run("work", "--once", "--cpus", "2", "--gpus", "1x16")
    (stage,) = stages(run)
    assert stage["state"] == "finished" and stage["progress"] == {"loss": 1.5} and stage["studies"] == ["commands"]
    assert "hello" in run("logs", "first@commands")
    shown = run("show", stage["key"][:6])
    assert "attempt 1" in shown and '"loss": 1.5' in shown and "finished" in shown
    assert json.loads(run("show", "commands", "--json"))["stages"][0]["tries"][0]["outcome"] == "finished"


def test_the_example_goes_on_where_it_was_stopped(run: Run, tmp_path: Path) -> None:
    example = str(Path(__file__).parents[2] / "examples" / "any_program.py")
    (tmp_path / "any_program.json").write_text('{"step": 190}')
    run("add", "--name", "halves", "--", sys.executable, example)
    run("work", "--once", "--cpus", "2")
    (stage,) = stages(run)
    assert stage["state"] == "finished" and stage["progress"]["step"] == 200
    assert "on GPU none, from step 190" in run("logs", "halves@commands")


def test_verbs_change_what_is_wanted(run: Run) -> None:
    run("add", "--name", "a", "--", "true")
    run("add", "--name", "b", "--study", "mine", "--priority", "2", "--", "true")
    assert [view["label"] for view in stages(run)] == ["b", "a"]
    assert run("priority", "a@commands", "5") == "a@commands: priority 5 for 1 stage\n"
    assert [view["label"] for view in stages(run)] == ["a", "b"]
    assert run("pause", "mine") == "mine: 1 stage will rest\n"
    assert {view["label"]: view["state"] for view in stages(run)} == {"a": "queued", "b": "paused"}
    run("resume", "mine")
    run("cancel", "a@commands")
    assert {view["label"]: view["state"] for view in stages(run)} == {"a": "cancelled", "b": "queued"}
    assert run("remove", "mine") == "mine is not in the queue any more\n"
    assert [view["label"] for view in stages(run)] == ["a"]


def test_a_failure_tells_why_and_is_tried_again_on_request(run: Run) -> None:
    run("add", "--name", "a", "--", sys.executable, "-c", "raise SystemExit(3)")
    told = run("work", "--once", "--cpus", "2")
    assert "a: failed (the command ended with status 3: it printed nothing" in told
    assert "status 3" in run("list", "--all")
    assert run("retry", "commands") == "commands: 1 stage queued again\n"


def test_what_holds_a_stage_up_is_said(run: Run, tmp_path: Path) -> None:
    run("add", "--name", "a", "--", "true")
    queue = open_queue(tmp_path / "storage")
    (candidate,) = queue.candidates()
    queue.give_up(queue.claim(candidate.key, queue.add_worker("h", 1)), Outcome.LOST, "process 7 is gone")
    assert "was lost (process 7 is gone), rests for " in run("list")
    queue.database.close()


def test_a_large_command_is_refused_with_the_number(run: Run) -> None:
    run("add", "--gpu-gib", "40", "--name", "a", "--", "true")
    assert "infeasible (it needs a GPU with 40.0 GiB and the largest here has" in run(
        "work", "--once", "--gpus", "1x16"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "nothing"], "nothing in the queue is named nowhere|nothing in the queue is named nothing: the queue"),
        (["add", "--env", "X", "--", "true"], "--env X is not NAME=VALUE"),
        (["logs", "a@commands"], "has printed nothing yet: it is queued"),
        (["pause", "b@commands"], "study commands has no run named b"),
    ],
)
def test_mistakes_are_one_sentence(run: Run, arguments: list[str], sentence: str) -> None:
    if "commands" in " ".join(arguments):
        run("add", "--name", "a", "--", "true")
    with pytest.raises(HRSError, match=sentence):
        run(*arguments)
