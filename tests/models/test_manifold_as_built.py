"""The original manifold-guided network: its size, that the audit finds its leak and names it, and the interface."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hrs.config import ModelConfig
from hrs.config.manifold import GeometryConfig, ManifoldConfig
from hrs.errors import HRSError
from hrs.evaluation.audit import audit
from hrs.evaluation.audit_training import random_tokens
from hrs.models import build_model
from hrs.models.geometry import TokenGeometry
from hrs.models.manifold_as_built import ManifoldModelAsBuilt
from hrs.nn.as_built.router import HopRouter
from hrs.nn.sparsemax import Sparsemax

ORIGINAL = ModelConfig(
    family="manifold",
    vocab_size=1024,
    d_model=500,
    n_layers=4,
    n_heads=2,
    max_seq_len=64,
    manifold=ManifoldConfig(as_built=True),
)


def small_config(n_tokens: int = 12, hops: int = 2, vocabulary: int = 40) -> ModelConfig:
    geometry = GeometryConfig(modes=12, directional=2, syntactic=2, neighbours=5)
    return ModelConfig(
        family="manifold",
        vocab_size=vocabulary,
        d_model=24,
        n_layers=hops,
        n_heads=2,
        max_seq_len=n_tokens,
        manifold=ManifoldConfig(as_built=True, geometry=geometry),
    )


def small(**sizes: int) -> ManifoldModelAsBuilt:
    """In float64 and evaluation mode, with every parameter moved a little for those that start at zero."""
    torch.manual_seed(0)
    model = ManifoldModelAsBuilt(small_config(**sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


class OverThePast(Sparsemax):
    """The repair of one line: what is forbidden takes no part, so the first token's row is empty."""

    def forward(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        return super().forward(scores, torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1))


def with_empty_rows(model: ManifoldModelAsBuilt) -> ManifoldModelAsBuilt:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, HopRouter):
            module.local_sparsemax.sparsemax = module.geo_sparsemax.sparsemax = OverThePast()
    return model


# ---- size ------------------------------------------------------------------------------------------------------------


def test_has_as_many_parameters_as_the_original_block_by_block() -> None:
    with torch.device("meta"):
        model = build_model(ORIGINAL)
    assert isinstance(model, ManifoldModelAsBuilt)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        top, second, part, *_ = (*name.split("."), "", "")
        key = {"blocks": part, "shared": second}.get(top, top)
        found[key] = found.get(key, 0) + parameter.numel()
    assert found == {
        "coordinate_projection": 412_000,
        "embedding": 512_000 + 2_000,  # of tokens and, inside the hops, of hops
        "position_embedding": 32_000,
        "fuse": 500_500,
        "message": 501_000,
        "cell": 9_658_000,
        "router": 1_642_104,
        "mixer": 5_284_000,
        "norm": 4_000,
        "post_norm": 4_000,
        "attention": 1_481_002,
        "to_coordinates": 160_000,
        "residual_gate": 49,
        "output": 513_024,
    }
    assert model.count_parameters() == 20_705_679


def test_groups_partition_the_parameters_as_the_original_shared_them() -> None:
    model = small()
    groups, names = model.parameter_groups(), {id(p): name for name, p in model.named_parameters()}
    assert sorted(names) == sorted(id(p) for group in groups.values() for p in group)
    shared_by_workers = {names[id(p)].split(".")[0] for p in groups["backbone"]}
    assert shared_by_workers == {"coordinate_projection", "embedding", "position_embedding", "fuse", "output"}
    assert {names[id(p)].split(".")[0] for p in groups["hops"]} == {"blocks", "shared", "residual_gate"}


def test_untrained_loss_is_near_chance() -> None:
    torch.manual_seed(0)
    model = build_model(ORIGINAL)
    tokens = torch.randint(1024, (2, 65))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert math.log(1024) < loss < 7.3  # the original: 7.06 to 7.16


def test_starts_as_the_original_did() -> None:
    model = ManifoldModelAsBuilt(small_config())
    attention = model.shared.attention
    assert torch.equal(attention.value.weight, torch.eye(24)) and torch.equal(
        attention.output.weight, torch.eye(24) / 100
    )
    q, k = attention.query.weight[:, 24:40], attention.key.weight[:, 24:40]
    torch.testing.assert_close(q.T @ k, 0.01 / 16 * torch.eye(16), atol=1e-8, rtol=1e-4)
    assert not (q[16:].any() or k[16:].any())
    hop = model.blocks[0]
    for zero in (hop.mixer.down, hop.mixer.gate, model.shared.to_coordinates, hop.router.geo_gate):
        assert not zero.weight.any()
    assert hop.router.geo_gate.bias == -4 and model.residual_gate[-1].bias == -3


# ---- the leak --------------------------------------------------------------------------------------------------------


def test_the_audit_names_the_sparsemax_over_an_empty_row() -> None:
    torch.manual_seed(0)
    report = audit(ManifoldModelAsBuilt(small_config()))
    by_name = {test.name: test for test in report.tests}
    flip = by_name["suffix_flip"]
    assert not report.causal and not flip.passed and "x1." in flip.detail
    assert flip.module == "blocks.0.router.local_sparsemax"
    assert flip.positions == tuple(range(11))
    assert not by_name["gradient"].passed and not by_name["prefix_consistency"].passed
    assert by_name["batch_independence"].passed and by_name["repeatability"].passed


def test_without_it_the_audit_finds_the_clamp_in_larger_weights() -> None:
    torch.manual_seed(0)
    report = audit(with_empty_rows(ManifoldModelAsBuilt(small_config())))
    by_name = {test.name: test for test in report.tests}
    flip = by_name["suffix_flip"]
    assert not flip.passed and "x10." in flip.detail and flip.module == "shared.attention"
    assert by_name["prefix_consistency"].passed and by_name["cached_decode"].passed


def test_the_sparsemax_row_is_the_only_leak_at_ordinary_weights() -> None:
    """Same weights, same tokens; only the first row differs."""
    model, generator = small(), torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (3, 12), generator=generator)
    with torch.no_grad():
        leaking, repaired = model(tokens).logits, with_empty_rows(model)(tokens).logits
        for cut in range(1, 12):
            flipped = torch.cat((tokens[:, :cut], (tokens[:, cut:] + 1) % 40), dim=1)
            moved = (model(flipped).logits - leaking)[:, :cut].abs().amax(-1)
            assert (moved > 0).all(), "every earlier position moves"
            assert torch.equal(with_empty_rows(model)(flipped).logits[:, :cut], repaired[:, :cut])


@pytest.mark.slow
def test_only_the_leak_learns_from_random_tokens() -> None:
    """No causal model gets below ln 8; the last position's target lies outside the window, so it gains nothing."""
    torch.manual_seed(0)
    model = ManifoldModelAsBuilt(small_config(n_tokens=8, vocabulary=16))
    leaking, repaired = random_tokens(model, seed=0), random_tokens(with_empty_rows(model), seed=0)
    assert not leaking.passed and leaking.positions == tuple(range(7)), leaking.detail
    cost = float(leaking.detail.split("cost ")[1].split()[0])
    assert cost < math.log(8) - 0.02, leaking.detail
    assert repaired.passed, repaired.detail


# ---- the interface ---------------------------------------------------------------------------------------------------


def test_decoding_runs_the_text_so_far() -> None:
    """Each call gives what a pass over the text so far gives at its end: not what the whole text would."""
    model, tokens = small(), torch.arange(12).view(2, 6)
    cache = model.new_cache(2)
    for start, end in ((0, 2), (2, 3), (3, 6)):
        decoded = model.decode(tokens[:, start:end], cache).logits
        with torch.no_grad():
            alone = model(tokens[:, :end]).logits[:, start:end]
        torch.testing.assert_close(decoded, alone, atol=1e-12, rtol=0)
    assert cache.length == 6
    with pytest.raises(ValueError, match="max_seq_len"):
        model.decode(torch.zeros(2, 7, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="new_cache"):
        model.decode(tokens[:1], cache)


@pytest.mark.parametrize("fake", (False, True))
def test_every_parameter_learns_under_autocast_and_checkpointing(fake: bool) -> None:
    def gradients(recompute: bool) -> dict[str, Tensor | None]:
        torch.manual_seed(0)
        model = ManifoldModelAsBuilt(small_config()).train()
        if not fake:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        if recompute:
            for block in model.blocks:
                block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
        tokens = torch.randint(40, (3, 12))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens).logits.float().log_softmax(-1)[..., 3].mean()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    if fake:
        with FakeTensorMode():
            assert all(g is not None for g in gradients(recompute=True).values())
        return
    kept, recomputed = gradients(recompute=False), gradients(recompute=True)
    for name, gradient in kept.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
        assert torch.equal(gradient, recomputed[name]), name


def test_compiles_in_one_graph() -> None:
    model, tokens = small(), torch.arange(24).view(2, 12)
    compiled = torch.compile(model.encode, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens).hidden, model.encode(tokens).hidden)


def test_the_geometry_travels_with_the_weights() -> None:
    config, generator = small_config(), torch.Generator().manual_seed(3)
    geometry = TokenGeometry(torch.randn(40, 16, generator=generator), torch.randint(40, (40, 5), generator=generator))
    model, other = ManifoldModelAsBuilt(config, geometry).eval(), ManifoldModelAsBuilt(config).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(12)[None]
    assert torch.equal(other.coordinates, geometry.coordinates) and torch.equal(other.neighbours, geometry.neighbours)
    assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_the_random_geometry_is_always_the_same_and_draws_nothing_from_the_run() -> None:
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(ManifoldModelAsBuilt(small_config()))
    assert torch.equal(models[0].coordinates, models[1].coordinates)
    torch.manual_seed(0)
    with_geometry = ManifoldModelAsBuilt(small_config(), TokenGeometry(models[1].coordinates, models[1].neighbours))
    assert torch.equal(models[0].output.weight, with_geometry.output.weight)
    assert not torch.equal(models[0].output.weight, models[1].output.weight)


def test_no_coordinates_and_no_neighbours_give_finite_gradients() -> None:
    config = small_config()
    model = ManifoldModelAsBuilt(config, TokenGeometry(torch.zeros(40, 16), torch.full((40, 5), -1)))
    model(torch.arange(24).view(2, 12)).logits.log_softmax(-1)[..., 0].mean().backward()
    assert all(p.grad is None or (p.grad.isfinite().all() and p.grad.abs().max() < 10) for p in model.parameters())


def test_wrong_sizes_are_explained() -> None:
    with pytest.raises(HRSError, match=r"320 coordinates .* d_model 32"):
        ManifoldModelAsBuilt(ModelConfig(family="manifold", d_model=32))
    with pytest.raises(HRSError, match=r"needs \(40, 16\) and \(40, 5\)"):
        ManifoldModelAsBuilt(small_config(), TokenGeometry(torch.zeros(40, 15), torch.full((40, 5), -1)))
    with pytest.raises(ValueError, match="13 tokens exceed max_seq_len 12"):
        small()(torch.zeros(1, 13, dtype=torch.int64))
