"""Text leaves this project as UTF-8 in every locale, and what a terminal cannot show stops no command."""

import ast
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hrs.errors import HRSError
from jobs.entry import run_entry

ROOT = Path(__file__).parent.parent


def text_files_of_the_locale(source: str) -> Iterator[int]:
    """Yield the lines that open, read or write a text file without saying its encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = [a.value for a in node.args if isinstance(a, ast.Constant)] + [
            k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)
        ]
        modes = [value for value in given if isinstance(value, str) and value and set(value) <= set("rwxabt+")]
        opens = (name in ("open", "fdopen", "TextIOWrapper") and not isinstance(node.func, ast.Name)) or name == "open"
        if name in ("read_text", "write_text") or (opens and modes and "b" not in modes[-1]):
            yield node.lineno


def test_the_search_finds_what_it_looks_for() -> None:
    source = "p.read_text()\np.write_text('a')\nopen(p, 'w')\np.open('a')\np.open(mode='r')\n"
    assert list(text_files_of_the_locale(source)) == [1, 2, 3, 4, 5]
    assert list(text_files_of_the_locale("p.open('rb')\np.read_text(encoding='utf-8')\np.read_bytes()\n")) == []


@pytest.mark.parametrize("package", ["hrs", "jobs", "serve", "tune"])
def test_no_text_file_depends_on_the_locale(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / package).rglob("*.py")
        for line in text_files_of_the_locale(path.read_text(encoding="utf-8"))
    }
    assert not found, "say encoding='utf-8' there"


def ended(main: Callable[[], int | None], stream: io.TextIOBase, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        run_entry(main)
    return end.value.code


def test_a_terminal_that_cannot_show_a_character_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    assert ended(lambda: print("Größe \udce9 \u03c0"), stream, monkeypatch) is None
    stream.flush()
    assert raw.getvalue() == b"Gr\\xf6\\xdfe \\udce9 \\u03c0\n"


def test_an_error_that_cannot_be_shown_is_still_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise HRSError("no file Größe \udce9")

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    assert ended(main, io.StringIO(), monkeypatch) == 2
    assert raw.getvalue() == b"error: no file Gr\\xf6\\xdfe \\udce9\n"


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "from jobs.entry import run_entry\nrun_entry(lambda: print('x' * 1_000_000, flush=True))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_commands_end_well_in_a_forced_ascii_locale(tmp_path: Path) -> None:
    """The command that writes the most outside of ASCII, in a process that really has that locale."""
    (tmp_path / "größe.txt").write_text("Größe\n\n", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    environment["HRS_STORAGE"] = str(tmp_path / "storage")
    code = "from hrs.cli import main; main()"
    for words, status in ((("presets", "--markdown"), 0), (("show", "manifold_v18"), 0), (("report", "größe"), 2)):
        run = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, check=False)
        assert run.returncode == status and b"Traceback" not in run.stderr, run.stderr
