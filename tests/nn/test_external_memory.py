"""External memory: its cross-attention, how training fills the slots, and the defects of the original."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import EngramConfig, ModelConfig
from hrs.nn.cross_attention import CrossAttention
from hrs.nn.engrams.memory import MemoryEngrams

D, W, S, T = 8, 4, 3, 12
CONFIG = ModelConfig(
    vocab_size=13,
    n_layers=4,
    n_heads=2,
    d_model=D,
    d_ff=16,
    max_seq_len=T,
    dropout=0.0,
    engram=EngramConfig(
        kind="memory", window=W, slots=S, extract_after=-2, dropout=0.0, slot_updates=10, slot_decay=0.9
    ),
)


def config(**changes: object) -> ModelConfig:
    return dataclasses.replace(CONFIG, engram=dataclasses.replace(CONFIG.engram, **changes))  # type: ignore[arg-type]


def attention(*, as_original: bool) -> CrossAttention:
    """As in a model: the general initialisation first, then its own."""
    torch.manual_seed(0)
    layer = CrossAttention(config(as_original=as_original)).double()
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    layer.initialise()
    return layer


def memory(**changes: object) -> MemoryEngrams:
    return MemoryEngrams(config(**changes)).double()


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def passes(layer: MemoryEngrams, *hidden: Tensor) -> None:
    """Micro-batches of one step."""
    for x in hidden:
        state = layer.start(torch.arange(x.shape[1]), None)
        for index in range(CONFIG.n_layers):
            layer.leave(index, x if index == 2 else x + 100, state)  # only the output of block 2 counts


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_original", [False, True])
def test_attention_equals_slow_reference(as_original: bool) -> None:
    """gate * Wo concat_h softmax(q k / sqrt(d_head)) v, for one token and one head at a time."""
    layer, x, slots = attention(as_original=as_original), draws(1, 2, 5, D), draws(2, S, D)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(draws(10 + i, *parameter.shape))
    result, width = layer(x, slots), D // 2
    memory = slots if layer.slot_norm is None else layer.slot_norm(slots)
    for b in range(2):
        for t in range(5):
            q, heads = layer.query.weight @ layer.norm(x[b, t]), []
            for h in range(2):
                part = slice(h * width, (h + 1) * width)
                k, v = (memory @ linear.weight.T[:, part] for linear in (layer.key, layer.value))
                weights = torch.exp(k @ q[part] / math.sqrt(width))
                heads.append((weights[:, None] * v).sum(0) / weights.sum())
            gate = 1 / (1 + torch.exp(-layer.gate)) if as_original else layer.gate
            torch.testing.assert_close(result[b, t], gate * (layer.output.weight @ torch.cat(heads)))


def test_starts_as_exactly_nothing_and_learns_at_once() -> None:
    """Output 0 at the start; Wo has a gradient at the first step, everything else at the second."""
    layer, x, slots, target = attention(as_original=False), draws(1, 2, 5, D), draws(2, S, D), draws(3, 2, 5, D)
    assert torch.equal(layer(x, slots), torch.zeros_like(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(x, slots) - target).square().sum().backward()
    assert layer.output.weight.grad is not None
    assert layer.output.weight.grad.norm() > 1e-3
    optimizer.step()
    optimizer.zero_grad()
    (layer(x, slots) - target).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize("as_original", [False, True])
def test_empty_slots_are_skipped(as_original: bool) -> None:
    """Zero slots give exactly 0 whatever the weights, biases of the norms included."""
    layer = attention(as_original=as_original)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(draws(10 + i, *parameter.shape))
    x = draws(1, 2, 5, D)
    assert torch.equal(layer(x, torch.zeros(S, D).double()), torch.zeros_like(x))
    assert (layer(x, draws(2, S, D)) != 0).all()


def test_equal_slots_are_a_constant_vector() -> None:
    """The original's defect: one vector for every token of every text, at half strength from the start, and no
    gradient for Wq and Wk."""
    layer, slots = attention(as_original=True), draws(2, 1, D).expand(S, D)
    for module in (layer.query, layer.key, layer.value, layer.output):
        module.weight.data.mul_(50)  # to N(0, 1), so that nothing is small by chance
    result = torch.cat([layer(draws(seed, 2, 5, D), slots).flatten(0, 1) for seed in (1, 3)])  # [20, d]
    constant = 0.5 * layer.output.weight @ layer.value.weight @ slots[0]
    torch.testing.assert_close(result, constant.expand_as(result), rtol=1e-12, atol=1e-12)
    (result * draws(4, 20, D)).sum().backward()
    norms = {n: getattr(layer, n).weight.grad.norm().item() for n in ("query", "key", "value", "output")}
    assert max(norms["query"], norms["key"]) < 1e-12
    assert min(norms["value"], norms["output"]) > 1


@pytest.mark.parametrize("as_original", [False, True])
def test_distinct_slots_are_read_by_query(as_original: bool) -> None:
    """Tokens read different things, and Wq learns."""
    layer, x, slots = attention(as_original=as_original), draws(1, 2, 5, D), draws(2, S, D)
    for module in (layer.query, layer.key, layer.value, layer.output):
        nn.init.normal_(module.weight)
    result = layer(x, slots).flatten(0, 1)
    distances = torch.cdist(result, result) + torch.eye(10).double()
    assert distances.min() > 1e-2
    (result * draws(4, 10, D)).sum().backward()
    assert layer.query.weight.grad is not None
    assert layer.query.weight.grad.norm() > 1e-2


@pytest.mark.parametrize(("as_original", "expected"), [(True, 12_589_059), (False, 12_589_059 + 3 * 2 * 1024)])
def test_parameter_count_at_the_originals_size(as_original: bool, expected: int) -> None:
    """3 * (4 d^2 + 2 d + 1) at the three odd blocks of six; repaired, the norm of the slots comes on top."""
    with torch.device("meta"):
        large = dataclasses.replace(config(as_original=as_original), d_model=1024, n_heads=16, n_layers=6)
        layers = [CrossAttention(large) for index in range(6) if index % 2]
        counted = [p for module in (*layers, MemoryEngrams(large)) for p in module.parameters()]
    assert sum(p.numel() for p in counted) == expected


# ---- filling -------------------------------------------------------------------------------------------------------


def window_means(x: Tensor) -> list[Tensor]:
    return [row[w * W : (w + 1) * W].sum(0) / W for row in x for w in range(x.shape[1] // W)]


def test_slots_equal_slow_k_means() -> None:
    """Ten updates after two micro-batches each, one window mean and one slot at a time."""
    layer = memory()
    slots, usage = [], [1 / S] * S
    for step in range(10):
        layer.set_progress(step / 10)
        batches = [draws(100 + step, 2, 11, D), draws(200 + step, 1, 8, D)]  # 2 * 2 and 2 windows
        passes(layer, *batches)
        layer.keep_observations()
        means = [mean for x in batches for mean in window_means(x)]
        if step == 0:
            ordered = sorted(means, key=lambda m: m.tolist())
            slots = [ordered[i] for i in (1, 3, 5)]  # the middle of each third of six
        else:
            groups: list[list[Tensor]] = [[] for _ in slots]
            for mean in means:
                groups[max(range(S), key=lambda s: F.cosine_similarity(slots[s], mean, dim=0).item())].append(mean)
            slots = [0.9 * s + 0.1 * sum(g) / len(g) if g else s for s, g in zip(slots, groups, strict=True)]
            usage = [0.9 * u + 0.1 * len(g) / 6 for u, g in zip(usage, groups, strict=True)]
        torch.testing.assert_close(layer.slots, torch.stack(slots))
        torch.testing.assert_close(layer.usage, torch.tensor(usage).double())
    assert min(usage) > 0.25 / S  # none died, so the reference need not replace any


def test_slots_start_distinct_and_wait_for_enough() -> None:
    """Equal observations are one; the slots stay empty until there are as many distinct ones as slots."""
    layer, x = memory(), draws(1, 1, W, D)
    for step in range(3):
        layer.set_progress(step / 10)
        passes(layer, x, x)
        layer.keep_observations()
        assert not layer.slots.any()
    passes(layer, draws(2, 2, W, D))
    layer.keep_observations()
    assert torch.cdist(layer.slots, layer.slots).add(torch.eye(S).double()).min() > 0.1
    known = torch.stack(window_means(x) + window_means(draws(2, 2, W, D)))
    assert (torch.cdist(layer.slots, known).min(dim=1).values < 1e-12).all()


def test_k_means_finds_clusters_and_revives_dead_slots() -> None:
    """Three directions, three slots; two of them start where nothing is ever seen again, and come back."""
    layer = memory(slot_decay=0.8, slot_updates=100)
    centres = 3 * torch.eye(D, dtype=torch.float64)[:S]
    layer.slots.copy_(torch.stack((centres[0], -centres[0], -centres[1])))
    layer.filled.fill_(True)
    for step in range(100):
        layer.set_progress(step / 100)
        rows = centres[torch.arange(12) % S] + 0.1 * draws(step, 12, D)
        passes(layer, rows.repeat_interleave(W, dim=0)[None])
        layer.keep_observations()
    distances = torch.cdist(layer.slots, centres)
    assert sorted(distances.argmin(dim=1).tolist()) == [0, 1, 2]
    assert distances.min(dim=1).values.max() < 0.2


def test_observations_beyond_the_reservoir_are_left_out() -> None:
    """The first 16 S window means since the last update are kept, across micro-batches and steps."""
    layer = memory()
    layer.last_update.fill_(0)  # nothing is due
    batches = [draws(seed, 3, T, D) for seed in range(8)]  # 9 means each, 48 rows
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        passes(layer, first, second)
        layer.keep_observations()
    means = torch.stack([mean for x in batches for mean in window_means(x)])
    assert int(layer.seen.n_kept) == 16 * S
    torch.testing.assert_close(layer.seen.kept, means[: 16 * S])


def test_original_is_one_moving_average() -> None:
    """Mean of the means of passes at each update, copied to every slot, the first time as it is."""
    layer, expected, seen = memory(as_original=True), torch.zeros(D).double(), []
    for step in range(30):
        layer.set_progress(step / 30)
        batches = [draws(100 + step, 2, 5, D), draws(200 + step, 1, 3, D)]
        passes(layer, *batches)
        layer.keep_observations()
        seen += [x.sum(dim=(0, 1)) / (x.shape[0] * x.shape[1]) for x in batches]
        if step % 3 == 0:  # 10 updates in 30 steps, the first after step 0
            mean = sum(seen) / len(seen)
            expected = mean if step == 0 else 0.9 * expected + 0.1 * mean
            seen = []
        torch.testing.assert_close(layer.slots, expected.expand(S, D))


@pytest.mark.parametrize("steps", [50_000, 700, 500])
def test_updates_come_at_the_originals_steps(steps: int) -> None:
    """Every 100 of 50,000 steps from step 0 on, and 500 times in runs of any other length."""
    layer, due, last = memory(slot_updates=500), [], -1
    for step in range(steps):
        layer.set_progress(step / steps)
        if layer._update > last:
            due.append(step)
            last = layer._update
    assert len(due) == 500
    if steps == 50_000:
        assert due == list(range(0, 50_000, 100))


# ---- what survives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_original", [False, True])
def test_dropped_observations_leave_no_trace(as_original: bool) -> None:
    """A step that ran out of memory and is repeated in smaller parts ends as if it had never been tried."""
    tried, plain = memory(as_original=as_original), memory(as_original=as_original)
    for step in range(4):
        x = draws(step, 4, T, D)
        for layer in (tried, plain):
            layer.set_progress(step / 20)
            if layer is tried:
                passes(layer, draws(50 + step, 4, T, D))
                layer.drop_observations()
            passes(layer, x[:2], x[2:])
            layer.keep_observations()
        for name, buffer in plain.named_buffers():
            assert torch.equal(tried.get_buffer(name), buffer), name
    assert plain.slots.any()


@pytest.mark.parametrize("as_original", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resumes_bit_exactly(as_original: bool, stop: int) -> None:
    """A state_dict between two updates carries what was seen since the last one; pending passes are not in it."""

    def advance(layer: MemoryEngrams, steps: range) -> None:
        for step in steps:
            layer.set_progress(step / 30)  # an update every third step
            passes(layer, draws(step, 2, T, D), draws(90 + step, 1, T, D))
            layer.keep_observations()

    whole, first, second = (memory(as_original=as_original) for _ in range(3))
    advance(whole, range(9))
    advance(first, range(stop))
    passes(first, draws(77, 2, T, D))  # a step that does not end
    saved = first.state_dict()
    assert not any("pending" in name for name in saved)
    second.load_state_dict(saved)
    advance(second, range(stop, 9))
    for name, buffer in whole.named_buffers():
        assert torch.equal(second.get_buffer(name), buffer), name


def test_evaluation_and_windows_that_are_incomplete_show_nothing() -> None:
    layer = memory()
    passes(layer, draws(1, 2, W - 1, D))
    layer.eval()
    passes(layer, draws(1, 2, T, D))
    assert int(layer.seen.n_pending) == 0
    assert not layer.seen.pending.any()


def test_dropout_hides_the_slots() -> None:
    """In training a micro-batch finds its slots empty now and then; in evaluation never."""
    layer = memory(dropout=0.5)
    layer.slots.copy_(draws(1, S, D))
    torch.manual_seed(0)
    seen = {bool(layer.start(torch.arange(2), None).inputs.slots.any()) for _ in range(20)}  # type: ignore[union-attr]
    assert seen == {True, False}
    layer.eval()
    assert all(torch.equal(layer.start(torch.arange(2), None).inputs.slots, layer.slots) for _ in range(20))  # type: ignore[arg-type]


@pytest.mark.parametrize("as_original", [False, True])
def test_observing_compiles_into_one_graph(as_original: bool) -> None:
    """No value is read back in the pass, so the graph has no break; its results equal those of eager code."""
    torch._dynamo.reset()
    eager, compiled, x = memory(as_original=as_original), memory(as_original=as_original), draws(1, 2, T, D)
    state = compiled.start(torch.arange(T), None)
    run = torch.compile(lambda h: compiled.leave(2, h + 0, state), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        passes(eager, x)
        run(x)
    assert torch.equal(eager.seen.pending, compiled.seen.pending)
    assert torch.equal(eager.seen.n_pending, compiled.seen.n_pending)
