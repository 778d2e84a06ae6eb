"""Names in place of paths: each kind finds its run, and what is unknown or ambiguous is answered with candidates."""

import errno
import json
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from hrs.cli import app
from hrs.cluster.listing import folder_bytes, list_runs
from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.tracking.naming import find_model, model_names

KEYS = ("abcd000000000000", "abcd111111111111", "ef00000000000000", "0123456789abcdef")


@pytest.fixture
def named(tracker: Tracker, storage: Storage, tmp_path: Path) -> Storage:
    """A study of two causal presets and a leaking one, and a run that failed."""
    presets = ("dense_baseline", "full_hrs", "full_hrs_legacy", "full_hrs")
    configs = [
        ExperimentConfig(preset=p, scale="tiny", seed=seed) for p, seed in zip(presets, (0, 0, 0, 1), strict=True)
    ]
    study_id = tracker.open_study("v1-tiny", dict(zip(KEYS, configs, strict=True)))
    for key, config, bits in zip(KEYS, configs, (1.5, 1.2, 0.1, None), strict=True):
        run = tracker.open_run(key, study_id, config, "data")
        storage.run(key).mkdir(parents=True, exist_ok=True)
        (storage.run(key) / "weights").write_bytes(bytes(2**20))
        if bits is None:
            run.finish("failed", "why")
            continue
        run.log(1, {"bits_per_byte": bits, "parameters": 42_900})
        (tmp_path / "audit.json").write_text(json.dumps({"causal": bits > 1, "tests": []}))
        (tmp_path / "evaluation.json").write_text("{}")
        documents = pa.table({
            "document": [0, 1], "title": ["a", "b"], "topic": ["x", "y"], "nats": [9.0, 8.0], "text_nats": [8.0, 7.0],
            "tokens": [4, 4], "bytes": [20, 20], "words": [4, 4],
        })  # fmt: skip
        with pa.ipc.new_file(str(tmp_path / "documents.arrow"), documents.schema) as writer:
            writer.write_table(documents)
        for name in ("audit.json", "evaluation.json", "documents.arrow"):
            run.log_artifact(tmp_path / name)
        run.set_tags({"causal": str(bits > 1).lower()})
        run.finish("finished")
    return storage


def test_every_kind_of_name_finds_its_run(named: Storage, tmp_path: Path) -> None:
    key_of = {
        "v1-tiny": KEYS[1],
        "dense_baseline@v1-tiny": KEYS[0],
        "full_hrs@v1-tiny": KEYS[1],
        "full_hrs/0@v1-tiny": KEYS[1],
        "full_hrs_legacy@v1-tiny": KEYS[2],
        KEYS[0]: KEYS[0],
        "ef00": KEYS[2],
        "abcd1": KEYS[1],
    }
    assert {name: find_model(named, name).name for name in key_of} == key_of
    assert find_model(named, str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("abcd", rf"beginning of 2 runs \({KEYS[0]}, {KEYS[1]}\)"),
        ("v1-tinny", "did you mean v1-tiny"),
        ("full_hrs@v2", "there is no study 'v2' in 'full_hrs@v2': there are v1-tiny"),
        ("dual@v1-tiny", "has no preset 'dual': it has dense_baseline, full_hrs, full_hrs_legacy"),
        ("full_hrs/1@v1-tiny", r"no finished run in study 'v1-tiny' \(seed 1 failed\)"),
        ("full_hrs/7@v1-tiny", "no seed 7"),
        ("no/such/folder", "there is no model at /"),
        ("zzz", "no path, study or run has the name 'zzz'"),
    ],
)
def test_what_is_no_name_is_one_sentence_with_candidates(name: str, sentence: str, named: Storage) -> None:
    with pytest.raises(HRSError, match=sentence) as caught:
        find_model(named, name)
    assert "\n" not in str(caught.value)


def test_a_run_whose_directory_is_gone_is_said(named: Storage) -> None:
    (named.run(KEYS[1]) / "weights").unlink()
    named.run(KEYS[1]).rmdir()
    with pytest.raises(HRSError, match=r"is tracked, but its directory .* is gone"):
        find_model(named, "v1-tiny")


def test_shells_complete_studies_presets_and_runs(named: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_names(named, "") == ["v1-tiny"]
    assert model_names(named, "abcd") == list(KEYS[:2])
    assert model_names(named, "full_hrs@v") == ["full_hrs@v1-tiny"]
    monkeypatch.setenv("HRS_STORAGE", str(named.root))

    def completed(*words: str) -> list[str]:
        environment = {
            "_HRS_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(("hrs", *words)),
            "COMP_CWORD": str(len(words)),
        }
        return CliRunner().invoke(app, [], env=environment, prog_name="hrs").output.split()

    assert completed("show", "full_co") == ["full_core", "full_core_legacy"]
    assert completed("report", "v") == ["v1-tiny"]
    assert completed("generate", "abcd1") == ["abcd111111111111"]


def test_runs_are_listed_with_their_scores_and_sizes(named: Storage) -> None:
    (named.root / "runs" / "untracked").mkdir()
    lines = list_runs(named).splitlines()
    assert len(lines) == 6 and lines[0].split()[:2] == ["run", "preset/seed"]
    assert lines[2].split() == [
        KEYS[1],
        "full_hrs/0",
        "tiny",
        "v1-tiny",
        "finished",
        "1.2000",
        "yes",
        "42.9k",
        "1.0",
        "MiB",
    ]
    assert "NO" in lines[3] and "failed" in lines[4]
    last, older = list_runs(named, "v1-tiny", 1).splitlines()[1:]
    assert last.split() == lines[4].split() and older == "... and 3 older: --last 0 lists all"
    assert folder_bytes(named.run(KEYS[0])) == 2**20
    with pytest.raises(HRSError, match="no runs"):
        list_runs(Storage(named.root / "empty"))


def test_a_read_only_storage_is_reported(named: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setenv("HRS_STORAGE", str(named.root))
    monkeypatch.setattr("hrs.storage.os.access", lambda path, mode: False)
    monkeypatch.setattr("hrs.cluster.pages.write_report", refuse)
    ended = CliRunner().invoke(app, ["report", "v1-tiny"])
    assert ended.exit_code == 0, ended.output
    assert "dense_baseline" in ended.output and "the page is as it was" in ended.output
