"""Product-key experts as a layer: against gathers, against single experts, and as part of training and decoding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import PeerConfig
from hrs.errors import HRSError
from hrs.nn.peer import Peer, expert_statistics
from hrs.training.memory_trace import StorageCounter

D, MODES = 16, ("hrs", "paper")


def layer(mode: str, dtype: torch.dtype = torch.float64, **changes: int) -> Peer:
    """Small enough for heads and tokens to choose the same experts; weights large enough for gradients to matter."""
    torch.manual_seed(0)
    shape = {"sub_keys": 4, "n_heads": 2, "top_k": 3, **changes}
    peer = Peer(PeerConfig(mode=mode, **shape), D, dropout=0.0).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5)
    return peer


@pytest.mark.parametrize(("d", "n"), [(512, 34_604_032), (1024, 70_256_640)])
def test_parameter_counts_of_the_original(d: int, n: int) -> None:
    with torch.device("meta"):
        peer = Peer(PeerConfig(sub_keys=512, n_heads=8, top_k=16), d, dropout=0.1)
    assert sum(p.numel() for p in peer.parameters()) == n


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(HRSError, match=r"peer\.n_heads 3 must divide d_model 16"):
        Peer(PeerConfig(n_heads=3), D, dropout=0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_result_and_gradients_equal_the_naive_layer(mode: str, dtype: torch.dtype, tolerance: float) -> None:
    peer, direction = layer(mode, dtype), torch.randn(2, 5, D, dtype=dtype)
    x = torch.randn(2, 5, D, dtype=dtype, requires_grad=True)
    results = []
    for peer.naive in (False, True):
        y = peer(x)[0]
        results.append([y, *torch.autograd.grad(y, [x, *peer.parameters()], direction)])
    for fast, naive in zip(*results, strict=True):
        assert naive.abs().max() > 1e-3
        torch.testing.assert_close(fast, naive, rtol=tolerance, atol=tolerance)


def brute_force(peer: Peer, x: Tensor) -> Tensor:
    """One token [d], one head, one expert at a time, over the scores of all experts."""
    config, c = peer.config, peer.key_width
    total, heads = torch.zeros(D, dtype=x.dtype), []
    for h, query in enumerate(peer.query(x).chunk(config.n_heads)):
        query = peer.query_norm(query)
        paper = config.mode == "paper"
        left, right = (query[:c], query[c:]) if paper else (query, query)
        keys = peer.keys[:, 0 if paper else h]
        scores = ((keys[0] @ left)[:, None] + (keys[1] @ right)[None, :]).flatten()
        best = scores.topk(config.top_k)
        result = torch.zeros(peer.up.shape[1], dtype=x.dtype)
        for weight, e in zip(best.values.softmax(0), best.indices, strict=True):
            dot = peer.down[e] @ (x if paper else query)
            result = result + weight * (F.gelu(dot) if paper else torch.sigmoid(dot)) * peer.up[e]
        heads.append(result)
        total = total + result if paper else total
    return total if config.mode == "paper" else peer.norm(peer.output(torch.cat(heads)))


@pytest.mark.parametrize("mode", MODES)
def test_result_equals_one_expert_at_a_time(mode: str) -> None:
    peer, x = layer(mode), torch.randn(1, 4, D, dtype=torch.float64)
    expected = torch.stack([brute_force(peer, token) for token in x[0]])
    torch.testing.assert_close(peer(x)[0][0], expected, rtol=1e-12, atol=1e-12)


def test_hrs_starts_as_half_a_weighted_mean_and_paper_at_the_size_it_states() -> None:
    torch.manual_seed(0)
    x = F.layer_norm(torch.randn(1, 64, 128), (128,))
    hrs = Peer(PeerConfig(sub_keys=32), 128, dropout=0.0)
    before = hrs(x)[0]
    nn.init.zeros_(hrs.down)  # every hidden unit is a half then
    torch.testing.assert_close(before, hrs(x)[0], rtol=0.0, atol=0.05 * before.std().item())
    paper = Peer(PeerConfig(mode="paper", sub_keys=32), 128, dropout=0.0)
    assert 0.5 < paper(x)[0].std().item() / math.sqrt(0.4 * 8 / (16 * 128)) < 2


@pytest.mark.parametrize("mode", MODES)
def test_sparse_gradients_accumulate_to_dense_ones(mode: str) -> None:
    dense, sparse = layer(mode, sub_keys=12), layer(mode, sub_keys=12)
    sparse.sparse_gradients = True
    for _ in range(2):
        x = torch.randn(1, 3, D, dtype=torch.float64)
        for peer in (dense, sparse):
            peer(x)[0].square().mul(torch.arange(D)).sum().backward()
    for name, parameter in sparse.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.is_sparse == (name in ("down", "up"))
        assert not gradient.is_sparse or gradient._nnz() < sparse.n_experts
        torch.testing.assert_close(gradient.to_dense(), dense.get_parameter(name).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_do_not_depend_on_each_other_to_the_last_bit(mode: str) -> None:
    peer, x = layer(mode, sub_keys=16), torch.randn(3, 10, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:], changed[1] = torch.randn(2, 1, 1, D, dtype=torch.float64)
    before, after = peer(x)[0], peer(changed)[0]
    assert torch.equal(before[[0, 2], :6], after[[0, 2], :6])
    assert not torch.equal(before[[0, 2], 6:], after[[0, 2], 6:])


@pytest.mark.parametrize("mode", MODES)
def test_pieces_equal_the_whole(mode: str) -> None:
    peer, x = layer(mode, sub_keys=16), torch.randn(2, 10, D, dtype=torch.float64)
    pieces = torch.cat([peer(part)[0] for part in x.split([1, 2, 5, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(pieces, peer(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_usage_is_the_sum_of_retrieval_weights(mode: str) -> None:
    peer, x = layer(mode), torch.randn(2, 5, D, dtype=torch.float64)
    assert peer.train()(x)[1] is None
    usage = peer.eval()(x)[1]
    assert usage is not None and usage.shape == (16,) and not usage.requires_grad
    torch.testing.assert_close(usage.sum().item(), float(2 * 5 * 2), rtol=1e-6, atol=0.0)
    both = peer(x[:1])[1] + peer(x[1:])[1]  # type: ignore[operator]
    torch.testing.assert_close(usage, both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_gives_nearly_the_same(mode: str, sparse: bool) -> None:
    peer, x = layer(mode, torch.float32, sub_keys=8), torch.randn(2, 5, D)
    peer.sparse_gradients = sparse
    with torch.autocast("cpu", torch.bfloat16):
        y = peer(x)[0]
    # A query rounded to half precision may retrieve another expert: compare the bulk.
    assert (y.float() - peer(x)[0]).abs().median() < 0.05
    y.float().sum().backward()
    for parameter in peer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype is torch.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_fake_step_keeps_as_much_as_a_real_one(mode: str, sparse: bool) -> None:
    """What a memory plan sees. Sparse gradients are planned for the most rows that may be touched."""

    def peak() -> int:
        counter = StorageCounter()
        with counter:
            peer = Peer(PeerConfig(mode=mode, sub_keys=32, n_heads=2, top_k=4), D, dropout=0.1)  # type: ignore[arg-type]
            peer.sparse_gradients = sparse
            counter.see(peer.parameters())
            peer(torch.ones(2, 8, D, requires_grad=True))[0].sum().backward()
        return counter.peak_bytes

    real = peak()
    with FakeTensorMode():
        fake = peak()
    most_rows = 2 * 8 * 2 * 4
    slack = most_rows * (D + 1) * 8 * 2 if sparse else 0
    assert real <= fake <= real + slack


@pytest.mark.parametrize("mode", MODES)
def test_chosen_experts_are_never_copied_for_the_backward_pass(mode: str) -> None:
    peaks = {}
    for naive in (False, True):
        peer = Peer(PeerConfig(mode=mode, sub_keys=4, n_heads=2, top_k=4), 64, dropout=0.0)  # type: ignore[arg-type]
        peer.naive, x = naive, torch.randn(1, 128, 64)
        with StorageCounter() as counter:
            peer(x)[0].sum().backward()
        peaks[naive] = counter.peak_bytes
    gathered = 128 * 2 * 4 * peer.down.shape[1] * 4  # one table's chosen rows
    assert peaks[False] < peaks[True] - gathered


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_into_one_graph(mode: str, sparse: bool, backend: str) -> None:
    peer, x = layer(mode, sub_keys=12), torch.randn(2, 5, D, dtype=torch.float64)
    peer.sparse_gradients = sparse
    compiled = torch.compile(peer, fullgraph=True, backend=backend)
    gradients = []
    for function in (peer, compiled):
        peer.zero_grad()
        y = function(x)[0]
        y.square().sum().backward()
        assert peer.down.grad is not None and peer.down.grad.is_sparse == sparse
        gradients.append([y, *(p.grad.to_dense() for p in peer.parameters())])  # type: ignore[union-attr]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_statistics_of_even_single_and_partial_use() -> None:
    assert expert_statistics(torch.ones(8)) == pytest.approx({"coverage": 1, "unevenness": 0, "dead": 0})
    one = F.one_hot(torch.tensor(3), 8).float()
    assert expert_statistics(one) == pytest.approx({"coverage": 1 / 8, "unevenness": math.log(8), "dead": 7})
    usage = torch.tensor([3.0, 1.0, 0.0, 0.0])
    divergence = 0.75 * math.log(0.75 * 4) + 0.25 * math.log(0.25 * 4)
    assert expert_statistics(usage) == pytest.approx({"coverage": 0.5, "unevenness": divergence, "dead": 2})
    with pytest.raises(HRSError, match="no expert was used"):
        expert_statistics(torch.zeros(4))
