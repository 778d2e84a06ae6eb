"""Cross-attention to retrieved slots: each sequence its own, absent ones out of it, and exactly nothing for none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.errors import HRSError
from hrs.nn.cross_attention import CrossAttention
from hrs.nn.engrams import build_engrams

D, S, T = 8, 5, 7
CONFIG = ModelConfig(
    vocab_size=13, n_heads=2, d_model=D, d_ff=16, max_seq_len=T, dropout=0.0, engram=EngramConfig(kind="retrieved")
)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention() -> CrossAttention:
    """With an output matrix that has moved."""
    torch.manual_seed(0)
    return CrossAttention(CONFIG).double()


def by_hand(layer: CrossAttention, x: Tensor, slots: Tensor) -> Tensor:
    """One sequence [n, d] and the slots [m, d] that it has, head by head."""
    q, memory = layer.query(layer.norm(x)), layer.slot_norm(slots)
    heads = []
    for q_h, k_h, v_h in zip(*(t.chunk(2, dim=-1) for t in (q, layer.key(memory), layer.value(memory))), strict=True):
        heads.append(((q_h @ k_h.T) / (D / 2) ** 0.5).softmax(-1) @ v_h)
    return layer.gate * layer.output(torch.cat(heads, dim=-1))


@given(present=st.lists(st.booleans(), min_size=2 * S, max_size=2 * S))
def test_a_sequence_reads_the_slots_it_has_and_no_others(present: list[bool]) -> None:
    """Reference: attention over those slots alone. Without any, the output is exactly 0."""
    layer, x = attention(), draws(1, 2, T, D)
    mask = torch.tensor(present).view(2, S)
    slots = draws(2, 2, S, D) * mask[..., None]
    output = layer(x, slots)
    for row in range(2):
        if mask[row].any():
            expected = by_hand(layer, x[row], slots[row][mask[row]])
            # Numbers below 10 from sums of 8 products lose 80 roundings per step; normalisation, logits, weights,
            # values and output are five steps, none of which enlarges an error more than twice: 3,000 roundings.
            torch.testing.assert_close(output[row], expected, rtol=1e-12, atol=1e-12)
        else:
            assert not output[row].any()


def test_slots_for_all_are_the_same_as_for_each() -> None:
    layer, x, slots = attention(), draws(1, 3, T, D), draws(2, S, D)
    slots[1] = 0.0
    assert torch.equal(layer(x, slots), layer(x, slots.expand(3, S, D)))


def test_other_sequences_slots_and_values_of_absent_ones_do_not_matter() -> None:
    layer, x, slots = attention(), draws(1, 2, T, D), draws(2, 2, S, D)
    changed = torch.stack((slots[0], draws(3, S, D)))
    assert torch.equal(layer(x, slots)[0], layer(x, changed)[0])
    assert not torch.equal(layer(x, slots)[1], layer(x, changed)[1])


def test_gradients_of_a_batch_with_an_empty_row_are_finite_and_reach_every_matrix() -> None:
    """Distinct slots give the query and the key a gradient, which the original's equal slots never did."""
    layer, slots = attention(), draws(2, 2, S, D)
    slots[1] = 0.0
    (layer(draws(1, 2, T, D), slots) * draws(3, 2, T, D)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A bias of the slots' norm moves all keys of a head alike, but their values too.
        assert parameter.grad.abs().max() > 1e-6, name
    equal = slots[:1, :1].expand(2, S, D)
    layer.zero_grad()
    (layer(draws(1, 2, T, D), equal) * draws(3, 2, T, D)).sum().backward()
    assert layer.query.weight.grad.abs().max() < 1e-12


def test_the_start_of_training_is_no_change_at_all() -> None:
    layer = attention()
    layer.initialise()
    assert not layer(draws(1, 2, T, D), draws(2, 2, S, D)).any()
    assert layer.gate == 1


def test_dropout_takes_the_memory_from_whole_windows() -> None:
    config = ModelConfig(d_model=D, n_heads=2, engram=EngramConfig(kind="retrieved", dropout=0.5))
    mechanism, memory = build_engrams(config).train(), torch.ones(400, S, D)
    torch.manual_seed(0)
    state = mechanism.start(torch.arange(T), None)
    mechanism.offer(memory, state)
    rows = state.inputs.slots.flatten(1)
    assert ((rows == 0).all(1) | (rows == 1).all(1)).all()
    assert 150 < int((rows == 1).all(1).sum()) < 250
    mechanism.eval().offer(memory, state)
    assert torch.equal(state.inputs.slots, memory)


def test_a_retrieved_memory_has_no_original() -> None:
    with pytest.raises(HRSError, match="as_original has no meaning"):
        EngramConfig(kind="retrieved", as_original=True)


def test_attention_over_slots_equals_the_fused_kernel_without_a_mask() -> None:
    """All slots present: what kind=memory computes."""
    layer, x, slots = attention(), draws(1, 2, T, D), draws(2, S, D)
    masked = layer(x, slots)
    layer.by_slot = False
    torch.testing.assert_close(layer(x, slots), masked, rtol=1e-12, atol=1e-12)
