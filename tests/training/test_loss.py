from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hrs.models import build_model
from hrs.models.base import Unembedding
from hrs.presets import experiment
from hrs.training.loss import CPU_CHUNKING, IGNORED, Chunking, cross_entropy

B, T, D, V = 3, 7, 5, 11


def _case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randint(V, (B, T))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_logits", [1, V, 4 * V, 21 * V - 1, 21 * V, 10**6])
def test_chunks_change_neither_loss_nor_gradients(chunk_logits: int, label_smoothing: float) -> None:
    hidden, weight, targets = _case()
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    loss = cross_entropy(
        lambda h: h @ weight.T, hidden, targets,
        label_smoothing=label_smoothing, chunking=Chunking(logits=chunk_logits), vocab_size=V,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operator gave, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_the_logits_of_all_positions_never_exist() -> None:
    vocab_size, chunk = 512, 2 * 512
    hidden, weight = torch.randn(2, 16, 4, requires_grad=True), torch.randn(vocab_size, 4, requires_grad=True)
    targets = torch.randint(vocab_size, (2, 16))
    sizes = {}
    for name, chunk_logits in {"chunked": chunk, "plain": 10**9}.items():
        with _LargestTensor() as largest:
            cross_entropy(
                lambda h: h @ weight.T, hidden, targets, chunking=Chunking(logits=chunk_logits), vocab_size=vocab_size
            ).backward()
        sizes[name] = largest.numel
    assert sizes == {"chunked": vocab_size * 4, "plain": 2 * 16 * vocab_size}  # the weight's gradient, all logits


def test_bf16_logits_are_scored_in_float32() -> None:
    hidden, weight, targets = _case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(lambda h: h @ weight.T, hidden, targets, vocab_size=V)
        logits = (hidden @ weight.T).flatten(0, 1)
    assert logits.dtype is torch.bfloat16
    expected = F.cross_entropy(logits.float(), targets.flatten())
    assert loss.dtype is torch.float32 and loss.item() == pytest.approx(expected.item(), abs=1e-6)


# ---- linear output layers: loss and gradients in one pass ------------------------------------------------------------


def _logits_are_not_wanted(hidden: Tensor) -> Tensor:
    raise AssertionError("a linear output layer is scored without its logits")


def _reference(hidden: Tensor, unembedding: Unembedding, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """All logits at once, through autograd."""
    weight, bias, softcap = unembedding
    logits = F.linear(hidden, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing, reduction="sum", ignore_index=IGNORED
    )
    return total / targets.numel()


def _fused(hidden: Tensor, unembedding: Unembedding, targets: Tensor, **options: object) -> Tensor:
    options = {"chunking": Chunking(logits=2**24)} | options
    return cross_entropy(
        _logits_are_not_wanted, hidden, targets, vocab_size=len(unembedding.weight), unembedding=unembedding, **options
    )


def test_the_cpu_leaves_few_logits_to_autograd() -> None:
    hidden, weight, targets = _case()
    with pytest.raises(AssertionError, match="without its logits"):
        _fused(hidden, Unembedding(weight), targets, chunking=CPU_CHUNKING)
    assert CPU_CHUNKING.plain <= 4 * 128 * 2048  # not those of a step at tiny


@pytest.mark.parametrize("multiple", [1, 4, V, 64])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_loss_equals_autograd_of_all_logits(
    dtype: torch.dtype, label_smoothing: float, softcap: float, multiple: int
) -> None:
    """With bias, ignored targets, padding and every size of chunk; and a factor in front of the loss."""
    hidden, weight, targets = _case()
    hidden, weight = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    targets[0, 2], targets[2, 5:] = IGNORED, IGNORED
    inputs, layer = (hidden, weight, bias), Unembedding(weight, bias, softcap)
    expected = _reference(hidden, layer, targets, label_smoothing)
    gradients = torch.autograd.grad(0.3 * expected, inputs)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-6
    for logits in (1, 5 * V, 10**6):
        chunking = Chunking(logits=logits, multiple=multiple)
        loss = _fused(hidden, layer, targets, label_smoothing=label_smoothing, chunking=chunking)
        assert loss.dtype is dtype
        torch.testing.assert_close(loss, expected, atol=tolerance, rtol=0)
        for got, want in zip(torch.autograd.grad(0.3 * loss, inputs), gradients, strict=True):
            assert got.shape == want.shape and got.dtype is dtype
            torch.testing.assert_close(got, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("n_chunks", [1, 64, 128])
def test_bf16_keeps_the_weights_gradient_within_three_per_mille_of_float32(n_chunks: int) -> None:
    """However many chunks it is summed over: an accumulator in bf16 would be off by 0.9 % with 64 chunks."""
    torch.manual_seed(0)
    n, width, n_ids = 512, 32, 101
    hidden, weight = torch.randn(1, n, width, requires_grad=True), (0.3 * torch.randn(n_ids, width)).requires_grad_()
    targets = torch.randint(n_ids, (1, n))
    exact = torch.autograd.grad(_reference(hidden, Unembedding(weight), targets), (hidden, weight))
    chunking = Chunking(logits=128 * n // n_chunks, multiple=64)
    assert -(-n // chunking.rows(n, 128)) in (n_chunks, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _fused(hidden, Unembedding(weight), targets, chunking=Chunking(logits=128 * n // n_chunks))
        padded = _fused(hidden, Unembedding(weight), targets, chunking=chunking)
    for rough in (loss, padded):
        for got, want in zip(torch.autograd.grad(rough, (hidden, weight)), exact, strict=True):
            assert got.dtype is torch.float32 and (got - want).norm() / want.norm() < 3e-3


def test_a_certain_prediction_keeps_its_gradient_in_bf16() -> None:
    """p = 1 - 1e-4 is 1 in bf16; the gradient of its logit is -1e-4 nevertheless."""
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    margin = torch.tensor(1e4 - 1).log()
    hidden = margin.view(1, 1, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = _fused(hidden, Unembedding(weight), torch.zeros(1, 1, dtype=torch.int64))
    assert torch.autograd.grad(loss, hidden)[0].item() == pytest.approx(-1e-4, rel=0.05)


def test_without_gradients_only_the_loss_is_computed() -> None:
    """No operator gives a tensor of the weight's size, nor a second product."""
    hidden, weight, targets = _case()
    with torch.no_grad(), _Calls() as calls:
        loss = _fused(hidden, Unembedding(weight), targets, chunking=Chunking(logits=10**6))
    assert calls.n["aten::mm"] == 1
    torch.testing.assert_close(loss, _reference(hidden, Unembedding(weight), targets))
    with _Calls() as calls:
        _fused(hidden.detach(), Unembedding(weight), targets).backward()
    assert calls.n["aten::mm"] + calls.n["aten::addmm_"] == 2 and weight.grad is not None


class _Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.n[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_three_products_and_one_copy_of_the_weight_however_many_chunks() -> None:
    hidden, weight, targets = _case()
    with torch.autocast("cpu", torch.bfloat16), _Calls() as calls, _LargestTensor() as largest:
        _fused(hidden, Unembedding(weight), targets, chunking=Chunking(logits=3 * V)).backward()
    assert calls.n["hrs::half_product"] == 2 * 7 and calls.n["hrs::add_half_product"] == 7
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as flops:
        _fused(hidden, Unembedding(weight), targets, chunking=Chunking(logits=3 * V)).backward()
    assert flops.get_total_flops() == 3 * 2 * B * T * V * D
    assert largest.numel == B * T * D  # of 231 logits, 33 at a time


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, targets = _case()
    loss = _fused(hidden, Unembedding(weight), targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_it_compiles() -> None:
    """In one graph, with the same loss and gradients."""
    hidden, weight, targets = _case()
    layer = Unembedding(weight)
    step = torch.compile(lambda h: _fused(h * 2, layer, targets, chunking=Chunking(logits=5 * V)), backend="aot_eager",
                         fullgraph=True)  # fmt: skip
    expected = torch.autograd.grad(_reference(hidden * 2, layer, targets), (hidden, weight))
    for got, want in zip(torch.autograd.grad(step(hidden), (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("preset", ["dense_baseline", "manifold_v18", "manifold_v18_legacy", "v18_cross_attn"])
def test_models_describe_their_output_layer(preset: str) -> None:
    """What unembedding() says is what unembed() computes; None is left to unembed()."""
    model = build_model(experiment(preset, "micro").model)
    layer = model.unembedding()
    hidden = torch.randn(2, 3, model.d_model, requires_grad=True)
    targets = torch.randint(model.vocab_size, (2, 3))
    assert layer is not None
    told = _fused(hidden, layer, targets)
    asked = cross_entropy(model.unembed, hidden, targets, vocab_size=model.vocab_size)
    torch.testing.assert_close(told, asked)
    for got, want in zip(*(torch.autograd.grad(x, (hidden, layer.weight)) for x in (told, asked)), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
