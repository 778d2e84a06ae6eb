"""Windows mixed with engrams: a slow reference of both forms, causality, decoding, the observed loss."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.models.hrs import HRSModel
from hrs.nn.engrams.base import EngramState
from hrs.nn.engrams.observed_loss import ObservedLoss
from hrs.nn.engrams.replace import ReplaceEngrams
from hrs.nn.engrams.window import PrefixEngrams

D, T, W, K = 8, 15, 4, 2
ENGRAM = EngramConfig(
    kind="replace", window=W, per_window=K, extract_after=0, dropout=0.0, recon_weight=0.5, gate_entropy_weight=0.25
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
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)  # effects far above rounding
    if built.engram.observed is not None:
        built.engram.observed.average.uniform_(2.0, 5.0)
    return built


def text(n: int = T) -> Tensor:
    return torch.randint(13, (2, T), generator=torch.Generator().manual_seed(1))[:, :n]


def reconstruct(layer: ReplaceEngrams, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Of one window [W, d]: the vectors for a window's tokens [W, d], and how far its engrams are from its mean."""
    mean = sum(windows) / W
    engrams = layer.encoder.output(F.gelu(layer.encoder.hidden(mean))).reshape(K, D)
    engrams = torch.stack([layer.encoder.norm(e) for e in engrams])
    centre = engrams.mean(0)
    vectors = []
    for i in range(W):
        y = engrams[i // (W // K)] + layer.upsampler.positions[i]
        y = y + layer.upsampler.output(F.gelu(layer.upsampler.hidden(y)))
        vectors.append(layer.upsampler.norm(y) + layer.type_embedding)
    return torch.stack(vectors), 1 - mean @ centre / (mean.norm() * centre.norm())


@pytest.mark.parametrize("n", [3, 4, 7, 8, 15])
@pytest.mark.parametrize("as_original", [False, True])
def test_equals_slow_reference(as_original: bool, n: int) -> None:
    """Token by token, for whole windows and an unfinished one."""
    layer = model(as_original=as_original).engram
    assert isinstance(layer, ReplaceEngrams)
    hidden, later = torch.randn(2, 2, n, D, dtype=torch.float64)
    state = layer.start(torch.arange(n), None)
    layer.leave(0, hidden, state)
    expected, distances, entropies = later.clone(), [], []
    for b in range(2):
        for w in range(n // W):
            vectors, distance = reconstruct(layer, hidden[b, w * W : (w + 1) * W])
            distances.append(distance)
            if as_original:
                loss = sum(layer.observed.average[w * W + i] for i in range(W)) / W
                gate, target = torch.sigmoid(layer.alpha * (loss - layer.theta)), w
            else:
                gate, target = torch.sigmoid(layer.alpha * (layer.theta - distance)), w + 1
            entropies.append(-gate * gate.log() - (1 - gate) * (1 - gate).log())
            for i in range(W):
                if (t := target * W + i) < n:
                    expected[b, t] = gate * vectors[i] + (1 - gate) * later[b, t]
    for index in (1, 2):
        torch.testing.assert_close(layer.enter(index, later, state)[0], expected, rtol=1e-12, atol=1e-12)
    recon, entropy = (sum(values, torch.zeros(())) / max(len(values), 1) for values in (distances, entropies))
    sign = 1 if as_original else -1
    torch.testing.assert_close(state.losses["recon"], 0.5 * recon, check_dtype=False)
    torch.testing.assert_close(state.losses["gate_entropy"], sign * 0.25 * entropy, check_dtype=False)


@pytest.mark.parametrize("n", [12, T])
def test_repaired_earlier_logits_ignore_later_tokens_exactly(n: int) -> None:
    built = model()
    before = built(text(n)).logits
    for cut in range(1, n):
        changed = text(n).clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 13
        after = built(changed).logits
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert (after[:, cut:] != before[:, cut:]).any(-1).all()


def test_original_leaks_within_its_window_only() -> None:
    """One changed token moves the logits from the start of its own window on."""
    built = model(as_original=True)
    before = built(text()).logits
    for place, first in ((1, 0), (3, 0), (6, 4), (11, 8), (12, 12), (14, 14)):  # 12 .. 14 are no whole window
        changed = text().clone()
        changed[:, place] = (changed[:, place] + 1) % 13
        moved = (built(changed).logits != before).any(-1)
        assert not moved[:, :first].any() and moved[:, first:].all()


@pytest.mark.parametrize("sizes", [(1,) * T, (4, 4, 7), (3, 9, 1, 2), (14, 1)])
def test_repaired_decoding_equals_forward(sizes: tuple[int, ...]) -> None:
    built = model()
    cache = built.new_cache(2)
    pieces = [built.decode(piece, cache).logits for piece in text().split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), built(text()).logits, rtol=1e-10, atol=1e-10)


def test_original_decodes_by_running_again() -> None:
    built = model(as_original=True)
    cache = built.new_cache(2)
    for piece in text().split((5, 3, 7), dim=1):
        last = built.decode(piece, cache).logits
    torch.testing.assert_close(last, built(text()).logits[:, -7:], rtol=1e-10, atol=1e-10)


def test_adds_what_the_original_added_to_the_prefix() -> None:
    paper = ModelConfig(engram=EngramConfig(kind="prefix", dropout=0.0))
    with torch.device("meta"):
        prefix, replace = PrefixEngrams(paper), ReplaceEngrams(dataclasses.replace(paper, engram=EngramConfig()))
    count = [sum(p.numel() for p in layer.parameters()) for layer in (prefix, replace)]
    assert count[1] - count[0] == 591_874


@pytest.mark.parametrize(("as_original", "theta"), [(False, 0.0), (True, 3.0)])
def test_every_parameter_learns_from_its_start(as_original: bool, theta: float) -> None:
    torch.manual_seed(0)
    built = HRSModel(config(as_original=as_original)).train()
    assert (built.engram.theta.item(), built.engram.alpha.item()) == (theta, 1.0)
    if as_original:
        built.engram.observed.average.fill_(math.log(13))
    output = built(text())
    assert built.engram.upsampler.positions.std().item() == pytest.approx(0.02, rel=0.3)
    (F.cross_entropy(output.logits.flatten(0, 1), text().flatten()) + sum(output.losses.values())).backward()
    assert all(p.grad.abs().sum() > 0 for p in built.engram.parameters())


@pytest.mark.parametrize("as_original", [False, True])
def test_dropout_takes_the_engrams_away(as_original: bool) -> None:
    built = model(as_original=as_original, dropout=1.0).train()
    plain = HRSModel(dataclasses.replace(CONFIG, engram=EngramConfig())).double()
    plain.load_state_dict({k: v for k, v in built.state_dict().items() if not k.startswith("engram.")})
    output = built(text())
    assert torch.equal(output.logits, plain(text()).logits)
    assert [loss.item() for loss in output.losses.values()] == [0.0, 0.0]


def test_original_gate_stays_closed_until_a_loss_is_known() -> None:
    built = model(as_original=True)
    seen = built(text()).logits
    built.engram.observed.average.zero_()
    plain = HRSModel(dataclasses.replace(CONFIG, engram=EngramConfig())).double()
    plain.load_state_dict({k: v for k, v in built.state_dict().items() if not k.startswith("engram.")})
    # In training the two sum in another order: float64 leaves 1e-13, engrams move logits by more than 1e-6.
    torch.testing.assert_close(built(text()).logits, plain(text()).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(seen, plain(text()).logits, rtol=0, atol=1e-6)


def test_observed_loss_is_an_average_over_updates() -> None:
    """Mean of an update's passes, each taken in with weight 0.01; what is dropped leaves no trace."""
    observed, expected = ObservedLoss(3).double(), [0.0, 0.0, 0.0]
    for passes in ([[2.0, 4.0, 6.0]], [[1.0, 1.0], [3.0, 5.0]], []):
        for losses in passes:
            observed.observe(torch.tensor(losses).double())
        observed.keep()
        for i in range(3):
            if seen := [losses[i] for losses in passes if i < len(losses)]:
                expected[i] = 0.99 * expected[i] + 0.01 * sum(seen) / len(seen)
    observed.observe(torch.full((3,), 100.0).double())
    observed.drop()
    observed.keep()
    torch.testing.assert_close(observed.average, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert set(observed.state_dict()) == {"average"}


def test_window_means_leave_out_positions_without_a_loss() -> None:
    observed = ObservedLoss(6)
    observed.average.copy_(torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0, 0.0]))
    assert observed.window_means(3, 2).tolist() == [2.0, 5.0, 0.0]
    assert observed.window_means(1, 4).tolist() == [3.0]


def test_only_the_original_wants_losses() -> None:
    original, repaired = ReplaceEngrams(config(as_original=True)), ReplaceEngrams(config())
    assert original.wants_losses and not repaired.wants_losses
    original.observe_loss(torch.full((T,), 2.0))
    original.drop_observations()
    original.observe_loss(torch.full((T,), 3.0))
    for layer in (original, repaired):
        layer.keep_observations()
    torch.testing.assert_close(original.observed.average, torch.full((T,), 0.03))


def test_state_is_empty_where_nothing_is_read() -> None:
    """Blocks up to the extraction take their input as it is."""
    layer = model().engram
    x = torch.randn(1, 3, D)
    assert layer.enter(0, x, EngramState(positions=torch.arange(3)))[0] is x
