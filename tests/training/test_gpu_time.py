"""The kernel counter and the roofline of hrs.training.gpu_time on steps small enough to count by hand."""

import pytest
import torch

from hrs.presets import experiment
from hrs.training.gpu_time import GpuSpeed, KernelTrace, fuse, model_step, trace_training

GPU = GpuSpeed(
    half_flops=2e12, single_flops=1e12, bytes_per_second=1e9, arithmetic_efficiency=1.0, bandwidth_efficiency=1.0,
    kernel_seconds=0.0, launch_seconds=0.0, compiled_launch_seconds=0.0,
)  # fmt: skip


def traced(function):
    with KernelTrace() as trace:
        function()
    return trace


def test_views_and_allocations_are_no_kernels():
    x = torch.ones(4, 6)
    trace = traced(lambda: x.view(2, 12).transpose(0, 1)[3:].unsqueeze(0).expand(5, 9, 2).detach())
    assert trace.kernels == []
    assert traced(lambda: torch.empty(3)).kernels == []


def test_bytes_and_operations_of_a_product():
    x, y = torch.ones(4, 6), torch.ones(6, 8)
    (kernel,) = traced(lambda: x @ y).kernels
    assert kernel.flops == 2 * 4 * 6 * 8
    assert sum(kernel.reads.values()) == 4 * (24 + 48)
    assert sum(kernel.writes.values()) == 4 * 32
    step = model_step([kernel], GPU, compiled=False)
    assert step.seconds == pytest.approx((4 * (24 + 48 + 32)) / 1e9)  # memory-bound: 416 ns against 0.4 ns


def test_a_look_up_reads_the_rows_it_returns():
    table, ids = torch.ones(1000, 8), torch.tensor([3, 5])
    (kernel,) = traced(lambda: torch.nn.functional.embedding(ids, table)).kernels
    assert sum(kernel.reads.values()) == 2 * 8 * 4 + 2 * 8


def test_element_wise_chains_fuse_and_products_do_not():
    x, y = torch.ones(4, 4), torch.ones(4, 4)
    trace = traced(lambda: torch.relu((x + y) * 2).sum() + (x @ y).exp().sum())
    assert [k.name for k in trace.kernels] == ["add", "mul", "relu", "sum", "mm", "exp", "sum", "add"]
    first, product, second = fuse(trace.kernels)
    assert first.name == "add+mul+relu+sum" and product.name == "mm" and second.name == "exp+sum+add"
    # Only what another group reads is written: the sum, a scalar.
    assert sum(first.reads.values()) == 2 * 64 and sum(first.writes.values()) == 4


def test_a_kernel_does_not_move_before_what_it_reads():
    x, y = torch.ones(4, 4), torch.ones(4, 4)

    def step():
        a = x + 1
        b = x @ y
        return a * b

    assert [k.name for k in fuse(traced(step).kernels)] == ["add", "mm", "mul"]


def test_waits_of_the_host_are_told():
    x = torch.ones(3)
    assert traced(lambda: x.sum().item()).syncs == ["_local_scalar_dense"]
    assert traced(lambda: x.nonzero()).syncs == ["nonzero"]
    assert traced(lambda: (x + 1).tolist()).syncs == ["tolist"]
    assert traced(lambda: x + 1).syncs == []


def test_operations_of_a_training_step_are_those_of_its_matrices():
    config = experiment("dense_baseline", "micro")
    trace = trace_training(config, micro_batch=4)
    model = config.model
    tokens = 4 * model.max_seq_len
    weights = model.n_layers * (4 * model.d_model**2 + 2 * model.d_model * model.d_ff)
    weights += model.vocab_size * model.d_model
    attention = 4 * model.max_seq_len * model.d_model * tokens // 2 * model.n_layers
    expected = 6 * weights * tokens + attention * 7 // 2
    assert sum(k.flops for k in trace.kernels) == expected
