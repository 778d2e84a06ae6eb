"""Steps whose finiteness the host looks at later have the results of steps that it waits for, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_checks import curve, different

from hrs.errors import HRSError
from hrs.training import Runtime, load_model, train
from hrs.training.checkpoint import read_latest

LAZY = {"training.optimizer.expert_updates": "lazy", "model.n_layers": 2}
AVERAGED = {"training.averaging.decays": (0.5, 0.9), "training.averaging.start_frac": 0.2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "averaged": ("dense_baseline", AVERAGED),
    "routed": ("full_hrs", {"training.phases": []}),
    "lazy experts": ("v17_unphased", LAZY),
    "slots": ("dense_memory", {}),
    "slots as in the original": ("v18_cross_attn_legacy", {"model.n_layers": 3, "training.phases": []}),
    "observed losses": ("v5_replace_legacy", {"model.n_layers": 3, "training.phases": []}),
    "unclipped": ("dense_baseline", {"training.optimizer.clip_norm": 0.0}),
}


class _Poisoned:
    """A cross-entropy that is not finite in the given steps, gradients included."""

    def __init__(self, steps: set[int]) -> None:
        from hrs.training.loss import cross_entropy

        self.steps, self.count, self.real = steps, -1, cross_entropy

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.real(*args, **kwargs)
        self.count += torch.is_grad_enabled()
        return loss * float("inf") if self.count in self.steps and torch.is_grad_enabled() else loss


@pytest.mark.parametrize("case", CASES)
def test_looking_later_changes_not_a_bit(
    case: str, small_experiment, small_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, averages, what engrams remember, reports and counters; steps 0, 4 and 5 are not finite."""
    preset, changes = CASES[case]
    config = small_experiment(preset, {"training.steps": 8} | changes)
    reports, checkpoints = {}, {}
    for name, check_every in (("waits", None), ("looks later", 3)):
        monkeypatch.setattr("hrs.training.step.cross_entropy", _Poisoned({0, 4, 5}))
        runtime = Runtime(device="cpu", log_every=4, check_every=check_every)
        reports[name] = curve(list(train(config, small_store, tmp_path / name, runtime)))
        checkpoints[name] = read_latest(tmp_path / name)
    left, right = checkpoints["waits"], checkpoints["looks later"]
    assert reports["looks later"] == reports["waits"]
    assert reports["waits"][8]["skipped_steps"] == 3
    for tensors in ("weights", "trainer", "averages"):
        assert different(getattr(left, tensors), getattr(right, tensors)) == []
    for counter in ("skipped_steps", "skipped_in_a_row", "interval"):
        assert left.state[counter] == right.state[counter]


def test_ten_bad_steps_in_a_row_stop_the_run_at_the_next_look(
    small_experiment, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the tenth step; the weights are those before the first."""
    config = small_experiment("dense_baseline", {"training.steps": 30, "training.validations": 0})
    monkeypatch.setattr("hrs.training.step.cross_entropy", _Poisoned({1, *range(5, 30)}))
    with pytest.raises(HRSError, match="10 steps in a row, up to step 14"):
        run(config, tmp_path, checkpoint_every=5, log_every=30, check_every=7)
    assert all(w.isfinite().all() for w in load_model(tmp_path)[0].state_dict().values())


def test_a_run_goes_on_counting_where_it_was_ended(
    small_experiment, small_store, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine bad steps, a checkpoint in between, and the tenth: a look before a checkpoint leaves nothing uncounted."""
    config = small_experiment("dense_baseline", {"training.steps": 30, "training.validations": 0})
    monkeypatch.setattr("hrs.training.step.cross_entropy", _Poisoned(set(range(3, 30))))
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=5, check_every=100)
    for progress in train(config, small_store, tmp_path, runtime):
        if progress.step == 6:
            break
    state = read_latest(tmp_path).state
    assert (state["step"], state["skipped_steps"], state["skipped_in_a_row"]) == (5, 2, 2)
    monkeypatch.setattr("hrs.training.step.cross_entropy", _Poisoned(set(range(30))))
    with pytest.raises(HRSError, match="10 steps in a row, up to step 12"):
        run(config, tmp_path, checkpoint_every=5, log_every=30, check_every=4)
    assert not (tmp_path / "training.json").exists()
