"""Models of transformers keep the promises of every language model here."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hrs.errors import HRSError
from hrs.evaluation import audit
from hrs.generation import Sampling, generate
from hrs.models.pretrained import PretrainedModel, is_pretrained, load_pretrained

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
KINDS = ("gpt2", "llama", "qwen2", "gemma2", "gpt_neox", "mistral", "phi", "opt")


def small(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=KINDS)
def inner(request: pytest.FixtureRequest) -> PreTrainedModel:
    return small(request.param)


def test_logits_are_the_models_own(inner: PreTrainedModel) -> None:
    model, tokens = PretrainedModel(inner), torch.randint(97, (2, 9))
    with torch.no_grad():
        expected = inner(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected)
        output = model.encode(tokens)
        assert output.hidden[..., : model.d_model].shape == (2, 9, 32)
        if (head := model.unembedding()) is not None:
            logits = output.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
            torch.testing.assert_close(logits, expected)


def test_decoding_gives_what_the_whole_pass_gives(inner: PreTrainedModel) -> None:
    model, tokens = PretrainedModel(inner.double()), torch.randint(97, (2, 9))
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [model.decode(part, cache).logits for part in tokens.split([4, 1, 3, 1], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens).logits)
    with pytest.raises(ValueError, match="exceed the context of 64"):
        model.decode(torch.zeros(2, 60, dtype=torch.int64), cache)


def test_texts_grow_beyond_the_context() -> None:
    model = PretrainedModel(small("gpt2")).eval()
    steps = list(generate(model, [[1, 2, 3]], Sampling(temperature=0, max_new_tokens=80)))
    assert len(steps) == 80


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_audit_clears_causal_models(kind: str) -> None:
    report = audit(PretrainedModel(small(kind)).eval())
    assert report.causal, report


class Ahead(nn.Module):
    """Attention that reads a little of the next token."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> object:
        return self.attention(hidden_states=hidden_states + 1e-6 * hidden_states.roll(-1, 1), **kwargs)


def test_the_audit_catches_one_that_sees_ahead() -> None:
    inner = small("llama")
    inner.model.layers[1].self_attn = Ahead(inner.model.layers[1].self_attn)
    assert not audit(PretrainedModel(inner).eval()).causal


def test_a_folder_is_opened_without_a_hub(tmp_path: Path) -> None:
    assert not is_pretrained(tmp_path)
    inner = small("gpt2")
    inner.save_pretrained(tmp_path)
    assert is_pretrained(tmp_path)
    tokens = torch.randint(97, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(tmp_path)(tokens).logits, inner(tokens).logits)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"cut off")
    with pytest.raises(HRSError, match=r"cannot be opened by transformers .* is it complete\?"):
        load_pretrained(tmp_path)


def test_encoder_decoders_are_refused() -> None:
    config = transformers.T5Config(vocab_size=97, d_model=32, num_layers=1, num_heads=2, d_kv=8, d_ff=32)
    with pytest.raises(HRSError, match="is not a decoder-only language model"):
        PretrainedModel(transformers.T5ForConditionalGeneration(config))
