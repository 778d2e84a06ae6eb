"""Whether a categorisation head knows more of a window's topic than the most frequent answer, or the bare states.

A head that trains along may learn its training windows by heart and nothing else. So it is scored on held-out windows,
beside two baselines that have never seen them either.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from hrs.config import CategoryConfig
from hrs.data.categories import token_labels
from hrs.data.store import TokenStore
from hrs.data.windows import evaluation_windows, window_categories
from hrs.evaluation.reading import read_windows
from hrs.models.base import LanguageModel

PROBE_WINDOWS = 500
"""Training windows, at most, that the probe learns from."""
HELD_OUT_WINDOWS = 2000
"""Windows, at most, of the split that is scored."""


def category_scores(model: LanguageModel, store: TokenStore, split: str, batch_windows: int) -> dict[str, float]:
    """``category_accuracy``, ``category_majority`` and ``category_probe`` of :class:`hrs.evaluation.Evaluation`, on
    windows of ``split`` that do not overlap; nothing if none of them, or of the training text, has a topic.

    Topics are always those of the documents themselves, also of models that were trained on estimated labels.

    Raises:
        HRSError: if the corpus has more topics than the head, or none and too little text to cluster.
    """
    config = CategoryConfig(n_classes=model.n_categories)
    starts, labels = _labelled_windows(model, store, "train", config, PROBE_WINDOWS)
    held_out_starts, held_out_labels = _labelled_windows(model, store, split, config, HELD_OUT_WINDOWS)
    if not len(labels) or not len(held_out_labels):
        return {}
    states, _ = _read(model, store, "train", starts, batch_windows)
    held_out_states, answers = _read(model, store, split, held_out_starts, batch_windows)
    named = {
        "category_accuracy": answers,
        "category_majority": token_labels(store, "train", config).counts(len(store.train)).argmax(),
        "category_probe": _probe(states, labels, held_out_states),
    }
    return {name: float(np.mean(found == held_out_labels)) for name, found in named.items()}


def _labelled_windows(
    model: LanguageModel, store: TokenStore, split: str, config: CategoryConfig, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and labels of at most ``most`` windows, spread evenly through the split; those without label are out."""
    window = model.max_seq_len
    starts = np.array([start for start, _ in evaluation_windows(len(store.split(split)), window, window)])
    starts = starts[np.arange(min(most, len(starts))) * len(starts) // min(most, len(starts))]
    labels = window_categories(token_labels(store, split, config), starts, min(window, len(store.split(split)) - 1))
    return starts[labels >= 0], labels[labels >= 0]


@torch.no_grad()
def _read(
    model: LanguageModel, store: TokenStore, split: str, starts: NDArray[np.int64], batch_windows: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The mean final state [N, d] of each window, and the head's answer [N]."""
    text = store.split(split)
    length = min(model.max_seq_len, len(text) - 1)
    states, answers = [], []
    for batch in np.split(starts, range(batch_windows, len(starts), batch_windows)):
        ids, context = read_windows(model, text, batch, length)
        output = model.encode(ids[:, :-1], context)
        assert output.category_logits is not None, "a model with n_categories must give category_logits"
        states.append(output.hidden[..., : model.d_model].double().mean(1).cpu().numpy())
        answers.append(output.category_logits.argmax(-1).cpu().numpy())
    return np.concatenate(states), np.concatenate(answers)


def _probe(
    states: NDArray[np.float64], labels: NDArray[np.int64], held_out_states: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Answers [M] for held-out states [M, d] of a regression on states [N, d] with labels [N]."""
    # Here, because it takes seconds to import and only models with a categorisation head need it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(labels)) == 1:  # which no regression accepts
        return np.full(len(held_out_states), labels[0])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    answers: NDArray[np.int64] = probe.fit(states, labels).predict(held_out_states)
    return answers
