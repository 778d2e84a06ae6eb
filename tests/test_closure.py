"""A stage's code is what it imports: helpers far away count, comments, names of files and neighbours do not."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from hrs import closure, identity
from hrs.closure import code_of
from hrs.errors import HRSError

FILES = {
    "proj/__init__.py": "",
    "proj/train.py": "from proj.steps import step\nfrom proj import tools\nimport json\n\n"
    "def train():\n    return step() + tools.one()\n",
    "proj/steps.py": "from .deep.helper import scale\nfrom typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from proj.metrics import metric\n\n"
    "def step():\n    return scale(2)\n\n\ndef other():\n    return 3\n",
    "proj/deep/__init__.py": "",
    "proj/deep/helper.py": "import proj.deep.constants as fixed\n\ndef scale(x):\n    return x * fixed.FACTOR\n",
    "proj/deep/constants.py": "FACTOR = 3\n",
    "proj/tools.py": "def one():\n    from proj.late import late\n    return late()\n",
    "proj/late.py": "from proj import tools\n\ndef late():\n    return tools and 1\n",  # a circle, as late imports make
    "proj/metrics.py": "def metric():\n    return 1\n",
    "proj/twin.py": "def step():\n    return 7\n",
}

Edit = Callable[[str, str, str], None]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def fingerprint() -> str:
    for cached in (closure._fingerprint, closure._read, closure._file_of):
        cached.cache_clear()
    return code_of("proj.train:train")


def edit(project: Path, name: str, old: str, new: str) -> None:
    path = project / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("proj/train.py", "step()", "step() * 2"),
        ("proj/steps.py", "scale(2)", "scale(3)"),
        ("proj/deep/helper.py", "x * fixed", "x + fixed"),
        ("proj/deep/constants.py", "3", "4"),  # three imports away
        ("proj/late.py", "1", "2"),  # imported inside a function
        ("proj/train.py", "from proj.steps import step", "from proj.twin import step"),
    ],
)
def test_what_runs_counts(project: Path, name: str, old: str, new: str) -> None:
    before = fingerprint()
    edit(project, name, old, new)
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("proj/steps.py", "def step", "# a comment\n\n\ndef step"),
        ("proj/deep/helper.py", "    return", '    """Scale it."""\n    return'),
        ("proj/metrics.py", "1", "2"),  # for type checkers only
        ("proj/twin.py", "7", "8"),
        (
            "proj/steps.py",
            "def step():\n    return scale(2)\n\n\ndef other():\n    return 3\n",
            "def other():\n    return 3\n\n\ndef step():\n    return scale(2)\n",
        ),
    ],
)
def test_what_does_not_run_does_not_count(project: Path, name: str, old: str, new: str) -> None:
    before = fingerprint()
    edit(project, name, old, new)
    assert fingerprint() == before


def test_names_of_files_do_not_count(project: Path) -> None:
    before = fingerprint()
    (project / "proj/steps.py").rename(project / "proj/renamed.py")
    edit(project, "proj/train.py", "proj.steps", "proj.renamed")
    (project / "proj/deep").rename(project / "proj/deeper")
    edit(project, "proj/renamed.py", ".deep.helper", ".deeper.helper")
    edit(project, "proj/deeper/helper.py", "proj.deep.constants", "proj.deeper.constants")
    assert fingerprint() == before


def test_two_modules_that_swap_their_names_count(project: Path) -> None:
    (project / "proj/a.py").write_text("def f():\n    return 1\n")
    (project / "proj/b.py").write_text("def f():\n    return 2\n")
    (project / "proj/train.py").write_text("from proj.a import f\nfrom proj.b import f as g\n\nX = f() - g()\n")
    before = fingerprint()
    (project / "proj/train.py").write_text("from proj.b import f\nfrom proj.a import f as g\n\nX = f() - g()\n")
    assert fingerprint() != before


def test_code_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(HRSError, match=r"the code of nowhere\.at\.all:f cannot be found: is nowhere a package"):
        code_of("nowhere.at.all:f")


def test_functions_of_a_run_exist_and_do_not_know_of_reports_or_queues() -> None:
    for function in identity._FUNCTIONS_OF_A_RUN:
        module, _, name = function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        packages = {known.split(".")[1] for known in closure.closure(module) if "." in known}
        assert not packages & {"report", "queue", "cluster", "tracking", "retrieval", "export", "generation"}
