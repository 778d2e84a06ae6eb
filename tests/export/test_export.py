"""The whole way on a run that was really trained: export, reload, score, alarm."""

import json
from pathlib import Path

import pytest
import torch

from hrs.config import ExperimentConfig
from hrs.data import TokenStore
from hrs.errors import HRSError
from hrs.evaluation import evaluate
from hrs.export import ExportResult, export, format_result, load, load_artifact
from hrs.export.as_built import export_as_built
from hrs.export.tensors import Grids
from hrs.presets import experiment
from hrs.training import load_model, train


@pytest.fixture(scope="module")
def run(small_corpus: Path, small_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"data.corpus": f"jsonl:{small_corpus}", "data.tokenizer": "bpe:300", "training.steps": 15}
    config: ExperimentConfig = experiment("dense_baseline", "micro", overrides=changes)
    directory = tmp_path_factory.mktemp("run")
    for _ in train(config, small_store, directory):
        pass
    return directory


def test_the_printed_score_is_that_of_the_file(run: Path, small_store: TokenStore, tmp_path: Path) -> None:
    (run / "audit.json").write_text(json.dumps({"causal": True, "tests": []}))
    result = export(run, tmp_path / "model.hrs", store=small_store)
    model, config = load(result.path)
    assert evaluate(model, small_store).bits_per_byte == result.artifact_bits_per_byte
    source, source_config = load(run)
    assert config == source_config
    assert evaluate(source, small_store).bits_per_byte == result.source_bits_per_byte != result.artifact_bits_per_byte
    assert abs(result.gap) < 0.002 and not result.leak_alarm
    assert result.size == result.path.stat().st_size and result.parameters == source.count_parameters()
    header = load_artifact(result.path).header
    assert header["source"] == {"bits_per_byte": result.source_bits_per_byte, "causal": True}
    assert header["data"]["fingerprint"] == small_store.fingerprint
    text = format_result(result)
    assert f"{result.artifact_bits_per_byte:.4f} (the file, read back)" in text and "ALARM" not in text
    assert json.loads(result.to_json())["gap"] == result.gap


def test_a_budget_and_calibration_are_kept_to(run: Path, small_store: TokenStore, tmp_path: Path) -> None:
    free = export(run, tmp_path / "free.hrs", store=small_store)
    budget = round(0.8 * free.size)
    tight = export(run, tmp_path / "tight.hrs", store=small_store, budget=budget, calibrate=8)
    assert tight.size <= budget and tight.bits_per_weight < free.bits_per_weight
    calibrated = [tensor["calibrated"] for tensor in load_artifact(tight.path).header["tensors"]]
    assert any(calibrated) and not calibrated[0], "layers are calibrated, the embedding is not"
    assert f"of {budget:,} allowed" in format_result(tight)
    with pytest.raises(HRSError, match="does not fit into 100 bytes"):
        export(run, tmp_path / "none.hrs", store=small_store, budget=100)
    assert not (tmp_path / "none.hrs").exists()


def test_a_gap_is_an_alarm_and_so_is_no_number() -> None:
    def result(score: float, causal: bool | None = True) -> ExportResult:
        return ExportResult(
            path=Path("m"),
            size=1,
            budget=None,
            parameters=1,
            bits_per_weight=8.0,
            grids=Grids(),
            calibration_windows=0,
            source_bits_per_byte=0.186,
            artifact_bits_per_byte=score,
            causal=causal,
            sha256="",
        )

    assert not result(0.2059).leak_alarm and result(0.2061).leak_alarm and result(float("nan")).leak_alarm
    assert "LEAK ALARM" in format_result(result(0.434)) and "NOT CAUSAL" in format_result(result(0.186, False))


def test_load_takes_directories_and_files(run: Path, tmp_path: Path) -> None:
    assert load(run)[1] == load_model(run)[1]
    with pytest.raises(HRSError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "weights.safetensors").write_bytes(bytes(64))
    with pytest.raises(HRSError, match="not an artifact"):
        load(tmp_path / "weights.safetensors")


def test_the_original_scheme_rounds_coarser_than_int8_by_rows(run: Path) -> None:
    state = load(run)[0].state_dict()
    name = "embedding.weight"
    floored, content = export_as_built(state, threshold=1023)
    free, larger = export_as_built(state, threshold=1023, floor=0.0)
    assert (floored[name] - state[name]).norm() > 3 * (free[name] - state[name]).norm() > 0
    assert len(content) < len(larger), "the floor is what makes its file small"
    untouched, _ = export_as_built(state)
    assert all(torch.equal(untouched[n], t.half().float()) for n, t in state.items()), "small tensors become float16"
