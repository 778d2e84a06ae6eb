"""When models are compiled, and what happens where that fails."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_checks import different, largest_gap, weights

from hrs.models import build_model
from hrs.presets import experiment
from hrs.training import Runtime, train
from hrs.training.optimizer import build_optimizer
from hrs.training.runtime import missing_compiler
from hrs.training.step import Stepper

GPU = torch.device("cuda", 0)


def test_the_cpu_compiles_only_when_asked_and_a_gpu_if_it_can(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    assert not Runtime().compiles(torch.device("cpu")) and Runtime(compile=True).compiles(torch.device("cpu"))
    monkeypatch.setattr("hrs.training.runtime.missing_compiler", lambda: None)
    assert Runtime().compiles(GPU) and not Runtime(compile=False).compiles(GPU) and not caplog.records
    assert not Runtime().compiles(GPU, lazy_experts=True)
    monkeypatch.setattr("hrs.training.runtime.missing_compiler", lambda: "Triton is not installed")
    assert not Runtime().compiles(GPU)
    assert [r.message for r in caplog.records] == [
        "training uncompiled: lazily updated experts need sparse gradients",
        "training uncompiled: Triton is not installed",
    ]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert missing_compiler() == "there is no C compiler (cc, gcc or clang) on PATH"
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h is missing" in missing_compiler()
    (tmp_path / "Python.h").touch()
    assert missing_compiler() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_compiler() == "Triton is not installed"


@pytest.mark.parametrize("preset", ["dense_baseline", pytest.param("full_hrs", marks=pytest.mark.slow)])
def test_compiled_steps_agree_with_plain_ones(preset: str, small_experiment, small_store, tmp_path: Path) -> None:
    """Traced by torch.compile and its autograd, run without generated code: the same up to rounding."""
    real, torch_compile = torch.compile, lambda function: real(function, backend="aot_eager")
    config = small_experiment(preset, {"training.steps": 3, "training.validations": 0, "training.phases": []})
    for name, compiled in (("plain", False), ("compiled", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", torch_compile)
            list(train(config, small_store, tmp_path / name, Runtime(device="cpu", compile=compiled)))
    assert largest_gap(weights(tmp_path / "plain"), weights(tmp_path / "compiled")) < 1e-4


def test_where_compiling_fails_by_default_training_goes_on_without(
    small_experiment, small_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """The failed step is done again from the same random state: the run equals one that was never compiled."""

    def broken(graph, inputs):  # type: ignore[no-untyped-def]
        raise RuntimeError("no such instruction")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=broken))
    config = small_experiment("dense_baseline", {"training.steps": 2, "training.validations": 0, "model.dropout": 0.1})
    list(train(config, small_store, tmp_path / "plain", Runtime(device="cpu")))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        list(train(config, small_store, tmp_path / "asked", Runtime(device="cpu", compile=True)))
    monkeypatch.setattr(Runtime, "compiles", lambda self, device, **_: True)
    list(train(config, small_store, tmp_path / "default", Runtime(device="cpu")))
    assert different(weights(tmp_path / "plain"), weights(tmp_path / "default")) == []
    assert [r for r in caplog.records if "training uncompiled" in r.message]


@pytest.mark.slow
def test_nine_models_are_compiled_one_after_another_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm worker trains one preset after another; eight compilations of ``encode`` used to be all there were."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(name)
        return graph.forward  # only that it was traced matters here, not the code made of it

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=backend))
    names = ("dense_baseline", "dual_head", "dual_head_router", "full_core", "v2_attn_conv", "kernel_exponential",
             "attention_alibi", "attention_learned", "v16_peer_engram")  # fmt: skip
    for name in names:
        config = experiment(name, "micro", overrides={"data.tokenizer": "bpe:257", "model.n_layers": 3})
        training = dataclasses.replace(config.training, batch_sequences=2)
        model = build_model(config.model).train()
        optimizer = build_optimizer(model, training.optimizer)
        stepper = Stepper(model, optimizer, training, torch.device("cpu"), 2, compiled=True)
        windows = torch.randint(257, (2, config.model.max_seq_len + 1))
        assert stepper.step(windows) is not None
        assert name in compiled, f"{name} was trained uncompiled, after {len(set(compiled))} models"
    assert len(set(compiled)) == 9
