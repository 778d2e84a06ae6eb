"""What a preset's model is made of, that it is causal, that all of it learns, and that it can be composed freely."""

import contextlib
import dataclasses
import math
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from distinct_models import DISTINCT_HRS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hrs.config import AttentionConfig, ModelConfig, flatten, override
from hrs.config.components import EngramKind
from hrs.config.effective import fields_in_effect
from hrs.errors import HRSError
from hrs.models import LanguageModel, WindowContext, build_model
from hrs.models.hrs import HRSModel
from hrs.presets import PRESETS, experiment

CLEAN = [name for name in DISTINCT_HRS if not PRESETS[name].leaks]
PREFIXED = [name for name in DISTINCT_HRS if experiment(name, "micro").model.engram.kind == "prefix"]
SAMPLE = ("dense_baseline", "dual_head_router", "full_hrs_trc", "full_hrs_legacy")


def micro(preset: str, **changes: object) -> HRSModel:
    """The preset at micro scale in float64, evaluation mode; fields of ModelConfig by keyword, ``__`` for a dot."""
    torch.manual_seed(0)
    overrides = {f"model.{name.replace('__', '.')}": value for name, value in changes.items()}
    model = build_model(experiment(preset, "micro", overrides=overrides).model)
    assert isinstance(model, HRSModel)
    return model.double().eval()


def tokens(batch: int = 2, n: int = 64) -> torch.Tensor:
    return torch.randint(512, (batch, n))


def context_for(model: HRSModel, batch: int = 2) -> WindowContext:
    """History, topics and memory for models that use them."""
    history = torch.randint(512, (batch, model.history_tokens)) if model.history_tokens else None
    category = torch.randint(model.n_categories, (batch,)) if model.n_categories else None
    memory = torch.randn(batch, 6, model.d_model) if model.takes_memory else None
    return WindowContext(history, category, memory)


def engrams_of(model: HRSModel, x: torch.Tensor) -> torch.Tensor:
    """The engrams [B, E, d] that the model's mechanism makes of states [B, T, d]."""
    state = model.engram.start(torch.arange(x.shape[1]), None)
    model.engram.leave(model.engram.extract_after, x, state)
    return state.inputs.memory


def opened(model: HRSModel) -> HRSModel:
    """With every parameter moved a little, for gates and projections that start at zero, and with slots filled."""
    model.train()
    for _ in range(3):
        model(tokens(4))
        model.keep_observations()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# ---- composition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", DISTINCT_HRS)
def test_groups_partition_the_parameters(preset: str) -> None:
    model = micro(preset)
    groups = model.parameter_groups()
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(groups.values())


def test_groups_hold_what_their_names_say() -> None:
    model = micro("full_hrs")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {role: {names[id(p)] for p in members} for role, members in model.parameter_groups().items()}
    first = {role: {n for n in members if n.startswith("blocks.0.")} for role, members in groups.items()}
    router, tiers = "blocks.0.tiers.router.", "blocks.0.tiers.tiers."
    assert first["router"] == {router + "hidden.weight", router + "output.weight"}
    assert first["conv"] == {tiers + "conv.conv.conv.weight", tiers + "conv.norm.weight", tiers + "conv.norm.bias"}
    assert first["attention_tier"] == {tiers + "attention.qkv.weight", tiers + "attention.output.weight"}
    assert first["sink"] == {tiers + "sink.scale", tiers + "sink.kappa"}
    assert {n.split(".")[5] for n in first["expert"]} == {"gate", "hidden", "output", "norm"}
    assert groups["locality_head"] == {"locality.projection.weight"}
    assert groups["engram"] == {n for n in names.values() if n.startswith(("engram.encoder.", "engram.type_embedding"))}
    assert {"embedding.weight", "norm.weight", "blocks.0.tiers.output_gate"} <= groups["backbone"]
    assert {"blocks.0.attention.qkv.weight", "blocks.0.attention_norm.bias"} <= first["backbone"]


def test_initial_values() -> None:
    """N(0, 0.02) for matrices, 0.02 / sqrt(2 L) into the residual stream; gates 0.1; norms one and zero."""
    torch.manual_seed(0)
    model = build_model(experiment("full_hrs", "tiny").model)
    scaled = 0.02 / math.sqrt(2 * model.config.n_layers)
    for name, p in model.named_parameters():
        if name.endswith((".output_gate", ".scale", ".kappa")):
            assert (p == 0.1).all()
        elif "norm." in name:
            assert (p == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith(".bias"):
            assert (p == 0).all()
        elif "conv.conv" in name:
            assert p.abs().max() <= 1 / math.sqrt(7)
        else:
            std = scaled if name.endswith("attention.output.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.3 if p.numel() < 1000 else 0.05), name
    dense = build_model(experiment("dense_baseline", "tiny").model)
    assert dense.blocks[0].mlp.output.weight.std().item() == pytest.approx(scaled, rel=0.05)


ALTERNATIVES = {
    "vocab_size": 700, "n_layers": 3, "n_heads": 4, "d_model": 16, "d_ff": 24, "max_seq_len": 100, "dropout": 0.3,
    "rope_base": 50.0, "router.hidden": 3, "router.temperature_start": 2.0, "router.temperature_end": 0.7,
    "router.temperature_decay_frac": 0.0, "router.balance_weight": 0.5, "router.entropy_weight": 0.0,
    "router.flops_weight": 1.0, "router.trc_window": 200, "tiers.conv_kernel": 1,
    "tiers.n_experts": 1, "tiers.expert_hidden": 5, "tiers.sink_rescale": True, "tiers.renormalise_gate": True,
    "engram.window": 7, "engram.per_window": 1, "engram.extract_after": 0, "engram.recon_weight": 0.0,
    "engram.dropout": 0.0, "locality.enabled": True, "locality.weight": 0.0, "locality.window": 40,
    "router.hub_exponent": 1.5, "tiers.input_density": 0.1, "engram.as_original": True, "engram.history_windows": 2,
    "engram.remember_gate": True, "engram.gate_entropy_weight": -0.01, "engram.synapse": True,
    "engram.synapse_hidden": 3, "engram.slots": 5, "engram.slot_updates": 2, "engram.slot_decay": 0.5,
    "peer.sub_keys": 5, "peer.n_heads": 4, "peer.top_k": 3, "peer.gated": False, "peer.idle_norm": True,
    "peer.mode": "paper", "attention.features": 7, "category.enabled": True, "category.weight": 0.0,
    "category.n_classes": 3, "category.labels": "estimated", "test_time_memory.enabled": True,
    "test_time_memory.chunk": 5, "test_time_memory.key_width": 3, "test_time_memory.router_hidden": 2,
    "conv_blocks": 2, "placeholder_losses": True, "locality.n_anchors": 3,
    "locality.n_negatives": 1, "locality.temperature": 1.0,
}  # fmt: skip
CHOICES = [
    *(("feed_forward", value) for value in ("mlp", "tiers", "peer", "tiers,peer,mlp")),
    *(("tiers.names", value) for value in ("conv,peer", "sink,attention")),
    *(("engram.kind", value) for value in get_args(EngramKind)),
    *(("attention.kernel", value) for value in get_args(get_type_hints(AttentionConfig)["kernel"])),
    *(("attention.positions", value) for value in ("rotary", "learned", "alibi")),
    *(("loss_scales", value) for value in ("fixed", "learned", "original")),
    ("family", "manifold"),
]
GUIDED = {
    **{name: ALTERNATIVES[name] for name in ("vocab_size", "n_layers", "n_heads", "d_model", "max_seq_len")},
    "rope_base": 50.0, "dropout": 0.3, "manifold.source": "none", "manifold.recency": 1.0,
    "manifold.confidence_tokens": 3, "manifold.temperature": 1.0, "manifold.transport_share": 1.0,
    "manifold.softcap": 0.0,
    "manifold.geometry.definition": "as_built", "manifold.geometry.dimensions": 3, "manifold.geometry.steps": 1,
    "manifold.geometry.partners": 5, "manifold.geometry.modes": 40, "manifold.geometry.directional": 0,
    "manifold.geometry.syntactic": 1, "manifold.geometry.neighbours": 2, "manifold.geometry.seed": 1,
}  # fmt: skip
"""Of the manifold-guided network; ``manifold.as_built`` is another network, with tests of its own."""


def test_alternatives_name_every_field() -> None:
    named = {*ALTERNATIVES, *(name for name, _ in CHOICES), *GUIDED, "manifold.as_built"}
    assert named == set(flatten(ModelConfig()))


@pytest.mark.parametrize(
    ("preset", "field", "value"),
    [
        *((preset, field, value) for preset in SAMPLE for field, value in (*ALTERNATIVES.items(), *CHOICES)),
        *(("manifold_v18", field, value) for field, value in GUIDED.items()),
    ],
)
def test_any_field_on_any_preset_works_or_raises(preset: str, field: str, value: object) -> None:
    """It trains to finite gradients and decodes what it evaluates, or says what is wrong."""
    config = experiment(preset, "micro").model
    torch.manual_seed(0)
    try:
        model = build_model(override(config, {field: value}))
    except HRSError as error:
        assert field.split(".")[0] in str(error)
        return
    text = torch.randint(model.vocab_size, (2, model.max_seq_len))
    output = model.train()(text)
    (F.cross_entropy(output.logits.flatten(0, 1), text.flatten()) + sum(output.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    if model.config.engram.kind != "prefix":
        cache = model.new_cache(2)
        pieces = torch.cat([model.decode(piece, cache).logits for piece in text[:, :30].split(11, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(text[:, :30]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs", "manifold_v18"])
def test_fields_that_are_not_in_effect_change_nothing(preset: str) -> None:
    config = experiment(preset, "micro")
    effective = fields_in_effect(config)
    idle = {n: v for n, v in (GUIDED | ALTERNATIVES).items() if f"model.{n}" not in effective}
    assert len(idle) > 15 and not any(name.endswith(("kind", "enabled")) for name in idle)

    def trained(model_config: ModelConfig) -> list[Tensor]:
        torch.manual_seed(0)
        model = build_model(model_config).train()
        output = model(torch.arange(2 * model.max_seq_len).view(2, -1) % model.vocab_size)
        return [*model.state_dict().values(), output.logits, *output.losses.values()]

    plain, together = trained(config.model), config.model
    for name, value in idle.items():
        with contextlib.suppress(HRSError):  # some are refused while their part is off
            together = override(together, {name: value})
    assert together != config.model
    assert all(map(torch.equal, plain, trained(together)))


def test_prefix_engrams_refuse_dropout() -> None:
    with pytest.raises(HRSError, match=r"engram\.dropout"):
        micro("full_hrs", engram__kind="prefix")


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", CLEAN)
def test_earlier_logits_ignore_later_tokens_exactly(preset: str) -> None:
    """In float64, bit for bit, at window edges (16) and between them."""
    model, text = micro(preset), tokens()
    logits = model(text).logits
    for cut in (1, 15, 16, 17, 40, 63):
        changed = text.clone()
        changed[:, cut:] = (text[:, cut:] + torch.randint(1, 512, text[:, cut:].shape)) % 512
        after = model(changed).logits
        assert torch.equal(after[:, :cut], logits[:, :cut])
        assert not torch.equal(after[:, cut:], logits[:, cut:])


@pytest.mark.parametrize("preset", PREFIXED)
def test_prefixed_engrams_show_every_token_the_future(preset: str) -> None:
    """One token changed at the end moves the logits of all positions: with convolutions in place of attention, of the
    first twelve, as far as two of them reach."""
    model, text = opened(micro(preset)), tokens()
    changed = text.clone()
    changed[:, -1] = (text[:, -1] + 1) % 512
    moved = (model(changed).logits != model(text).logits).any(-1).all(0)
    assert moved[:-1].tolist() == ([True] * 12 + [False] * 51 if preset == "v2_full_legacy" else [True] * 63)


def test_engrams_reach_tokens_after_their_window_only() -> None:
    """Another type embedding changes logits from the last token of the first window on, and none before."""
    model, text = micro("full_hrs"), tokens()
    before = model(text).logits
    with torch.no_grad():
        model.engram.type_embedding.normal_()
    differs = (model(text).logits != before).any(-1).all(0)
    assert differs.tolist() == [False] * 15 + [True] * 49


def test_window_engrams_are_read_by_the_main_attention_through_its_norm() -> None:
    """Equal to the layers called by hand: extra keys for the attention of later blocks, and nothing else of them."""
    model, text = micro("full_hrs_trc"), tokens()
    torch.nn.init.normal_(model.blocks[3].attention_norm.weight)
    positions, x = torch.arange(64), model.embedding(text)
    for block in model.blocks[:2]:
        x, _ = block(x, positions)
    engrams = engrams_of(model, x)
    ends = torch.tensor([15, 31, 47, 63]).repeat_interleave(4)
    for block in model.blocks[2:]:
        norm = block.attention_norm
        x = x + block.attention(norm(x), positions, None, norm(engrams), ends)
        x, _, _ = block.tiers(x, block.feed_forward_norm(x), positions)
    torch.testing.assert_close(model(text).hidden, model.norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["window", "running", "replace", "recurrence"])
def test_summaries_of_others_change_what_reads_them_and_nothing_else(kind: str) -> None:
    """No token in front of the first summary moves, later ones do; equal texts have equal summaries."""
    model, text = opened(micro("dense_baseline", engram__kind=kind, engram__dropout=0.0)), tokens()
    assert model.summarises
    own = model(text).logits
    with model.reading_others():
        theirs, same = model(text).logits, model(text[[0, 0]]).logits
    first = 0 if kind == "running" else 16 if kind == "replace" else 15
    assert torch.equal(theirs[:, :first], own[:, :first])
    assert (theirs != own).any(-1)[:, first:].all()
    torch.testing.assert_close(same, own[[0, 0]], rtol=1e-12, atol=1e-12)
    assert torch.equal(model(text).logits, own)  # it ends with the context


def test_models_without_summaries_of_their_text_have_no_others_to_read() -> None:
    for changes in ({}, {"engram__kind": "memory"}):
        model, text = micro("dense_baseline", **changes), tokens()
        assert not model.summarises
        own = model(text).logits
        with model.reading_others():
            assert torch.equal(model(text).logits, own)


def test_dropped_engrams_leave_the_model_without_engrams() -> None:
    """With engram dropout 1 training output is that of the same weights built with kind none, and recon is 0."""
    with_engrams = micro("full_hrs", engram__dropout=1.0, dropout=0.0).train()
    without = micro("full_core", dropout=0.0).train()
    without.load_state_dict({k: v for k, v in with_engrams.state_dict().items() if not k.startswith("engram.")})
    text = tokens()
    outputs = []
    for model in (with_engrams, without):
        for block in model.blocks:
            block.tiers.router.eval()  # no Gumbel noise
        outputs.append(model(text))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-12, atol=1e-12)
    assert outputs[0].losses["recon"] == 0


def test_prefix_engrams_run_through_the_whole_block() -> None:
    """Equal to putting them in front of the tokens by hand, at positions 0 .. E - 1, and cutting them off again."""
    model, text = micro("full_hrs_trc_legacy"), tokens()
    x = model.embedding(text)
    for block in model.blocks[:2]:
        x, _ = block(x, torch.arange(64))
    engrams = engrams_of(model, x)
    for block in model.blocks[2:]:
        x = block(torch.cat((engrams, x), 1), torch.arange(16 + 64))[0][:, 16:]
    torch.testing.assert_close(model(text).hidden, model.norm(x), rtol=1e-12, atol=1e-12)


# ---- training --------------------------------------------------------------------------------------------------------


RESTING = {
    "v10_control_legacy": {"feed_forward_norm"},  # allocated and never used
    "v17_peer_only_legacy": {"feed_forward_norm"},
    "v18_cross_attn_legacy": {"feed_forward_norm", "cross"},
}
"""Parts of originals that get no gradient. Equal slots give the cross-attention's query and key none."""


@pytest.mark.parametrize("preset", CLEAN)
def test_every_parameter_learns(preset: str) -> None:
    """One training step's loss has a gradient for every tensor."""
    model, text = opened(micro(preset, engram__dropout=0.0)).train(), tokens()
    output = model(text, context_for(model))
    (F.cross_entropy(output.logits.flatten(0, 1), text.flatten()) + sum(output.losses.values())).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    assert {name.split(".")[2] if name.startswith("blocks.") else name for name in still} == RESTING.get(preset, set())


def test_legacy_expert_gate_hardly_learns() -> None:
    """The documented exception: what is left of its gradient is the 1e-8 in the original's denominator."""
    model, text = micro("full_hrs_legacy").train(), tokens()
    output = model(text)
    (F.cross_entropy(output.logits.flatten(0, 1), text.flatten()) + sum(output.losses.values())).backward()
    for name, p in model.named_parameters():
        assert (p.grad.abs().max() < 1e-8) == name.endswith("expert.gate.weight"), name


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("dense_baseline", set()),
        ("dual_head", {"locality"}),
        ("full_core", {"locality", "balance", "entropy"}),
        ("full_hrs", {"locality", "balance", "entropy", "recon"}),
    ],
)
def test_losses_in_training_and_metrics_in_both_modes(preset: str, expected: set[str]) -> None:
    model = micro(preset)
    evaluated, trained = model(tokens()), model.train()(tokens())
    assert evaluated.losses == {} and set(trained.losses) == expected
    for output in (evaluated, trained):
        assert set(output.metrics) == ({"tier_share", "routing_entropy"} if "balance" in expected else set())
        if output.metrics:
            assert output.metrics["tier_share"].shape == (4, 4)
            assert torch.allclose(output.metrics["tier_share"].sum(-1), torch.ones(4).double())
            assert ((output.metrics["routing_entropy"] >= 0) & (output.metrics["routing_entropy"] <= math.log(4))).all()
            assert not output.metrics["tier_share"].requires_grad


def test_losses_are_weighted_means_over_layers() -> None:
    """Doubling a weight doubles its loss and leaves the others alone."""
    base = {"engram__recon_weight": 0.1, "router__balance_weight": 0.1, "locality__weight": 0.1}
    text, seen = tokens(), {}
    for changed in (None, *base):
        model = micro("full_hrs", dropout=0.0, engram__dropout=0.0, **{k: 0.2 if k == changed else 0.1 for k in base})
        torch.manual_seed(1)
        seen[changed] = {name: loss.item() for name, loss in model.train()(text).losses.items()}
    for field, name in zip(base, ("recon", "balance", "locality"), strict=True):
        for other, value in seen[field].items():
            assert value == pytest.approx((2 if other == name else 1) * seen[None][other], rel=1e-6)


def test_progress_anneals_every_router() -> None:
    model = micro("full_hrs")
    model.set_progress(0.4)
    assert [b.tiers.router.temperature.item() for b in model.blocks] == pytest.approx([0.65] * 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_runs_in_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """Converted as a whole, forward and decoding stay near float64, by the root mean square of the logits' error."""
    model, text = micro("full_hrs_trc"), tokens()
    exact = model(text).logits
    model.to(dtype)
    cache = model.new_cache(2)
    pieces = torch.cat([model.decode(piece, cache).logits for piece in text.split(9, dim=1)], dim=1)
    for logits in (model(text).logits, pieces):
        assert logits.dtype == dtype
        assert (logits.double() - exact).square().mean().sqrt() < tolerance * exact.std()


def test_trains_under_bf16_autocast() -> None:
    model, text = micro("full_hrs_trc").float().train(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(text)
        loss = F.cross_entropy(output.logits.flatten(0, 1), text.flatten()) + sum(output.losses.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        return checkpoint(self.block, *inputs, use_reentrant=False)


@pytest.mark.parametrize("preset", ["full_hrs_trc", "full_hrs_legacy"])
def test_blocks_can_be_checkpointed_from_outside(preset: str) -> None:
    """Recomputing every block's activations gives the same gradients, noise included."""
    model, text, gradients = micro(preset).train(), tokens(), []
    for wrapped in (False, True):
        if wrapped:
            model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
        torch.manual_seed(1)
        output = model(text)
        model.zero_grad()
        (output.logits.square().mean() + sum(output.losses.values())).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiles_into_one_graph(training: bool) -> None:
    """No graph breaks, and a new router temperature does not compile again."""
    model, text = micro("full_hrs_trc", dropout=0.0).train(training), tokens()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.encode, backend=count, fullgraph=True)
    for fraction in (0.1, 0.2, 0.3):
        model.set_progress(fraction)
        torch.manual_seed(1)
        hidden = compiled(text).hidden
        torch.manual_seed(1)
        torch.testing.assert_close(hidden, model.encode(text).hidden, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


# ---- the interface ---------------------------------------------------------------------------------------------------


def test_encode_then_unembed_is_forward() -> None:
    model, text = micro("full_hrs"), tokens()
    encoded = model.encode(text)
    assert encoded.logits is None
    assert torch.equal(model.unembed(encoded.hidden), model(text).logits)
    assert isinstance(model, LanguageModel) and model.input_embedding(text).shape == (2, 64, 32)


def test_same_seed_same_weights_and_state_dict_round_trip() -> None:
    first, second = micro("full_hrs_trc"), micro("full_hrs_trc")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = build_model(dataclasses.replace(first.config, dropout=0.0)).double().eval()
    other.load_state_dict(first.state_dict())
    text = tokens()
    assert torch.equal(other(text).logits, first(text).logits)


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="65 tokens exceed max_seq_len 64"):
        micro("dense_baseline")(tokens(n=65))
