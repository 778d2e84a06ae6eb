"""The manifold-guided network as it was submitted: it sees the future.

Parameter Golf pull request 663 reported 0.434 bits per byte with it. The number is a leak, see
:mod:`hrs.nn.as_built`; the network is kept so that the audit can show where.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import ModelConfig
from hrs.errors import HRSError
from hrs.models.base import Cache, LanguageModel, ModelOutput, Unembedding, WindowContext
from hrs.models.geometry import TokenGeometry
from hrs.nn.as_built import Hop, SharedLayers, read_tokens

_GATE_HIDDEN = 16
_GATE_BIAS = -3.0
_LEAST_GATE = 0.05
_HOP_PARTS = ("blocks.", "shared.", "residual_gate.")
"""Beginnings of names in the group ``hops``; all others are the backbone."""


@dataclass
class AsBuiltCache(Cache):
    """The text so far."""

    batch_size: int
    tokens: Tensor | None = None


class ManifoldModelAsBuilt(LanguageModel):
    """Hops over a frozen geometry of tokens, post-norm, without dropout or a bound of the logits.

    Args:
        config: gives vocab_size, d_model, n_layers (hops), n_heads, max_seq_len and ``manifold``.
        geometry: coordinates and neighbours, kept as buffers; None for random ones, always the same.

    Raises:
        HRSError: if the geometry's shape is not the config's, or has more coordinates than ``d_model``.
    """

    coordinates: Tensor
    neighbours: Tensor

    def __init__(self, config: ModelConfig, geometry: TokenGeometry | None = None) -> None:
        super().__init__()
        d, n = config.d_model, config.manifold.geometry.n_coordinates
        if n > d:
            raise HRSError(
                f"the original network pads {n} coordinates with zeros up to d_model {d}, which is too small: "
                "lower manifold.geometry.modes, directional or syntactic, or raise d_model"
            )
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_seq_len = config.max_seq_len
        self.d_model = d
        geometry = _placeholder(config) if geometry is None else _checked(geometry, config)
        self.register_buffer("coordinates", geometry.coordinates.clone())
        self.register_buffer("neighbours", geometry.neighbours.clone())
        self.coordinate_projection = nn.Sequential(nn.Linear(n, d), nn.GELU(), nn.Linear(d, d), nn.LayerNorm(d))
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Embedding(config.max_seq_len, d)
        self.fuse = nn.Linear(2 * d, d)
        self.blocks = nn.ModuleList(Hop(config) for _ in range(config.n_layers))
        self.shared = SharedLayers(config)
        gate = nn.Linear(_GATE_HIDDEN, 1)
        nn.init.constant_(gate.bias, _GATE_BIAS)
        self.residual_gate = nn.Sequential(nn.Linear(1, _GATE_HIDDEN), nn.GELU(), gate)
        self.output = nn.Linear(d, config.vocab_size)
        self.shared.attention.initialise(self.coordinates)

    @property
    def input_embedding(self) -> nn.Module:
        return self.embedding

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def unembedding(self) -> Unembedding:
        return Unembedding(self.output.weight, self.output.bias)

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        n_tokens = tokens.shape[1]
        if n_tokens > self.max_seq_len:
            raise ValueError(f"{n_tokens} tokens exceed max_seq_len {self.max_seq_len}")
        told = read_tokens(tokens, self.coordinates, self.neighbours, self.config.manifold)
        positions = torch.arange(n_tokens, device=tokens.device)
        fused = self.fuse(torch.cat((self.coordinate_projection(told.coordinates), self.embedding(tokens)), dim=-1))
        first = states = fused + self.position_embedding(positions)
        before, velocities = None, told.velocities(told.directions)
        for hop in self.blocks:
            states, following = hop(states, self.shared, told, self._entropy(states), velocities, before)
            before, velocities = velocities, following
        moved = self.shared.to_coordinates(states) - self.shared.to_coordinates(first)
        gate = self.residual_gate(moved.norm(dim=-1, keepdim=True)).sigmoid()
        return ModelOutput(hidden=states + (_LEAST_GATE + (1 - _LEAST_GATE) * gate) * first)

    def _entropy(self, states: Tensor) -> Tensor:
        """Of the prediction from states [B, S, D], as a share of ln V: [B, S, 1], without a gradient.

        The weights are detached one by one: within autocast, no_grad would leave casts without a gradient in its cache.
        """
        logits = F.linear(states.detach(), self.output.weight.detach(), self.output.bias.detach())
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1, keepdim=True) / math.log(self.vocab_size)

    def new_cache(self, batch_size: int, history: Tensor | None = None, memory: Tensor | None = None) -> AsBuiltCache:
        return AsBuiltCache(batch_size)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        """See :meth:`LanguageModel.decode`.

        Every call runs the whole text so far: nothing can be kept of a model whose first state changes with each later
        token. Its results then differ from :meth:`forward`, which saw more.
        """
        if not isinstance(cache, AsBuiltCache) or len(tokens) != cache.batch_size:
            raise ValueError(f"decode needs a cache from new_cache({len(tokens)}), the batch size of these tokens")
        if self.training:
            raise ValueError("decode works in evaluation mode only: call model.eval() first")
        text = tokens if cache.tokens is None else torch.cat((cache.tokens, tokens), dim=1)
        output = self.encode(text)
        output.hidden = output.hidden[:, -tokens.shape[1] :]
        output.logits = self.unembed(output.hidden)
        cache.tokens, cache.length = text, text.shape[1]
        return output

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "hops": []}
        for name, parameter in self.named_parameters():
            groups["hops" if name.startswith(_HOP_PARTS) else "backbone"].append(parameter)
        return groups


def _checked(geometry: TokenGeometry, config: ModelConfig) -> TokenGeometry:
    wanted = config.manifold.geometry
    shapes = (config.vocab_size, wanted.n_coordinates), (config.vocab_size, wanted.neighbours)
    found = tuple(geometry.coordinates.shape), tuple(geometry.neighbours.shape)
    if found != shapes:
        raise HRSError(
            f"the geometry has coordinates {found[0]} and neighbours {found[1]}, but the model needs {shapes[0]} and "
            f"{shapes[1]}: compute it with this model's vocab_size and manifold.geometry"
        )
    return geometry


def _placeholder(config: ModelConfig) -> TokenGeometry:
    """Gaussian coordinates from a generator of their own; the next ids as neighbours."""
    n_ids, wanted = config.vocab_size, config.manifold.geometry
    generator = torch.Generator().manual_seed(wanted.seed)
    coordinates = torch.randn(n_ids, wanted.n_coordinates, generator=generator, device="cpu")
    steps = torch.arange(1, wanted.neighbours + 1)
    following = (torch.arange(n_ids)[:, None] + steps) % n_ids  # [V, K]
    return TokenGeometry(
        coordinates=coordinates.to(following.device), neighbours=following.masked_fill(steps >= n_ids, -1)
    )
