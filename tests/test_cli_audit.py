"""What `hrs presets` and `hrs audit --all` print, and the status they end with."""

import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hrs.cli import app
from hrs.errors import HRSError
from hrs.presets import FAMILIES, PRESETS, STUDIES

A_FEW = {name: PRESETS[name] for name in ("dense_baseline", "dense_window", "full_hrs_legacy")}


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_presets_are_listed_by_family() -> None:
    listed = run("presets")
    assert listed.exit_code == 0
    assert re.findall(r"^(\S.*)$", listed.output, re.MULTILINE)[:-1] == list(FAMILIES)
    assert re.findall(r"^  (\w+) ", listed.output, re.MULTILINE) == list(PRESETS)
    assert listed.output.splitlines()[-1] == f"studies: {', '.join(STUDIES)}"


def test_all_audits_every_preset_and_ends_well_if_each_is_what_its_label_says(monkeypatch) -> None:
    monkeypatch.setattr("hrs.cli.PRESETS", A_FEW)
    audited = run("audit", "--all")
    assert audited.exit_code == 0, audited.output
    *lines, last = audited.output.splitlines()
    assert [line.split()[0] for line in lines] == list(A_FEW)
    assert last == "3 presets: 2 causal, 1 not, 0 unexpected"


@pytest.mark.parametrize(("name", "leaks"), [("dense_baseline", True), ("full_hrs_legacy", False)])
def test_all_ends_with_status_1_if_a_label_is_wrong(name: str, leaks: bool, monkeypatch) -> None:
    monkeypatch.setattr("hrs.cli.PRESETS", {name: replace(PRESETS[name], leaks=leaks)})
    audited = run("audit", "--all")
    assert audited.exit_code == 1
    assert audited.output.splitlines()[-1].endswith("1 unexpected")


@pytest.mark.parametrize("arguments", [(), ("full_hrs", "--all"), ("--all", "--random-tokens")])
def test_audit_wants_one_thing_to_audit(arguments: tuple[str, ...]) -> None:
    audited = run("audit", *arguments)
    assert isinstance(audited.exception, HRSError) and "--all alone" in str(audited.exception)


@pytest.mark.parametrize(("name", "status"), [("dense_memory", 0), ("v5_replace_legacy", 1)])
def test_one_preset_is_audited_as_training_would_leave_it(name: str, status: int) -> None:
    audited = run("audit", name)
    assert audited.exit_code == status, audited.output
    assert audited.output.startswith("NOT CAUSAL" if status else "causal")
