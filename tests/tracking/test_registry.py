"""The registry: which run is taken, one version per file, an alias that moves whole, and the file behind a name."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from waiting import free_port, wait_for_health

from hrs.config import ExperimentConfig
from hrs.errors import HRSError
from hrs.identity import code_version
from hrs.report.records import RunRecord
from hrs.storage import Storage, open_storage
from hrs.tracking import Tracker, format_promotion, promote, resolve_model, ui_command
from hrs.tracking.candidates import format_candidates, judge
from hrs.tracking.store import connect

AddRun = Callable[..., str]


def write_checkpoint(folder: Path, content: str) -> Path:
    """The two files that count here; what they hold is the trainer's business."""
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_text(content)
    (folder / "state.json").write_text(json.dumps({"sha256": content}))
    return folder


@pytest.fixture
def add_run(tracker: Tracker, storage: Storage) -> AddRun:
    """Adds a finished run to a study as a trial leaves it: scores, audit and checkpoint, tracked and in its folder."""

    def add(preset: str, seed: int, bits: float, causal: bool | None = True, study: str = "demo") -> str:
        config, key = ExperimentConfig(preset=preset, seed=seed), f"{preset}{seed}"
        study_id = tracker.open_study(study, {key: config})
        folder = storage.run(key)
        checkpoint = write_checkpoint(folder / "checkpoints" / "step_00000020", key)
        with tracker.open_run(key, study_id, config, "data") as run:
            run.log(20, {"bits_per_byte": bits})
            (folder / "evaluation.json").write_text("{}")
            with pa.OSFile(str(folder / "documents.arrow"), "wb") as sink:
                pa.ipc.new_file(sink, pa.schema([])).close()
            run.log_artifact(checkpoint)
            (folder / "tokenizer.json").write_text(key)
            run.log_artifact(folder / "tokenizer.json")
            if causal is not None:
                (folder / "audit.json").write_text(json.dumps({"causal": causal, "tests": []}))
                run.log_artifact(folder / "audit.json")
        return key

    return add


def export(tracker: Tracker, storage: Storage, key: str, content: bytes, name: str = "model.hrs") -> Path:
    """As jobs/export.py leaves a file."""
    path = storage.run(key) / name
    path.write_bytes(content)
    tracker.log_run_artifacts(key, [path], "export")
    return path


def versions(storage: Storage, name: str = "hrs") -> list[int]:
    return sorted(int(v.version) for v in connect(storage)[0].search_model_versions(f"name = '{name}'"))


def test_every_run_is_judged_and_only_a_finished_causal_one_is_taken() -> None:
    run = RunRecord(key="a", preset="p", scale="micro", seed=0, status="finished", causal=True)
    runs = {
        "good": replace(run, metrics={"bits_per_byte": 2.0}),
        "better": replace(run, seed=1, metrics={"bits_per_byte": 1.5}),
        "leaky": replace(run, preset="p_legacy", causal=False, metrics={"bits_per_byte": 0.4}),
        "unaudited": replace(run, seed=2, causal=None, metrics={"bits_per_byte": 1.0}),
        "killed": replace(run, seed=3, status="killed", metrics={"bits_per_byte": 1.0}),
        "unscored": replace(run, seed=4),
    }
    verdicts = {(c.record.preset, c.record.seed): c.verdict for c in judge(list(runs.values()))}
    assert verdicts == {
        ("p", 1): "taken",
        ("p", 0): "more bits per byte",
        ("p_legacy", 0): "not causal: it sees what it predicts",
        ("p", 2): "not audited",
        ("p", 3): "killed",
        ("p", 4): "not evaluated",
    }
    assert judge(list(runs.values()))[0].record is runs["better"]
    assert "taken" not in {c.verdict for c in judge([runs["leaky"], runs["killed"]])}
    assert format_candidates(judge([runs["leaky"], runs["good"], runs["unscored"]])).splitlines() == [
        "run         bits/byte  causal  status    verdict",
        "p/0         2.0000     yes     finished  taken",
        "p_legacy/0  0.4000     NO      finished  not causal: it sees what it predicts",
        "p/4         -          yes     finished  not evaluated",
    ]


def test_the_best_causal_run_is_registered_with_what_it_is(add_run: AddRun, storage: Storage) -> None:
    add_run("hrs", 0, 1.9)
    best = add_run("hrs", 1, 1.8)
    add_run("hrs_legacy", 0, 0.4, causal=False)
    promotion = promote(storage, "demo")
    assert (promotion.taken.key, promotion.version, promotion.created) == (best, 1, True)
    assert versions(storage) == [1]
    version = connect(storage)[0].get_model_version("hrs", "1")
    assert version.aliases == ["champion"] and version.run_id == Tracker(storage).run_id(best)
    expected = {
        "hrs.run_key": best,
        "study": "demo",
        "preset": "hrs",
        "scale": "tiny",
        "seed": "1",
        "bits_per_byte": "1.800000",
        "causal": "true",
        "code_version": code_version(),
        "hrs.artifact": "step_00000020",
    }
    assert version.tags.items() >= expected.items()
    text = format_promotion(promotion)
    assert "taken: hrs/1, 1.8000 bits per byte (the fewest bits per byte of 2 finished causal runs; 1 that see" in text
    assert "mlflow:hrs@champion is version 1" in text


def test_a_study_of_leaky_runs_has_nothing_to_promote(add_run: AddRun, storage: Storage) -> None:
    add_run("hrs_legacy", 0, 0.4, causal=False)
    add_run("hrs", 0, 1.9, causal=None)
    with pytest.raises(HRSError, match=r"no finished run that passed the causality audit(.|\n)*hrs_legacy/0 +0\.4000"):
        promote(storage, "demo")
    assert connect(storage)[0].search_registered_models() == []
    with pytest.raises(HRSError, match="there is no study 'other'"):
        promote(storage, "other")


def test_one_file_of_one_run_is_one_version_and_the_alias_follows_the_best(
    add_run: AddRun, storage: Storage, tracker: Tracker
) -> None:
    first = add_run("hrs", 0, 1.9)
    assert promote(storage, "demo").created
    again = promote(storage, "demo", alias="other")
    assert (again.created, again.version, again.previous) == (False, 1, None)

    path = export(tracker, storage, first, b"eight bits")
    exported = promote(storage, "demo")
    assert (exported.artifact, exported.version, exported.previous) == ("export/model.hrs", 2, 1)
    assert resolve_model(storage, "mlflow:hrs@champion") == path
    assert resolve_model(storage, "mlflow:hrs@other") == storage.run(first) / "checkpoints" / "step_00000020"

    better = add_run("hrs", 1, 1.7)
    moved = promote(storage, "demo")
    assert (moved.taken.key, moved.version, moved.previous) == (better, 3, 2)
    assert format_promotion(moved).endswith("mlflow:hrs@champion is version 3, before version 2")
    assert resolve_model(storage, "mlflow:hrs@champion").is_relative_to(storage.run(better))
    assert resolve_model(storage, "mlflow:hrs/2") == path
    assert versions(storage) == [1, 2, 3]


def test_promotions_at_once_make_one_version(add_run: AddRun, storage: Storage) -> None:
    add_run("hrs", 0, 1.9)
    with ThreadPoolExecutor(4) as pool:
        promotions = list(pool.map(lambda _: promote(storage, "demo"), range(4)))
    assert [p.version for p in promotions] == [1] * 4 and sum(p.created for p in promotions) == 1
    assert versions(storage) == [1]


def test_a_model_is_fetched_once_where_its_run_is_not(add_run: AddRun, storage: Storage, tracker: Tracker) -> None:
    key = add_run("hrs", 0, 1.9)
    promote(storage, "demo", alias="checkpoint")
    export(tracker, storage, key, b"eight bits")
    promote(storage, "demo")
    shutil.rmtree(storage.run(key))
    checkpoint, file = (resolve_model(storage, f"mlflow:hrs@{alias}") for alias in ("checkpoint", "champion"))
    assert file.read_bytes() == b"eight bits"
    assert {p.name for p in checkpoint.iterdir()} == {"weights.safetensors", "state.json"}
    assert json.loads((checkpoint.parent.parent / "audit.json").read_text())["causal"] is True
    assert (checkpoint.parent.parent / "tokenizer.json").is_file()
    for path in (checkpoint, file):
        assert path.is_relative_to(storage.root / "models")

    client, _ = connect(storage)
    shutil.rmtree(client.get_run(tracker.run_id(key)).info.artifact_uri.removeprefix("file://"))
    assert resolve_model(storage, "mlflow:hrs/2") == file
    file.write_bytes(b"eight bitz")  # damaged: neither here nor there is what was registered
    with pytest.raises(HRSError, match=r"export/model\.hrs of mlflow:hrs/2 cannot be fetched"):
        resolve_model(storage, "mlflow:hrs/2")


def test_a_file_that_was_written_again_is_not_the_registered_one(
    add_run: AddRun, storage: Storage, tracker: Tracker
) -> None:
    key = add_run("hrs", 0, 1.9)
    export(tracker, storage, key, b"eight bits")
    promote(storage, "demo")
    export(tracker, storage, key, b"six bits")
    with pytest.raises(HRSError, match="is no longer what was registered, because the run's export/model"):
        resolve_model(storage, "mlflow:hrs/1")
    assert promote(storage, "demo").version == 2
    assert resolve_model(storage, "mlflow:hrs@champion").read_bytes() == b"six bits"


def test_several_exports_need_one_that_is_the_model(add_run: AddRun, storage: Storage, tracker: Tracker) -> None:
    key = add_run("hrs", 0, 1.9)
    export(tracker, storage, key, b"4", "four.hrs")
    assert promote(storage, "demo").artifact == "export/four.hrs"
    assert resolve_model(storage, "mlflow:hrs@champion") == storage.run(key) / "four.hrs"
    export(tracker, storage, key, b"6", "six.hrs")
    with pytest.raises(HRSError, match=r"2 exported files \(export/four.hrs, export/six.hrs\) and none is model.hrs"):
        promote(storage, "demo")
    export(tracker, storage, key, b"8")
    assert promote(storage, "demo").artifact == "export/model.hrs"


def test_what_does_not_exist_is_one_sentence(add_run: AddRun, storage: Storage, tmp_path: Path) -> None:
    assert resolve_model(storage, tmp_path) == tmp_path
    with pytest.raises(HRSError, match=r"there is no registered model 'hrs' \(there are: none yet\)"):
        resolve_model(storage, "mlflow:hrs@champion")
    add_run("hrs", 0, 1.9)
    promote(storage, "demo")
    for source, message in {
        "mlflow:other@champion": r"there is no registered model 'other' \(there are: hrs\)",
        "mlflow:hrs@best": r"registered model 'hrs' has no alias 'best' \(it has: champion\)",
        "mlflow:hrs/7": r"registered model 'hrs' has no version 7 \(it has: 1\)",
        "mlflow:hrs": "is not of the form mlflow:NAME@ALIAS or mlflow:NAME/VERSION",
        "mlflow:hrs/champion": "is not of the form",
        "mlflow:it's@x": 'model name "it\'s" must be',
    }.items():
        with pytest.raises(HRSError, match=message):
            resolve_model(storage, source)
    for alias in ("", "latest", "v2", "a b"):
        with pytest.raises(HRSError, match=r"alias .* must be letters"):
            promote(storage, "demo", alias=alias)
    with pytest.raises(HRSError, match="model name 'a/b' must be"):
        promote(storage, "demo", name="a/b")
    connect(storage)[0].create_registered_model("foreign")
    connect(storage)[0].create_model_version("foreign", tmp_path.as_uri())
    with pytest.raises(HRSError, match="was not registered by `hrs promote`"):
        resolve_model(storage, "mlflow:foreign/1")


@pytest.mark.slow
def test_a_machine_that_shares_only_the_server_gets_the_model(
    storage: Storage, add_run: AddRun, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = subprocess.Popen(ui_command(storage, port=port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_health(port, lambda: server.poll() is None)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        key = add_run("hrs", 0, 1.9)
        assert promote(storage, "demo").version == 1
        elsewhere = open_storage(tmp_path_factory.mktemp("elsewhere"))
        found = resolve_model(elsewhere, "mlflow:hrs@champion")
        assert found.is_relative_to(elsewhere.root) and (found / "weights.safetensors").read_text() == key
        with pytest.raises(HRSError, match="has no alias 'best'"):
            resolve_model(elsewhere, "mlflow:hrs@best")
    finally:
        server.terminate()
        server.wait()
    assert not os.path.exists(storage.root / "models")
