"""The running summary: a slow reference, a start that changes nothing, causality, decoding."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hrs.config import EngramConfig, ModelConfig
from hrs.errors import HRSError
from hrs.models.hrs import HRSModel
from hrs.nn.engrams.running import RunningEngrams

D, T = 8, 12
CONFIG = ModelConfig(
    vocab_size=13,
    n_layers=4,
    n_heads=2,
    d_model=D,
    d_ff=16,
    max_seq_len=T,
    dropout=0.0,
    engram=EngramConfig(kind="running", extract_after=1, dropout=0.0, recon_weight=0.5),
)


def model(*, opened: bool = True, **changes: object) -> HRSModel:
    torch.manual_seed(0)
    built = HRSModel(dataclasses.replace(CONFIG, **changes)).double().eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)  # effects far above rounding
    if not opened:
        for gate in built.engram.gates:
            gate.data.zero_()
    return built


def text(batch: int = 2) -> Tensor:
    return torch.randint(13, (batch, T), generator=torch.Generator().manual_seed(1))


def test_equals_slow_reference() -> None:
    """Token t's engram is LN(W2 GELU(W1 mean_{s <= t} x_s + b1) + b2); block i adds gate_i times it."""
    layer = model().engram
    assert isinstance(layer, RunningEngrams)
    x, later = torch.randn(2, 2, T, D, dtype=torch.float64)
    state = layer.start(torch.arange(T), None)
    assert torch.equal(layer.enter(0, x, state)[0], x)
    assert torch.equal(layer.leave(1, x, state), x)
    distances = []
    for b in range(2):
        for t in range(T):
            mean = sum(x[b, s] for s in range(t + 1)) / (t + 1)
            engram = layer.encoder.norm(layer.encoder.output(F.gelu(layer.encoder.hidden(mean))))
            distances.append(1 - mean @ engram / (mean.norm() * engram.norm()))
            for index in (2, 3):
                expected = later[b, t] + layer.gates[index - 2] * engram
                actual = layer.enter(index, later, state)[0][b, t]
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.losses["recon"], 0.5 * torch.stack(distances).mean(), rtol=1e-12, atol=1e-12)


def test_starts_as_the_model_without_engrams() -> None:
    """Exactly; the gates get a gradient at once, the encoder as soon as they are open."""
    torch.manual_seed(0)
    fresh = HRSModel(CONFIG).double()
    plain = HRSModel(dataclasses.replace(CONFIG, engram=EngramConfig())).double()
    plain.load_state_dict({k: v for k, v in fresh.state_dict().items() if not k.startswith("engram.")})
    assert torch.equal(fresh(text()).logits, plain(text()).logits)
    for opened in (False, True):
        trained = model(opened=opened).train()
        F.cross_entropy(trained(text()).logits.flatten(0, 1), text().flatten()).backward()
        assert all(gate.grad.abs().sum() > 0 for gate in trained.engram.gates)
        assert (trained.engram.encoder.hidden.weight.grad.abs().sum() > 0) == opened


@pytest.mark.parametrize("conv_blocks", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_earlier_logits_ignore_later_tokens_exactly(conv_blocks: int, dtype: torch.dtype) -> None:
    """Cumulative sums run in order: nothing that comes later can change how an earlier one is rounded."""
    built = model(conv_blocks=conv_blocks).to(dtype)
    before = built(text()).logits
    for cut in range(1, T):
        changed = text()
        changed[:, cut:] = (changed[:, cut:] + 1) % 13
        after = built(changed).logits
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert (after[:, cut:] != before[:, cut:]).any(-1).all()


def test_every_token_reads_all_before_it() -> None:
    """With attention and convolution out of the way, the first token still reaches the last through the mean."""
    built = model(conv_blocks=2)
    for block in built.blocks:
        mixer = block.attention.output if block.attention is not None else block.conv.norm
        torch.nn.init.zeros_(mixer.weight)
        if block.conv is not None:
            torch.nn.init.zeros_(mixer.bias)
    changed = text()
    changed[:, 0] = (changed[:, 0] + 1) % 13
    assert (built(changed).logits != built(text()).logits).any(-1).all()


@pytest.mark.parametrize("sizes", [(1,) * T, (5, 1, 6), (T - 1, 1)])
@pytest.mark.parametrize("conv_blocks", [0, 2])
def test_decoding_equals_forward(sizes: tuple[int, ...], conv_blocks: int) -> None:
    built = model(conv_blocks=conv_blocks)
    cache = built.new_cache(2)
    pieces = [built.decode(piece, cache).logits for piece in text().split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), built(text()).logits, rtol=1e-10, atol=1e-10)


def test_dropout_takes_the_engrams_away() -> None:
    engram = dataclasses.replace(CONFIG.engram, dropout=1.0)
    dropping, closed = model(engram=engram).train(), model(opened=False)
    output = dropping(text())
    # Training and evaluation sum in another order: float64 leaves 1e-13, engrams move logits by more than 1e-6.
    torch.testing.assert_close(output.logits, closed(text()).logits, rtol=0, atol=1e-12)
    assert output.losses["recon"] == 0
    assert not torch.allclose(dropping.eval()(text()).logits, output.logits, rtol=0, atol=1e-6)


def test_parameters() -> None:
    """Encoder d -> 2d -> d with biases and a norm, and a vector for each of two blocks."""
    with torch.device("meta"):
        layer = RunningEngrams(dataclasses.replace(CONFIG, d_model=512, n_heads=8))
    assert sum(p.numel() for p in layer.parameters()) == 2 * 512 * 1024 + 1024 + 512 + 2 * 512 + 2 * 512


def test_there_is_no_original() -> None:
    with pytest.raises(HRSError, match="as_original"):
        RunningEngrams(dataclasses.replace(CONFIG, engram=dataclasses.replace(CONFIG.engram, as_original=True)))
