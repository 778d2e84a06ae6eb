from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_checks import weights

from hrs.config import PhaseConfig
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.training.optimizer import build_optimizer
from hrs.training.phases import check_phases, enter_phase, phase_at, phases_of


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 300))
def test_phases_cover_every_step_once_and_in_order(shares: list[int], steps: int) -> None:
    configs = [PhaseConfig(name=str(i), frac=share / sum(shares)) for i, share in enumerate(shares)]
    phases = phases_of(configs, steps)
    assert [phase.start for phase in phases] == [0] + [phase.end for phase in phases[:-1]] and phases[-1].end == steps
    indices = [phase_at(phases, step).index for step in range(steps)]
    assert indices == sorted(indices)
    for phase in phases:
        # Both ends are rounded by half a step; sums of six shares of 300 steps are off by at most 12 * 300 roundings.
        assert indices.count(phase.index) == pytest.approx(phase.config.frac * steps, rel=0, abs=1 + 1e-12)


def test_the_five_phases_of_50k_steps_begin_where_the_protocol_says(small_experiment) -> None:
    phases = phases_of(small_experiment("full_hrs").training.phases, 50_000)
    assert [phase.start for phase in phases] == [0, 8_000, 16_000, 26_000, 38_000]


def test_no_phases_mean_one_in_which_everything_learns() -> None:
    (phase,) = phases_of((), 5)
    assert (phase.start, phase.end, phase.multipliers) == (0, 5, {})


def _phase(**fields) -> tuple:
    return tuple(phases_of([PhaseConfig(name="p", frac=1.0, **fields)], 10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"multipliers": (("backbon", 1.0),)}, "unknown group backbon"),
        ({"freeze": ("engram.encodr",)}, "begins with 'engram.encodr'"),
        ({"reinitialise": ("nowhere",)}, "begins with 'nowhere'"),
        ({"multipliers": (("backbone", 0.0),)}, "let at least one group learn"),
    ],
)
def test_a_phase_that_cannot_mean_anything_is_refused(fields, message, small_experiment) -> None:
    model = build_model(small_experiment("dense_baseline").model)
    with pytest.raises(HRSError, match=message):
        check_phases(_phase(**fields), model)


def test_a_phase_may_name_a_known_group_that_this_model_lacks(small_experiment) -> None:
    check_phases(_phase(multipliers=(("engram", 0.0),)), build_model(small_experiment("dense_baseline").model))


def test_resting_parameters_do_not_move_while_the_others_learn(small_experiment, run, tmp_path: Path) -> None:
    """Neither decay nor old momentum reaches a group of multiplier 0, nor a frozen prefix."""
    phases = [
        {"name": "all", "frac": 0.5},
        {"name": "some", "frac": 0.5, "multipliers": [["router", 0.0]], "freeze": ["engram.encoder"]},
    ]
    changes = {"training.phases": phases, "training.optimizer.weight_decay": 0.5, "training.steps": 8}
    config = small_experiment("full_hrs", changes)
    run(config, tmp_path, checkpoint_every=4)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    halfway, end = weights(folders[0]), weights(folders[1])
    moved = {name for name in end if not torch.equal(halfway[name], end[name])}
    assert {name for name in end if ".router." in name or name.startswith("engram.encoder")}.isdisjoint(moved)
    assert {"embedding.weight", "engram.type_embedding"} <= moved


def test_a_resting_group_has_no_moments(small_experiment, run, tmp_path: Path) -> None:
    from hrs.training.checkpoint import read_latest

    run(small_experiment("full_core", {"training.steps": 4}), tmp_path)
    with_moments = read_latest(tmp_path).trainer
    assert any(name.startswith("moments/exp_avg/embedding") for name in with_moments)
    multipliers = [["engram", 0.0]]
    phases = [{"name": "only", "frac": 1.0, "multipliers": multipliers}]
    run(small_experiment("full_hrs", {"training.steps": 4, "training.phases": phases}), tmp_path / "engram")
    assert not [name for name in read_latest(tmp_path / "engram").trainer if "engram." in name]


def test_parameters_are_drawn_anew_only_at_the_first_step_of_the_phase(small_experiment) -> None:
    model = build_model(small_experiment("full_hrs").model)
    optimizer = build_optimizer(model, small_experiment().training.optimizer)
    (phase,) = _phase(reinitialise=("engram.type_embedding",))
    before = model.engram.type_embedding.detach().clone()
    enter_phase(phase, 3, model, optimizer)  # resumed in the middle
    assert torch.equal(model.engram.type_embedding, before)
    torch.manual_seed(5)
    enter_phase(phase, 0, model, optimizer)
    torch.manual_seed(5)
    assert torch.equal(model.engram.type_embedding, torch.empty(before.shape).normal_(0.0, 0.02))


def test_a_parameter_drawn_anew_forgets_its_moments(small_experiment) -> None:
    config = small_experiment("full_hrs")
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.training.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (phase,) = _phase(reinitialise=("engram.type_embedding",))
    enter_phase(phase, 0, model, optimizer)
    forgotten = [name for name, parameter in model.named_parameters() if parameter not in optimizer.state]
    assert forgotten == ["engram.type_embedding"]
