"""The manifold-guided network: causal, decodable, trainable, and the same however it is executed."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import GeometryConfig, ManifoldConfig, ModelConfig, TrainingConfig
from hrs.errors import HRSError
from hrs.evaluation import audit
from hrs.models.geometry import TokenGeometry
from hrs.models.manifold import ManifoldModel
from hrs.nn.sparsemax import Sparsemax
from hrs.training.activations import checkpoint_activations
from hrs.training.memory_step import training_step_peak
from hrs.training.memory_trace import StorageCounter

V, N, K, T = 23, 10, 4, 16


def config(*, n_layers: int = 2, d_model: int = 16, dropout: float = 0.0, **manifold: float) -> ModelConfig:
    sizes = GeometryConfig(modes=6, directional=2, syntactic=2, neighbours=K)
    return ModelConfig(
        family="manifold",
        vocab_size=V,
        n_layers=n_layers,
        n_heads=2,
        d_model=d_model,
        max_seq_len=T,
        dropout=dropout,
        manifold=ManifoldConfig(geometry=sizes, **manifold),
    )


NONE = TokenGeometry(torch.zeros(V, N), torch.full((V, K), -1))


def model(geometry: TokenGeometry | None = None, *, opened: bool = False, **changes: float) -> ManifoldModel:
    """In float64, evaluation mode; ``opened`` moves every parameter, so that no branch is zero."""
    torch.manual_seed(0)
    made = ManifoldModel(config(**changes), geometry).double().eval()
    if opened:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def text(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(seed))


def decode(network: ManifoldModel, tokens: Tensor, sizes: list[int]) -> Tensor:
    cache = network.new_cache(len(tokens))
    return torch.cat([network.decode(piece, cache).logits for piece in tokens.split(sizes, dim=1)], dim=1)


# ---- causality and decoding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [None, NONE], ids=["drawn", "none"])
def test_audit_finds_it_causal(geometry: TokenGeometry | None) -> None:
    report = audit(model(geometry))
    assert report.causal, str(report)


def test_audit_would_see_the_original_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite number in place of the mask, and no null slot: the first token receives the mean of all messages."""
    right = Sparsemax.forward

    def leaking(self: Sparsemax, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        assert allowed is not None
        weights = right(self, scores[..., :-1].masked_fill(~allowed[..., :-1], -1e4))
        return F.pad(weights, (0, 1))

    monkeypatch.setattr(Sparsemax, "forward", leaking)
    report = audit(model())
    assert not report.causal
    flip = next(test for test in report.tests if test.name == "suffix_flip")
    assert not flip.passed
    assert flip.module == "blocks.0.router"


@pytest.mark.slow
def test_random_tokens_are_not_learned() -> None:
    report = audit(model(), random_token_training=True)
    assert report.causal, str(report)


@pytest.mark.parametrize("cut", range(1, T))
def test_a_changed_suffix_leaves_the_logits_before_it(cut: int) -> None:
    network, tokens = model(opened=True), text()
    changed = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 5) % V), dim=1)
    before, after = network(tokens).logits, network(changed).logits
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


@examples(15)
@given(cuts=st.lists(st.integers(1, T - 1), unique=True))
def test_decoding_in_pieces_equals_forward(cuts: list[int]) -> None:
    network, tokens = model(opened=True), text()
    sizes = [b - a for a, b in itertools.pairwise([0, *sorted(cuts), T])]
    # Some 40 sums of at most 64 products follow each other: 3,000 roundings of numbers below 10, 3e-12. Only transport
    # enlarges them, by up to 1 / |u + v|; the text is always the same, and no two of its directions are opposite.
    torch.testing.assert_close(decode(network, tokens, sizes), network(tokens).logits, rtol=0, atol=1e-10)


def test_decoding_in_float32_equals_forward() -> None:
    network, tokens = model().float(), text()
    torch.testing.assert_close(decode(network, tokens, [1] * T), network(tokens).logits, rtol=0, atol=1e-5)


def test_decoding_a_repeated_token_equals_forward() -> None:
    """Its velocity is rounding error alone, which must stay one."""
    network, tokens = model(opened=True), torch.full((1, T), 3)
    torch.testing.assert_close(decode(network, tokens, [5, 1, 10]), network(tokens).logits, rtol=0, atol=1e-10)


def test_mistakes_are_refused_and_leave_the_cache_usable() -> None:
    network, tokens = model(), text()
    cache = network.new_cache(2)
    network.decode(tokens[:, :10], cache)
    with pytest.raises(ValueError, match="batch size"):
        network.decode(tokens[:1], cache)
    with pytest.raises(ValueError, match="17 tokens exceed max_seq_len 16"):
        network.decode(tokens[:, :7], cache)
    with pytest.raises(ValueError, match="evaluation mode"):
        network.train().decode(tokens[:, 10:], cache)
    logits = network.eval().decode(tokens[:, 10:], cache).logits
    torch.testing.assert_close(logits, network(tokens).logits[:, 10:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="exceed"):
        network.encode(torch.zeros(1, T + 1, dtype=torch.long))


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_weights_do_not_depend_on_the_geometry() -> None:
    drawn, given_one = model(), model(NONE)
    for (name, a), b in zip(drawn.named_parameters(), given_one.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_holds_its_geometry() -> None:
    generator = torch.Generator().manual_seed(5)
    geometry = TokenGeometry(3 * torch.randn(V, N, generator=generator), NONE.neighbours)
    kept = geometry.coordinates.clone()
    trained, loaded = model(geometry), model()
    assert not torch.equal(trained(text()).logits, loaded(text()).logits)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(trained(text()).logits, loaded(text()).logits)
    assert torch.equal(trained.coordinates, kept.double())
    trained.load_state_dict(model().state_dict())
    assert torch.equal(geometry.coordinates, kept), "loading weights wrote into the caller's geometry"


def test_unit_of_the_coordinates_has_no_effect() -> None:
    coordinates = torch.randn(V, N, generator=torch.Generator().manual_seed(5))
    neighbours = NONE.neighbours
    a, b = (model(TokenGeometry(scale * coordinates, neighbours), opened=True) for scale in (1.0, 1024.0))
    torch.testing.assert_close(a(text()).logits, b(text()).logits, rtol=0, atol=1e-10)


def test_none_geometry_learns_without_nan() -> None:
    network = model(NONE).train()
    output = network(text())
    assert output.metrics["neighbour_coverage"].tolist() == [0.0, 0.0]
    F.cross_entropy(output.logits.flatten(0, 1), text(seed=2).flatten()).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "geometry",
    [
        TokenGeometry(torch.zeros(V, N + 1), NONE.neighbours),
        TokenGeometry(torch.zeros(V - 1, N), NONE.neighbours),
        TokenGeometry(NONE.coordinates, torch.zeros(V, K - 1, dtype=torch.long)),
    ],
)
def test_a_geometry_of_other_sizes_is_refused(geometry: TokenGeometry) -> None:
    with pytest.raises(HRSError, match=r"the geometry has (coordinates|neighbours) of shape \[\d+, \d+\]"):
        ManifoldModel(config(), geometry)


def test_more_neighbours_than_tokens_are_none() -> None:
    sizes = GeometryConfig(modes=2, directional=0, syntactic=0, neighbours=5)
    made = ModelConfig(family="manifold", vocab_size=3, n_heads=1, d_model=4, manifold=ManifoldConfig(geometry=sizes))
    assert (ManifoldModel(made).neighbours >= 0).sum(dim=1).tolist() == [2, 2, 2]


# ---- learning --------------------------------------------------------------------------------------------------------


def test_groups_partition_the_parameters() -> None:
    network = model()
    groups = network.parameter_groups()
    assert set(groups) == {"backbone", "hops"}
    grouped = [id(p) for members in groups.values() for p in members]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    hops = {id(p) for p in (*network.shared.parameters(), *network.blocks.parameters())}
    assert {id(p) for p in groups["hops"]} == hops


def test_hops_start_orthogonal_and_different() -> None:
    first, second = model(n_layers=2).hops
    for name, weight in first.named_parameters():
        if name in ("cell.state.weight", "cell.incoming.weight", "router.probe.weight", "mixer.hidden.weight"):
            torch.testing.assert_close(weight.mT @ weight, torch.eye(weight.shape[1]).double(), rtol=0, atol=1e-6)
            assert not torch.equal(weight, second.get_parameter(name))


def test_logits_are_bounded_by_the_softcap() -> None:
    network = model(softcap=2.0)
    hidden = 1e4 * torch.randn(3, 16, dtype=torch.float64)
    assert network.unembed(hidden).abs().max() <= 2.0
    small = 1e-3 * torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(network.unembed(small), network.output(small), rtol=1e-6, atol=0)
    network = model(softcap=0.0)
    assert torch.equal(network.unembed(hidden), network.output(hidden))


def test_learns_to_copy() -> None:
    """The second half repeats the first, which is drawn anew in every step: only reading earlier tokens can help."""
    torch.manual_seed(0)
    network = ManifoldModel(config(d_model=32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    half, ids = 6, 12
    for _ in range(120):
        drawn = torch.randint(ids, (8, half), generator=generator)
        tokens = torch.cat((drawn, drawn, drawn[:, :1]), dim=1)
        losses = F.cross_entropy(network(tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert losses[:, half:].mean() < 0.5
    assert losses[:, : half - 1].mean() > 2.2  # random tokens stay random: ln 12 = 2.48


def test_metrics_are_one_detached_number_per_hop() -> None:
    metrics = model(n_layers=3).train()(text()).metrics
    names = {"geo_support", "geo_null", "geo_share", "neighbour_coverage", "prior_cosine", "prior_ahead"}
    assert set(metrics) == names
    for value in metrics.values():
        assert value.shape == (3,) and not value.requires_grad
    for name in ("geo_null", "geo_share", "neighbour_coverage"):
        assert ((metrics[name] >= 0) & (metrics[name] <= 1)).all()


# ---- execution -------------------------------------------------------------------------------------------------------


def gradients(network: ManifoldModel, tokens: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    F.cross_entropy(network(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_activation_checkpointing_changes_nothing() -> None:
    plain, recomputing = (model(opened=True, dropout=0.2).train() for _ in range(2))
    checkpoint_activations(recomputing)
    expected, got = gradients(plain, text()), gradients(recomputing, text())
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, got[name]), name


def test_bf16_autocast_is_near_float32() -> None:
    network, tokens = model().float(), text()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(tokens)
        loss = F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    torch.testing.assert_close(output.logits, network(tokens).logits, rtol=0, atol=0.1)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_memory_of_a_step_is_predicted(activation_checkpointing: bool) -> None:
    """A step on fake tensors takes what a real one takes."""
    training = TrainingConfig(precision="bf16" if activation_checkpointing else "fp32")
    peaks = []
    for mode in (FakeTensorMode(), torch.enable_grad()):
        counter = StorageCounter(block_bytes=1)
        with mode, counter:
            top = training_step_peak(
                counter, config(), training, 2, 2, activation_checkpointing=activation_checkpointing
            )
        peaks.append(top.bytes)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_parameters_are_counted_without_allocation() -> None:
    """The sizes of the original network: 1024 ids, width 500, 320 coordinates, 4 hops, 12 neighbours, 2 heads."""
    original = ModelConfig(family="manifold", vocab_size=1024, n_layers=4, n_heads=2, d_model=500, max_seq_len=64)
    with torch.device("meta"):
        network = ManifoldModel(original)
    assert network.count_parameters() == 20_039_648
    assert all(p.device.type == "meta" for p in (*network.parameters(), *network.buffers()) if p.numel() > 1000)
    assert model().count_parameters() == sum(p.numel() for p in model().parameters())


@pytest.mark.slow
def test_encode_compiles_to_one_graph() -> None:
    network = model(opened=True).train()
    compiled = torch.compile(network.encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(text()).hidden, network.encode(text()).hidden, rtol=0, atol=1e-10)
    compiled(text()).hidden.sum().backward()
    got = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    network.encode(text()).hidden.sum().backward()
    for name, p in network.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=0, atol=1e-9)
