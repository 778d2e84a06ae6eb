"""Causal language models of the transformers library behind :class:`hrs.models.LanguageModel`.

Any model that ``AutoModelForCausalLM.from_pretrained`` opens from a folder: audit, evaluation, generation and serving
then work on it as on models that were trained here. Nothing is downloaded.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hrs.errors import HRSError
from hrs.models.base import Cache, LanguageModel, ModelOutput, Unembedding, WindowContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
"""Where configurations of transformers tell the longest context."""
_CONTEXT = 2048
"""Of models that tell none."""
_PROBE = 5
_ROUNDINGS = 16


class PretrainedModel(LanguageModel):
    """A causal model of transformers.

    Args:
        model: in any mode; it is used, not copied.

    Raises:
        HRSError: if it is not a decoder-only model over token ids.
    """

    computes_in = torch.float32  # norms and rotations of many models, also of float64 weights

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise HRSError(f"{type(model).__name__} is not a decoder-only language model: name a causal one")
        self.inner = model
        self.vocab_size = _rows_and_columns(model.get_output_embeddings())[0]
        self.d_model = _rows_and_columns(model.get_input_embeddings())[1]
        limits = [getattr(config, name, None) for name in _LIMITS]
        self.max_seq_len = next((limit for limit in limits if limit), _CONTEXT)
        self.blocks = _layers(model)
        capped = getattr(config, "final_logit_softcapping", None)  # bends small logits too little to be seen
        self._is_linear = not capped and self._head_is_linear()

    @property
    def input_embedding(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the context of {self.max_seq_len}")
        return ModelOutput(hidden=self._hidden(tokens, use_cache=False))

    def _hidden(self, tokens: Tensor, **arguments: Any) -> Tensor:
        """Return final hidden states [B, T, d], or with a head of its own [B, T, d + V]: the logits stand beside."""
        if self._is_linear:
            return self.inner.base_model(tokens, **arguments).last_hidden_state
        output = self.inner(tokens, output_hidden_states=True, **arguments)
        return torch.cat((output.hidden_states[-1], output.logits), dim=-1)

    def unembed(self, hidden: Tensor) -> Tensor:
        if self._is_linear:
            return self.inner.get_output_embeddings()(hidden)
        return hidden[..., self.d_model :]

    def unembedding(self) -> Unembedding | None:
        if not self._is_linear:
            return None
        head = self.inner.get_output_embeddings()
        return Unembedding(head.weight, getattr(head, "bias", None))

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        """Return whether logits are what the output layer makes of the base model's states, nothing more."""
        self._is_linear = True
        tokens = torch.arange(_PROBE, device=self.inner.device).unsqueeze(0) % self.vocab_size
        with evaluating(self.inner):
            expected = self.inner(tokens, use_cache=False).logits
            try:
                found = self.unembed(self._hidden(tokens, use_cache=False))
            except (AttributeError, TypeError, RuntimeError):
                return False
        if found.shape != expected.shape:
            return False
        return bool((found - expected).abs().max() <= _ROUNDINGS * torch.finfo(found.dtype).eps * expected.abs().max())

    def new_cache(self, batch_size: int, history: Tensor | None = None, memory: Tensor | None = None) -> Cache:
        return _PretrainedCache()

    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        assert isinstance(cache, _PretrainedCache)
        if cache.length + tokens.shape[1] > self.max_seq_len:
            raise ValueError(f"{cache.length + tokens.shape[1]} tokens exceed the context of {self.max_seq_len}")
        output = self.inner(tokens, past_key_values=cache.inner, use_cache=True, output_hidden_states=True)
        cache.inner = output.past_key_values
        cache.length += tokens.shape[1]
        return ModelOutput(hidden=output.hidden_states[-1], logits=output.logits)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": list(self.inner.parameters())}


class _PretrainedCache(Cache):
    """Keys and values as transformers keeps them."""

    def __init__(self) -> None:
        self.inner: Any = None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _rows_and_columns(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return rows, columns


def _layers(model: nn.Module) -> nn.ModuleList:
    """Return the longest list of modules: the layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise HRSError(f"{type(model).__name__} has no list of layers: it cannot be looked into")
    return max(lists, key=len)


def is_pretrained(folder: Path) -> bool:
    """Return whether a folder holds a model of transformers: its configuration and weights."""
    weights = ("*.safetensors", "*.bin", "*.gguf", "*.safetensors.index.json")
    return (folder / CONFIG_FILE).is_file() and any(next(folder.glob(name), None) for name in weights)


def load_pretrained(folder: Path) -> PretrainedModel:
    """Return the model of a folder: float32, on the CPU, in evaluation mode.

    Raises:
        HRSError: if it cannot be opened, or is not a causal model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except Exception as error:  # of the reader of weights, of configurations, of code that comes with the model
        cause = " ".join(str(error).split())[:200]
        raise HRSError(f"the model in {folder} cannot be opened by transformers ({cause}): is it complete?") from error
    return PretrainedModel(model).eval()
