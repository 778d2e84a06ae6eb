"""The HRS language model: any composition of routed tiers, product-key experts, engrams and auxiliary heads."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.models.base import Cache, LanguageModel, ModelOutput, Unembedding, WindowContext
from hrs.models.hrs_cache import HRSCache, HRSSlots
from hrs.nn.attention import Attention
from hrs.nn.block import Block, BlockCache, BlockStatistics
from hrs.nn.cache import SlotTable
from hrs.nn.cpu_step import CpuStep
from hrs.nn.cross_attention import CrossAttention
from hrs.nn.dropout import Dropout
from hrs.nn.eager import on_eager_cpu
from hrs.nn.engrams import EngramMechanism, build_engrams
from hrs.nn.feedforward import FeedForward
from hrs.nn.locality import LocalityHead
from hrs.nn.objectives import AuxiliaryObjectives
from hrs.nn.products import linear, product
from hrs.nn.router import Router, routing_losses, routing_statistics
from hrs.nn.test_time_memory import TestTimeMemory

_ROLES = (
    ("locality.", "locality_head"),
    ("engram.", "engram"),
    ("objectives.category.", "engram"),
    ("test_time_memory.", "test_time_memory"),
    ("objectives.scales.", "loss_scales"),
    (".cross.", "engram"),
    (".synapse.", "expert"),
    (".router.", "router"),
    (".tiers.conv.", "conv"),
    (".tiers.expert.", "expert"),
    (".tiers.peer.", "expert"),
    (".peer", "expert"),
    (".tiers.attention.", "attention_tier"),
    (".tiers.sink.", "sink"),
)
"""Part of a parameter's name, and the group it belongs to; all others are the backbone."""

_OBSERVED_LOGITS = 2**24
"""Logits held at once when losses are only looked at."""


class HRSModel(LanguageModel):
    """Pre-norm transformer with tied embeddings; what else it has, the config alone decides."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        engram = config.engram
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        self.d_model = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.attention.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        self.dropout = Dropout(config.dropout)
        self.engram = build_engrams(config)
        self.takes_memory = engram.kind == "retrieved"
        self.memory_slots = engram.slots if self.takes_memory else 0
        # Slots are the same for every text, or come from outside.
        self.summarises = engram.kind not in ("none", "memory", "retrieved")
        self.history_tokens = 0 if self.engram is None else self.engram.history_tokens
        n_engrams = (config.max_seq_len + self.history_tokens) // engram.window * engram.per_window
        # One position past the last token: there a dropped engram is out of every token's sight.
        n_positions = config.max_seq_len + (n_engrams if engram.kind == "prefix" else 1)
        reading = engram.extraction_block(config.n_layers) + 1 if engram.kind in ("window", "recurrence") else math.inf
        self.blocks = nn.ModuleList(
            Block(config, index, n_positions=n_positions, n_memory=n_engrams if index >= reading else 0)
            for index in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.locality = LocalityHead(config.locality, config.d_model) if config.locality.enabled else None
        self.objectives = AuxiliaryObjectives(config)
        self.n_categories = config.category.n_classes if config.category.enabled else 0
        self.test_time_memory = TestTimeMemory(config) if config.test_time_memory.enabled else None
        # What runs the whole text for every token keeps nothing that rows of different lengths could share a step of.
        self.batches_ragged = self.engram is None or not self.engram.decodes_by_rerunning
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
        for module in self.modules():
            if isinstance(module, EngramMechanism | CrossAttention | TestTimeMemory):
                module.initialise()

    # ---- forward and decode: one path ----------------------------------------------------------------------------

    @property
    def input_embedding(self) -> nn.Module:
        return self.embedding

    def unembed(self, hidden: Tensor) -> Tensor:
        if self.test_time_memory is not None:
            return self.test_time_memory.unembed(hidden, self.embedding.weight)
        return linear(hidden, self.embedding.weight)

    def unembedding(self) -> Unembedding | None:
        return Unembedding(self.embedding.weight) if self.test_time_memory is None else None

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        recalled = None if context is None else self._recall(context.history)
        output = self._run(tokens, None, recalled, None if context is None else context.memory)
        pooled = output.hidden[..., : self.d_model].mean(dim=1)
        output.category_logits = self.objectives.category_logits(pooled)
        if self.training:
            category = None if context is None else context.category
            output.losses = self.objectives.losses(output.losses, pooled, output.category_logits, category)
            if self.engram is not None and self.engram.wants_losses:
                self._observe_losses(self.engram, output.hidden, tokens)
        return output

    def new_cache(self, batch_size: int, history: Tensor | None = None, memory: Tensor | None = None) -> HRSCache:
        with torch.no_grad():
            recalled = self._recall(history)
        return HRSCache(
            batch_size,
            self._block_caches(),
            engram=None if self.engram is None else self.engram.new_cache(),
            recalled=recalled,
            memory=memory,
        )

    def new_slots(self, n: int) -> HRSSlots:
        if not self.batches_ragged:
            return super().new_slots(n)  # type: ignore[return-value]
        table = SlotTable(n)
        blocks = [cache.slots(table) for cache in self._block_caches()]
        plain = self.engram is None and self.test_time_memory is None
        modules: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        covered = plain and all(CpuStep.covers(block) for block in modules)
        return HRSSlots(
            table,
            blocks,
            engram=None if self.engram is None else self.engram.new_slots(table),
            test_time=None if self.test_time_memory is None else self.test_time_memory.new_slots(table),
            cpu_step=CpuStep(modules, blocks, table) if covered else None,
        )

    def _block_caches(self) -> list[BlockCache]:
        """An empty cache for each block; those that read engrams as keys have room for them."""
        memory = None if self.engram is None else self.engram.memory_positions()
        return [
            block.new_cache(memory if self.engram is not None and index > self.engram.extract_after else None)  # type: ignore[operator]
            for index, block in enumerate(self.blocks)
        ]

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        """See :meth:`LanguageModel.decode`.

        With engrams that show the future every call runs the whole text so far: nothing can be kept of a model whose
        early states change with each later window. Its results then differ from :meth:`forward`, which saw more.
        """
        if self.training:
            raise ValueError("decode works in evaluation mode only: call model.eval() first")
        if isinstance(cache, HRSSlots):
            return self._step(tokens, cache)
        if not isinstance(cache, HRSCache) or tokens.shape[0] != cache.batch_size:
            raise ValueError(f"decode needs a cache from new_cache({tokens.shape[0]}), the batch size of these tokens")
        n_new = tokens.shape[1]
        if self.engram is not None and self.engram.decodes_by_rerunning:
            tokens = tokens if cache.tokens is None else torch.cat((cache.tokens, tokens), dim=1)
            output = self._run(tokens, None, cache.recalled, cache.memory)
            output.hidden = output.hidden[:, -n_new:]
            cache.tokens = tokens
        else:
            output = self._run(tokens, cache, cache.recalled, cache.memory)
        cache.advance(n_new)
        output.logits = self.unembed(output.hidden)
        return output

    def _step(self, tokens: Tensor, slots: HRSSlots) -> ModelOutput:
        """One token [n, 1] for each slot."""
        if max(slots.lengths, default=0) == self.max_seq_len:
            raise ValueError(f"{self.max_seq_len + 1} tokens exceed max_seq_len {self.max_seq_len}")
        eager = not slots.staged and on_eager_cpu(tokens) and not torch.is_autocast_enabled("cpu")
        if slots.cpu_step is not None and eager:
            with torch.inference_mode():
                return self._cpu_step(tokens, slots, slots.cpu_step)
        output = self._run(tokens, slots, None, slots.memory)
        slots.table.advance()
        hidden = output.hidden.squeeze(1)
        plain = self.test_time_memory is None
        logits = F.linear(hidden, slots.table.matrix(self.embedding.weight)) if plain else self.unembed(hidden)
        output.logits = logits.unsqueeze(1)
        return output

    def _cpu_step(self, tokens: Tensor, slots: HRSSlots, blocks: CpuStep) -> ModelOutput:
        """:meth:`_step` of models whose blocks :class:`CpuStep` covers."""
        x = self._embed(tokens, slots.begin(len(tokens), tokens.device)).squeeze(1)  # [n, d]
        hidden = self.norm(blocks(x))
        logits = product(hidden, slots.table.matrix(self.embedding.weight).t())
        slots.table.advance()
        return ModelOutput(hidden=hidden.unsqueeze(1), logits=logits.unsqueeze(1))

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        # For inference in half precision embeddings are halved and norms are not: the residual stream is of their type.
        x = self.embedding(tokens).to(self.norm.weight.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        return self.dropout(x)

    def _recall(self, history: Tensor | None) -> Tensor | None:
        """What the engrams keep of the text [B, history_tokens] in front of a window, ids of -1 for none.

        No gradient enters the blocks that read it (as in Transformer-XL, Dai et al. 2019), only the engrams' encoder.
        Every window is read on its own, as if a text began with it: so places without text have no say in it.
        """
        if history is None or self.engram is None or not self.history_tokens:
            return None
        with torch.no_grad():
            windows = history.clamp_min(0).view(-1, self.config.engram.window)  # [B H, window]
            positions = torch.arange(windows.shape[1], device=history.device)
            x = self._embed(windows, positions)
            for block in self.blocks[: self.engram.extract_after + 1]:
                x, _ = block(x, positions)
        return self.engram.recall(x.view(*history.shape, self.d_model), history >= 0)

    def _run(
        self,
        tokens: Tensor,
        cache: HRSCache | HRSSlots | None,
        recalled: Tensor | None,
        memory: Tensor | None = None,
    ) -> ModelOutput:
        n = tokens.shape[1]
        if isinstance(cache, HRSSlots):
            positions = cache.begin(len(tokens), tokens.device)
        else:
            start = 0 if cache is None else cache.length
            if start + n > self.max_seq_len:
                raise ValueError(f"{start + n} tokens exceed max_seq_len {self.max_seq_len}")
            positions = torch.arange(start, start + n, device=tokens.device)
        x = self._embed(tokens, positions)
        engram = self.engram
        state = None
        if engram is not None:
            state = engram.start(positions, None if cache is None else cache.engram, recalled)
            if memory is not None:
                engram.offer(memory.to(x.dtype), state)
        statistics: list[BlockStatistics] = []
        locality: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            block_cache = None if cache is None else cache.blocks[index]
            if engram is None or state is None:
                x, told = block(x, positions, None, block_cache)
            else:
                x, block_positions, inputs = engram.enter(index, x, state)
                x, told = block(x, block_positions, inputs, block_cache)
                x = engram.leave(index, x, state)
            statistics.append(told)
            if self.training and self.locality is not None:
                locality.append(self.locality(x))
        losses = {} if state is None else dict(state.losses)
        if locality:
            losses["locality"] = self.config.locality.weight * torch.stack(locality).mean()
        metrics = self._statistics(statistics, losses) if cache is None else {}
        hidden = self.norm(x)
        if self.test_time_memory is not None:
            if isinstance(cache, HRSCache) and cache.test_time is None:
                cache.test_time = self.test_time_memory.new_cache(hidden)
            hidden = self.test_time_memory(hidden, self.embedding(tokens), None if cache is None else cache.test_time)
        return ModelOutput(hidden=hidden, losses=losses if self.training else {}, metrics=metrics)

    def _statistics(self, statistics: list[BlockStatistics], losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics of what the blocks told; adds the router's losses to ``losses``."""
        metrics: dict[str, Tensor] = {}
        if routings := [s.routing for s in statistics if s.routing is not None]:
            shares, entropies = routing_statistics(routings)
            metrics = {"tier_share": shares.detach(), "routing_entropy": entropies.detach()}
            losses |= routing_losses(shares, entropies, self.config.router, self.config.tiers.names)
        if usage := [s.expert_usage for s in statistics if s.expert_usage is not None]:
            metrics["expert_usage"] = torch.stack(usage)
        return metrics

    @contextmanager
    def reading_others(self) -> Iterator[None]:
        if self.engram is None:
            yield
            return
        self.engram.from_others = True
        try:
            yield
        finally:
            self.engram.from_others = False

    def project(self, states: Tensor) -> Tensor | None:
        return None if self.locality is None else self.locality.projection(states)

    # ---- training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _observe_losses(self, engram: EngramMechanism, hidden: Tensor, tokens: Tensor) -> None:
        """Tell the engrams what each position cost; the last one's target is not in the window."""
        size = max(1, _OBSERVED_LOGITS // (len(tokens) * self.vocab_size))
        losses = [
            F.cross_entropy(self.unembed(states).float().transpose(1, 2), ids, reduction="none").mean(dim=0)
            for states, ids in zip(hidden[:, :-1].split(size, 1), tokens[:, 1:].split(size, 1), strict=True)
        ]
        engram.observe_loss(torch.cat(losses))

    def set_progress(self, fraction: float) -> None:
        for module in self.modules():
            if isinstance(module, Router):
                module.set_progress(fraction)
        if self.engram is not None:
            self.engram.set_progress(fraction)

    def keep_observations(self) -> None:
        if self.engram is not None:
            self.engram.keep_observations()

    def drop_observations(self) -> None:
        if self.engram is not None:
            self.engram.drop_observations()

    def drop_observations_unless(self, taken: Tensor) -> None:
        if self.engram is not None:
            self.engram.drop_observations_unless(taken)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            role = next((role for part, role in _ROLES if part in name), "backbone")
            groups.setdefault(role, []).append(parameter)
        return groups
