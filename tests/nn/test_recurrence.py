"""Segment recurrence against a slow reference: what is recalled, what counts as known, whole and in pieces."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.errors import HRSError
from hrs.models.base import WindowContext
from hrs.models.hrs import HRSModel
from hrs.nn.engrams.recurrence import RecurrenceEngrams

D, W, K, H, T = 8, 4, 2, 3, 12
CONFIG = ModelConfig(
    vocab_size=13,
    n_layers=3,
    n_heads=2,
    d_model=D,
    d_ff=16,
    max_seq_len=T,
    dropout=0.0,
    engram=EngramConfig(
        kind="recurrence", window=W, per_window=K, history_windows=H, extract_after=0, dropout=0.0, recon_weight=0.5
    ),
)


def mechanism(**changes: object) -> RecurrenceEngrams:
    torch.manual_seed(0)
    engram = dataclasses.replace(CONFIG.engram, **changes)  # type: ignore[arg-type]
    layer = RecurrenceEngrams(dataclasses.replace(CONFIG, engram=engram))
    layer.initialise()
    return layer.double()


def model() -> HRSModel:
    torch.manual_seed(0)
    built = HRSModel(CONFIG).double().eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)  # effects far above rounding
    return built


def hidden_states(n: int = H * W) -> Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def token_ids(*shape: int) -> Tensor:
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(2))


def history(*counts: int) -> Tensor:
    """[B, H W]: each row's last ``counts`` tokens are text, in front of it there is none."""
    return token_ids(len(counts), H * W).masked_fill(~known(*counts), -1)


def known(*counts: int) -> Tensor:
    """[B, H W]: each row's last ``counts`` tokens are text."""
    return torch.tensor([[i >= H * W - n for i in range(H * W)] for n in counts])


@pytest.mark.parametrize("counts", [(0, 1), (3, 4), (5, 11), (12, 8)])
def test_recall_equals_slow_reference(counts: tuple[int, int]) -> None:
    """Each window is encoded on its own; it counts only if every one of its tokens is text."""
    layer, hidden = mechanism(), hidden_states()
    recalled = layer.recall(hidden, known(*counts))
    assert recalled.shape == (2, H * K, D + 1)
    for b, count in enumerate(counts):
        for w in range(H):
            mean = sum(hidden[b, w * W + i] for i in range(W)) / W
            vectors = layer.encoder.output(F.gelu(layer.encoder.hidden(mean))).reshape(K, D)
            for k in range(K):
                row = recalled[b, w * K + k]
                expected = layer.encoder.norm(vectors[k]) + layer.type_embedding + layer.age_embedding[w]
                torch.testing.assert_close(row[:-1], expected, rtol=1e-12, atol=1e-12)
                assert row[-1] == (1.0 if count >= (H - w) * W else 0.0)


def test_encoder_learns_for_later_reading_and_the_history_does_not() -> None:
    """Gradients of what blocks read of a known history reach encoder and age embedding, but not the states."""
    layer, hidden = mechanism(), hidden_states().requires_grad_()
    recalled = layer.recall(hidden, known(12, 4))
    (recalled[..., :-1] * recalled[..., -1:]).square().sum().backward()
    assert hidden.grad is None
    assert layer.encoder.hidden.weight.grad is not None
    assert layer.encoder.hidden.weight.grad.norm() > 0
    assert layer.age_embedding.grad is not None
    assert (layer.age_embedding.grad.norm(dim=1) > 0).all()


def test_history_stands_at_position_zero_in_front_of_the_windows() -> None:
    """Blocks after the extraction get both, blocks up to it nothing."""
    layer, x = mechanism(), hidden_states(10)
    recalled = layer.recall(hidden_states(), known(4, 12))
    state = layer.start(torch.arange(10), None, recalled)
    assert layer.enter(0, x, state)[2].memory is None
    layer.leave(0, x, state)
    inputs = layer.enter(1, x, state)[2]
    assert inputs.memory is not None
    assert inputs.memory_positions is not None
    assert inputs.memory_gate is not None
    assert torch.equal(inputs.memory[:, : H * K], recalled[..., :-1])
    assert inputs.memory_positions.tolist() == [0] * (H * K) + [3, 3, 7, 7]
    assert inputs.memory_gate.tolist() == [[0.0] * 4 + [1.0] * 6, [1.0] * 10]


def test_no_history_equals_unknown_history() -> None:
    """A text without context has the same states as one in front of which nothing is known."""
    built, tokens = model(), token_ids(2, T)
    without = built(tokens).hidden
    assert torch.equal(without, built(tokens, WindowContext(history=history(0, 0))).hidden)
    one_window = built(tokens, WindowContext(history=history(W - 1, W))).hidden
    assert torch.equal(one_window[0], without[0])  # no complete window
    assert (one_window[1] - without[1]).abs().amax(dim=-1).min() > 1e-6  # every token reads it, the first too


def test_places_without_text_have_no_say() -> None:
    """What is known of a window does not depend on how much is unknown in front of it."""
    built, tokens, before = model(), token_ids(2, T), history(W, 2 * W - 1)
    before[1, -W:] = before[0, -W:]
    states = built(tokens[:1].expand(2, -1), WindowContext(history=before)).hidden
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (3, 1, 5, 3), (4, 4, 4), (6, 6)])
def test_pieces_equal_the_whole(sizes: tuple[int, ...]) -> None:
    """Decoding with a history equals the parallel pass; the history is appended to the caches exactly once."""
    built, tokens, before = model(), token_ids(2, T), history(12, 5)
    whole = built(tokens, WindowContext(history=before)).logits
    cache = built.new_cache(2, before)
    pieces = [built.decode(piece, cache).logits for piece in tokens.split(list(sizes), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)  # type: ignore[arg-type]
    assert [c.attention.length for c in cache.blocks] == [T] + [T + H * K + T // W * K] * 2  # type: ignore[union-attr]


def test_no_state_depends_on_later_tokens() -> None:
    built, tokens, context = model(), token_ids(2, T), WindowContext(history=history(12, 5))
    before = built(tokens, context).hidden
    for s in range(1, T):
        changed = tokens.clone()
        changed[:, s:] = (changed[:, s:] + 1 + token_ids(2, T - s) % 12) % 13
        after = built(changed, context).hidden
        assert torch.equal(after[:, :s], before[:, :s])
        assert (after[:, s] != before[:, s]).any(dim=-1).all()


def test_dropout_draws_for_windows_and_history_separately() -> None:
    """A dropped history is unknown, dropped windows are out of sight; all four cases occur in training, one in eval."""
    layer, x = mechanism(dropout=0.5), hidden_states(8)
    recalled = layer.recall(hidden_states(), known(12, 12))
    cases = set()
    for _ in range(50):
        state = layer.start(torch.arange(8), None, recalled)
        layer.leave(0, x, state)
        gate, positions = state.inputs.memory_gate, state.inputs.memory_positions
        assert gate is not None
        assert positions is not None
        assert gate[:, : H * K].unique().numel() == 1
        assert bool((gate[:, H * K :] == 1).all())
        cases.add((bool(gate[0, 0]), bool(positions[-1] < T)))
    assert cases == {(a, b) for a in (False, True) for b in (False, True)}
    layer.eval()
    state = layer.start(torch.arange(8), None, recalled)
    layer.leave(0, x, state)
    assert state.inputs.memory_gate is not None
    assert bool((state.inputs.memory_gate == 1).all())


def test_ages_are_told_apart() -> None:
    """Two windows that change places keep their content and change their vectors."""
    layer, hidden = mechanism(), hidden_states()
    swapped = torch.cat((hidden[:, W : 2 * W], hidden[:, :W], hidden[:, 2 * W :]), dim=1)
    before, after = (layer.recall(states, known(12, 12))[:, ::K, :-1] for states in (hidden, swapped))  # [B, H, d]
    ages = layer.age_embedding
    torch.testing.assert_close(before[:, 0] - ages[0], after[:, 1] - ages[1])
    assert (before[:, 0] - after[:, 1]).abs().max() > 1e-3


def test_has_no_original() -> None:
    with pytest.raises(HRSError, match="as_original has no meaning"):
        mechanism(as_original=True)
