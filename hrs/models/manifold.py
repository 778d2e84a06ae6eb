"""The manifold-guided network without the leak: hops of routing and attention over a frozen geometry of tokens.

After pull request 663 of openai/parameter-golf, rebuilt. Every set of allowed tokens is boolean and applied last, rows
without an earlier token receive nothing, the weight of the past falls with its distance, states are really transported,
and all branches are pre-norm around one residual stream, which carries the first state to the end by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ManifoldConfig, ModelConfig
from hrs.errors import HRSError
from hrs.models.base import Cache, LanguageModel, ModelOutput, Unembedding, WindowContext
from hrs.models.geometry import TokenGeometry
from hrs.nn.cache import TailCache
from hrs.nn.dropout import Dropout
from hrs.nn.manifold import Hop, HopCache, HopStatistics, SharedLayers, WindowReader, per_token
from hrs.nn.manifold.context import context_velocity, wide
from hrs.nn.manifold.hop_cell import HopCell
from hrs.nn.manifold.mixer import SpectralMixer
from hrs.nn.products import Linear

_HOPS = ("blocks.", "shared.")
"""Beginnings of the names of parameters in the group of that name; all others are the backbone."""
_SEED = 0
_SMALL = 0.02


@dataclass
class ManifoldCache(Cache):
    """State of incremental decoding."""

    batch_size: int
    tokens: TailCache
    """[B, S] ids; what hops read of the tokens alone is made anew from them."""
    hops: list[HopCache]


class ManifoldModel(LanguageModel):
    """Embedding of a token and its coordinates, hops, a norm, and an output layer of its own with a soft cap.

    The coordinates are read as given, divided by their root mean square: they have no unit.

    Args:
        config: vocab_size, n_layers (hops), n_heads, d_model, max_seq_len, dropout, rope_base and manifold are read.
        geometry: None puts one drawn from a fixed seed in its place, for counting, tracing, and weights loaded
            afterwards. It has no part in the other weights: they are drawn from the global generator alike.

    Raises:
        HRSError: if the geometry has other sizes than the config.
    """

    coordinates: Tensor
    coordinate_scale: Tensor
    neighbours: Tensor

    def __init__(self, config: ModelConfig, geometry: TokenGeometry | None = None) -> None:
        super().__init__()
        d, manifold = config.d_model, config.manifold
        n_coordinates = manifold.geometry.n_coordinates
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        self.d_model = d
        self._set_geometry(geometry or _placeholder(config.vocab_size, manifold))
        self.reader = WindowReader(manifold)
        self.coordinate_embedding = nn.Sequential(Linear(n_coordinates, d), nn.GELU(), Linear(d, d), nn.LayerNorm(d))
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.fuse = Linear(2 * d, d)
        self.dropout = Dropout(config.dropout)
        self.shared = SharedLayers(config)
        self.blocks = nn.ModuleList(Hop(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d)
        self.output = Linear(d, config.vocab_size)
        self._initialise()

    def _set_geometry(self, geometry: TokenGeometry) -> None:
        sizes = self.config.manifold.geometry
        for name, tensor, columns in (
            ("coordinates", geometry.coordinates, sizes.n_coordinates),
            ("neighbours", geometry.neighbours, sizes.neighbours),
        ):
            if tensor.shape != (self.vocab_size, columns):
                raise HRSError(
                    f"the geometry has {name} of shape {list(tensor.shape)} and the model needs "
                    f"{[self.vocab_size, columns]}: compute it with this model's manifold.geometry and tokenizer"
                )
        # Copies: loading a checkpoint writes into buffers.
        coordinates = geometry.coordinates.to(torch.get_default_dtype(), copy=True)
        size = coordinates.square().mean().sqrt()
        self.register_buffer("coordinates", coordinates)
        self.register_buffer("coordinate_scale", torch.where(size > 0, size, torch.ones_like(size)))
        self.register_buffer("neighbours", geometry.neighbours.clone())

    @torch.no_grad()
    def _initialise(self) -> None:
        """Orthogonal matrices, drawn anew for each hop, and zero biases, with these exceptions:

        | embedding                                  | N(0, 1), the size of the normalised coordinates beside it |
        | output layer, hop embeddings               | N(0, 0.02)                                                |
        | what a branch adds to the stream           | divided by sqrt(2 n_layers); the mixer's is zero          |
        | gain of the cell (its structure's bias)    | 1                                                         |
        | gates, certainty, maps to coordinates      | zero: half open, and velocities of the tokens alone       |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if module is not self.output:
                    nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.output.weight, std=_SMALL)
        nn.init.zeros_(self.shared.to_coordinates.weight)
        branch = 1 / math.sqrt(2 * self.config.n_layers)
        self.shared.attention.output.weight.mul_(branch)
        for hop in self.hops:
            nn.init.normal_(hop.hop_embedding, std=_SMALL)
            nn.init.zeros_(hop.router.certainty.weight)
            nn.init.zeros_(hop.router.geo_gate.weight)
        for module in self.modules():
            if isinstance(module, HopCell):
                module.output.weight.mul_(branch)
                gain = module.structure[-1].bias
                assert isinstance(gain, Tensor)
                gain[: self.d_model] = 1.0
            elif isinstance(module, SpectralMixer):
                nn.init.zeros_(module.output.weight)
                nn.init.zeros_(module.gate.weight)

    @property
    def hops(self) -> list[Hop]:
        """The blocks, by their type."""
        return [block for block in self.blocks if isinstance(block, Hop)]

    # ---- forward and decode: one path ----------------------------------------------------------------------------

    @property
    def input_embedding(self) -> nn.Module:
        return self.embedding

    def unembed(self, hidden: Tensor) -> Tensor:
        logits, cap = self.output(hidden), self.config.manifold.softcap
        return cap * torch.tanh(wide(logits) / cap) if cap else logits

    def unembedding(self) -> Unembedding:
        return Unembedding(self.output.weight, self.output.bias, self.config.manifold.softcap)

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        return self._run(tokens, None)

    def new_cache(self, batch_size: int, history: Tensor | None = None, memory: Tensor | None = None) -> ManifoldCache:
        capacity = self.max_seq_len
        return ManifoldCache(batch_size, TailCache(capacity), [HopCache(capacity) for _ in self.blocks])

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        if not isinstance(cache, ManifoldCache) or tokens.shape[0] != cache.batch_size:
            raise ValueError(f"decode needs a cache from new_cache({tokens.shape[0]}), the batch size of these tokens")
        if self.training:
            raise ValueError("decode works in evaluation mode only: call model.eval() first")
        output = self._run(tokens, cache)
        cache.length += tokens.shape[1]
        output.logits = self.unembed(output.hidden)
        return output

    def _run(self, tokens: Tensor, cache: ManifoldCache | None) -> ModelOutput:
        n = tokens.shape[1]
        end = n if cache is None else cache.length + n
        if end > self.max_seq_len:
            raise ValueError(f"{end} tokens exceed max_seq_len {self.max_seq_len}")
        text = tokens if cache is None else cache.tokens.extend(tokens)  # [B, S]
        window = self.reader(text, n, self.coordinates / self.coordinate_scale, self.neighbours)
        located = per_token(self.coordinate_embedding, window.coordinates, tokens)
        embedded = self.embedding(tokens)
        # The stream stays in float32 under autocast.
        x = self.dropout(wide(self.fuse(torch.cat((located.to(embedded.dtype), embedded), dim=-1))))
        before, velocity = None, context_velocity(window.directions, window.recency)
        statistics = []
        for index, hop in enumerate(self.blocks):
            memory = None if cache is None else cache.hops[index]
            x, following, told = hop(x, velocity, before, window, self.shared, memory)
            before, velocity = velocity, following
            statistics.append(told)
        metrics = _metrics(statistics, window.coverage) if cache is None else {}
        return ModelOutput(hidden=self.norm(x), metrics=metrics)

    # ---- training ------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """``hops`` (all that routes, mixes and attends, their shared layers included) and ``backbone``."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault("hops" if name.startswith(_HOPS) else "backbone", []).append(parameter)
        return groups


def _metrics(statistics: Sequence[HopStatistics], coverage: Tensor) -> dict[str, Tensor]:
    """Each [n_layers]: of the geodesic route the mean support in tokens, the null slot's weight and the share among the
    routes; how many neighbours have been seen; weights of the geometry in attention."""
    priors = torch.stack([s.prior for s in statistics])  # [n_layers, 2]
    return {
        "geo_support": torch.stack([s.routes.support for s in statistics]),
        "geo_null": torch.stack([s.routes.null for s in statistics]),
        "geo_share": torch.stack([s.routes.share for s in statistics]),
        "neighbour_coverage": coverage.mean().expand(len(statistics)),
        "prior_cosine": priors[:, 0],
        "prior_ahead": priors[:, 1],
    }


def _placeholder(vocab_size: int, config: ManifoldConfig) -> TokenGeometry:
    """Gaussian coordinates, and for every id the same distinct steps to its neighbours; -1 beyond all other ids.

    From a generator of its own, so that a model's weights do not depend on whether it was given a geometry.
    """
    sizes = config.geometry
    shape, known = (vocab_size, sizes.n_coordinates), min(sizes.neighbours, vocab_size - 1)
    if torch.empty(0).device.type == "meta":
        return TokenGeometry(torch.empty(shape), torch.empty(vocab_size, sizes.neighbours, dtype=torch.int64))
    generator = torch.Generator("cpu").manual_seed(_SEED)
    coordinates = torch.randn(shape, generator=generator, device="cpu")
    steps = 1 + torch.randperm(vocab_size - 1, generator=generator, device="cpu")[:known]
    neighbours = (torch.arange(vocab_size, device="cpu")[:, None] + steps) % vocab_size  # [V, known]
    return TokenGeometry(coordinates, F.pad(neighbours, (0, sizes.neighbours - known), value=-1))
