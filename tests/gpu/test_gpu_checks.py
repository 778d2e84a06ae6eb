"""The logic of ``make test-gpu`` on a simulated GPU: what passes, what fails, and what the table says."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import __main__ as command
from tests.gpu import checks
from tests.gpu.bench import Row, format_table, rows_from_lines
from tests.gpu.checks import CHECKS, Bench, Settings, run_check
from tests.simulated_gpu import GIB, SimulatedGpu, simulated_gpus

TURING = SimulatedGpu(name="Tesla T4", total_bytes=15 * GIB, capability=(7, 5))
ROOT = Path(__file__).resolve().parent.parent.parent


def rows_of(name: str, folder: Path, *presets: str, gpu: SimulatedGpu | None = None, count: bool = False) -> list[Row]:
    with simulated_gpus(gpu or SimulatedGpu(), count_memory=count):
        return list(run_check(name, Settings(presets=presets), folder))


def test_the_machine_is_named_with_what_it_can_do(tmp_path: Path) -> None:
    first, speed = rows_of("machine", tmp_path, gpu=TURING)
    assert first.subject == "Tesla T4" and "capability 7.5" in first.figures and "bf16 no" in first.figures
    assert "TFLOP/s" in speed.figures


def test_operators_agree_with_their_references(tmp_path: Path) -> None:
    rows = rows_of("kernels", tmp_path)
    assert {row.result for row in rows} <= {"ok", "skipped"} and sum(row.result == "ok" for row in rows) >= 3


def test_a_wrong_operator_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checks.expert_kernels.dot
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: object())  # as if Triton were there
    assert all(row.result == "ok" for row in rows_of("kernels", tmp_path))
    monkeypatch.setattr(checks.expert_kernels, "dot", lambda *args: right(*args) + 100)
    wrong = [row for row in rows_of("kernels", tmp_path) if row.subject.startswith("chosen rows")]
    assert wrong and all(row.result == "FAILED" for row in wrong)


def test_presets_live_their_whole_life(tmp_path: Path) -> None:
    rows = rows_of("presets", tmp_path, "dense_baseline", "dense_retrieved")
    assert [row.result for row in rows] == ["ok", "ok"], rows
    assert "resumed at 10" in rows[0].figures and "causal True" in rows[0].figures


def test_a_preset_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    rows = rows_of("presets", tmp_path, "no_such_preset", "dense_baseline")
    assert [row.result for row in rows] == ["FAILED", "ok"] and "no_such_preset" in rows[0].figures


def test_gpus_that_emulate_bf16_are_not_compared_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_compare_precision", lambda bench, preset, p: Row("precision", f"{preset} {p}", "ok"))
    rows = rows_of("precision", tmp_path, "dense_baseline", gpu=TURING)
    assert [(row.subject, row.result) for row in rows] == [
        ("dense_baseline bf16", "skipped"), ("dense_baseline fp16", "ok"),
    ]  # fmt: skip


def test_texts_of_the_gpu_are_compared_with_those_of_the_cpu(tmp_path: Path) -> None:
    (row,) = rows_of("generation", tmp_path, "dense_baseline")
    assert row.result == "ok" and "48 of 48 tokens as on the CPU" in row.figures


def test_an_exception_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench) -> Iterator[Row]:
        yield Row("machine", "first", "ok")
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setitem(CHECKS, "machine", broken)
    first, second = rows_of("machine", tmp_path)
    assert first.result == "ok" and second.result == "FAILED"
    assert second.figures == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_the_table_puts_failures_first_and_is_markdown() -> None:
    rows = [Row("a", "x", "ok", "1 | 2"), Row("b", "y", "FAILED", "why")]
    head, rule, *body = format_table(rows).splitlines()
    assert head.startswith("| check") and set(rule) <= set("|-")
    assert [line.split("|")[2].strip() for line in body] == ["y", "x"]
    assert all(line.count("|") == 5 for line in (head, *body))


def test_rows_travel_between_processes() -> None:
    row = Row("a", "x", "ok", "3 ms")
    assert rows_from_lines(["noise\n", f"ROW {json.dumps(row.as_dict())}\n"]) == [row]


def test_a_worker_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU every worker ends with an error: the command must say so and fail."""
    monkeypatch.setattr(command, "has_gpu", lambda: True)
    assert command.main(["--only", "machine"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_told_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=250
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: torch finds no GPU") and len(done.stderr) < 200


def test_unknown_checks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "machine,nonsense"]) == 2
    assert "unknown check nonsense" in capsys.readouterr().err


def test_every_check_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == len(CHECKS) and all(len(line) > 30 for line in lines)
