"""Averages of the weights: what they hold, what they leave alone, which one is kept, and how they survive."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_checks import curve, different, weights

from hrs.config import AveragingConfig
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.models.geometry import TokenGeometry
from hrs.training import Runtime, latest_checkpoint, load_model, train
from hrs.training.averaging import Averages
from hrs.training.checkpoint import read_checkpoint, read_latest
from hrs.training.memory import estimate_peak
from hrs.training.validation import Validation

CPU = torch.device("cpu")
DECAYS = (0.5, 0.9)
AVERAGED = {"training.averaging.decays": DECAYS}
PHASES = [
    {"name": "first", "frac": 0.5, "multipliers": [["expert", 0.0]]},
    {"name": "second", "frac": 0.5, "reinitialise": ["blocks.0.attention"]},
]
LAZY = {"training.optimizer.expert_updates": "lazy", "training.phases": PHASES, "model.n_layers": 2}
"""Tables updated by rows, a group that rests, and parameters drawn anew in the middle."""
WORSENS = {"training.schedule.peak_lr": 3.0, "training.schedule.warmup_frac": 1.0}
"""Rates so high at the end that the best validation lies in the middle."""
REMEMBERS = "dense_memory"
"""Its blocks read buffers that every step of training moves."""


def last_weights(directory: Path) -> dict[str, Tensor]:
    """The weights that learned."""
    return load_model(directory, "last")[0].state_dict()


def averages_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = read_latest(directory)
    assert checkpoint is not None
    return checkpoint.averages


# ---- the average -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "start_frac"),
    [("full_hrs_trc", {"model.n_layers": 3}, 0.25), ("v17_peer_only", LAZY, 0.0), ("dense_baseline", {}, 1.0)],
)
def test_averages_equal_the_recursion_over_the_weights_of_every_step(
    preset, changes, start_frac, small_experiment, small_store, tmp_path: Path
) -> None:
    """Reference: a <- d a + (1 - d) w in float64 over the weights read back from a checkpoint of every step."""
    config = small_experiment(preset, AVERAGED | changes | {"training.averaging.start_frac": start_frac})
    torch.manual_seed(config.seed)
    seen = [{name: w.clone() for name, w in build_model(config.model).state_dict().items()}]
    for _ in train(config, small_store, tmp_path, Runtime(device="cpu", log_every=1, checkpoint_every=1)):
        if latest_checkpoint(tmp_path):
            seen.append(last_weights(tmp_path))
    seen.append(last_weights(tmp_path))
    assert len(seen) == 13
    start, averages = round(12 * start_frac), averages_of(tmp_path)
    names = {name for name, _ in build_model(config.model).named_parameters()}
    assert set(averages) == {f"{d}/{name}" for d in DECAYS for name in names}
    for decay in DECAYS:
        for name in names:
            expected = seen[start][name].double()
            for later in seen[start + 1 :]:
                expected = decay * expected + (1 - decay) * later[name].double()
            torch.testing.assert_close(averages[f"{decay}/{name}"].double(), expected, atol=1e-6, rtol=0)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(0.0))

    def move(self, by: float) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(by)
        self.count += 1


def averages_and_model(decays=DECAYS, steps: int = 10, **config) -> tuple[Averages, _Tied]:
    torch.manual_seed(0)
    model = _Tied()
    return Averages(AveragingConfig(decays=decays, **config), model, steps), model


def test_tied_parameters_are_averaged_once_and_change_places_together() -> None:
    averages, model = averages_and_model(decays=(0.5,))
    averages.follow(0, updated=False)
    before = model.head.weight.detach().clone()
    model.move(2.0)
    averages.follow(1, updated=True)
    assert set(averages.tensors()) == {"0.5/embedding.weight", "0.5/head.bias"}
    with averages.in_place_of_weights(0.5):
        assert model.head.weight is model.embedding.weight
        torch.testing.assert_close(model.head.weight.detach(), before + 1.0)


def test_a_skipped_step_moves_no_average_but_may_begin_them() -> None:
    averages, model = averages_and_model(start_frac=0.2)
    averages.follow(0, updated=False)
    averages.follow(1, updated=True)
    assert averages.tensors() == {}
    model.move(1.0)
    averages.follow(2, updated=False)
    assert all(torch.equal(value, model.state_dict()[name.split("/")[1]]) for name, value in averages.tensors().items())
    before = {name: value.clone() for name, value in averages.tensors().items()}
    model.move(1.0)
    averages.follow(3, updated=False)
    assert different(averages.tensors(), before) == []
    averages.follow(4, updated=True)
    assert len(different(averages.tensors(), before)) == 4


def test_a_step_that_is_not_finite_is_no_update_of_an_average(
    small_experiment, small_store, tmp_path: Path, monkeypatch
) -> None:
    from hrs.training import step

    real, calls = step.cross_entropy, [0]

    def poisoned(*args, **kwargs) -> Tensor:
        calls[0] += 1
        return real(*args, **kwargs) * (float("nan") if calls[0] == 5 else 1.0)

    monkeypatch.setattr("hrs.training.step.cross_entropy", poisoned)
    config = small_experiment("dense_baseline", AVERAGED | {"training.validations": 0})
    seen = []
    for _ in train(config, small_store, tmp_path, Runtime(device="cpu", log_every=1, checkpoint_every=1)):
        seen.append(averages_of(tmp_path) if latest_checkpoint(tmp_path) else {})
    assert different(seen[4], seen[5]) == []  # after 4 and after 5 steps
    assert different(seen[3], seen[4]) and different(seen[5], seen[6])


def test_without_decays_nothing_is_done() -> None:
    averages, model = averages_and_model(decays=())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    averages.follow(0, updated=False)
    averages.follow(1, updated=True)
    assert averages.validate(lambda: pytest.fail("there is nothing to validate"), 1) == {}
    averages.finish(10)
    assert averages.tensors() == {} and averages.kept is None
    assert different(model.state_dict(), before) == []


# ---- what they leave alone -------------------------------------------------------------------------------------------


def test_after_an_exchange_every_bit_and_every_address_is_what_it_was() -> None:
    averages, model = averages_and_model(decays=(0.9,))
    averages.follow(0, updated=False)
    model.move(0.1)
    averages.follow(1, updated=True)
    tensors = dict(model.named_parameters())
    bits, addresses = ({n: f(p) for n, p in tensors.items()} for f in (lambda p: p.detach().clone(), Tensor.data_ptr))
    with pytest.raises(ZeroDivisionError), averages.in_place_of_weights(0.9):
        assert all(not torch.equal(tensors[name], bits[name]) for name in tensors)
        raise ZeroDivisionError
    assert {n: p.data_ptr() for n, p in tensors.items()} == addresses
    assert different(dict(model.named_parameters()), bits) == []


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("full_hrs_trc", {"model.engram.dropout": 0.5, "model.n_layers": 3}), (REMEMBERS, {}), ("v17_peer_only", LAZY)],
)
def test_averaging_changes_neither_weights_nor_curve(
    preset, changes, small_experiment, small_store, run, tmp_path: Path
) -> None:
    """With validations at half the steps, each of which exchanges the weights twice; dropout and noise draw on."""
    plain = small_experiment(preset, changes | {"training.validations": 6})
    averaged = small_experiment(preset, changes | AVERAGED | {"training.validations": 6})
    before = curve(run(plain, tmp_path / "plain"))
    after = curve(run(averaged, tmp_path / "averaged"))
    assert different(weights(tmp_path / "plain"), last_weights(tmp_path / "averaged")) == []
    ema = {f"validation_loss_ema_{d}" for d in DECAYS}
    assert {s: {k: v for k, v in m.items() if k not in ema} for s, m in after.items()} == before
    assert {s for s, m in after.items() if ema <= set(m)} == {2, 4, 6, 8, 10, 12}
    assert not [path.name for path in (tmp_path / "plain").rglob("*.safetensors") if path.stem in ("averages", "kept")]


# ---- the one that is kept --------------------------------------------------------------------------------------------


def scripted(losses: list[float], **config) -> Averages:
    """Averages that two validations per line of ``losses`` judged: one for each decay."""
    averages, model = averages_and_model(**config)
    averages.follow(0, updated=False)
    values = iter(losses)
    for step in range(1, len(losses) // 2 + 1):
        model.move(1.0)
        averages.follow(step, updated=True)
        averages.validate(lambda: next(values), step)
    return averages


@pytest.mark.parametrize(
    ("losses", "step", "decay"),
    [
        ([3.0, 2.0, 2.5, 2.1], 1, 0.9),
        ([3.0, 2.0, 1.9, 1.8, 1.7, 1.9], 3, 0.5),
        ([2.0, 2.0, 2.0, 2.0], 1, 0.5),  # the earlier of equals
        ([float("nan"), float("inf"), 5.0, float("nan")], 2, 0.5),
    ],
)
def test_the_lowest_validation_loss_is_kept(losses, step: int, decay: float) -> None:
    """The weights are those at that step: they moved by 1 a step, and the average of decay d is behind by its lag."""
    averages = scripted(losses)
    averages.finish(10)
    kept = averages.kept
    assert kept is not None and (kept.step, kept.decay, kept.loss) == (step, decay, min(x for x in losses if x == x))
    average = 0.0
    for value in range(1, step + 1):
        average = decay * average + (1 - decay) * value
    torch.manual_seed(0)
    torch.testing.assert_close(kept.weights["head.bias"], _Tied().head.bias.detach() + average)
    assert kept.weights["count"] == step


@pytest.mark.parametrize("config", [{"keep": "last"}, {"keep": "best"}])
def test_without_a_best_the_first_decay_at_the_last_step_is_kept(config) -> None:
    averages = scripted([float("nan")] * 4 if config["keep"] == "best" else [3.0, 2.0, 2.0, 1.0], **config)
    assert averages.kept is None
    averages.finish(2)
    kept = averages.kept
    assert kept is not None and (kept.step, kept.decay, kept.loss) == (2, 0.5, None)
    assert torch.equal(kept.weights["head.bias"], averages.tensors()["0.5/head.bias"])


def test_before_the_start_only_the_weights_are_validated(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment(changes=AVERAGED | {"training.averaging.start_frac": 1.0, "training.validations": 3})
    reports = {p.step: p.metrics for p in run(config, tmp_path, checkpoint_every=4)}
    named = {step: {k for k in metrics if "validation_loss" in k} for step, metrics in reports.items()}
    assert named[4] == named[8] == {"validation_loss"} and len(named[12]) == 3
    assert len({reports[12][name] for name in named[12]}) == 1  # copies of the weights
    assert not (tmp_path / "checkpoints" / "step_00000008" / "averages.safetensors").exists()
    assert different(weights(tmp_path), last_weights(tmp_path)) == []


@pytest.mark.parametrize(
    ("preset", "changes"),
    [(REMEMBERS, {}), ("v17_peer_only", LAZY), ("full_hrs_trc", {"training.phases": [], "model.n_layers": 3})],
)
def test_a_run_is_evaluated_with_the_best_average_it_reported(
    preset, changes, small_experiment, small_store, run, tmp_path: Path
) -> None:
    """A fresh model scores it anew."""
    config = small_experiment(preset, AVERAGED | changes | WORSENS | {"training.validations": 6})
    reports = run(config, tmp_path)
    losses = {
        (p.step, decay): p.metrics[f"validation_loss_ema_{decay}"]
        for p in reports
        for decay in DECAYS
        if "validation_loss" in p.metrics
    }
    step, decay = min(losses, key=losses.__getitem__)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert (summary["kept_step"], summary["kept_decay"]) == (step, decay)
    assert step < 12
    validation = Validation(small_store.validation, config)
    model, _ = load_model(tmp_path)
    assert validation.loss(model, CPU, 4) == losses[step, decay]
    assert different(model.state_dict(), load_model(tmp_path, "averaged")[0].state_dict()) == []
    last, _ = load_model(tmp_path, "last")
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert not buffers or set(buffers) & set(different(model.state_dict(), last.state_dict()))
    assert validation.loss(last, CPU, 4) == reports[-1].metrics["validation_loss"] > losses[step, decay]


def test_the_last_average_is_kept_if_asked_for(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment(changes=AVERAGED | {"training.averaging.keep": "last"})
    run(config, tmp_path)
    averages = averages_of(tmp_path)
    assert all(torch.equal(value, averages[f"0.5/{name}"]) for name, value in weights(tmp_path).items())
    summary = json.loads((tmp_path / "training.json").read_text())
    assert (summary["kept_step"], summary["kept_decay"]) == (12, 0.5)


def test_a_run_without_validations_is_evaluated_with_the_last_average(small_experiment, run, tmp_path: Path) -> None:
    run(small_experiment(changes=AVERAGED | {"training.validations": 0}), tmp_path)
    averages = averages_of(tmp_path)
    assert all(torch.equal(value, averages[f"0.5/{name}"]) for name, value in weights(tmp_path).items())


def test_a_run_without_averages_is_evaluated_with_its_weights(small_experiment, run, tmp_path: Path) -> None:
    run(small_experiment(), tmp_path)
    assert different(weights(tmp_path), last_weights(tmp_path)) == []
    summary = json.loads((tmp_path / "training.json").read_text())
    assert (summary["kept_step"], summary["kept_decay"]) == (None, None)
    with pytest.raises(HRSError, match="holds no averaged weights"):
        load_model(tmp_path, "averaged")


# ---- what survives ---------------------------------------------------------------------------------------------------


def test_a_run_resumed_anywhere_has_the_same_averages_and_keeps_the_same(
    small_experiment, small_store, tmp_path: Path
) -> None:
    """Lazy tables, a phase that draws anew at 4, dropout; averages begin at 2, validations are at 2, 4, 6 and 8."""
    changes = {"training.averaging.start_frac": 1 / 4, "training.validations": 4, "training.steps": 8}
    config = small_experiment("v17_peer_only", AVERAGED | LAZY | WORSENS | changes)
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=3)
    undisturbed = curve(list(train(config, small_store, tmp_path / "0", runtime)))
    expected = read_latest(tmp_path / "0")
    assert expected is not None and expected.state["kept"]["step"] in (
        2,
        4,
        6,
    )  # one that a resumed run cannot make anew
    for stop_after in range(1, 9):
        directory, reports = tmp_path / str(stop_after), []
        for progress in train(config, small_store, directory, runtime):
            reports.append(progress)
            if progress.step == stop_after:
                break
        torch.manual_seed(99)  # another process would not have this one's generator
        reports += train(config, small_store, directory, runtime)
        assert curve(reports) == undisturbed, stop_after
        resumed = read_latest(directory)
        assert resumed is not None and resumed.state["kept"] == expected.state["kept"], stop_after
        for name in ("weights", "averages", "kept"):
            assert different(getattr(resumed, name), getattr(expected, name)) == [], (stop_after, name)


@pytest.mark.parametrize("name", ["averages.safetensors", "kept.safetensors"])
def test_a_damaged_file_of_averages_is_refused(name: str, small_experiment, run, tmp_path: Path) -> None:
    run(small_experiment(changes=AVERAGED | {"training.steps": 2}), tmp_path)
    path = tmp_path / "checkpoints" / "step_00000002"
    assert load_file(path / name)
    (path / name).unlink()
    with pytest.raises(HRSError, match=f"damaged: {name}"):
        read_checkpoint(path)


def test_memory_counts_a_copy_per_average_and_the_kept_one_where_it_lies(small_experiment) -> None:
    plain, averaged = small_experiment(), small_experiment(changes=AVERAGED)
    for device, copies in (("cpu", 3), ("cuda", 2)):
        before, after = (estimate_peak(config, 1, Runtime(device=device)) for config in (plain, averaged))
        assert before.average_bytes == 0
        assert after.peak_bytes - before.peak_bytes == after.average_bytes == copies * before.parameter_bytes


# ---- the geometry ----------------------------------------------------------------------------------------------------


def test_a_new_run_of_the_manifold_family_needs_a_geometry(small_experiment, run, tmp_path: Path) -> None:
    with pytest.raises(HRSError, match="geometry of its tokens"):
        run(small_experiment(changes={"model.family": "manifold"}), tmp_path)


def test_the_geometry_reaches_the_model(small_experiment, small_store, tmp_path: Path, monkeypatch) -> None:
    given = TokenGeometry(torch.zeros(300, 4), torch.zeros(300, 2, dtype=torch.int64))
    built = []

    def build(config, geometry):
        built.append(geometry)
        return build_model(config)

    monkeypatch.setattr("hrs.training.loop.build_model", build)
    config = small_experiment(changes={"training.steps": 1})
    list(train(config, small_store, tmp_path, Runtime(device="cpu"), given))
    assert built == [given]
