"""The test-time memory against a token-by-token reference, in pieces, and on text that repeats itself."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hrs.config import ModelConfig, TestTimeMemoryConfig
from hrs.nn.test_time_memory import TestTimeMemory

D, C, V = 6, 4, 11
CONFIG = ModelConfig(
    vocab_size=V,
    n_heads=1,
    d_model=D,
    test_time_memory=TestTimeMemoryConfig(enabled=True, chunk=C, key_width=3, router_hidden=5),
)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer() -> TestTimeMemory:
    """Every parameter random, so that none is without effect."""
    built = TestTimeMemory(CONFIG).double()
    for i, parameter in enumerate(built.parameters()):
        parameter.data.copy_(draws(10 + i, *parameter.shape))
    return built


def reference(memory: TestTimeMemory, hidden: Tensor, embedded: Tensor) -> Tensor:
    """One sequence [T, d], one token after another, one delta-rule step per pair."""
    weights, waiting, results = torch.zeros(3, D).double(), [], []
    for t in range(len(hidden)):
        query = memory.query.weight @ hidden[t]
        read = weights.T @ (query / query.norm())
        confidence = (read.square().mean() + 1e-6).sqrt()
        inner = F.gelu(memory.router_hidden(torch.cat((hidden[t], confidence[None]))))
        mix = memory.router_output(inner).log_softmax(0)
        results.append(torch.cat((hidden[t], read + memory.output.weight @ read, mix)))
        waiting.append(t)
        if len(waiting) == C:
            behind = [hidden[i - 1] if i > 0 else torch.zeros(D).double() for i in waiting]
            forget = sum(memory.gates(h)[1] for h in behind) / C
            start = weights = weights * torch.sigmoid(forget)
            for i, h in zip(waiting, behind, strict=True):
                key = memory.key.weight @ h
                key = key / key.norm() if i > 0 else key
                value = embedded[i] / (embedded[i].square().mean() + 1e-6).sqrt()
                surprise = (value - start.T @ key).square().mean()
                step = torch.sigmoid(memory.gates(h)[0] + memory.surprise * surprise)
                weights = weights + step * torch.outer(key, value - weights.T @ key)
            waiting = []
    return torch.stack(results)


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 8, 13])
def test_equals_slow_reference(n_tokens: int) -> None:
    memory, hidden, embedded = layer(), draws(1, 2, n_tokens, D), draws(2, 2, n_tokens, D)
    result = memory(hidden, embedded)
    assert result.shape == (2, n_tokens, 2 * D + 2)
    expected = torch.stack([reference(memory, h, e) for h, e in zip(hidden, embedded, strict=True)])
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [(14,), (1,) * 14, (4, 4, 6), (3, 1, 9, 1), (5, 9), (2, 10, 2)])
def test_pieces_equal_the_whole(sizes: tuple[int, ...]) -> None:
    """Chunks end where they would in one pass, wherever the pieces are cut."""
    memory, hidden, embedded = layer(), draws(1, 2, 14, D), draws(2, 2, 14, D)
    cache = memory.new_cache(hidden)
    pieces = [
        memory(h, e, cache) for h, e in zip(hidden.split(list(sizes), 1), embedded.split(list(sizes), 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), memory(hidden, embedded), rtol=0, atol=1e-10)


def test_nothing_depends_on_later_tokens() -> None:
    """A token changes what is read from the chunk after its own on, and nothing before itself."""
    memory, hidden, embedded = layer(), draws(1, 2, 13, D), draws(2, 2, 13, D)
    before = memory(hidden, embedded)
    for s in range(13):
        for changed in (0, 1):
            pair = [hidden.clone(), embedded.clone()]
            pair[changed][:, s:] += draws(3, 2, 13 - s, D)
            after = memory(*pair)
            assert torch.equal(after[:, :s], before[:, :s])
            end = (s // C + 1) * C
            if end < 13:  # the token is in a complete chunk that someone reads
                assert (after[:, end:, D : 2 * D] != before[:, end:, D : 2 * D]).any(dim=-1).all()


def test_starts_as_the_model_with_an_eighth_of_uniform() -> None:
    """Initial weights .88 and .12, and an empty memory predicts the uniform distribution."""
    memory = TestTimeMemory(CONFIG).double()
    hidden, embedding = draws(1, 2, 2 * C, D), draws(4, V, D)
    joined = memory(hidden, draws(2, 2, 2 * C, D))
    probabilities = memory.unembed(joined, embedding).exp()
    expected = 0.88 * (hidden @ embedding.T).softmax(-1) + 0.12 / V
    torch.testing.assert_close(probabilities[:, :C], expected[:, :C])
    assert (probabilities[:, C:] - expected[:, C:]).abs().max() > 1e-3
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2 * C).double())


def test_recognises_a_pair_it_has_read() -> None:
    """Untrained: after the state before a token comes again, the memory's first guess is that token."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, d_model=64, test_time_memory=TestTimeMemoryConfig(enabled=True, chunk=8, key_width=32)
    )
    memory, embedding = TestTimeMemory(config).double(), draws(4, 100, 64)
    tokens = torch.randperm(100, generator=torch.Generator().manual_seed(5))[:9].repeat(2)[None]  # nine tokens, twice
    states = draws(6, 100, 64)[tokens]
    read = memory(states, embedding[tokens])[..., 64:128]
    guesses = (read @ embedding.T).argmax(-1)[0]
    assert guesses[9:16].tolist() == tokens[0, 10:17].tolist()


def test_stays_bounded_on_one_pair_without_end() -> None:
    """Equal keys are the worst case: steps that add up would overshoot, steps in turn never do."""
    memory = TestTimeMemory(CONFIG).double()
    memory.gates.bias.data.fill_(50.0)  # steps of 1, no forgetting
    hidden, embedded = draws(1, 1, 1, D).expand(1, 400, D), draws(2, 1, 1, D).expand(1, 400, D)
    read = memory(hidden, embedded)[..., D : 2 * D]
    value = embedded[0, 0] / embedded[0, 0].square().mean().sqrt()
    torch.testing.assert_close(read[0, C:], value.expand(400 - C, D), rtol=1e-5, atol=0)
    loud = memory(1e6 * draws(1, 1, 400, D), 1e6 * draws(2, 1, 400, D))[..., D:]
    assert loud.isfinite().all()
    assert loud[..., :D].abs().max() < 1e3


def test_every_parameter_learns() -> None:
    """Through the updates too; after one step, because the router's first layer and Wo start behind zeros."""
    memory, hidden, embedded = TestTimeMemory(CONFIG).double(), draws(1, 2, 13, D), draws(2, 2, 13, D)
    optimizer = torch.optim.SGD(memory.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.nll_loss(
            memory.unembed(memory(hidden, embedded), draws(4, V, D)).flatten(0, 1), torch.arange(26) % V
        ).backward()
        optimizer.step()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_gradients_are_those_of_finite_differences() -> None:
    memory, embedding = layer(), draws(4, V, D)
    hidden, embedded = draws(1, 1, 9, D).requires_grad_(), draws(2, 1, 9, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, e: memory.unembed(memory(h, e), embedding).sum(-1), (hidden, embedded))


def test_runs_on_fake_tensors_in_bfloat16_and_compiled() -> None:
    """The planner's, the card's and the compiler's way of running it."""
    hidden, embedded, embedding = draws(1, 2, 13, D).float(), draws(2, 2, 13, D).float(), draws(4, V, D).float()
    memory = layer().float()
    exact = memory.unembed(memory(hidden, embedded), embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = memory.unembed(memory(hidden, embedded), embedding)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    torch._dynamo.reset()
    run = torch.compile(lambda h, e: memory.unembed(memory(h, e), embedding), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(hidden, embedded), exact)
    with FakeTensorMode():
        planned = TestTimeMemory(CONFIG)
        joined = planned(torch.empty(2, 13, D), torch.empty(2, 13, D))
        planned.unembed(joined, torch.empty(V, D)).sum().backward()
        assert joined.shape == (2, 13, 2 * D + 2)


class Bigrams(nn.Module):
    """The smallest model that a memory can help: the state is a function of the last token alone."""

    def __init__(self, *, remembers: bool) -> None:
        super().__init__()
        d = 24
        self.embedding = nn.Embedding(16, d)
        self.inner = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        memory = TestTimeMemoryConfig(enabled=True, chunk=4, key_width=16, router_hidden=16)
        self.memory = TestTimeMemory(dataclasses.replace(CONFIG, d_model=d, test_time_memory=memory))
        self.remembers = remembers

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross-entropy [B, T - 1] at every token but the first."""
        embedded = self.embedding(tokens)
        hidden = self.norm(embedded + self.inner(embedded))
        if self.remembers:
            scores = self.memory.unembed(self.memory(hidden, embedded), self.embedding.weight)
        else:
            scores = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(scores[:, :-1].mT, tokens[:, 1:], reduction="none")


def test_learns_to_copy_random_sequences() -> None:
    """Twelve random distinct tokens out of 16, twice over: the second time can be known from the first alone.

    Without a memory nothing is better than ln 15; with one the copy is nearly certain, and the first time does not
    get worse.
    """

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, 16, generator=generator).argsort(dim=1)[:, :12].repeat(1, 2)

    losses = {}
    for remembers in (False, True):
        torch.manual_seed(0)
        draw, model = torch.Generator().manual_seed(1), Bigrams(remembers=remembers)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            model.loss(sample(32, draw)).mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses[remembers] = model.loss(sample(512, draw)).mean(dim=0)
    # Loss i is that of token i + 1. The copy of token j is at 12 + j; its pair is read from the chunk after j on.
    first, copied = slice(0, 11), slice(12, 22)
    assert losses[False][copied].mean() > 0.97 * math.log(15)
    assert losses[True][copied].mean() < 0.1 * math.log(15)
    assert losses[True][first].mean() < losses[False][first].mean() + 0.1
