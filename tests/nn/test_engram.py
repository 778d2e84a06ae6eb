"""Window summaries, and the original's prefix, against slow references; whole and in pieces."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.errors import HRSError
from hrs.models import build_model
from hrs.nn.engrams.base import EngramState
from hrs.nn.engrams.window import PrefixEngrams, WindowEngrams
from hrs.presets import experiment

D, W, K = 6, 4, 3


def mechanism(kind: str = "window", **changes: object) -> WindowEngrams:
    torch.manual_seed(0)
    engram = EngramConfig(**{"kind": kind, "window": W, "per_window": K, "extract_after": 0, "dropout": 0.0, **changes})
    config = ModelConfig(vocab_size=7, n_layers=3, n_heads=1, d_model=D, max_seq_len=20, engram=engram)
    layer = {"window": WindowEngrams, "prefix": PrefixEngrams}[kind](config)
    layer.initialise()
    torch.nn.init.normal_(layer.type_embedding)
    return layer.double()


def states(n: int, seed: int = 1) -> Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(layer: WindowEngrams, x: Tensor, cache: object = None, start: int = 0) -> EngramState:
    """The state of a pass after the extraction from ``x``, the output of the first block."""
    state = layer.start(torch.arange(start, start + x.shape[1]), cache)
    assert torch.equal(layer.leave(0, x, state), x)
    return state


@pytest.mark.parametrize("n_tokens", [3, 4, 5, 11, 12])
def test_equals_slow_reference(n_tokens: int) -> None:
    """LN(W2 GELU(W1 mean + b1) + b2) + type embedding for every complete window; the rest is left out."""
    layer, x = mechanism(), states(n_tokens)
    state = read(layer, x)
    n_windows = n_tokens // W
    memory, positions = state.inputs.memory, state.inputs.memory_positions
    if n_windows == 0:
        assert memory is None and positions is None
    else:
        assert memory.shape == (2, n_windows * K, D)
        assert positions.tolist() == [(w + 1) * W - 1 for w in range(n_windows) for _ in range(K)]
    encoder, distances = layer.encoder, []
    for b in range(2):
        for w in range(n_windows):
            mean = sum(x[b, w * W + i] for i in range(W)) / W
            vectors = encoder.output(F.gelu(encoder.hidden(mean))).reshape(K, D)
            vectors = torch.stack([encoder.norm(v) for v in vectors])
            rows = slice(w * K, (w + 1) * K)
            torch.testing.assert_close(memory[b, rows], vectors + layer.type_embedding, rtol=1e-12, atol=1e-12)
            centre = vectors.mean(0)
            distances.append(1 - mean @ centre / (mean.norm() * centre.norm()))
    expected = torch.stack(distances).mean() if distances else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(state.losses["recon"], 0.1 * expected, rtol=1e-12, atol=1e-12)


def test_only_later_blocks_read() -> None:
    layer, x = mechanism(), states(12)
    state = read(layer, x)
    assert [layer.enter(index, x, state)[2].memory is None for index in range(3)] == [True, False, False]


def test_reconstruction_does_not_pull_at_the_hidden_states() -> None:
    """Its target is detached: the hidden states' gradient comes through the encoder alone."""
    layer = mechanism()
    layer.encoder.requires_grad_(False)
    for parameter in (layer.encoder.hidden.weight, layer.encoder.hidden.bias):
        parameter.data.zero_()  # the encoder ignores its input, so nothing is left
    x = states(8).requires_grad_()
    read(layer, x).losses["recon"].backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (2, 9, 1, 1), (4, 4, 5), (3, 1, 9)])
def test_pieces_equal_the_whole(sizes: tuple[int, ...]) -> None:
    """Engrams appear with the piece that completes their window."""
    layer, x = mechanism(), states(13)
    cache, whole = layer.new_cache(), read(layer, x).inputs
    seen, found, places = 0, [], []
    for piece in x.split(list(sizes), dim=1):
        inputs = read(layer, piece, cache, start=seen).inputs
        seen += piece.shape[1]
        if inputs.memory is not None:
            found.append(inputs.memory)
            places.append(inputs.memory_positions)
        assert sum(v.shape[1] for v in found) == seen // W * K
    torch.testing.assert_close(torch.cat(found, 1), whole.memory, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat(places), whole.memory_positions)


def test_dropped_engrams_are_out_of_sight_and_cost_nothing() -> None:
    layer = mechanism(dropout=1.0)
    state = read(layer.train(), states(8))
    assert state.inputs.memory_positions.tolist() == [20] * 2 * K
    assert state.losses["recon"] == 0
    state = read(layer.eval(), states(8))
    assert state.inputs.memory_positions.tolist() == [3] * K + [7] * K


def test_prefix_stands_in_front_and_is_taken_off_again() -> None:
    layer, x = mechanism("prefix"), states(9)
    state = read(layer, x)
    joined, positions, inputs = layer.enter(1, x, state)
    assert torch.equal(joined, torch.cat((read(mechanism(), x).inputs.memory, x), dim=1))
    assert torch.equal(positions, torch.arange(2 * K + 9))
    assert inputs.memory is None
    assert torch.equal(layer.leave(1, joined, state), x)


def test_window_has_no_original() -> None:
    with pytest.raises(HRSError, match=r"kind=prefix"):
        mechanism(as_original=True)


@pytest.mark.parametrize(("preset", "leaks"), [("full_hrs", False), ("full_hrs_legacy", True)])
def test_who_sees_the_future(preset: str, leaks: bool) -> None:
    """In a whole model, bit for bit: one changed token moves all earlier logits, or none."""
    torch.manual_seed(0)
    config = experiment(preset, "micro").model
    model = build_model(dataclasses.replace(config, vocab_size=13)).double().eval()
    text = torch.randint(13, (1, 64))
    before = model(text).logits
    for cut in (15, 16, 40, 63):
        changed = text.clone()
        changed[:, cut] = (text[:, cut] + 1) % 13
        moved = (model(changed).logits != before).any(-1)[0]
        assert moved[:cut].all() if leaks else not moved[:cut].any()
        assert moved[cut:].any()
