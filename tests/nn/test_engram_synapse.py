"""The virtual synapse: its factors, and which engrams each token reads them from."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.nn.engrams.base import BlockInputs
from hrs.nn.engrams.synapse import Synapse
from hrs.nn.engrams.window import PrefixEngrams, WindowEngrams

D, T, W, K, H = 8, 14, 4, 2, 2
ENGRAM = EngramConfig(kind="window", window=W, per_window=K, extract_after=0, dropout=0.0, synapse=True)
CONFIG = ModelConfig(vocab_size=13, n_layers=2, n_heads=H, d_model=D, max_seq_len=T, dropout=0.0, engram=ENGRAM)


def mechanism(**changes: object) -> WindowEngrams:
    torch.manual_seed(0)
    engram = dataclasses.replace(ENGRAM, **changes)  # type: ignore[arg-type]
    layer = (PrefixEngrams if engram.kind == "prefix" else WindowEngrams)(dataclasses.replace(CONFIG, engram=engram))
    layer.initialise()
    torch.nn.init.normal_(layer.type_embedding)
    return layer.double()


def synapse() -> Synapse:
    torch.manual_seed(0)
    layer = Synapse(D, H, 5).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def states(n: int = T) -> Tensor:
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(layer: WindowEngrams, x: Tensor, cache: object = None, start: int = 0) -> BlockInputs:
    state = layer.start(torch.arange(start, start + x.shape[1]), cache)
    layer.leave(0, x, state)
    return layer.enter(1, x, state)[2]


def factors(layer: Synapse, inputs: BlockInputs) -> Tensor:
    """[B, n, H], what each token's queries are multiplied by."""
    return layer(inputs.synapse_means)[:, inputs.synapse_index]


def test_factors_equal_slow_reference() -> None:
    layer, means = synapse(), torch.randn(3, 4, D, dtype=torch.float64)
    actual = layer(means)
    assert actual.shape == (3, 4, H)
    assert torch.equal(actual[:, 0], torch.ones(3, H, dtype=torch.float64))
    for b in range(3):
        for row in range(1, 4):
            query, key = (
                (network[2].weight @ F.gelu(network[0].weight @ means[b, row])).reshape(H, D // H)
                for network in (layer.query, layer.key)
            )
            for h in range(H):
                gain = query[h] @ key[h] / (query[h].norm() * key[h].norm())
                torch.testing.assert_close(actual[b, row, h], (1 + gain).sqrt(), rtol=1e-12, atol=1e-12)


def test_parameters() -> None:
    assert sum(p.numel() for p in Synapse(512, 8, 64).parameters()) == 131_072


def test_gradient_is_finite_where_the_root_is_steepest() -> None:
    """Opposite directions (gain -1), the same ones, and no engrams at all."""
    layer, means = synapse(), torch.randn(2, 2, D, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for query, key in zip(layer.query.parameters(), layer.key.parameters(), strict=True):
            key.copy_(query)
        layer.key[2].weight.neg_()
    factor = layer(means)
    assert (factor[:, 1] == Synapse.LEAST**0.5).all()
    (factor.sum() + layer(torch.zeros_like(means) * means).sum()).backward()
    assert means.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("n", [3, 4, 13, T])
def test_tokens_read_the_mean_of_engrams_complete_at_them(n: int) -> None:
    layer, x = mechanism(), states(n)
    inputs = read(layer, x)
    assert inputs.synapse_means.shape == (2, n // W + 1, D)
    assert torch.equal(inputs.synapse_means[:, 0], torch.zeros(2, D, dtype=torch.float64))
    for t in range(n):
        row = inputs.synapse_index[t]
        seen = [] if inputs.memory is None else inputs.memory[:, inputs.memory_positions <= t].unbind(1)
        expected = sum(seen) / len(seen) if seen else torch.zeros(2, D, dtype=torch.float64)
        torch.testing.assert_close(inputs.synapse_means[:, row], expected, rtol=1e-12, atol=1e-12)
        assert (row == 0) == (t < W - 1)


@pytest.mark.parametrize("sizes", [(1,) * T, (4, 4, 6), (3, 9, 2), (13, 1), (2, 2, 1, 9)])
def test_pieces_equal_the_whole(sizes: tuple[int, ...]) -> None:
    layer, reader, x = mechanism(), synapse(), states()
    cache, seen, found = layer.new_cache(), 0, []
    for piece in x.split(sizes, dim=1):
        found.append(factors(reader, read(layer, piece, cache, seen)))
        seen += piece.shape[1]
    torch.testing.assert_close(torch.cat(found, 1), factors(reader, read(layer, x)), rtol=1e-12, atol=1e-12)


def test_factors_ignore_later_tokens_exactly() -> None:
    layer, reader, x = mechanism(), synapse(), states()
    before = factors(reader, read(layer, x))
    for cut in range(1, T):
        changed = x.clone()
        changed[:, cut:] += 1
        after = factors(reader, read(layer, changed))
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert torch.equal(after, before) == (cut >= T // W * W)  # nobody reads an unfinished window


def test_dropped_engrams_leave_the_temperature_alone() -> None:
    inputs = read(mechanism(dropout=1.0).train(), states())
    assert torch.equal(factors(synapse(), inputs), torch.ones(2, T, H, dtype=torch.float64))


def test_original_shows_all_engrams_to_every_row() -> None:
    """Prefix rows too; the mean leaves out the type embedding, which only the prefix gets."""
    layer, reader, x = mechanism(kind="prefix"), synapse(), states()
    inputs = read(layer, x)
    m = T // W
    assert torch.equal(inputs.synapse_index, torch.ones(m * K + T, dtype=torch.int64))
    windows = [layer.encoder(x[:, w * W : (w + 1) * W].mean(1, keepdim=True)) for w in range(m)]
    mean = torch.cat(windows, 1).mean((1, 2))
    torch.testing.assert_close(inputs.synapse_means[:, 1], mean, rtol=1e-12, atol=1e-12)
    changed = x.clone()
    changed[:, m * W - 1] += 1
    assert (factors(reader, read(layer, changed)) != factors(reader, inputs)).any(-1).all()
    assert read(layer, states(W - 1)).synapse_means is None
