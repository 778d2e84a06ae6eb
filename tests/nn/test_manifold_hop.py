"""Cell, mixer, attention and the whole hop, against plain forms of their equations."""

from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrs.config import GeometryConfig, ManifoldConfig, ModelConfig
from hrs.nn.manifold import Hop, HopCache, SharedLayers, TokenWindow, WindowReader
from hrs.nn.manifold.attention import ManifoldAttention
from hrs.nn.manifold.context import ahead, context_velocity, unit
from hrs.nn.manifold.hop_cell import HopCell
from hrs.nn.manifold.mixer import SpectralMixer
from hrs.nn.manifold.transport import transported

Module = TypeVar("Module", bound=nn.Module)

V, N, K, D, B, T = 9, 4, 3, 8, 2, 10
CONFIG = ModelConfig(
    family="manifold",
    vocab_size=V,
    n_layers=2,
    n_heads=2,
    d_model=D,
    max_seq_len=T,
    dropout=0.0,
    manifold=ManifoldConfig(geometry=GeometryConfig(modes=2, directional=1, syntactic=1, neighbours=K)),
)
NEIGHBOURS = (torch.arange(V)[:, None] + torch.tensor([1, 3, 4])) % V
TOKENS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def window(end: int = T, n: int = T) -> TokenWindow:
    return WindowReader(CONFIG.manifold)(TOKENS[:, :end], n, draws(V, N, seed=2), NEIGHBOURS)


def drawn(module: Module) -> Module:
    """In float64, no parameter zero."""
    module.double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * draws(*parameter.shape, seed=i))
    return module


def test_cell_is_a_gated_update_of_state_and_message() -> None:
    cell, seen = drawn(HopCell(D, N)), window()
    s, incoming = draws(B, T, D), draws(B, T, D, seed=1)
    a, b, z = cell.structure(seen.coordinates[TOKENS]).chunk(3, dim=-1)
    first = torch.cat((cell.state.weight, cell.incoming.weight), dim=1)  # of the update of [s; incoming]
    for message in (incoming, torch.zeros_like(incoming)):
        update = cell.output(F.gelu(F.linear(torch.cat((s, message), dim=-1), first, cell.state.bias)))
        got = cell(cell.state(s), cell.modulation(seen), message if message.any() else None)
        torch.testing.assert_close(got, torch.sigmoid(z) * (a * update + b), rtol=0, atol=1e-12)


def test_mixer_gates_its_hidden_units_by_coordinates() -> None:
    mixer, x, seen = drawn(SpectralMixer(D, N)), draws(B, T, D), window()
    gate = torch.sigmoid(mixer.gate(seen.coordinates[TOKENS]))
    torch.testing.assert_close(mixer(x, seen), mixer.output(F.gelu(mixer.hidden(x)) * gate), rtol=0, atol=1e-12)


def test_attention_equals_a_loop_over_queries() -> None:
    layer, seen = drawn(ManifoldAttention(CONFIG)), window()
    x, offset, velocity, prior = draws(B, T, D), draws(D, seed=1), draws(B, T, N, seed=2), draws(B, T, T, seed=3)
    got = layer(x, offset, velocity, prior, seen)
    length, width = N**0.5, D // 2
    q = layer.query(torch.cat((x + offset, length * seen.directions, length * velocity), dim=-1))
    k = layer.key(torch.cat((x + offset, length * seen.directions), dim=-1))
    v = layer.value(x)
    for b in range(B):
        for t in range(T):
            heads = []
            for h in range(2):
                part = slice(h * width, (h + 1) * width)
                turned = layer.rotary(q[b, t : t + 1, part], torch.tensor([t]))[0]
                keys = layer.rotary(k[b, : t + 1, part], torch.arange(t + 1))
                weights = (keys @ turned / width**0.5 + prior[b, t, : t + 1]).softmax(0)
                heads.append(weights @ v[b, : t + 1, part])
            torch.testing.assert_close(got[b, t], layer.output(torch.cat(heads)), rtol=0, atol=1e-12)


def run(hop: Hop, shared: SharedLayers, x: torch.Tensor, seen: TokenWindow, cache: HopCache | None = None):
    before = draws(B, T, N, seed=7)[:, seen.positions]
    return hop(x, context_velocity(seen.directions, seen.recency), before, seen, shared, cache)


def test_hop_follows_its_equations() -> None:
    """Transport, cell with what the router brings, velocity of moved directions, attention, mixer: in this order."""
    hop, shared, x, seen = drawn(Hop(CONFIG)), drawn(SharedLayers(CONFIG)), draws(B, T, D), window()
    stream, velocity, _ = run(hop, shared, x, seen)
    old, before = context_velocity(seen.directions, seen.recency), draws(B, T, N, seed=7)
    lifted = old @ shared.lift.T
    x = transported(x, before @ shared.lift.T, lifted, CONFIG.manifold.transport_share)
    projected, modulation = hop.cell.state(hop.cell_norm(x)), hop.cell.modulation(seen)
    messages = shared.message(hop.message_norm(x + hop.cell(projected, modulation)))
    x = x + hop.cell(projected, modulation, hop.router(hop.cell_norm(x), messages, old, lifted, seen)[0])
    state, c = hop.attention_norm(x), seen.directions
    moved = unit(c + shared.to_coordinates(state))
    expected = context_velocity(moved, seen.recency)
    prior = seen.cosines * (hop.prior[0] + hop.prior[1] * ahead(c, expected) @ c.mT)
    x = x + shared.attention(state, hop.hop_embedding, expected, prior, seen)
    x = x + hop.mixer(hop.mixer_norm(x), seen)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stream, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * T, [3, 1, 6], [T]])
def test_hop_in_pieces_equals_the_whole(sizes: list[int]) -> None:
    hop, shared, x = drawn(Hop(CONFIG)), drawn(SharedLayers(CONFIG)), draws(B, T, D)
    whole, velocity, _ = run(hop, shared, x, window())
    cache, end, pieces = HopCache(T), 0, []
    for n in sizes:
        end += n
        pieces.append(run(hop, shared, x[:, end - n : end], window(end, n), cache)[:2])
    torch.testing.assert_close(torch.cat([p[0] for p in pieces], dim=1), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces], dim=1), velocity, rtol=0, atol=1e-11)


def test_every_part_of_a_hop_takes_part() -> None:
    """Each parameter of the hop and of the shared layers has a gradient: no branch is left out."""
    hop, shared = drawn(Hop(CONFIG)), drawn(SharedLayers(CONFIG))
    stream, velocity, _ = run(hop, shared, draws(B, T, D), window())
    (stream.square().sum() + velocity[..., 0].sum()).backward()
    parameters = [*hop.named_parameters(), *shared.named_parameters()]
    without = [name for name, p in parameters if p.grad is None or not p.grad.any()]
    assert not without


def test_values_do_not_see_the_hop_embedding() -> None:
    """One visible token: its value is all that attention can return, whatever is added to queries and keys."""
    layer, seen = drawn(ManifoldAttention(CONFIG)), window()
    x, velocity, prior = draws(B, T, D), draws(B, T, N), draws(B, T, T)
    a, b = (layer(x, draws(D, seed=s), velocity, prior, seen) for s in (1, 2))
    torch.testing.assert_close(a[:, 0], b[:, 0], rtol=0, atol=1e-12)
    assert (a - b)[:, 1:].abs().max() > 1e-3
