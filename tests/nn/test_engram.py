"""Window summaries against a slow reference, whole and in pieces."""

import pytest
import torch
import torch.nn.functional as F

from hrs.config import EngramConfig
from hrs.nn.engram import EngramCache, Engrams

D, W, K = 6, 4, 3


def engrams() -> Engrams:
    torch.manual_seed(0)
    layer = Engrams(EngramConfig(window=W, per_window=K), D)
    torch.nn.init.normal_(layer.type_embedding)
    return layer.double()


@pytest.mark.parametrize("n_tokens", [3, 4, 5, 11, 12])
def test_equals_slow_reference(n_tokens: int) -> None:
    """LN(W2 GELU(W1 mean + b1) + b2) + type embedding for every complete window; the rest is left out."""
    layer, x = engrams(), torch.randn(2, n_tokens, D).double()
    result, positions, loss = layer(x)
    n_windows = n_tokens // W
    assert result.shape == (2, n_windows * K, D)
    assert positions.tolist() == [(w + 1) * W - 1 for w in range(n_windows) for _ in range(K)]
    encoder, distances = layer.encoder, []
    for b in range(2):
        for w in range(n_windows):
            mean = sum(x[b, w * W + i] for i in range(W)) / W
            vectors = encoder.output(F.gelu(encoder.hidden(mean))).reshape(K, D)
            vectors = torch.stack([encoder.norm(v) for v in vectors])
            rows = slice(w * K, (w + 1) * K)
            torch.testing.assert_close(result[b, rows], vectors + layer.type_embedding, rtol=1e-12, atol=1e-12)
            centre = vectors.mean(0)
            distances.append(1 - mean @ centre / (mean.norm() * centre.norm()))
    expected = torch.stack(distances).mean() if distances else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_reconstruction_does_not_pull_at_the_hidden_states() -> None:
    """Its target is detached: the hidden states' gradient comes through the encoder alone."""
    layer = engrams()
    layer.encoder.requires_grad_(False)
    for parameter in (layer.encoder.hidden.weight, layer.encoder.hidden.bias):
        parameter.data.zero_()  # the encoder ignores its input, so nothing is left
    x = torch.randn(2, 8, D).double().requires_grad_()
    layer(x)[2].backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("sizes", [(13,), (1,) * 13, (2, 9, 1, 1), (4, 4, 5), (3, 1, 9)])
def test_pieces_equal_the_whole(sizes: tuple[int, ...]) -> None:
    """Engrams appear with the piece that completes their window."""
    layer, x, cache = engrams(), torch.randn(2, 13, D).double(), EngramCache()
    whole, positions, _ = layer(x)
    seen, found, places = 0, [], []
    for piece in x.split(list(sizes), dim=1):
        seen += piece.shape[1]
        vectors, ends, _ = layer(piece, cache)
        found.append(vectors)
        places.append(ends)
        assert sum(v.shape[1] for v in found) == seen // W * K
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.cat(places), positions)
