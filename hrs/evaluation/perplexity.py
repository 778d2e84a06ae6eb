"""Loss over a whole split: every token scored exactly once, in float32, summed in float64.

The same call for every model and every split::

    evaluation = evaluate(model, store)
    print(evaluation.metrics())
"""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hrs.data.store import TokenSplit, TokenStore
from hrs.data.windows import Shown, WindowMemories, evaluation_windows, strangers, window_memory
from hrs.errors import HRSError
from hrs.evaluation.category import category_scores
from hrs.evaluation.diagnostics import block_outputs, effective_rank, flops_per_token
from hrs.evaluation.reading import read_windows
from hrs.evaluation.result import Evaluation
from hrs.gpu import with_batch_that_fits
from hrs.models.base import LanguageModel
from hrs.nn.peer import expert_statistics

RANK_ROWS = 4096
"""States per block, at most, of which the effective rank is taken."""
_LOGITS_AT_ONCE = 2**24


def evaluate(
    model: LanguageModel,
    store: TokenStore,
    split: str = "validation",
    *,
    stride_frac: float = 0.5,
    batch_windows: int = 16,
    memories: WindowMemories | None = None,
    shown: Shown = "right",
) -> Evaluation:
    """Score a split with overlapping windows of the model's full context, on the model's device and in its precision.

    A model that can use what stands before a window in its document gets it.

    Args:
        stride_frac: step between windows over ``max_seq_len``; each target but the first has at least
            ``1 - stride_frac`` of the context before it, or all the text there is.
        batch_windows: windows per pass, halved if memory runs out. Changes speed and memory, and results only by
            rounding.
        memories: what a model with ``takes_memory`` reads besides the text; None is no memory.
        shown: whether each window reads its own memory, another one's, or none.

    Raises:
        HRSError: if the store has ids that the model lacks, the split is empty, the loss is not finite, the model
            cannot read memories, or not even one window at a time fits the memory.
    """
    if store.vocab_size > model.vocab_size:
        raise HRSError(
            f"the token store has {store.vocab_size} ids and the model only {model.vocab_size}: "
            "evaluate with the data the model was trained on"
        )
    if memories is not None and not model.takes_memory:
        raise HRSError("this model reads no memories: evaluate one with engram.kind=retrieved, or give none")
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        result, _ = with_batch_that_fits(
            lambda n_windows: _evaluate(model, store, split, stride_frac, n_windows, memories, shown),
            batch_windows,
            device,
            "evaluation",
        )
        return result
    finally:
        model.train(was_training)


@torch.no_grad()
def _evaluate(
    model: LanguageModel,
    store: TokenStore,
    split: str,
    stride_frac: float,
    batch_windows: int,
    memories: WindowMemories | None,
    shown: Shown,
) -> Evaluation:
    text = store.split(split)
    n_targets = len(text) - 1
    device = next(model.parameters()).device
    stride = max(1, round(stride_frac * model.max_seq_len))
    windows = np.array(list(evaluation_windows(len(text), model.max_seq_len, stride)), dtype=np.int64)  # [N, 2]
    length = min(model.max_seq_len, n_targets)
    seekers = strangers(windows[:, 0])

    nats = np.full(len(text), np.nan)  # by position of the target; there is none at 0
    n_scored = 0
    by_position = np.zeros(length)
    sampled = np.zeros(len(text), dtype=bool)
    sampled[1 + np.random.default_rng(0).choice(n_targets, min(RANK_ROWS, n_targets), replace=False)] = True
    states: list[list[Tensor]] = [[] for _ in model.blocks]
    metrics: dict[str, Tensor] = {}

    with block_outputs(model) as outputs:
        for first in range(0, len(windows), batch_windows):
            batch, memory = windows[first : first + batch_windows], None
            if memories is not None:
                others = seekers[first : first + batch_windows]
                memory = window_memory(memories, shown, split, batch[:, 0], others)
            starts, first_scored = batch[:, :1], batch[:, 1:]
            targets = starts + 1 + np.arange(length)  # [B, T], positions in the text
            ids, context = read_windows(model, text, starts[:, 0], length, memory)
            output = model.encode(ids[:, :-1], context)
            losses = target_losses(model, output.hidden, ids[:, 1:])
            scored = targets >= first_scored
            nats[targets[scored]] = losses[scored]
            n_scored += int(scored.sum())
            by_position += losses.sum(0)
            rows = torch.from_numpy(scored & sampled[targets]).to(device)
            for collected, stream in zip(states, outputs, strict=True):
                collected.append(stream[:, -length:][rows].cpu())  # a block may see a prefix before the tokens
            for name, value in output.metrics.items():
                weight = 1 if name == "expert_usage" else len(batch) / len(windows)  # a sum among means
                metrics[name] = metrics.get(name, 0) + weight * value.double().cpu()

    assert n_scored == n_targets, (n_scored, n_targets)
    if not np.isfinite(nats[1:]).all():
        bad = int((~np.isfinite(nats[1:])).sum())
        raise HRSError(f"the loss of {bad} of {n_targets} tokens is not finite: training diverged, try a lower peak_lr")
    documents = document_table(text, store.topics, nats)
    text_nats = float(documents["text_nats"].to_numpy().sum())
    bits_of_nats = 1 / (math.log(2) * int(text.n_bytes.sum()))
    nats_per_token = float(nats[1:].sum() / n_targets)
    sample = [torch.cat(rows) for rows in states]
    projected = [p for rows in sample if (p := model.project(rows.to(device))) is not None]
    experts = [expert_statistics(layer) for layer in metrics.get("expert_usage", ())]
    return Evaluation(
        nats_per_token=nats_per_token,
        perplexity=_exp(nats_per_token),
        bits_per_byte=bits_of_nats * text_nats,
        bits_per_byte_shuffled=_shuffled(model, text, windows, length, batch_windows, bits_of_nats),
        word_perplexity=_exp(text_nats / max(1, int(text.n_words.sum()))),
        n_tokens=n_targets,
        loss_by_position=by_position / len(windows),
        flops_per_token=flops_per_token(model, ids[:1, :-1], None if context is None else context.rows(slice(1))),
        effective_rank=[effective_rank(rows) for rows in sample],
        effective_rank_projected=[effective_rank(rows) for rows in projected],
        routing_entropy=metrics["routing_entropy"].tolist() if "routing_entropy" in metrics else [],
        tier_share=metrics["tier_share"].tolist() if "tier_share" in metrics else [],
        expert_coverage=[layer["coverage"] for layer in experts],
        expert_unevenness=[layer["unevenness"] for layer in experts],
        dead_experts=[round(layer["dead"]) for layer in experts],
        documents=documents,
        **(category_scores(model, store, split, batch_windows) if model.n_categories else {}),
    )


def _exp(nats: float) -> float | None:
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def _shuffled(
    model: LanguageModel, text: TokenSplit, windows: NDArray[np.int64], length: int, batch_windows: int, scale: float
) -> float | None:
    """Loss of the text times ``scale`` when every window reads the summaries of another, far from its own."""
    if not model.summarises or len(windows) < 2:
        return None
    nats = np.zeros(len(text))
    # In their own order windows overlap with their neighbours, whose summaries would be half their own.
    order = np.random.default_rng(0).permutation(windows)
    with model.reading_others():
        for batch in np.array_split(order, max(1, len(order) // max(2, batch_windows))):
            ids, context = read_windows(model, text, batch[:, 0], length)
            losses = target_losses(model, model.encode(ids[:, :-1], context).hidden, ids[:, 1:])
            targets = batch[:, :1] + 1 + np.arange(length)  # [B, T], positions in the text
            scored = targets >= batch[:, 1:]
            nats[targets[scored]] = losses[scored]
    nats[text.document_starts[1:] - 1] = 0.0  # end of text is no part of it
    return scale * float(nats[1:].sum())


def target_losses(model: LanguageModel, hidden: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """Losses [B, T] in nats of target ids [B, T], given final states [B, T, d].

    Logits are made for a few positions at a time, at most 2^24 numbers: at a vocabulary of 50,257 a whole batch's
    would outweigh the model.
    """
    chunk = max(1, _LOGITS_AT_ONCE // model.vocab_size)

    def chunks() -> Iterator[Tensor]:
        for states, ids in zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True):
            logits = model.unembed(states)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            yield F.cross_entropy(logits, ids, reduction="none").double()

    losses: NDArray[np.float64] = torch.cat(list(chunks())).view_as(targets).cpu().numpy()
    return losses


def document_table(text: TokenSplit, topics: tuple[str, ...], nats: NDArray[np.float64]) -> pa.Table:
    """Losses summed by document, from ``nats`` by position in the text; every target belongs to one document."""
    starts, ends = text.document_starts[:-1], text.document_starts[1:]
    total = np.add.reduceat(nats, starts)
    return pa.table(
        {
            "document": pa.array(range(len(starts)), pa.int32()),
            "title": pa.array(text.titles, pa.string()),
            "topic": pa.array([topics[i] if i >= 0 else None for i in text.topic_ids], pa.string()),
            "nats": total,
            "text_nats": total - nats[ends - 1],  # the last target of each is its end of text
            "tokens": ends - starts,
            "bytes": text.n_bytes,
            "words": text.n_words,
        }
    )
