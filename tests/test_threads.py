"""Commands and jobs choose their threads as trials do."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from hrs.cli import app
from hrs.threads import VARIABLE
from jobs.entry import run_entry

pytestmark = pytest.mark.usefixtures("restored_threads")


def threads_in_entry() -> int:
    """Return the threads that ``main`` of an entry point has, which had three before."""
    seen: list[int] = []
    torch.set_num_threads(3)
    with pytest.raises(SystemExit):
        run_entry(lambda: seen.append(torch.get_num_threads()))
    return seen[0]


def test_an_entry_point_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    assert threads_in_entry() == 1


def test_the_environment_decides_where_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "3")
    assert threads_in_entry() == 3


def test_the_option_decides_over_everything() -> None:
    assert CliRunner().invoke(app, ["--threads", "2", "presets"]).exit_code == 0
    assert torch.get_num_threads() == 2


def test_no_threads_are_refused() -> None:
    assert CliRunner().invoke(app, ["--threads", "0", "presets"]).exit_code == 2


def test_torch_imported_later_has_one_too() -> None:
    script = "import sys\nfrom hrs.threads import set_threads\n"
    script += "set_threads()\nassert 'torch' not in sys.modules\nimport torch\nprint(torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(ended.stdout) == 1
