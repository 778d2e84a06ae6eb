"""Every benchmark starts as docs/benchmarks.md says: ``python -m benchmarks.NAME`` from the repository's root."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("*.py"))}
STARTED = [name for name, text in FILES.items() if '__name__ == "__main__"' in text]


@pytest.mark.parametrize("name", STARTED)
def test_prints_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_threads: None
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)  # imported by another one
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("document", ["docs/benchmarks.md", *(f"benchmarks/{name}.py" for name in STARTED)])
def test_is_documented_as_a_module(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert not re.search(r"python benchmarks/", text)
    assert set(re.findall(r"python -m benchmarks\.([a-z]\w*)", text)) <= set(STARTED)
    if document.endswith(".py"):
        assert f"python -m benchmarks.{Path(document).stem}" in text


@pytest.mark.parametrize("name", [name for name in STARTED if re.search(r"from benchmarks\.", FILES[name])])
def test_started_as_a_file_says_how_to_start_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = [sys.executable, f"benchmarks/{name}.py", "--help"]
    ended = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == f"error: start this from the repository's root as python -m benchmarks.{name}\n"
