"""Training attention and dropout on the CPU against plain operators, value and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hrs.config import AttentionConfig, ModelConfig
from hrs.nn import cpu_attention
from hrs.nn.attention import Attention
from hrs.nn.dropout import Dropout, keep_mask
from hrs.nn.eager import on_eager_cpu
from hrs.training.memory_imitation import ImitateCuda

D, HEADS, T = 24, 3, 70
"""T is no multiple of the queries scored at once, and more than two times as many."""


def attention(positions: str = "rotary", dropout: float = 0.0) -> Attention:
    """In float64 and training mode, with weights so large that the softmax has something to tell apart."""
    torch.manual_seed(0)
    choice = AttentionConfig(positions=positions)  # type: ignore[arg-type]
    config = ModelConfig(d_model=D, n_heads=HEADS, dropout=dropout, rope_base=100.0, attention=choice)
    layer = Attention(config, n_positions=T).double().train()
    with torch.no_grad():
        layer.qkv.weight.mul_(3)
    return layer


def states(n: int = T) -> Tensor:
    return torch.randn(2, n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).requires_grad_()


def value_and_gradients(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, inputs, cotangent)]


def require_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for fast, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12 * max(1.0, float(slow.detach().abs().max())))


@pytest.mark.parametrize("n", [1, 32, T])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_equals_plain_operators(positions: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = attention(positions), states(n)
    fast = value_and_gradients(layer(x, torch.arange(n)), x, *layer.parameters())
    assert "_Attention" in names_of_graph(layer(x, torch.arange(n)))
    monkeypatch.setattr(layer, "_has_fast_training", lambda x: False)
    slow = layer(x, torch.arange(n))
    assert "_Attention" not in names_of_graph(slow)
    require_equal(fast, value_and_gradients(slow, x, *layer.parameters()))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_dropout_equals_plain_operators_with_the_same_masks(positions: str) -> None:
    """The reference multiplies out the whole matrix of scores and lets autograd do the rest."""
    layer, x, p = attention(positions), states(), 0.3
    turns = None if layer.rotary is None else layer.rotary.turns(torch.arange(T))
    torch.manual_seed(5)
    fast = cpu_attention.project_and_attend(x, layer.qkv.weight, turns, n_heads=HEADS, scale=layer.scale, dropout=p)
    torch.manual_seed(5)
    mask = torch.zeros(2 * HEADS, T, T, dtype=torch.float64)
    for start in range(0, T, cpu_attention.QUERIES_AT_ONCE):
        end = min(start + cpu_attention.QUERIES_AT_ONCE, T)
        mask[:, start:end, :end] = keep_mask((2 * HEADS, end - start, end), p, torch.float64)
    assert 0.6 < mask.tril().sum() / torch.ones_like(mask).tril().sum() < 0.8  # p = 0.3, 14,910 draws: 26 deviations
    heads = layer.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
    q, k, v = layer._turned(heads[0], torch.arange(T)), layer._turned(heads[1], torch.arange(T)), heads[2]
    future = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    weights = (layer.scale * q @ k.mT + future).softmax(-1) * mask.view(2, HEADS, T, T) / (1 - p)
    slow = (weights @ v).transpose(1, 2).flatten(2)
    inputs = (x, layer.qkv.weight)
    require_equal(value_and_gradients(fast, *inputs), value_and_gradients(slow, *inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_later_tokens_change_nothing_before(dropout: float) -> None:
    layer, x, cut = attention(dropout=dropout), states(), 40
    with torch.no_grad():
        other = x.clone()
        other[:, cut:] *= 10
    torch.manual_seed(3)
    early = layer(x, torch.arange(T))[:, :cut]
    torch.manual_seed(3)
    assert torch.equal(early, layer(other, torch.arange(T))[:, :cut])
    (grad,) = torch.autograd.grad(early.sum(), x)
    assert (grad[:, cut:] == 0).all() and (grad[:, :cut] != 0).any()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fake_tensors_take_the_same_path(dropout: float) -> None:
    """Memory on the CPU is planned for what runs there; an imitation of CUDA is shown torch's own operators."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = ModelConfig(d_model=D, n_heads=HEADS, dropout=dropout)
        layer, x = Attention(config, n_positions=T).train(), torch.randn(2, T, D, requires_grad=True)
        y = layer(x, torch.arange(T))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert "_Attention" in names_of_graph(y)
        with ImitateCuda():
            assert "_FusedAttention" in names_of_graph(layer(x, torch.arange(T)))


def names_of_graph(y: Tensor) -> str:
    """Names of all functions that autograd would run, in one string."""
    names, todo = "", [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names += f" {node.name()}"
            todo += [next_node for next_node, _ in node.next_functions]
    return names


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_independent_draws_of_the_rate(p: float) -> None:
    """Count, neighbours and columns lie within six deviations of their binomial means; the seed is fixed."""
    torch.manual_seed(0)
    mask = keep_mask((1000, 1001), p, torch.float32)
    assert mask.unique().tolist() == [0.0, 1.0]
    for sample, rate in ((mask, 1 - p), (mask[:, 1:] * mask[:, :-1], (1 - p) ** 2)):
        # Products of neighbours share a factor, which at most triples the variance of their sum.
        deviation = math.sqrt(3 * rate * (1 - rate) / sample.numel())
        assert abs(float(sample.double().mean()) - rate) < 6 * deviation
    columns = mask.double().mean(0)
    assert (columns - (1 - p)).abs().max() < 6 * math.sqrt(p * (1 - p) / 1000)


def test_a_mask_is_a_function_of_the_generator() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(keep_mask((7, 5), 0.5, torch.float64))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_dropout_scales_what_it_keeps_and_passes_gradients_through_the_same_mask() -> None:
    layer, x = Dropout(0.25), (1 + torch.rand(50, 7, dtype=torch.float64)).requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    expected = keep_mask(x.shape, 0.25, x.dtype) / 0.75
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y == 0, expected == 0) and 0 < int((expected == 0).sum()) < x.numel()
    torch.testing.assert_close(y, x * expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything_is_torchs(p: float) -> None:
    x = torch.rand(3, 4)
    assert torch.equal(Dropout(p)(x), F.dropout(x, p))
    assert torch.equal(Dropout(0.5).eval()(x), x)


def test_torchs_own_masks_are_used_where_something_watches() -> None:
    x = torch.rand(4)
    assert on_eager_cpu(x) and isinstance(Dropout(0.5), nn.Dropout)
    with ImitateCuda():
        assert not on_eager_cpu(x)
    assert not on_eager_cpu(x.to("meta"))
