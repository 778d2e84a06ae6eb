"""A model with retrieved memory: exactly the base without one, a constant of the window with one, cached or not."""

import functools

import pytest
import torch
from torch import Tensor

from hrs.evaluation import audit
from hrs.models import WindowContext, build_model
from hrs.models.hrs import HRSModel
from hrs.presets import experiment
from hrs.training import Runtime
from hrs.training.activations import checkpoint_activations
from hrs.training.memory import predict_peak

SMALL = {"model.max_seq_len": 16, "model.n_layers": 3, "data.tokenizer": "bpe:257", "model.engram.slots": 6}
D, S, T, V = 32, 6, 16, 257


@functools.cache
def moved() -> HRSModel:
    """In float64, with every parameter moved, so that the cross-attention has an output."""
    torch.manual_seed(0)
    model = build_model(experiment("dense_retrieved", "micro", overrides=SMALL).model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def text(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(seed))


def memory(seed: int = 2, batch: int = 2) -> Tensor:
    slots = torch.randn(batch, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slots[1:, S // 2 :] = 0.0
    return slots


def logits(model: HRSModel, slots: Tensor | None, tokens: Tensor | None = None) -> Tensor:
    found = model(text() if tokens is None else tokens, WindowContext(memory=slots)).logits
    assert found is not None
    return found


def test_no_memory_and_absent_memory_are_the_model_without_cross_attention_to_the_bit() -> None:
    model = moved()
    plain = build_model(experiment("dense_baseline", "micro", overrides=SMALL).model).double().eval()
    lacking = plain.load_state_dict(model.state_dict(), strict=False)
    assert not lacking.missing_keys and all(".cross." in name for name in lacking.unexpected_keys)
    expected = plain(text()).logits
    assert torch.equal(logits(model, None), expected)
    assert torch.equal(logits(model, torch.zeros(2, S, D)), expected)
    half = memory()
    half[0] = 0.0
    assert torch.equal(logits(model, half)[0], expected[0])
    assert (logits(model, half)[1] != expected[1]).any(-1).all()
    with torch.no_grad():
        assert torch.equal(plain(text(), WindowContext(memory=memory())).logits, expected), "it takes no memory"
    assert (model.takes_memory, model.memory_slots, plain.takes_memory) == (True, S, False)


def test_a_new_model_is_unmoved_by_its_memory() -> None:
    model = build_model(experiment("dense_retrieved", "micro", overrides=SMALL).model).eval()
    assert torch.equal(logits(model, memory().float()), logits(model, None))


@torch.no_grad()
def test_the_memory_moves_every_position_and_later_tokens_move_none_before() -> None:
    model = moved()
    own, other = logits(model, memory()), logits(model, memory(3))
    assert (own != other).any(-1).all()
    for cut in (1, 7, T - 1):
        changed = text()
        changed[:, cut:] = (changed[:, cut:] + 1) % V
        after = logits(model, memory(), changed)
        assert torch.equal(after[:, :cut], own[:, :cut])


@pytest.mark.parametrize("size", [1, 5, T])
@torch.no_grad()
def test_cached_decoding_with_memory_equals_the_whole_pass(size: int) -> None:
    model = moved()
    cache = model.new_cache(2, memory=memory())
    pieces = [model.decode(piece, cache).logits for piece in text().split(size, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits(model, memory()), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_memory_replaced_between_calls_is_read_from_then_on() -> None:
    """Another memory changes what follows it; with none from the start on and one later, the earlier are as without."""
    model = moved()
    cache = model.new_cache(2)
    first = model.decode(text()[:, :7], cache).logits
    cache.memory = memory()
    second = model.decode(text()[:, 7:], cache).logits
    without = logits(model, None)
    torch.testing.assert_close(first, without[:, :7], rtol=0, atol=1e-12)
    assert (second - without[:, 7:]).abs().amax(-1).min() > 1e-6
    assert (second - logits(model, memory())[:, 7:]).abs().max() > 1e-9, "keys made before it are those without it"
    cache = model.new_cache(2, memory=memory(3))
    cache.memory = memory()
    torch.testing.assert_close(model.decode(text(), cache).logits, logits(model, memory()), rtol=0, atol=1e-12)


@torch.no_grad()
def test_sequences_without_memory_decode_beside_those_with_one() -> None:
    model, slots = moved(), memory()
    slots[1] = 0.0
    cache = model.new_cache(2, memory=slots)
    decoded = torch.cat([model.decode(piece, cache).logits for piece in text().split(3, dim=1)], 1)
    torch.testing.assert_close(decoded[0], logits(model, memory())[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(decoded[1], logits(model, None)[1], rtol=0, atol=1e-12)


def test_the_audit_gives_memory_and_finds_nothing_wrong() -> None:
    report = audit(moved())
    assert report.causal, str(report)


def test_the_audit_catches_a_memory_that_is_made_of_the_window() -> None:
    """A control: slots that the model itself makes of its tokens show the future."""

    class Peeking(HRSModel):
        def encode(self, tokens: Tensor, context: WindowContext | None = None):
            slots = self.embedding(tokens).detach()
            return super().encode(tokens, WindowContext(memory=slots))

    model = Peeking(experiment("dense_retrieved", "micro", overrides=SMALL).model)
    model.load_state_dict(moved().state_dict())
    failing = {test.name for test in audit(model.eval()).tests if not test.passed}
    assert {"suffix_flip", "prefix_consistency", "cached_decode"} <= failing


def test_the_audit_catches_a_memory_read_by_the_wrong_row() -> None:
    class Confused(HRSModel):
        def encode(self, tokens: Tensor, context: WindowContext | None = None):
            slots = None if context is None or context.memory is None else context.memory.flip(0)
            return super().encode(tokens, WindowContext(memory=slots))

    model = Confused(experiment("dense_retrieved", "micro", overrides=SMALL).model)
    model.load_state_dict(moved().state_dict())
    assert "batch_independence" in {test.name for test in audit(model.eval()).tests if not test.passed}


def test_training_steps_fit_the_planner_checkpointing_and_bf16() -> None:
    config = experiment("dense_retrieved", "micro", overrides=SMALL)
    with_memory = predict_peak(config, 2, Runtime(device="cpu"))
    without = predict_peak(experiment("dense_baseline", "micro", overrides=SMALL), 2, Runtime(device="cpu"))
    assert with_memory > without
    losses = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = build_model(config.model).train()
        model.load_state_dict({name: value.float() for name, value in moved().state_dict().items()})
        if checkpointed:
            checkpoint_activations(model)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = logits(model, memory(batch=2).float()).float().square().mean()
        loss.backward()
        losses.append((loss.detach(), model.blocks[1].cross.query.weight.grad.clone()))
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])
    assert losses[0][1].abs().max() > 0
