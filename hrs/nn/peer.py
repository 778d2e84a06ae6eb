"""Parameter-efficient expert retrieval (He 2024): single-neuron experts found by product keys (Lample et al. 2019)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrs.config import PeerConfig
from hrs.errors import HRSError
from hrs.nn.expert_ops import mix_experts, mix_experts_naive
from hrs.nn.expert_retrieval import retrieve, retrieve_naive
from hrs.nn.products import Linear


class Peer(nn.Module):
    """A layer of ``sub_keys ** 2`` experts, of which each head takes the best ``top_k`` for each token.

    Expert e is one neuron: activation(down[e] . input) * up[e]; all heads choose from the same experts, and weigh
    those chosen by the softmax of their scores.

    ``hrs``: queries of d_model / n_heads are also the experts' input, keys belong to heads, the hidden unit is a
    sigmoid, the heads' results are concatenated, projected and normalised. Keys start at N(0, 0.02), experts at
    N(0, 0.01), so that at first this is a memory: half the weighted mean of ``up``. That is so small that the norm's
    epsilon counts: the output begins below unit variance.

    ``paper``: experts read and write the model's width, GELU, summed over heads, with nothing after them. A head's
    query is twice as wide as a key and each half meets one side's keys, which the heads share. Queries are normalised
    by LayerNorm, not by the paper's BatchNorm: statistics of a batch would show a token its future. Tables start at
    N(0, 1/sqrt(d_model)) and keys at N(0, 1/sqrt(width)), for hidden units and scores of unit variance; the output then
    has about sqrt(0.4 n_heads / (top_k d_model)) per element, 0.02 at width 512, as large as the model's embeddings.

    ``sparse_gradients`` makes the gradients of ``down`` and ``up`` coalesced sparse tensors of the rows that were
    chosen. ``naive`` copies every chosen expert out, as the original did: the reference of tests and benchmarks.

    Args:
        config: its shape.
        d_model: width, a multiple of ``config.n_heads``.
        dropout: on the output.

    Raises:
        HRSError: if the heads do not divide the width.
    """

    sparse_gradients: bool = False
    naive: bool = False

    def __init__(self, config: PeerConfig, d_model: int, *, dropout: float) -> None:
        super().__init__()
        if d_model % config.n_heads:
            raise HRSError(f"peer.n_heads {config.n_heads} must divide d_model {d_model}")
        self.config = config
        self.n_experts = config.sub_keys**2
        self.key_width = d_model // config.n_heads
        halves = config.mode == "paper"
        self.n_queries = 2 if halves else 1
        n_key_heads, expert_width = (1, d_model) if halves else (config.n_heads, self.key_width)
        self.query = Linear(d_model, config.n_heads * self.n_queries * self.key_width, bias=False)
        self.query_norm = nn.LayerNorm(2 * self.key_width) if halves else nn.Identity()
        self.keys = nn.Parameter(torch.empty(2, n_key_heads, config.sub_keys, self.key_width))
        self.down = nn.Parameter(torch.empty(self.n_experts, expert_width))
        self.up = nn.Parameter(torch.empty(self.n_experts, expert_width))
        self.output = nn.Identity() if halves else Linear(d_model, d_model, bias=False)
        self.norm = nn.Identity() if halves else nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.keys, std=1 / math.sqrt(self.key_width) if halves else 0.02)
        for table in (self.down, self.up):
            nn.init.normal_(table, std=1 / math.sqrt(d_model) if halves else 0.01)

    def queries(self, x: Tensor) -> Tensor:
        """[B n, H, 1 or 2, width of a key] of tokens [B, n, d]: one for both sides, or one for each."""
        # Under autocast the projections run in half precision, scores and experts in the type of their tables.
        query = self.query(x).flatten(0, 1).unflatten(-1, (self.config.n_heads, -1))  # [B n, H, width of a query]
        return self.query_norm(query).to(self.keys.dtype).unflatten(-1, (self.n_queries, -1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised tokens [B, n, d] to [B, n, d], and in eval mode the softmax weight each expert got [n_experts]."""
        config, query = self.config, self.queries(x)
        choose, mix = (retrieve_naive, mix_experts_naive) if self.naive else (retrieve, mix_experts)
        experts, scores = choose(query, self.keys, config.top_k)
        weights = scores.softmax(dim=-1)  # [B n, H, k]
        # Rows of experts' input: [B n, d], or [B n H, d / H].
        inputs = x.flatten(0, 1).to(self.down.dtype) if config.mode == "paper" else query.flatten(0, 2)
        mixed = mix(
            inputs,
            self.down,
            self.up,
            experts.view(len(inputs), -1),
            weights.view(len(inputs), -1),
            F.gelu if config.mode == "paper" else torch.sigmoid,
            sparse_gradients=self.sparse_gradients,
        )
        output = self.dropout(self.norm(self.output(mixed.view(x.shape))))
        return output, None if self.training else self._usage(experts, weights)

    @torch.no_grad()
    def _usage(self, experts: Tensor, weights: Tensor) -> Tensor:
        usage = torch.zeros(self.n_experts, device=weights.device)
        return usage.scatter_add(0, experts.flatten(), weights.flatten().float())


def expert_statistics(usage: Tensor) -> dict[str, float]:
    """How evenly experts are used, as He (2024) measures it over a data set.

    Args:
        usage: [n_experts], the retrieval weights that each expert got, summed over as many tokens as one likes.

    Returns:
        ``coverage``, share of experts that got any; ``unevenness``, KL divergence of the distribution of usage from the
        uniform one, nats; ``dead``, number of experts that got none.

    Raises:
        HRSError: if no expert was used at all.
    """
    usage = usage.double()
    if not usage.sum() > 0:
        raise HRSError("no expert was used: expert statistics need the usage of at least one token in eval mode")
    share = usage / usage.sum()
    dead = int((usage == 0).sum())
    unevenness = math.log(len(usage)) + float(torch.special.xlogy(share, share).sum())
    return {"coverage": 1 - dead / len(usage), "unevenness": unevenness, "dead": float(dead)}
