"""Attention against a slow reference, with every kernel and all positions, alone, with extra keys, and in pieces."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hrs.config import AttentionConfig, ModelConfig
from hrs.nn.attention import Attention, RotaryEmbedding, alibi_slopes

D, HEADS, T = 8, 2, 12
WINDOW_ENDS = torch.tensor([3, 3, 7, 7, 11, 11])
EARLY_ENDS = WINDOW_ENDS < T // 2
PRODUCTS = ("dot", "exponential", "mlp", "random_projection")
KERNELS = (*PRODUCTS, "l1", "sin_product", "soft_rank")
POSITIONS = ("rotary", "learned", "alibi")


def build(kernel: str, positions: str, *, dropout: float = 0.0, features: int = 3) -> Attention:
    choice = AttentionConfig(kernel=kernel, positions=positions, features=features)  # type: ignore[arg-type]
    config = ModelConfig(d_model=D, n_heads=HEADS, dropout=dropout, rope_base=100.0, attention=choice)
    return Attention(config, n_positions=T + 1, n_extra_keys=6)


def attention(kernel: str = "dot", positions: str = "rotary", *, dropout: float = 0.0, features: int = 3) -> Attention:
    """In float64, with weights so large that the softmax has something to tell apart."""
    torch.manual_seed(0)
    layer = build(kernel, positions, dropout=dropout, features=features).double().eval()
    with torch.no_grad():
        layer.qkv.weight.mul_(3)
    return layer


def states(batch: int, n: int) -> Tensor:
    return torch.randn(batch, n, D, generator=torch.Generator().manual_seed(n)).double()


def turn(vector: Tensor, position: int) -> Tensor:
    """Rotate the pairs (i, i + half) one by one."""
    half = len(vector) // 2
    turned = vector.clone()
    for i in range(half):
        angle = position * 100.0 ** (-2 * i / len(vector))
        a, b = vector[i], vector[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def reference(
    layer: Attention, positions: str, x: Tensor, memory: Tensor, ends: Tensor, query_scale: Tensor | None
) -> Tensor:
    """Query by query, head by head, over exactly the keys that may be seen. x [T, d], memory [E, d], scale [H, T]."""
    d_head = D // HEADS
    wq, wk, wv = layer.qkv.weight.detach().split(D)
    rows = []
    for t in range(len(x)):
        sources = [(x[s], s) for s in range(t + 1)]
        sources += [(memory[e], int(ends[e])) for e in range(len(memory)) if ends[e] <= t]
        heads = []
        for h in range(HEADS):
            part = slice(h * d_head, (h + 1) * d_head)
            q, keys = (wq @ x[t])[part], [(wk @ v)[part] for v, _ in sources]
            if positions == "rotary":
                q, keys = turn(q, t), [turn(k, p) for k, (_, p) in zip(keys, sources, strict=True)]
            # The other head's rows are there only because a kernel may differ from head to head.
            q_h, k_h = (torch.stack(v).expand(1, HEADS, -1, -1) for v in ([q], keys))
            scores = layer.kernel.score(q_h, k_h, torch.ones(1, len(keys), dtype=torch.bool))[0, h, 0]
            if query_scale is not None:
                scores = scores * query_scale[h, t]
            if positions == "alibi":
                scores = scores - torch.tensor([2 ** (-8 * h / HEADS) * (t - p) for _, p in sources])
            values = torch.stack([(wv @ v)[part] for v, _ in sources])
            heads.append(scores.softmax(0) @ values)
        rows.append(layer.output.weight.detach() @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n_memory", [0, 6])
def test_equals_slow_reference(kernel: str, positions: str, n_memory: int) -> None:
    """A query sees tokens up to itself and an engram from its window's last token on, placed at that position."""
    layer = attention(kernel, positions)
    x, memory, ends = states(2, T), states(2, n_memory), WINDOW_ENDS[:n_memory]
    scale = 0.5 + torch.rand(2, HEADS, T).double() if n_memory else None
    extra = (memory, ends, scale) if n_memory else ()
    result = layer(x, torch.arange(T), None, *extra)
    for b in range(2):
        expected = reference(layer, positions, x[b], memory[b], ends, None if scale is None else scale[b])
        # Rotary tables are made in float32.
        bound = 1e-6 if positions == "rotary" else 1e-11
        torch.testing.assert_close(result[b], expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("features", [3, 4, 9])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_fused_equals_explicit_scores(
    kernel: str, positions: str, features: int, dtype: torch.dtype, bound: float
) -> None:
    """Results and all gradients, whether features are narrower than a head, as wide, or wider."""
    layer = attention(kernel, positions, features=features).to(dtype)
    x, memory = states(2, T).to(dtype).requires_grad_(), states(2, 6).to(dtype).requires_grad_()
    scale = (0.5 + torch.rand(2, HEADS, T)).to(dtype).requires_grad_()
    found = []
    for fused in (True, False):
        layer.fused = fused
        y = layer(x, torch.arange(T), None, memory, WINDOW_ENDS, scale)
        cotangent = torch.ones_like(y) * torch.arange(D) / D
        found.append((y, *torch.autograd.grad(y, (x, memory, scale, *layer.parameters()), cotangent)))
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=bound * max(1.0, float(slow.detach().abs().max())))


def test_plain_attention_is_exactly_torchs_own() -> None:
    """Dot product and rotary positions: not one bit apart from fused attention as it is, and no state added."""
    layer, x = attention(), states(2, T)
    heads = layer.qkv(x).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
    q, k = layer.rotary(heads[:2], torch.arange(T))
    plain = layer.output(F.scaled_dot_product_attention(q, k, heads[2], is_causal=True).transpose(1, 2).flatten(2))
    assert torch.equal(layer(x, torch.arange(T)), plain)
    assert set(layer.state_dict()) == {"qkv.weight", "output.weight"}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_flash_attention_takes_every_product_kernel(kernel: str, positions: str) -> None:
    """With no other backend allowed, whole and causal; the other kernels do without fused attention altogether."""
    layer, x = attention(kernel, positions), states(2, T)
    expected = layer(x, torch.arange(T))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it would not be used
        assert torch.equal(layer(x, torch.arange(T)), expected)
    assert layer.fused == (kernel in PRODUCTS)


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
@examples(6)
@given(cuts=st.lists(st.integers(1, T - 1), unique=True, max_size=T - 1), with_memory=st.booleans())
def test_pieces_equal_the_whole(kernel: str, positions: str, cuts: list[int], with_memory: bool) -> None:
    """Any chunking through the cache gives the one-pass result, also where a window completes inside a chunk."""
    layer = attention(kernel, positions)
    x, memory = states(2, T), states(2, 6)
    scale = 0.5 + torch.rand(2, HEADS, T, generator=torch.Generator().manual_seed(2)).double()
    whole = layer(x, torch.arange(T), None, *((memory, WINDOW_ENDS) if with_memory else ()), query_scale=scale)
    cache, pieces, edges = layer.new_cache(), [], [0, *sorted(cuts), T]
    for start, end in itertools.pairwise(edges):
        new = torch.isin(WINDOW_ENDS, torch.arange(start, end))
        extra = (memory[:, new], WINDOW_ENDS[new]) if with_memory else ()
        span = torch.arange(start, end)
        pieces.append(layer(x[:, start:end], span, cache, *extra, query_scale=scale[..., start:end]))
    # Logits below 100 in size from sums of at most 24 products lose 24 * 100 roundings, 3e-13; the weights as much
    # relatively, twice for numerator and sum; values and output add 24 * 10 roundings: 1e-12 in all.
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_later_tokens_change_no_bit_and_have_no_gradient(kernel: str, positions: str) -> None:
    layer, cut = attention(kernel, positions), T // 2
    x, memory = states(2, T).requires_grad_(), states(2, 6).requires_grad_()
    with torch.no_grad():
        other, other_memory = x.clone(), memory.clone()
        other[:, cut:] *= 10
        other_memory[:, ~EARLY_ENDS] *= 10
    early = layer(x, torch.arange(T), None, memory, WINDOW_ENDS)[:, :cut]
    assert torch.equal(early, layer(other, torch.arange(T), None, other_memory, WINDOW_ENDS)[:, :cut])
    grad_x, grad_memory = torch.autograd.grad(early, (x, memory), torch.randn_like(early))
    assert (grad_x[:, cut:] == 0).all() and (grad_memory[:, ~EARLY_ENDS] == 0).all()
    assert (grad_x[:, :cut] != 0).any() and (grad_memory[:, EARLY_ENDS] != 0).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_after_the_last_token_changes_nothing(kernel: str) -> None:
    """Extra keys at position T are out of sight: the result is that without them."""
    layer = attention(kernel)
    x, memory = states(1, T), 100 * states(1, 6)
    hidden = layer(x, torch.arange(T), None, memory, torch.full((6,), T))
    torch.testing.assert_close(hidden, layer(x, torch.arange(T)), rtol=1e-12, atol=1e-12)


# ---- positions -------------------------------------------------------------------------------------------------------


def test_rotation_depends_on_distance_only() -> None:
    """<turn(q, m), turn(k, n)> is a function of m - n."""
    rotary = RotaryEmbedding(6, 32, 100.0).double()
    q, k = torch.randn(6).double(), torch.randn(6).double()
    products = [rotary(q[None], torch.tensor([m + 5])) @ rotary(k[None], torch.tensor([m])).T for m in range(20)]
    torch.testing.assert_close(torch.cat(products), products[0].expand(20, 1), rtol=1e-6, atol=1e-6)


def test_alibi_slopes_fall_from_one() -> None:
    assert alibi_slopes(8).tolist() == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]
    assert alibi_slopes(6)[3].item() == 2**-4


@pytest.mark.parametrize("positions", POSITIONS)
def test_only_learned_positions_leave_attention_without_order(positions: str) -> None:
    """A shuffled past looks the same to the last token, unless attention itself knows where its keys are."""
    layer, x = attention("dot", positions), states(1, T)
    shuffled = x[:, [*reversed(range(T - 1)), T - 1]]
    last, other = (layer(t, torch.arange(T))[:, -1] for t in (x, shuffled))
    assert torch.allclose(last, other, rtol=1e-12, atol=1e-12) == (positions == "learned")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropout_acts_in_training_only(kernel: str) -> None:
    layer, x = attention(kernel, dropout=0.5), states(1, T)
    assert torch.equal(layer(x, torch.arange(T)), layer(x, torch.arange(T)))
    layer.train()
    layer.dropout.register_forward_hook(lambda module, args, output: args[0])  # leaves that of the weights alone
    assert not torch.equal(layer(x, torch.arange(T)), layer(x, torch.arange(T)))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_trains_recomputed_and_in_half_precision(kernel: str, positions: str) -> None:
    """Activation checkpointing gives the same gradients; bfloat16 autocast gives nearly those of float32."""
    layer, x = attention(kernel, positions).float().train(), states(2, T).float()

    def gradient(**autocast: bool) -> Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            y = checkpoint(layer, x, torch.arange(T), use_reentrant=False)
        y.float().square().mean().backward()
        return layer.qkv.weight.grad.clone()

    layer(x, torch.arange(T)).square().mean().backward()
    plain = layer.qkv.weight.grad.clone()
    torch.testing.assert_close(gradient(enabled=False), plain)
    half = gradient(enabled=True)
    assert half.isfinite().all()
    assert F.cosine_similarity(half.flatten(), plain.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_training_step_can_be_traced_without_data(kernel: str, positions: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = build(kernel, positions), torch.randn(2, T, D)
        y = layer(x, torch.arange(T))
        y.sum().backward()
    assert y.shape == (2, T, D)
    assert layer.qkv.weight.grad.shape == (3 * D, D)


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_to_one_graph(kernel: str) -> None:
    layer, x = attention(kernel, "alibi"), states(1, T)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, torch.arange(T)), layer(x, torch.arange(T)), rtol=1e-12, atol=1e-12)
