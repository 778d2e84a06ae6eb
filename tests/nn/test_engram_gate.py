"""The remember gate: its features and start, what it scales, what the original's did not."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.models.hrs import HRSModel
from hrs.nn.engrams.remember_gate import RememberGate, gate_entropy, standardised
from hrs.nn.engrams.window import PrefixEngrams, WindowEngrams

D, T, W, K = 8, 14, 4, 2
ENGRAM = EngramConfig(
    kind="window",
    window=W,
    per_window=K,
    extract_after=0,
    dropout=0.0,
    recon_weight=0.5,
    remember_gate=True,
    gate_entropy_weight=0.25,
)
CONFIG = ModelConfig(
    vocab_size=13, n_layers=3, n_heads=2, d_model=D, d_ff=16, max_seq_len=T, dropout=0.0, engram=ENGRAM
)


def config(**changes: object) -> ModelConfig:
    return dataclasses.replace(CONFIG, engram=dataclasses.replace(ENGRAM, **changes))  # type: ignore[arg-type]


def model(**changes: object) -> HRSModel:
    torch.manual_seed(0)
    built = HRSModel(config(**changes)).double().eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.5)  # effects far above rounding
    for parameter in built.engram.gate.parameters():
        parameter.data.normal_()  # gates far apart
    if isinstance(built.engram, PrefixEngrams):
        built.engram.observed.average.uniform_(2.0, 5.0)
    return built


def text(n: int = T) -> Tensor:
    return torch.randint(13, (2, T), generator=torch.Generator().manual_seed(1))[:, :n]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def gate_of(layer: RememberGate, *features: Tensor | float) -> Tensor:
    x = torch.stack([torch.as_tensor(f, dtype=torch.float64) for f in features])
    return torch.sigmoid(layer.output(F.gelu(layer.hidden(x))))[0]


def entropy(gates: list[Tensor]) -> Tensor:
    return sum(-g * g.log() - (1 - g) * (1 - g).log() for g in gates) / len(gates)


def encode(layer: WindowEngrams, mean: Tensor) -> Tensor:
    vectors = layer.encoder.output(F.gelu(layer.encoder.hidden(mean))).reshape(K, D)
    return torch.stack([layer.encoder.norm(v) for v in vectors])


def test_repaired_gate_equals_slow_reference() -> None:
    """Features of window w: how little it is like those before it, cosine with its engrams, two lengths."""
    layer = model().engram
    x = torch.randn(2, T, D, dtype=torch.float64)
    state = layer.start(torch.arange(T), None)
    layer.leave(0, x, state)
    gates = []
    for b in range(2):
        means = [sum(x[b, w * W + i] for i in range(W)) / W for w in range(T // W)]
        for w, mean in enumerate(means):
            novelty = 1 - cosine(mean, sum(means[:w]) / w) if w else 1.0
            centre = encode(layer, mean).mean(0)
            lengths = mean.norm() / math.sqrt(D), centre.norm() / math.sqrt(D)
            gates.append(gate_of(layer.gate, novelty, cosine(mean, centre), *lengths))
            for k in range(K):
                actual = state.inputs.memory_gate[b, w * K + k]
                torch.testing.assert_close(actual, gates[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.losses["gate_entropy"], -0.25 * entropy(gates), rtol=1e-12, atol=1e-12)
    assert torch.stack(gates).std() > 0.01


@pytest.mark.parametrize("n", [5, T])
def test_original_gate_equals_slow_reference(n: int) -> None:
    """Each reading block asks anew with its own input; the first feature compares losses of all windows."""
    layer = model(kind="prefix").engram
    hidden, *later = torch.randn(3, 2, n, D, dtype=torch.float64)
    state, m = layer.start(torch.arange(n), None), n // W
    layer.leave(0, hidden, state)
    losses = torch.stack([layer.observed.average[w * W : (w + 1) * W].mean() for w in range(m)])
    scores = (losses - losses.mean()) / losses.std() if m > 1 else torch.zeros(1)
    for index, x in enumerate(later, start=1):
        joined, gates = layer.enter(index, x, state)[0], []
        assert torch.equal(joined[:, m * K :], x)
        for b in range(2):
            for w in range(m):
                engrams = encode(layer, hidden[b, w * W : (w + 1) * W].mean(0))
                mean, centre = x[b, w * W : (w + 1) * W].mean(0), engrams.mean(0)
                lengths = mean.norm() / math.sqrt(D), centre.norm() / math.sqrt(D)
                gates.append(gate_of(layer.gate, scores[w], cosine(mean, centre), *lengths))
                expected = (engrams + layer.type_embedding) * gates[-1]
                torch.testing.assert_close(joined[b, w * K : (w + 1) * K], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.losses["gate_entropy"], 0.25 * entropy(gates), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["window", "prefix"])
def test_parameters_and_start(kind: str) -> None:
    """193 parameters; the model's general initialisation leaves the gate at sigmoid(2) for every window."""
    torch.manual_seed(0)
    built = HRSModel(config(kind=kind))
    gate = built.engram.gate
    assert sum(p.numel() for p in gate.parameters()) == 193
    logits = gate(torch.randn(2, 3), torch.randn(2, 3, D), torch.randn(2, 3, K, D))
    assert torch.equal(logits, torch.full((2, 3), 2.0))
    assert logits.sigmoid()[0, 0].item() == pytest.approx(0.88, abs=0.001)


@pytest.mark.parametrize(("kind", "alive"), [("window", True), ("prefix", False)])
def test_the_originals_gate_never_learns_to_look(kind: str, alive: bool) -> None:
    """Both layers at 0: after ten steps of descent all but the last bias are where they were."""
    torch.manual_seed(0)
    built = HRSModel(config(kind=kind)).train()
    gate, optimizer = built.engram.gate, torch.optim.SGD(built.parameters(), lr=0.5)
    start = {name: p.detach().clone() for name, p in gate.named_parameters()}
    for _ in range(10):
        output = built(text())
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), text()[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + sum(output.losses.values())).backward()
        optimizer.step()
    moved = {name for name, p in gate.named_parameters() if not torch.equal(p, start[name])}
    assert moved == ({"hidden.weight", "hidden.bias", "output.weight", "output.bias"} if alive else {"output.bias"})


def shut(built: HRSModel, bias: float) -> Tensor:
    for parameter in built.engram.gate.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(built.engram.gate.output.bias, bias)
    return built(text()).logits


def test_a_gate_before_the_norm_does_next_to_nothing() -> None:
    """From wide open to 12 % open: the repaired gate moves logits a hundred times as much as the original's.

    All that is left of the original's is the epsilon in the norm.
    """
    moves = {}
    for kind in ("window", "prefix"):
        torch.manual_seed(0)
        built = HRSModel(dataclasses.replace(config(kind=kind), n_layers=2)).double().eval()
        for block in built.blocks:
            block.attention.qkv.weight.data.normal_()
            block.attention.output.weight.data.normal_()
        moves[kind] = (shut(built, 10.0) - shut(built, -2.0)).abs().mean()
    assert moves["window"] > 100 * moves["prefix"] > 0


def test_repaired_is_causal_exactly() -> None:
    built = model()
    before = built(text()).logits
    for cut in range(1, T):
        changed = text().clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 13
        assert torch.equal(built(changed).logits[:, :cut], before[:, :cut])


def test_original_leaks_everywhere() -> None:
    built = model(kind="prefix")
    changed = text().clone()
    changed[:, 11] = (changed[:, 11] + 1) % 13  # the last token of a whole window
    assert (built(changed).logits != built(text()).logits).any(-1).all()


@pytest.mark.parametrize("sizes", [(1,) * T, (4, 4, 6), (3, 9, 2), (13, 1)])
def test_repaired_decoding_equals_forward(sizes: tuple[int, ...]) -> None:
    built = model()
    cache = built.new_cache(2)
    pieces = [built.decode(piece, cache).logits for piece in text().split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), built(text()).logits, rtol=1e-10, atol=1e-10)


def test_only_the_prefix_wants_losses() -> None:
    window, prefix = model().engram, model(kind="prefix").engram
    assert prefix.wants_losses and not window.wants_losses
    assert not PrefixEngrams(config(kind="prefix", remember_gate=False)).wants_losses
    before = prefix.observed.average.clone()
    prefix.observe_loss(torch.full((T,), 2.0))
    prefix.drop_observations()
    prefix.observe_loss(torch.full((T,), 3.0))
    prefix.keep_observations()
    torch.testing.assert_close(prefix.observed.average, 0.99 * before + 0.03)


def test_dropped_windows_pay_no_entropy() -> None:
    assert model(dropout=1.0).train()(text()).losses["gate_entropy"] == 0


def test_entropy_of_gates() -> None:
    assert gate_entropy(torch.zeros(3)).item() == pytest.approx(math.log(2))
    assert gate_entropy(torch.zeros(0)) == 0
    decided = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    gate_entropy(decided).backward()
    assert gate_entropy(decided) == 0 and decided.grad.isfinite().all()


def test_standardised_losses() -> None:
    torch.testing.assert_close(standardised(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([-1.0, 0.0, 1.0]))
    for alike in (torch.full((3,), 5.0), torch.tensor([5.0])):
        assert torch.equal(standardised(alike), torch.zeros_like(alike))
