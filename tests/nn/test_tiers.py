"""Each tier against a slow reference, and their mixture."""

import pytest
import torch
import torch.nn.functional as F

from hrs.config import ModelConfig, RouterConfig, TierConfig
from hrs.nn.conv_mixer import ConvMixer
from hrs.nn.tiers import ConvTier, ExpertTier, RoutedTiers, SinkTier, sparsify

D, T = 8, 10
POSITIONS = torch.arange(T)


def routed(names: tuple[str, ...] = ("conv", "expert", "attention", "sink"), **changes: object) -> RoutedTiers:
    torch.manual_seed(0)
    tiers = TierConfig(names=names, expert_hidden=4, **changes)  # type: ignore[arg-type]
    config = ModelConfig(d_model=D, n_heads=2, dropout=0.0, tiers=tiers, router=RouterConfig(hidden=4, trc_window=3))
    return RoutedTiers(config, T).double().eval()


def test_conv_equals_explicit_sum_over_past_inputs() -> None:
    tier, x = ConvTier(D, 3, dropout=0.0).double(), torch.randn(2, T, D).double()
    taps = tier.conv.conv.weight[:, 0]  # [d, 3], the last tap meets the newest token
    rows = []
    for t in range(T):
        past = [taps[:, 2 - lag] * x[:, t - lag] for lag in range(3) if t - lag >= 0]
        rows.append(tier.norm(torch.stack(past).sum(0)))
    torch.testing.assert_close(tier(x, POSITIONS), torch.stack(rows, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("renormalise_gate", [False, True])
def test_expert_equals_token_by_token_choice(renormalise_gate: bool) -> None:
    """Each token goes through its most probable expert alone, weighted by that probability or by one."""
    torch.manual_seed(1)
    tier = ExpertTier(D, 3, 4, dropout=0.0, renormalise_gate=renormalise_gate).double()
    x = torch.randn(2, T, D).double()
    result, used = tier(x, POSITIONS), set()
    for b in range(2):
        for t in range(T):
            probabilities = tier.gate(x[b, t]).softmax(-1)
            e = int(probabilities.argmax())
            used.add(e)
            part = slice(4 * e, 4 * e + 4)
            y = tier.norm(tier.output.weight[:, part] @ F.gelu(tier.hidden.weight[part] @ x[b, t]))
            weight = 1.0 if renormalise_gate else probabilities[e]
            torch.testing.assert_close(result[b, t], weight * y, rtol=1e-7, atol=1e-7)
    assert used == {0, 1, 2}


def test_expert_gate_learns_unless_renormalised() -> None:
    """Dividing the top-1 weight by itself leaves the gate without a gradient: the original's stayed a random hash."""
    norms = {}
    for renormalise_gate in (False, True):
        torch.manual_seed(0)
        tier = ExpertTier(D, 3, 4, dropout=0.0, renormalise_gate=renormalise_gate).double()
        (tier(torch.randn(2, T, D).double(), POSITIONS) * torch.randn(2, T, D).double()).sum().backward()
        assert tier.gate.weight.grad is not None
        norms[renormalise_gate] = tier.gate.weight.grad.norm().item()
    assert norms[False] > 0.1
    assert norms[True] < 1e-6


def test_sink_scales_by_its_absolute_value() -> None:
    tier, x = SinkTier(rescale=False).double(), torch.randn(1, T, D).double()
    tier.scale.data.fill_(-0.25)
    assert torch.equal(tier(x, POSITIONS), 0.25 * x)


@pytest.mark.parametrize("names", [("conv", "expert", "attention", "sink"), ("sink", "conv"), ("attention",)])
def test_mixture_equals_weighted_sum(names: tuple[str, ...]) -> None:
    """residual + gate * sum of weight * tier, in the configured order of the tiers."""
    layer = routed(names)
    residual, x = torch.randn(2, T, D).double(), torch.randn(2, T, D).double()
    result, routing, _ = layer(residual, x, POSITIONS)
    assert routing.shape == (2, T, len(names))
    mixed = sum(routing[..., [k]] * layer.tiers[name](x, POSITIONS) for k, name in enumerate(names))
    torch.testing.assert_close(result, residual + 0.1 * mixed, rtol=1e-6, atol=1e-6)


def test_sink_rescale_shrinks_the_whole_residual_stream() -> None:
    plain, rescaled = routed(), routed(sink_rescale=True)
    residual, x = torch.randn(2, T, D).double(), torch.randn(2, T, D).double()
    kappa = rescaled.tiers["sink"].kappa
    kappa.data.fill_(-0.3)
    rescaled.load_state_dict({**plain.state_dict(), "tiers.sink.kappa": kappa.data})
    before, routing, _ = plain(residual, x, POSITIONS)
    after, _, _ = rescaled(residual, x, POSITIONS)
    torch.testing.assert_close(after, before * (1 - routing[..., 3:] * (1 - 0.3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["conv", "expert", "attention", "sink"])
def test_later_tokens_leave_earlier_results_untouched(name: str) -> None:
    """Exactly, in float64: no tier's result depends on what follows, nor on other sequences in the batch."""
    layer, x = routed((name,)), torch.randn(3, T, D).double()
    residual = torch.zeros_like(x)
    changed = x.clone()
    changed[:, 6:] = torch.randn(3, T - 6, D).double()
    changed[1] = torch.randn(T, D).double()
    before, after = layer(residual, x, POSITIONS)[0], layer(residual, changed, POSITIONS)[0]
    assert torch.equal(before[[0, 2], :6], after[[0, 2], :6])
    assert not torch.equal(before[[0, 2], 6:], after[[0, 2], 6:])


def test_pieces_equal_the_whole() -> None:
    layer, x = routed(sink_rescale=True, conv_kernel=4), torch.randn(2, T, D).double()
    cache, start, pieces = layer.new_cache(), 0, []
    for n in (1, 2, 5, 1, 1):
        part = slice(start, start + n)
        pieces.append(layer(x[:, part], x[:, part], torch.arange(start, start + n), cache)[0])
        start += n
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x, x, POSITIONS)[0], rtol=1e-12, atol=1e-12)


def test_sparsify_keeps_the_largest_of_softplus() -> None:
    x = torch.tensor([[0.5, -1.0, 2.0, 0.0], [3.0, 3.5, -9.0, 1.0]])
    kept = sparsify(x, 0.5)
    assert kept[0].nonzero().flatten().tolist() == [0, 2] and kept[1].nonzero().flatten().tolist() == [0, 1]
    torch.testing.assert_close(kept[kept > 0], F.softplus(torch.tensor([0.5, 2.0, 3.0, 3.5])))
    assert (sparsify(x, 0.0) > 0).sum(-1).tolist() == [1, 1]  # never nothing at all


def test_sparse_tiers_leave_the_router_its_dense_input() -> None:
    dense, sparse = routed(), routed(input_density=0.25)
    sparse.load_state_dict(dense.state_dict())
    residual, x = torch.randn(2, T, D).double(), torch.randn(2, T, D).double()
    expected, routing, _ = dense(residual, sparsify(x, 0.25), POSITIONS)
    result, same_routing, _ = sparse(residual, x, POSITIONS)
    assert torch.equal(same_routing, dense.router(x))
    mixed = sum(same_routing[..., [k]] * t(sparsify(x, 0.25), POSITIONS) for k, t in enumerate(dense.tiers.values()))
    torch.testing.assert_close(result, residual + 0.1 * mixed, rtol=1e-6, atol=1e-6)
    assert not torch.equal(routing, same_routing) and not torch.equal(result, expected)


def test_conv_mixer_mixes_channels_and_is_causal_in_pieces() -> None:
    torch.manual_seed(0)
    mixer, x = ConvMixer(D, 4, dropout=0.0).double(), torch.randn(2, T, D).double()
    whole = mixer(x)
    torch.testing.assert_close(whole, mixer.norm(mixer.output(mixer.conv(x))), rtol=0, atol=0)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.equal(mixer(changed)[:, :6], whole[:, :6])
    cache = mixer.new_cache()
    pieces = [mixer(piece, cache) for piece in x.split([1, 3, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
