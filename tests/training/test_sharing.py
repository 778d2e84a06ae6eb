"""A run is the same whether one process computes all parts of a batch or several compute one each."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from sharing_processes import Pair, exchanged, sent_during_backward, shared_training
from test_training import LOGITS, _SmallCard
from torch import Tensor
from training_checks import different, largest_gap, weights

from hrs.data import TrainingWindows
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.training import Runtime
from hrs.training.checkpoint import read_latest
from hrs.training.loss import cross_entropy
from hrs.training.memory import predict_peak
from hrs.training.optimizer import build_optimizer
from hrs.training.step import Stepper

QUIET = {
    "model.dropout": 0.0,
    "model.locality.enabled": False,
    "training.steps": 4,
    "training.validations": 1,
    "training.label_smoothing": 0.0,
    "training.schedule.warmup_frac": 0.0,
    "training.optimizer.eps": 1e-3,  # else Adam turns the rounding of tiny gradients into whole steps
}
LAZY = {"training.optimizer.expert_updates": "lazy"}
NOISE = 5
SLOW_COMPILATION = pytest.param({"compile": True}, marks=pytest.mark.slow)
TWO = {"training.sharing.workers": 2}


def sharing(*unshared: str, workers: int = 2) -> dict[str, object]:
    return {"training.sharing.workers": workers, "training.sharing.unshared": list(unshared)}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    processes = Pair()
    yield processes
    processes.close()


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
def test_sharing_everything_changes_nothing(workers: int, small_experiment, run, tmp_path: Path) -> None:
    alone = run(small_experiment(changes=QUIET), tmp_path / "alone")
    shared = run(small_experiment(changes=QUIET | sharing(workers=workers)), tmp_path / "shared")
    assert largest_gap(weights(tmp_path / "alone"), weights(tmp_path / "shared")) < 1e-6
    for name in ("train_loss", "grad_norm"):
        assert [p.metrics[name] for p in shared] == pytest.approx([p.metrics[name] for p in alone], abs=1e-5)


def gradients_by_hand(config, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Of each half of the batch, in one pass with a seed of its own, without anything of the stepper."""
    found = []
    torch.manual_seed(NOISE)
    for half, seed in zip(tokens.chunk(2), torch.randint(2**62, (2,)).tolist(), strict=True):
        torch.manual_seed(0)
        model = build_model(config.model).train()
        torch.manual_seed(seed)
        output = model.encode(half[:, :-1])
        loss = cross_entropy(model.unembed, output.hidden, half[:, 1:], vocab_size=model.vocab_size)
        sum(output.losses.values(), loss).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize(
    ("preset", "unshared", "micro_batch"),
    [
        ("dual_head_router", (), 2),
        ("dual_head_router", ("router",), 2),
        ("full_core", ("router", "expert"), 2),
        ("dense_baseline", ("backbone",), 1),
        ("dense_baseline", ("backbone",), 2),
    ],
)
def test_unshared_groups_get_the_gradient_of_the_first_part(
    preset: str, unshared: tuple[str, ...], micro_batch: int, small_experiment, small_store
) -> None:
    config = small_experiment(preset, QUIET | sharing(*unshared))
    tokens = torch.from_numpy(TrainingWindows(small_store.train.tokens, 16, 4, 0).batch(3))
    first, second = gradients_by_hand(config, tokens)
    torch.manual_seed(0)
    model = build_model(config.model).train()
    stepper = Stepper(
        model, build_optimizer(model, config.training.optimizer), config.training, torch.device("cpu"), micro_batch
    )
    torch.manual_seed(NOISE)
    stepper.accumulate(tokens)
    groups = {id(p): group for group, parameters in model.parameter_groups().items() for p in parameters}
    apart = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in first and name not in second
            continue
        own = groups[id(parameter)] in unshared
        expected = first[name] if own else (first[name] + second[name]) / 2
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
        apart += own and not torch.allclose(first[name], second[name], rtol=1e-2)
    assert bool(apart) == bool(unshared), "the parts' gradients differ, or the test shows nothing"


def test_lazy_experts_can_be_unshared(small_experiment, run, tmp_path: Path) -> None:
    """Sparse gradients of two parts, or of the first one."""
    changes = QUIET | LAZY
    for name, unshared in (("shared", ()), ("own", ("expert",))):
        run(small_experiment("v17_peer_only", changes | sharing(*unshared)), tmp_path / name)
    run(small_experiment("v17_peer_only", changes), tmp_path / "alone")
    alone = weights(tmp_path / "alone")
    assert largest_gap(alone, weights(tmp_path / "shared")) < 1e-6
    assert largest_gap(alone, weights(tmp_path / "own")) > 1e-3


def test_every_part_has_noise_of_its_own_and_the_run_has_one_generator(small_experiment, small_store) -> None:
    config = small_experiment("dense_baseline", {"model.dropout": 0.5} | TWO)
    model = build_model(config.model).train()
    stepper = Stepper(model, build_optimizer(model, config.training.optimizer), config.training, torch.device("cpu"), 2)
    half = torch.from_numpy(TrainingWindows(small_store.train.tokens, 16, 2, 0).batch(0))
    states = []
    for micro_batch in (2, 1):
        torch.manual_seed(1)
        stepper.micro_batch = micro_batch
        second, first = stepper.accumulate(half.repeat(2, 1))[0]["train_loss"][:2]
        states.append(torch.get_rng_state())
    assert second != first
    assert torch.equal(*states), "what a part draws must not move the generator that all workers share"


def test_running_out_of_memory_repeats_all_parts(small_experiment, run, tmp_path: Path) -> None:
    """With noise, unshared groups and smaller micro-batches: to the bit as if told to use them."""
    config = small_experiment("full_hrs", {"training.steps": 4} | sharing("router", "expert"))
    run(config, tmp_path / "told", micro_batch=1)
    with _SmallCard(LOGITS) as card:
        run(config, tmp_path / "found")
    assert card.failures == 1
    assert different(weights(tmp_path / "told"), weights(tmp_path / "found")) == []


def test_what_fits_the_memory_is_cut_to_a_part(small_experiment, run, tmp_path: Path) -> None:
    config = small_experiment(changes={"training.steps": 1} | TWO)
    run(config, tmp_path, memory_limit_bytes=predict_peak(config, 4, Runtime(device="cpu")))
    assert json.loads((tmp_path / "training.json").read_text())["micro_batch"] == 2


@pytest.mark.parametrize("execution", [{"activation_checkpointing": True}, SLOW_COMPILATION])
def test_unshared_groups_do_not_depend_on_the_execution(execution, small_experiment, run, tmp_path: Path) -> None:
    changes = QUIET | {"model.n_layers": 2, "training.steps": 2, "training.validations": 0} | sharing("expert")
    config = small_experiment("v17_peer_only", changes)
    run(config, tmp_path / "plain")
    run(config, tmp_path / "other", **execution)
    assert largest_gap(weights(tmp_path / "plain"), weights(tmp_path / "other")) < 1e-5


@pytest.mark.parametrize(
    ("changes", "runtime", "message"),
    [
        (sharing("hops"), {}, "unknown group hops; this model has backbone"),
        (TWO, {"micro_batch": 4}, "micro_batch 4 must divide batch 2 of each of 2 workers"),
    ],
)
def test_what_cannot_be_is_refused(changes, runtime, message: str, small_experiment, run, tmp_path: Path) -> None:
    with pytest.raises(HRSError, match=message):
        run(small_experiment(changes=changes), tmp_path, **runtime)


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def both_ways(pair: Pair, small_store, run, tmp_path: Path) -> Callable[..., float]:
    """Train in one process and in two; the largest difference of any weight, after comparing what they report."""

    def train_both(config, trouble: str = "", **runtime) -> float:
        reports = run(config, tmp_path / "one", **runtime)
        execution = Runtime(device="cpu", log_every=1, **runtime)
        (first, second) = pair(shared_training, config, small_store, tmp_path / "two", execution, trouble)
        assert first[1] == second[1] == "" and second[0] == []
        for (step, metrics), p in zip(first[0], reports, strict=True):
            assert step == p.step and metrics.keys() == p.metrics.keys()
            for name in metrics.keys() - {"tokens_per_second"}:
                assert metrics[name] == pytest.approx(p.metrics[name], rel=1e-4, abs=1e-5), name
        one, two = (read_latest(tmp_path / name) for name in ("one", "two"))
        assert torch.equal(one.trainer["rng/cpu"], two.trainer["rng/cpu"])
        return largest_gap(one.weights, two.weights)

    return train_both


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("dense_baseline", QUIET | TWO),
        ("full_hrs", QUIET | sharing("router", "expert")),
        ("full_hrs", {"training.steps": 4, "training.optimizer.eps": 1e-3} | sharing("backbone")),  # all its noise
        pytest.param("v17_peer_only", QUIET | TWO | LAZY, marks=pytest.mark.slow),
        ("v17_peer_only", QUIET | sharing("expert") | LAZY),
    ],
)
def test_two_processes_learn_what_one_does(preset: str, changes, small_experiment, both_ways) -> None:
    assert both_ways(small_experiment(preset, changes)) < 1e-6


def test_what_a_model_remembers_is_the_first_workers(small_experiment, both_ways) -> None:
    """Slots of a memory, filled by passes and kept in buffers."""
    config = small_experiment("dense_memory", QUIET | TWO)
    assert "engram.slots" in build_model(config.model).state_dict()
    assert both_ways(config) < 1e-6


def test_a_worker_with_less_memory_takes_smaller_steps_alone(small_experiment, both_ways) -> None:
    assert both_ways(small_experiment(changes=QUIET | TWO), "small card") < 1e-6


RESTING = [
    {"name": "first", "frac": 0.5, "multipliers": [["engram", 0.0]]},
    {"name": "second", "frac": 0.5, "freeze": ["engram.encoder"]},
]


def test_gradients_that_come_and_go_with_phases_are_exchanged(small_experiment, both_ways) -> None:
    """In the first step of a phase other gradients are made than those that were sent during the pass before."""
    assert both_ways(small_experiment("full_hrs", QUIET | TWO | {"training.phases": RESTING})) < 1e-6


def test_gradients_sent_before_memory_ran_out_are_sent_again(
    pair: Pair, small_experiment, small_store, tmp_path: Path
) -> None:
    """The repeated passes have smaller micro-batches and other noise, so that what was sent is not what was learned."""
    config = small_experiment("dense_baseline", {"training.steps": 5, "model.dropout": 0.5} | TWO)
    for name in ("full in backward", "full in backward, late"):
        pair(shared_training, config, small_store, tmp_path / name, Runtime(device="cpu", log_every=1), name)
    assert different(weights(tmp_path / "full in backward"), weights(tmp_path / "full in backward, late")) == []


def test_buckets_are_sent_during_the_backward_pass(pair: Pair, small_experiment, small_store, tmp_path: Path) -> None:
    config = small_experiment("full_hrs", QUIET | TWO | {"training.phases": RESTING})
    runtime = Runtime(device="cpu", log_every=1)
    for rank, counts in enumerate(pair(sent_during_backward, config, small_store, tmp_path, runtime)):
        if rank == 0:  # the other one reports nothing, so that its steps cannot be told apart
            (_, all_after), second, third, fourth = counts
            assert counts[0][0] == 0 and all_after > 10
            assert second == (all_after, 0)
            assert fourth[1] == 0 and fourth[0] > 10
            assert sum(third) == all_after + fourth[0], "a phase began: once as before, and once in other buckets"


def test_when_a_worker_sends_does_not_matter(pair: Pair, small_experiment, small_store, tmp_path: Path) -> None:
    """With all noise, unshared groups and a phase: the same bits."""
    config = small_experiment("full_hrs", {"training.steps": 4, "training.phases": RESTING} | sharing("router"))
    for name in ("", "late"):
        pair(shared_training, config, small_store, tmp_path / f"run {name}", Runtime(device="cpu", log_every=1), name)
    assert different(weights(tmp_path / "run "), weights(tmp_path / "run late")) == []


def test_workers_agree_on_checkpoints_by_time(pair: Pair, small_experiment, small_store, tmp_path: Path) -> None:
    """Their clocks differ, and only the first one is busy with writing."""
    config = small_experiment("full_hrs", {"training.steps": 6} | sharing("expert"))
    for name, minutes in (("often", 1e-9), ("once", 60.0)):
        runtime = Runtime(device="cpu", log_every=1, checkpoint_minutes=minutes)
        (reports, error), _ = pair(shared_training, config, small_store, tmp_path / name, runtime)
        assert len(reports) == 6 and error == ""
    assert [len(list((tmp_path / name / "checkpoints").iterdir())) for name in ("often", "once")] == [2, 1]
    assert different(weights(tmp_path / "often"), weights(tmp_path / "once")) == []


def test_all_skip_a_step_that_is_not_finite_for_one(pair: Pair, small_experiment, small_store, tmp_path: Path) -> None:
    """Even if the worker's gradient is not used, as for groups that are not shared."""
    config = small_experiment(changes=QUIET | sharing("backbone") | {"training.validations": 0})
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=1)
    (reports, error), _ = pair(shared_training, config, small_store, tmp_path, runtime, "poison")
    assert [metrics["skipped_steps"] for _, metrics in reports] == [0, 0, 1, 1] and error == ""


def test_when_one_leaves_the_other_says_so_and_the_run_can_go_on(
    pair: Pair, small_experiment, small_store, run, tmp_path: Path
) -> None:
    config = small_experiment("full_hrs", {"training.steps": 6} | sharing("expert"))
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=2)
    (reports, stayed), (_, left) = pair(shared_training, config, small_store, tmp_path / "cut", runtime, "leave")
    assert "lost contact with another worker" in stayed and "\n" not in stayed
    assert left == "this worker has had enough"
    assert len(reports) == 3
    pair(shared_training, config, small_store, tmp_path / "cut", runtime)
    pair(shared_training, config, small_store, tmp_path / "whole", runtime)
    assert different(weights(tmp_path / "cut"), weights(tmp_path / "whole")) == []


def test_weights_that_came_apart_are_noticed_at_the_checkpoint(
    pair: Pair, small_experiment, small_store, tmp_path: Path
) -> None:
    config = small_experiment(changes=QUIET | TWO)
    runtime = Runtime(device="cpu", log_every=1, checkpoint_every=2)
    answers = pair(shared_training, config, small_store, tmp_path, runtime, "drift")
    for _, error in answers:
        assert error.startswith("after step 4, worker 1 differs from worker 0 in ")
    checkpoint = read_latest(tmp_path)
    assert checkpoint is not None and checkpoint.state["step"] == 2


def test_as_many_workers_as_the_config_says(pair: Pair, small_experiment, small_store, tmp_path: Path) -> None:
    config = small_experiment(changes=QUIET)
    (_, error), _ = pair(shared_training, config, small_store, tmp_path, Runtime(device="cpu"))
    assert "2 workers were started and the config has training.sharing.workers=1" in error


# ---- the exchange alone ----------------------------------------------------------------------------------------------


def test_gradients_are_averaged_taken_or_left_out(pair: Pair) -> None:
    """Of several types and sizes, dense and sparse, and missing on either worker or both."""

    def rows(indices: list[int], value: float) -> Tensor:
        values = torch.full((len(indices), 2), value)
        return torch.sparse_coo_tensor(torch.tensor([indices]), values, (5, 2), check_invariants=False)

    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((2, 3), value, dtype=dtype)

    def table(*values: float) -> Tensor:
        return torch.tensor(values)[:, None].expand(5, 2)

    by_parameter = [  # of the first worker, of the second, whether it is unshared, afterwards
        (full(1.0), full(3.0), False, full(2.0)),
        (None, full(3.0), False, full(1.5)),
        (full(3.0), None, False, full(1.5)),
        (full(1.0, torch.bfloat16), full(3.0, torch.bfloat16), False, full(2.0, torch.bfloat16)),
        (full(1.0), full(3.0), True, full(1.0)),
        (None, full(3.0), True, None),
        (rows([1, 4], 2.0), rows([4, 1, 2], 4.0), False, table(0.0, 3.0, 2.0, 0.0, 3.0)),
        (None, rows([3], 6.0), False, table(0.0, 0.0, 0.0, 3.0, 0.0)),
        (rows([0], 1.0), rows([1, 2], 9.0), True, table(1.0, 0.0, 0.0, 0.0, 0.0)),
        (None, rows([2], 1.0), True, None),
    ]
    first, second, own, expected = zip(*by_parameter, strict=True)
    unshared = [index for index, alone in enumerate(own) if alone]
    for after, means in pair(exchanged, [first, second], unshared):
        for i, (found, wanted) in enumerate(zip(after, expected, strict=True)):
            assert (found is None) == (wanted is None), i
            if found is not None:
                assert found.is_sparse == (6 <= i <= 8)
                assert torch.equal(found.to_dense(), wanted), i
        assert means == {"both": [1.5], "several": [0.75, 0.0], "second": [5.0]}
