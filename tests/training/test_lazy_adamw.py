"""Lazy AdamW against a row by row reference, against torch's AdamW, and in phases, clipping and checkpoints."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import OptimizerConfig, PhaseConfig
from hrs.training import lazy_adamw
from hrs.training.checkpoint import read_checkpoint, restore
from hrs.training.checkpoint_writer import save_checkpoint
from hrs.training.lazy_adamw import LazyAdamW, coalesced, lazy_parameters
from hrs.training.optimizer import build_optimizer, clip_gradients, gradient_norm, set_rates
from hrs.training.phases import enter_phase, phases_of

ROWS, WIDTH, EPS = 7, 3, 1e-8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


class Experts(nn.Module):
    """Two tables, of which each token reads some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.up = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.sparse_gradients = False

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, WIDTH], rows [T, n]."""
        down = F.embedding(rows, self.down, sparse=self.sparse_gradients)  # [T, n, WIDTH]
        up = F.embedding(rows, self.up, sparse=self.sparse_gradients)
        return torch.einsum("tnw,tn->tw", up, torch.tanh(torch.einsum("tnw,tw->tn", down, x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.experts(self.query(x), rows).square().mean()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": list(self.query.parameters()), "expert": list(self.experts.parameters())}


def table(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=dtype))


def lazy(parameter: nn.Parameter, *, lr: float = 0.1, decay: float = 0.1, betas=(0.9, 0.95)) -> LazyAdamW:
    return LazyAdamW([{"params": [parameter], "lazy": True, "weight_decay": decay}], lr=lr, betas=betas, eps=EPS)


def sparse(gradient: Tensor, rows: list[int]) -> Tensor:
    """The rows of a dense gradient as a sparse one; a row named twice counts twice."""
    index = torch.tensor([rows], dtype=torch.int64)
    return torch.sparse_coo_tensor(index, gradient[index[0]], gradient.shape, check_invariants=True)


def reference(weights: Tensor, steps: list[tuple[float, dict[int, Tensor]]], decay: float, betas) -> Tensor:
    """The documented rule for one row and one column at a time, in Python's floats."""
    beta1, beta2 = betas
    result = weights.double().tolist()
    for row in range(ROWS):
        for column in range(WIDTH):
            w, m, v, last = result[row][column], 0.0, 0.0, 0
            for t, (lr, gradients) in enumerate(steps, start=1):
                if row not in gradients:
                    continue
                g, k = float(gradients[row][column]), t - last
                m = beta1 * beta1 ** (k - 1) * m + (1 - beta1) * g
                v = beta2 * beta2 ** (k - 1) * v + (1 - beta2) * g * g
                w *= (1 - lr * decay) ** k
                w -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + EPS)
                last = t
            result[row][column] = w
    return torch.tensor(result, dtype=torch.float64)


# ---- the rule --------------------------------------------------------------------------------------------------------


@examples(40)
@given(
    touched=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=6), min_size=1, max_size=12),
    rates=st.lists(st.sampled_from([0.0, 1e-3, 0.1]), min_size=12, max_size=12),
    decay=st.sampled_from([0.0, 0.3]),
    betas=st.sampled_from([(0.9, 0.95), (0.0, 0.0), (0.5, 0.999)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_update_equals_the_rule_row_by_row(touched, rates, decay, betas, dtype) -> None:
    parameter = table(dtype)
    before, optimizer = parameter.detach().clone(), lazy(parameter, decay=decay, betas=betas)
    draw, steps = torch.Generator().manual_seed(1), []
    for rows, lr in zip(touched, rates, strict=False):
        gradient = torch.randn(ROWS, WIDTH, generator=draw, dtype=dtype)
        parameter.grad = sparse(gradient, rows)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        steps.append((lr, {row: rows.count(row) * gradient[row].double() for row in rows}))
    expected = reference(before, steps, decay, betas)
    # One step: m / sqrt(v) is at most (1 - b1) / sqrt(1 - b2) = 16, off by some 20 roundings, times the rate of 0.1;
    # and a weight below 22 is rounded twice. Twelve steps: 12 * (32 + 44) roundings at most.
    tolerance = 1000 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(parameter.detach().double(), expected, atol=tolerance, rtol=0)
    last = [max((t for t, rows in enumerate(touched, 1) if row in rows), default=0) for row in range(ROWS)]
    assert optimizer.state[parameter]["row_step"].tolist() == last


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_touched_at_every_step_are_those_of_dense_adamw(dtype) -> None:
    """Rows 0, 2, 4 of 7 learn at all of 50 steps, with a rate that changes; the others never, and stay as they are."""
    parameter, dense = table(dtype), table(dtype)
    before = parameter.detach().clone()
    optimizer = lazy(parameter)
    oracle = torch.optim.AdamW([dense], betas=(0.9, 0.95), eps=EPS, weight_decay=0.1, foreach=False)
    draw = torch.Generator().manual_seed(1)
    for step in range(50):
        gradient = torch.randn(ROWS, WIDTH, generator=draw, dtype=dtype)
        parameter.grad, dense.grad = sparse(gradient, [0, 2, 4]), gradient
        optimizer.param_groups[0]["lr"] = oracle.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step()
        oracle.step()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(parameter[[0, 2, 4]], dense[[0, 2, 4]], atol=tolerance, rtol=tolerance)
    assert torch.equal(parameter[[1, 3, 5, 6]], before[[1, 3, 5, 6]])


def against_dense(betas: tuple[float, float]) -> tuple[LazyAdamW, nn.Parameter, torch.optim.AdamW, nn.Parameter]:
    """Both optimizers after 30 steps with some rows each and one with all rows; a constant rate."""
    parameter, dense = table(), table()
    optimizer = lazy(parameter, lr=1e-2, betas=betas)
    oracle = torch.optim.AdamW([dense], lr=1e-2, betas=betas, eps=EPS, weight_decay=0.1)
    draw = torch.Generator().manual_seed(1)
    for step in range(31):
        rows = torch.randperm(ROWS, generator=draw)[: ROWS if step == 30 else 2].tolist()
        parameter.grad = sparse(torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64), rows)
        dense.grad = parameter.grad.to_dense()
        optimizer.step()
        oracle.step()
    return optimizer, parameter, oracle, dense


def test_moments_are_those_of_dense_adamw_after_any_pause() -> None:
    optimizer, parameter, oracle, dense = against_dense(betas=(0.9, 0.95))
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(optimizer.state[parameter][moment], oracle.state[dense][moment], atol=1e-14, rtol=0)


def test_only_the_movement_by_old_momentum_is_left_out() -> None:
    """Without momentum there is none, and every row ends where dense AdamW has it; with momentum it does not."""
    _, parameter, _, dense = against_dense(betas=(0.0, 0.95))
    torch.testing.assert_close(parameter, dense, atol=1e-12, rtol=1e-12)
    _, parameter, _, dense = against_dense(betas=(0.9, 0.95))
    assert (parameter - dense).abs().max() > 1e-2


def test_a_dense_gradient_touches_every_row() -> None:
    parameter, dense = table(), table()
    optimizer, oracle = lazy(parameter), torch.optim.AdamW([dense], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        parameter.grad = torch.full_like(parameter, float(step))
        dense.grad = parameter.grad.clone()
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(parameter, dense, atol=1e-12, rtol=1e-12)
    assert optimizer.state[parameter]["row_step"].tolist() == [4] * ROWS


@pytest.mark.parametrize("elements", [1, WIDTH, 2 * WIDTH + 1])
def test_an_update_in_chunks_changes_no_bit(elements: int, monkeypatch) -> None:
    results = []
    for size in (10**6, elements):
        monkeypatch.setitem(lazy_adamw.CHUNK_ELEMENTS, "cpu", size)
        _, parameter, _, _ = against_dense(betas=(0.9, 0.95))
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_the_update_itself_reads_no_value_on_the_host() -> None:
    """A fake tensor has no values: whatever would wait for a device fails on it."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.zeros(ROWS, WIDTH))
        optimizer = lazy(parameter)
        index, values = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(4, WIDTH)
        parameter.grad = torch.sparse_coo_tensor(
            index, values, parameter.shape, is_coalesced=True, check_invariants=False
        )
        norm = gradient_norm(optimizer)
        clip_gradients(optimizer, 1.0, norm)
        optimizer.step()
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert {k: (v.shape, v.dtype) for k, v in optimizer.state[parameter].items()} == {
        "step": ((), torch.float32),
        "exp_avg": ((ROWS, WIDTH), torch.float32),
        "exp_avg_sq": ((ROWS, WIDTH), torch.float32),
        "row_step": ((ROWS,), torch.int32),
    }


# ---- gradients -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, ROWS - 1), max_size=12))
def test_coalesced_is_torchs_and_keeps_what_is_in_order(rows: list[int]) -> None:
    gradient = sparse(torch.randn(ROWS, WIDTH, dtype=torch.float64), rows)
    ours, torchs = coalesced(gradient), gradient.coalesce()
    assert ours.is_coalesced()
    assert torch.equal(ours.indices(), torchs.indices())
    assert torch.equal(ours.values(), torchs.values())
    in_order = rows == sorted(set(rows))
    assert (ours.values().data_ptr() == gradient._values().data_ptr()) == in_order


def gradients(model: Model, parts: int) -> torch.optim.AdamW:
    """Accumulate the gradients of ``parts`` micro-batches that hit some rows often and row 5 never."""
    optimizer = build_optimizer(
        model, OptimizerConfig(expert_updates="lazy" if model.experts.sparse_gradients else "dense")
    )
    draw = torch.Generator().manual_seed(3)
    for _ in range(parts):
        x = torch.randn(6, WIDTH, generator=draw, dtype=torch.float64)
        (model(x, torch.randint(0, 5, (6, 4), generator=draw)) / parts).backward()
    return optimizer


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("limit", [0.01, 100.0])
def test_norm_and_clipping_of_sparse_gradients_are_those_of_dense_ones(parts: int, limit: float) -> None:
    torch.manual_seed(0)
    dense = Model().double()
    model = copy.deepcopy(dense)
    model.experts.sparse_gradients = True
    optimizer, oracle = gradients(model, parts), gradients(dense, parts)
    for parameter in (model.experts.down, model.experts.up):
        assert parameter.grad.is_coalesced() and parameter.grad._nnz() <= 5  # after every micro-batch
    norm = gradient_norm(optimizer)
    torch.testing.assert_close(norm, gradient_norm(oracle), atol=0, rtol=1e-13)
    clip_gradients(optimizer, limit, norm)
    clip_gradients(oracle, limit, gradient_norm(oracle))
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad, atol=1e-16, rtol=1e-12)
    torch.testing.assert_close(gradient_norm(optimizer), torch.clamp(norm, max=limit), atol=0, rtol=1e-3)


def test_the_norm_of_an_uncoalesced_gradient_is_of_its_sum() -> None:
    """Row 2 twice: 4 + 4 cancel -8, so nothing is left to count."""
    parameter = table()
    optimizer = lazy(parameter)
    index = torch.tensor([[2, 0, 2]])
    values = torch.stack([torch.full((WIDTH,), x, dtype=torch.float64) for x in (8.0, 1.0, -8.0)])
    parameter.grad = torch.sparse_coo_tensor(index, values, parameter.shape, check_invariants=True)
    assert gradient_norm(optimizer).item() == pytest.approx(math.sqrt(WIDTH), rel=1e-12)


# ---- in training -----------------------------------------------------------------------------------------------------

PHASES = phases_of(
    [
        PhaseConfig(name="all", frac=0.4),
        PhaseConfig(name="experts rest", frac=0.2, multipliers=(("expert", 0.0),)),
        PhaseConfig(name="one table anew", frac=0.4, multipliers=(("expert", 0.5),), reinitialise=("experts.up",)),
    ],
    10,
)


def learn(model: Model, optimizer: torch.optim.Optimizer, steps: range, *, everywhere: bool) -> None:
    """Steps of two clipped micro-batches over all three phases, in float64."""
    for step in steps:
        phase = next(phase for phase in PHASES if phase.start <= step < phase.end)
        if step in (phase.start, steps.start):
            torch.manual_seed(step)
            enter_phase(phase, step, model, optimizer)
        set_rates(optimizer, 0.05 / (1 + step), phase.multipliers)
        draw = torch.Generator().manual_seed(step)
        for _ in range(2):
            x = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)
            rows = torch.randint(0, ROWS if everywhere else 4, (ROWS, 2), generator=draw)
            if everywhere:
                rows[:, 0] = torch.randperm(ROWS, generator=draw)
            (model(x, rows) / 2).backward()
        clip_gradients(optimizer, 0.05, gradient_norm(optimizer))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_phases_accumulation_and_clipping_give_dense_adamw_where_all_rows_learn() -> None:
    torch.manual_seed(0)
    models = [Model().double()]
    models.append(copy.deepcopy(models[0]))
    for model, updates in zip(models, ("lazy", "dense"), strict=True):
        optimizer = build_optimizer(model, OptimizerConfig(expert_updates=updates))
        learn(model, optimizer, range(10), everywhere=True)
        # 10 steps less 2 at rest; the table drawn anew began again
        assert optimizer.state[model.experts.down]["step"] == 8 and optimizer.state[model.experts.up]["step"] == 4
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_continued_from_a_checkpoint_is_bit_exact(stop: int, tmp_path: Path) -> None:
    """Stopped while all learn, while the tables rest, and after one was drawn anew."""
    config, device = OptimizerConfig(expert_updates="lazy"), torch.device("cpu")
    torch.manual_seed(0)
    whole = Model().double()
    optimizer = build_optimizer(whole, config)
    learn(whole, optimizer, range(stop), everywhere=False)
    path = save_checkpoint(tmp_path, whole, optimizer, {"step": stop}, device)
    learn(whole, optimizer, range(stop, 10), everywhere=False)

    torch.manual_seed(99)
    resumed = Model().double()
    other = build_optimizer(resumed, config)
    restore(read_checkpoint(path), resumed, other, device)
    learn(resumed, other, range(stop, 10), everywhere=False)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert other.state[ours].keys() == optimizer.state[theirs].keys()
        for kind, value in optimizer.state[theirs].items():
            assert torch.equal(other.state[ours][kind], value) and other.state[ours][kind].dtype is value.dtype
    assert "row_step" in other.state[lazy_parameters(other)[0]]
