"""Slots for sequences of unequal length against a cache of its own for each sequence."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor, nn

from hrs.config import AttentionConfig, ModelConfig, RouterConfig
from hrs.nn.attention import Attention
from hrs.nn.cache import CachePart, KeyValueSlots, SlotPart, SlotTable, TailSlots
from hrs.nn.conv_mixer import CausalConv
from hrs.nn.router import Router

D, T, SLOTS = 8, 12, 3
KERNELS = ("dot", "exponential", "mlp", "random_projection", "l1", "sin_product", "soft_rank")
Step = Callable[[Tensor, Tensor, CachePart | SlotPart], Tensor]


class Slots:
    """One layer's slots and their table, as a model's slots keep them."""

    def __init__(self, layer: nn.Module, n: int) -> None:
        self.table = SlotTable(n)
        self.part: SlotPart = layer.new_cache().slots(self.table)  # type: ignore[operator]

    def join(self, cache: CachePart, length: int) -> None:
        self.part.join(cache, len(self.table.lengths))  # type: ignore[arg-type]
        self.table.join(1, length)

    def leave(self, slot: int) -> None:
        last = len(self.table.lengths) - 1
        if slot < last:
            self.part.leave(slot, last)
        self.table.leave(slot)

    def begin(self) -> Tensor:
        """Start a step; positions [n, 1] of its tokens."""
        self.table.begin(torch.tensor(self.table.lengths).unsqueeze(1))
        return self.table.positions


def attention(kernel: str, positions: str) -> Attention:
    choice = AttentionConfig(kernel=kernel, positions=positions, features=3)  # type: ignore[arg-type]
    return Attention(ModelConfig(d_model=D, n_heads=2, attention=choice), n_positions=T)


def attend(layer: Attention, x: Tensor, positions: Tensor, cache: CachePart | SlotPart) -> Tensor:
    return layer.output(layer.step(x, cache)) if isinstance(cache, KeyValueSlots) else layer(x, positions, cache)


def steps() -> dict[str, tuple[nn.Module, Step]]:
    """Every layer that looks back, and how to call it."""
    torch.manual_seed(0)
    layers: dict[str, tuple[nn.Module, Step]] = {}
    for kernel in KERNELS:
        for positions in ("rotary", "alibi", "learned"):
            layer = attention(kernel, positions)
            layers[f"{kernel} {positions}"] = layer, lambda x, p, c, layer=layer: attend(layer, x, p, c)
    for kernel in (1, 4):
        conv = CausalConv(D, kernel)
        layers[f"conv {kernel}"] = conv, lambda x, p, c, layer=conv: layer(x, c)
    for window in (1, 5):
        router = Router(RouterConfig(hidden=4, trc_window=window), D, 3, T)
        layers[f"router {window}"] = router, lambda x, p, c, layer=router: layer(x, c, p)
    for layer, _ in layers.values():
        layer.double().eval()
    return layers


LAYERS = steps()


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@examples(12)
@given(data=st.data())
def test_every_slot_goes_on_as_if_alone(name: str, data: st.DataObject) -> None:
    """Sequences of any length join, advance and leave in any order; what left never disturbs what takes its place."""
    layer, step = LAYERS[name]
    slots = Slots(layer, SLOTS)
    alone: list[tuple[CachePart, int]] = []
    for _ in range(data.draw(st.integers(3, 12))):
        full = [i for i, (_, length) in enumerate(alone) if length == T]
        free = len(alone) < SLOTS
        action = data.draw(st.sampled_from(["join"] * free + ["leave"] * bool(alone) + ["step"] * 3))
        if action == "join":
            length = data.draw(st.integers(1, T - 1))
            cache = layer.new_cache()  # type: ignore[operator]
            step(torch.randn(1, length, D).double(), torch.arange(length), cache)
            slots.join(cache, length)
            alone.append((cache, length))
        elif action == "leave" or full:
            gone = full[0] if full else data.draw(st.integers(0, len(alone) - 1))
            slots.leave(gone)
            last = alone.pop()
            if gone < len(alone):
                alone[gone] = last
        elif alone:
            x = torch.randn(len(alone), 1, D).double()
            together = step(x, slots.begin(), slots.part)
            slots.table.advance()
            for row, (cache, length) in enumerate(alone):
                expected = step(x[row : row + 1], torch.tensor([length]), cache)
                # As in test_attention: logits below 10 from sums of at most 12 products, 2,000 roundings in all.
                torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-10, atol=1e-12)
            alone = [(cache, length + 1) for cache, length in alone]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_slot_forgets_what_is_no_number(kernel: str) -> None:
    """A sequence that came to grief leaves nothing behind for the next one in its slot, nor for its neighbours."""
    layer = attention(kernel, "rotary").double().eval()
    slots = Slots(layer, 2)

    def read(states: Tensor) -> None:
        cache = layer.new_cache()
        layer(states, torch.arange(states.shape[1]), cache)
        slots.join(cache, states.shape[1])

    with torch.no_grad():
        read(torch.randn(1, 9, D).double())
        read(torch.full((1, 9, D), torch.nan).double())
        x = torch.randn(2, 1, D).double()
        first = attend(layer, x, slots.begin(), slots.part)
        slots.table.advance()
        assert first[0].isfinite().all() and first[1].isnan().all()
        slots.leave(1)
        read(torch.randn(1, 2, D).double())
        assert attend(layer, x, slots.begin(), slots.part).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv 4", "router 5"])
def test_a_short_sequence_has_no_tail_of_the_one_before(name: str) -> None:
    layer, step = LAYERS[name]
    slots, cache = Slots(layer, 1), layer.new_cache()  # type: ignore[operator]
    step(torch.full((1, 9, D), torch.nan).double(), torch.arange(9), cache)
    slots.join(cache, 9)
    slots.leave(0)
    cache, x = layer.new_cache(), torch.randn(1, 2, D).double()  # type: ignore[operator]
    step(x[:, :1], torch.arange(1), cache)
    slots.join(cache, 1)
    together = step(x[:, 1:], slots.begin(), slots.part)
    torch.testing.assert_close(together, step(x[:, 1:], torch.tensor([1]), cache), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_slots_hold_no_more_than_there_is_and_mask_the_rest() -> None:
    layer = attention("dot", "rotary").eval()
    slots = Slots(layer, 2)
    assert isinstance(slots.part, KeyValueSlots) and isinstance(Slots(CausalConv(D, 3), 2).part, TailSlots)
    for length in (3, 5):
        cache = layer.new_cache()
        layer(torch.randn(1, length, D), torch.arange(length), cache)
        slots.join(cache, length)
    slots.begin()
    keys, values = slots.part.filled()
    assert keys.shape == values.shape == (2, 2, 6, 4)
    assert slots.part.positions().tolist() == list(range(6))
    assert slots.part.visible()[:, 0, 0].sum(dim=-1).tolist() == [4, 6]
    mask = slots.part.mask(torch.float32)
    assert mask is not None and mask.isfinite().equal(slots.part.visible())
    slots.table.advance()
    slots.leave(0)
    assert slots.table.lengths == [6]
    slots.begin()
    assert slots.part.mask(torch.float32) is None  # one sequence sees all that it has


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_static_shapes_change_nothing(name: str) -> None:
    """Rows without a sequence and keys beyond the longest one are computed, and thrown away."""
    layer, step = LAYERS[name]
    slots, same = Slots(layer, 4), Slots(layer, 4)
    for length in (3, 7):
        cache = layer.new_cache()  # type: ignore[operator]
        step(torch.randn(1, length, D).double(), torch.arange(length), cache)
        slots.join(cache, length)
        same.join(cache, length)
    for _ in range(3):
        x = torch.randn(4, 1, D).double()
        expected = step(x[:2], same.begin(), same.part)
        slots.table.begin(torch.tensor([*slots.table.lengths, 0, 0]).unsqueeze(1), end=T)
        found = step(x, slots.table.positions, slots.part)
        torch.testing.assert_close(found[:2], expected, rtol=1e-10, atol=1e-12)
        slots.table.advance()
        same.table.advance()
