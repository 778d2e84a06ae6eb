"""The project keeps what its files promise: the cluster file is valid, imports obey the house, documents do not lie."""

import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from choose_constraints import CUDA_12, CUDA_13
from hrs.cli import app
from hrs.cluster.hardware import announced_nodes

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LAUNCHER_ONLY = {
    "hrs.cli",
    "hrs.cli_queue",
    "hrs.cli_storage",
    "hrs.cluster",
    "hrs.queue",
    "hrs.tracking",
    "hrs.verify",
}
"""The rooms below hrs/ that may know Ray or MLflow."""


# ---- cluster file ----------------------------------------------------------------------------------------------------


def launcher_config(text: str) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def test_cluster_file_is_valid_and_uses_every_machine() -> None:
    config = launcher_config((ROOT / "ray_cluster.yaml").read_text())
    machines = len(config["provider"]["worker_ips"])
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == config["max_workers"] == machines


def test_cluster_file_for_the_cloud_is_valid_once_its_comments_are_uncommented() -> None:
    text = (ROOT / "ray_cluster.yaml").read_text()
    values = yaml.safe_load(text)
    del values["provider"], values["min_workers"]
    for block in re.findall(r"^# (?:provider|available_node_types):\n(?:^# .*\n)*", text, re.MULTILINE):
        values |= yaml.safe_load(re.sub(r"^# ", "", block, flags=re.MULTILINE))
    assert values["provider"]["type"] == "aws"
    values["max_workers"] = 4
    config = launcher_config(yaml.safe_dump(values))
    assert config["head_node_type"] == "head"
    assert config["available_node_types"]["gpu"]["max_workers"] == 4
    nodes = announced_nodes(config)  # what a study is planned for before any of them runs
    assert [(len(node.gpus), node.cpus, node.gpus[0].name) for node in nodes] == [(1, 8, "A10G")] * 4
    assert "HRS_CLUSTER_CONFIG=$HOME/ray_bootstrap_config.yaml" in values["head_start_ray_commands"][-1]


def test_cluster_file_mounts_what_its_commands_install_from() -> None:
    values = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    mounted = {Path(source).name for source in values["file_mounts"].values()}
    commands = "\n".join(values["setup_commands"])
    for name in {CUDA_12, CUDA_13, *re.findall(r"[\w-]+\.(?:toml|txt|py)", commands)}:
        assert name in mounted
        assert (ROOT / name).exists()


def test_cluster_file_and_makefile_pin_the_same_uv() -> None:
    pins = {
        pin for name in ("ray_cluster.yaml", "Makefile") for pin in re.findall(r"uv==[\d.]+", (ROOT / name).read_text())
    }
    assert len(pins) == 1


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_import_contracts_hold() -> None:
    checked = subprocess.run([BIN / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_room_of_the_library_is_under_the_contract_that_keeps_ray_out() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (kept_clean,) = (set(c["source_modules"]) for c in contracts if "no cluster" in c["name"])
    rooms = {
        f"hrs.{path.stem}"
        for path in (ROOT / "hrs").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"hrs.__init__"} - LAUNCHER_ONLY == kept_clean


# ---- documents -------------------------------------------------------------------------------------------------------


def commands_of(document: Path) -> list[str]:
    """Lines of code blocks and inline code that call this project."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^ {4,}(.*)$", text, re.MULTILINE)
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()] + inline
    return [line.split(" #")[0] for line in lines]


def flags_of(line: str) -> set[str]:
    return set(re.findall(r"(?<!\S)(--[a-z][a-z-]*)", line))


def options_of(command: typer.core.TyperCommand) -> set[str]:
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


@functools.cache
def job_options(job: str) -> set[str]:
    """The flags that the job itself lists."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        importlib.import_module(f"jobs.{Path(job).stem}").parse(["--help"])
    return set(re.findall(r"^  (?:-h, )?(--[a-z][a-z-]*)", said.getvalue(), flags=re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_documents_resolve(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_in_documents_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for line in commands_of(document):
        if found := re.match(r"make ([a-z][a-z-]*)", line):
            assert found[1] in targets, f"{document.name}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_hrs_commands_and_their_flags_in_documents_exist(document: Path) -> None:
    for line in commands_of(document):
        words = line.removeprefix(".venv/bin/").partition(" -- ")[0].split()
        if words[:1] != ["hrs"] or not re.fullmatch(r"[a-z][\w-]*", "".join(words[1:2])):
            continue
        command = typer.main.get_command(app)
        for word in words[1:]:
            if not hasattr(command, "commands"):
                break
            assert word in command.commands, f"{document.name}: {line}"
            command = command.commands[word]
        handed_on = command.context_settings.get("ignore_unknown_options", False)
        allowed = options_of(command) | (job_options("jobs/ablation_sweep.py") if handed_on else set())
        assert flags_of(" ".join(words)) <= allowed, f"{document.name}: {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_jobs_and_their_flags_in_documents_exist(document: Path) -> None:
    for line in commands_of(document):
        if not (found := re.search(r"(jobs/\w+\.py)(.*)", line)):
            continue
        assert (ROOT / found[1]).exists(), f"{document.name}: {line}"
        known = job_options("jobs/ablation_sweep.py" if found[1] == "jobs/demo.py" else found[1])
        assert flags_of(found[2]) <= known, f"{document.name}: {line}"


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("[a-z]*.py")), ids=lambda path: path.name)
def test_jobs_can_be_started_as_files(job: Path) -> None:
    """`ray job submit jobs/X.py` runs the file by its shebang line; the submitted code must beat an installed copy."""
    text = job.read_text()
    if "__main__" not in text:
        pytest.skip("not a job: imported by jobs")
    assert text.startswith("#!/usr/bin/env python3\n")
    assert job.stat().st_mode & 0o111
    lines = text.splitlines()
    path = next(i for i, line in enumerate(lines) if line.startswith("sys.path.insert(0, "))
    guard = next(i for i, line in enumerate(lines) if line.startswith("import jobs"))
    first = next(i for i, line in enumerate(lines) if re.match(r"(from|import) (hrs|jobs\.|tune|torch|ray)", line))
    assert path < guard < first
