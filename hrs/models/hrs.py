"""The HRS language model: any composition of locality head, routed tiers and engrams on one transformer."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.errors import HRSError
from hrs.models.base import Cache, LanguageModel, ModelOutput
from hrs.nn.attention import Attention
from hrs.nn.block import Block, BlockCache
from hrs.nn.engram import EngramCache, Engrams
from hrs.nn.feedforward import FeedForward
from hrs.nn.locality import LocalityHead
from hrs.nn.router import Router, routing_losses, routing_statistics

_ROLES = (
    ("locality.", "locality_head"),
    ("engram.", "engram"),
    (".router.", "router"),
    (".tiers.conv.", "conv"),
    (".tiers.expert.", "expert"),
    (".tiers.attention.", "attention_tier"),
    (".tiers.sink.", "sink"),
)
"""Part of a parameter's name, and the group it belongs to; all others are the backbone."""


@dataclass
class HRSCache(Cache):
    """State of incremental decoding."""

    batch_size: int
    blocks: list[BlockCache]
    engram: EngramCache = field(default_factory=EngramCache)
    tokens: Tensor | None = None
    """Token ids so far, kept only for ``prefix`` engrams, which must be made anew from the whole text."""


class HRSModel(LanguageModel):
    """Pre-norm transformer with rotary attention and tied embeddings; what else it has, the config alone decides.

    Raises:
        HRSError: for a combination of fields that cannot be built.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        engram = config.engram
        if engram.kind == "prefix" and engram.dropout > 0:
            raise HRSError(
                "engram.dropout needs engram.kind=window: prepended engrams move every token, "
                "so they cannot be dropped for one micro-batch; set model.engram.dropout=0"
            )
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        n_engrams = config.max_seq_len // engram.window * engram.per_window
        # One position past the last token: there a dropped engram is out of every token's sight.
        n_positions = config.max_seq_len + (n_engrams if engram.kind == "prefix" else 1)
        self.blocks = nn.ModuleList(
            Block(
                config,
                n_positions=n_positions,
                n_memory=n_engrams if engram.kind == "window" and index > engram.extract_after else 0,
            )
            for index in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.engram = Engrams(engram, config.d_model) if engram.kind != "none" else None
        self.locality = LocalityHead(config.locality, config.d_model) if config.locality.enabled else None
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Linear and Embedding N(0, 0.02), biases 0; projections into the residual stream N(0, 0.02 / sqrt(2 L)).

        Convolutions, gates and scales keep the initial values their layers gave them.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                nn.init.normal_(module.output.weight, std=0.02 / math.sqrt(2 * self.config.n_layers))
        if self.engram is not None:
            nn.init.normal_(self.engram.type_embedding, std=0.02)

    # ---- forward and decode: one path ----------------------------------------------------------------------------

    @property
    def input_embedding(self) -> nn.Module:
        return self.embedding

    def unembed(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight)

    def encode(self, tokens: Tensor) -> ModelOutput:
        return self._run(tokens, None)

    def new_cache(self, batch_size: int) -> HRSCache:
        return HRSCache(batch_size, [block.new_cache() for block in self.blocks])  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        """See :meth:`LanguageModel.decode`.

        With ``prefix`` engrams every call runs the whole text so far: nothing can be kept of a model whose early
        states change with each later window. Its results then differ from :meth:`forward`, which saw the future.
        """
        if not isinstance(cache, HRSCache) or tokens.shape[0] != cache.batch_size:
            raise ValueError(f"decode needs a cache from new_cache({tokens.shape[0]}), the batch size of these tokens")
        if self.training:
            raise ValueError("decode works in evaluation mode only: call model.eval() first")
        n_new = tokens.shape[1]
        if self.config.engram.kind == "prefix":
            tokens = tokens if cache.tokens is None else torch.cat((cache.tokens, tokens), dim=1)
            output = self._run(tokens, None)
            output.hidden = output.hidden[:, -n_new:]
            cache.tokens = tokens
        else:
            output = self._run(tokens, cache)
        cache.length += n_new
        output.logits = self.unembed(output.hidden)
        return output

    def _run(self, tokens: Tensor, cache: HRSCache | None) -> ModelOutput:
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.max_seq_len:
            raise ValueError(f"{end} tokens exceed max_seq_len {self.max_seq_len}")
        positions = torch.arange(start, end, device=tokens.device)
        x = self.dropout(self.embedding(tokens))
        engrams: Tensor | None = None
        engram_positions: Tensor | None = None
        routings: list[Tensor] = []
        locality: list[Tensor] = []
        losses: dict[str, Tensor] = {}
        for index, block in enumerate(self.blocks):
            block_cache = None if cache is None else cache.blocks[index]
            if self.config.engram.kind == "prefix" and engrams is not None:
                x, routing = self._run_prefixed(block, x, engrams)
            else:
                x, routing = block(x, positions, engrams, engram_positions, block_cache)
            if routing is not None:
                routings.append(routing)
            if self.training and self.locality is not None:
                locality.append(self.locality(x))
            if self.engram is not None and index == self.config.engram.extract_after:
                engrams, engram_positions, losses["recon"] = self._extract(self.engram, x, cache)
        metrics: dict[str, Tensor] = {}
        if locality:
            losses["locality"] = self.config.locality.weight * torch.stack(locality).mean()
        if routings and cache is None:
            shares, entropies = routing_statistics(routings)
            metrics = {"tier_share": shares.detach(), "routing_entropy": entropies.detach()}
            losses |= routing_losses(shares, entropies, self.config.router, self.config.tiers.names)
        return ModelOutput(hidden=self.norm(x), losses=losses if self.training else {}, metrics=metrics)

    def _extract(self, engram: Engrams, hidden: Tensor, cache: HRSCache | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Engrams [B, E, d] of the windows now complete (None if there are none), their positions [E], and the loss."""
        engrams, ends, reconstruction = engram(hidden, None if cache is None else cache.engram)
        if self.training and self.config.engram.dropout > 0:
            # Drawn and applied on the device, in shapes that do not depend on it.
            dropped = torch.rand((), device=hidden.device) < self.config.engram.dropout
            ends = ends.masked_fill(dropped, self.max_seq_len)
            reconstruction = reconstruction.masked_fill(dropped, 0.0)
        return (engrams if engrams.shape[1] > 0 else None), ends, self.config.engram.recon_weight * reconstruction

    @staticmethod
    def _run_prefixed(block: nn.Module, x: Tensor, engrams: Tensor) -> tuple[Tensor, Tensor | None]:
        """The block on [engrams; tokens] in ordinary causal order, and the tokens' part of its output."""
        n_engrams = engrams.shape[1]
        joined = torch.cat((engrams, x), dim=1)
        output, routing = block(joined, torch.arange(joined.shape[1], device=x.device))
        return output[:, n_engrams:], routing

    # ---- training ------------------------------------------------------------------------------------------------

    def set_progress(self, fraction: float) -> None:
        for module in self.modules():
            if isinstance(module, Router):
                module.set_progress(fraction)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            role = next((role for part, role in _ROLES if part in name), "backbone")
            groups.setdefault(role, []).append(parameter)
        return groups
