import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hrs.training.loss import cross_entropy

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
        label_smoothing=label_smoothing, chunk_logits=chunk_logits, vocab_size=V,
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
                lambda h: h @ weight.T, hidden, targets, chunk_logits=chunk_logits, vocab_size=vocab_size
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
