"""Known leaks, each in a model of a page: an audit that lets one of them pass has stopped working.

Most leaks are one small module between a causal attention and a position-wise MLP. The same skeleton with a causal
module in that place is the control. Others come in with what stands before a window, or with what it is about.

    report = audit(LEAKS["finite_mask"].build())
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hrs.models.base import Cache, LanguageModel, ModelOutput, WindowContext

# ---- the modules -----------------------------------------------------------------------------------------------------


class CausalMean(nn.Module):
    """The control: the mean over all positions up to and including one's own."""

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
        return x.cumsum(1) / counts[:, None]


class FiniteMaskRoute(nn.Module):
    """A sparse route to earlier positions that writes -1e4 over the future, and so over all of row 0.

    Sparsemax (Martins & Astudillo 2016) does not change when a constant is added to a row: the first row, masked
    throughout, becomes uniform over the whole sequence. The attention of the next block then carries it everywhere.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.message = nn.Linear(width, width, bias=False)
        # Far below any fp32 tolerance that rounding would forgive.
        nn.init.normal_(self.message.weight, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ x.transpose(1, 2) / math.sqrt(x.shape[-1])  # [B, T, T]
        earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(-1)
        return sparsemax(scores.masked_fill(~earlier, -1e4)) @ self.message(x)


class BatchCentring(nn.Module):
    """Subtracts the mean over the batch: every row then depends on its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class SymmetricConvolution(nn.Module):
    """A depthwise convolution of three taps, padded on both sides: each position sees its successor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.taps = nn.Conv1d(width, width, kernel_size=3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.taps(x.transpose(1, 2)).transpose(1, 2)


class ExpertChoice(nn.Module):
    """An expert that takes the better-scored half of the sequence (Zhou et al. 2022): the rest decides who is in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.expert = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x)  # [B, T, 1]
        chosen = scores >= scores.topk(math.ceil(x.shape[1] / 2), dim=1).values[:, -1:]
        return chosen * self.expert(x)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of each row of scores [..., n] onto the simplex (Martins & Astudillo 2016, algorithm 1)."""
    ranked = scores.sort(-1, descending=True).values
    ranks = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    excess = ranked.cumsum(-1) - 1
    support = (ranks * ranked > excess).sum(-1, keepdim=True)
    return (scores - excess.gather(-1, support - 1) / support).clamp_min(0)


# ---- the skeleton ----------------------------------------------------------------------------------------------------


class SkeletonBlock(nn.Module):
    """Causal attention, the module under test, a position-wise MLP."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mixer = mixer
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixer(x)
        return x + self.mlp(x)


class RerunCache(Cache):
    """Keeps the tokens themselves, and their history."""

    def __init__(self, batch_size: int, history: Tensor | None) -> None:
        self.tokens = torch.empty(batch_size, 0, dtype=torch.long)
        self.context = WindowContext(history)


class SkeletonLM(LanguageModel):
    """Two blocks around ``mixer(width)``. Decoding runs the whole prefix again."""

    def __init__(
        self, mixer: Callable[[int], nn.Module], *, vocab_size: int = 31, max_seq_len: int = 24, width: int = 16
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.max_seq_len = max_seq_len
        self.d_model = width
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(max_seq_len, width) * 0.1)
        self.blocks = nn.ModuleList(SkeletonBlock(width, mixer(width)) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    @property
    def input_embedding(self) -> nn.Module:
        return self.embedding

    def embed(self, tokens: Tensor, context: WindowContext) -> Tensor:
        """Input [B, T, d] of the first block."""
        return self.embedding(tokens) + self.position[: tokens.shape[1]]

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens exceed max_seq_len {self.max_seq_len}")
        x = self.embed(tokens, context or WindowContext())
        for block in self.blocks:
            x = block(x)
        return ModelOutput(hidden=self.norm(x))

    def unembed(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T

    def new_cache(self, batch_size: int, history: Tensor | None = None, memory: Tensor | None = None) -> Cache:
        return RerunCache(batch_size, history)

    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        assert isinstance(cache, RerunCache)
        cache.tokens = torch.cat([cache.tokens.to(tokens.device), tokens], dim=1)
        cache.length = cache.tokens.shape[1]
        output = self.encode(cache.tokens, cache.context)
        hidden = output.hidden[:, -tokens.shape[1] :]
        return ModelOutput(hidden=hidden, logits=self.unembed(hidden))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": list(self.parameters())}


class HistoryLM(SkeletonLM):
    """Adds the mean embedding of a window's history, through a module of its own, to every token of the window."""

    history_tokens = 6

    def __init__(self, recall: Callable[[int], nn.Module], *, vocab_size: int = 31, max_seq_len: int = 24) -> None:
        super().__init__(lambda width: CausalMean(), vocab_size=vocab_size, max_seq_len=max_seq_len)
        self.recall = recall(self.d_model)

    def embed(self, tokens: Tensor, context: WindowContext) -> Tensor:
        x = super().embed(tokens, context)
        if context.history is None:
            return x
        known = (context.history >= 0)[..., None]  # [B, history_tokens, 1]
        mean = (self.embedding(context.history.clamp_min(0)) * known).sum(1) / known.sum(1).clamp_min(1)  # [B, d]
        return x + self.recall(mean)[:, None]


class TopicLM(SkeletonLM):
    """Adds an embedding of the window's topic, which is known only once the window has been read."""

    n_categories = 5

    def __init__(self) -> None:
        super().__init__(lambda width: CausalMean())
        self.topic = nn.Embedding(self.n_categories, self.d_model)

    def embed(self, tokens: Tensor, context: WindowContext) -> Tensor:
        x = super().embed(tokens, context)
        return x if context.category is None else x + self.topic(context.category)[:, None]


class OnceObserved(nn.Module):
    """Adds the mean over the sequence once a training pass has been kept, and until then nothing at all."""

    seen: Tensor
    open: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("open", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.open * x.mean(1, keepdim=True).expand_as(x)

    def keep(self) -> None:
        """The passes so far count."""
        self.open.copy_((self.seen > 0).to(self.open.dtype))


class ObservantLM(SkeletonLM):
    """Tells its modules when a training pass is to be kept."""

    def keep_observations(self) -> None:
        for module in self.modules():
            if isinstance(module, OnceObserved):
                module.keep()


# ---- what the audit must say -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """A fixture and the verdict it must get."""

    model: Callable[[], SkeletonLM]
    """The model with the module in question, freshly initialised."""
    reason: str
    """Why it is not causal; empty for the control."""
    through: str = ""
    """Name of the module that the audit must blame, or how it ends; empty for the model itself, or where none leaks."""
    fails: frozenset[str] = frozenset()
    """Names of the audit's tests that must fail; all others must pass."""

    def build(self) -> SkeletonLM:
        """A freshly initialised model; draws from the global torch generator."""
        return self.model()


def _skeleton_with(mixer: Callable[[int], nn.Module]) -> Callable[[], SkeletonLM]:
    return lambda: SkeletonLM(mixer)


_SEES_THE_FUTURE = frozenset({"suffix_flip", "suffix_flip_training", "prefix_consistency", "gradient", "cached_decode"})

LEAKS: Mapping[str, Leak] = {
    "control": Leak(model=_skeleton_with(lambda width: CausalMean()), reason=""),
    "history_control": Leak(model=lambda: HistoryLM(lambda width: nn.Linear(width, width)), reason=""),
    "finite_mask": Leak(
        model=_skeleton_with(FiniteMaskRoute),
        reason="a row with every entry at -1e4 is uniform after sparsemax, so position 0 reads the whole sequence",
        through="mixer",
        fails=_SEES_THE_FUTURE,
    ),
    "batch_centring": Leak(
        model=_skeleton_with(lambda width: BatchCentring()),
        reason="the mean over the batch carries the other rows",
        through="mixer",
        fails=frozenset({"batch_independence"}),
    ),
    "symmetric_convolution": Leak(
        model=_skeleton_with(SymmetricConvolution),
        reason="padding on both sides lets the last tap read the next token",
        through="mixer",
        fails=_SEES_THE_FUTURE,
    ),
    "expert_choice": Leak(
        model=_skeleton_with(ExpertChoice),
        reason="whether a position is among the chosen half depends on the scores of later positions",
        through="mixer",
        # Membership is a step function: no gradient tells of it.
        fails=_SEES_THE_FUTURE - {"gradient"},
    ),
    "history_of_the_batch": Leak(
        model=lambda: HistoryLM(lambda width: BatchCentring()),
        reason="what stands before a window is centred with what stands before the other windows of the batch",
        through="recall",
        fails=frozenset({"batch_independence"}),
    ),
    "once_observed": Leak(
        model=lambda: ObservantLM(lambda width: OnceObserved()),
        reason="a mean over the whole sequence is let in by a buffer that only training fills",
        through="mixer",
        # Before any training it is causal: found only because the audit gives it some.
        fails=_SEES_THE_FUTURE,
    ),
    "topic_reader": Leak(
        model=TopicLM,
        reason="the topic of a window is a label of all its tokens, later ones included",
        through="topic",
        # Whoever decodes has no topic yet.
        fails=frozenset({"category_blindness", "cached_decode"}),
    ),
}
