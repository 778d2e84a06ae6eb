"""Thresholds of the entropy gate, measured: quantiles of the entropy that one model has on held-out text.

A threshold in bits means nothing by itself. The original's 4.0 bits came from another model and other text; its own
model had a mean of 4.8, so the gate was open on almost every token. A quantile of the rolling mean says on which share
of the text a model is unsure, whatever its vocabulary::

    calibration = calibrate(model, store.validation)
    calibration.save(path)
    gate = Gate.of(calibration.settings)

The entropies are those at the true tokens. Text that a model samples itself may be easier or harder for it, so the
share of generated tokens at which the gate fires is close to the calibrated one, not equal.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrs import strict_json
from hrs.data.store import TokenSplit
from hrs.data.windows import evaluation_windows
from hrs.errors import HRSError
from hrs.evaluation.reading import read_windows
from hrs.files import write_whole
from hrs.models.base import LanguageModel
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.entropy import Gate, GateSettings, RollingEntropy

QUANTILE, RELEASE_QUANTILE = 0.9, 0.7
"""Of the rolling mean, by default: for the threshold and for the release."""
_LOGITS_AT_ONCE = 2**24
_GRID = np.linspace(0, 1, 101)

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What one model's entropy is like on one text, and the gate that follows from it. Entropies are in bits."""

    model: str
    """Fingerprint of the model, see :func:`hrs.retrieval.engrams.model_fingerprint`."""
    quantile: float
    """Of the rolling mean, for the threshold: the gate is open on a share of ``1 - quantile`` of the text."""
    release_quantile: float
    """The same for the release."""
    threshold_bits: float
    release_bits: float
    window: int
    cooldown: int
    n_tokens: int
    """Tokens whose entropy was measured."""
    n_documents: int
    mean_bits: float
    """Of a token."""
    share_above: float
    """Share of the full windows whose mean is above the threshold: ``1 - quantile``, less where values are equal."""
    share_fired: float
    """Share of the tokens at which the gate fires, hysteresis and cooldown included."""
    share_held: float
    """Share of the tokens that come within ``cooldown`` tokens after a firing: of a text whose retrievals are held that
    long, the share that reads retrieved memory."""
    token_quantiles: tuple[float, ...]
    """[101], entropy of a token at quantiles 0, 0.01, ..., 1."""
    rolling_quantiles: tuple[float, ...]
    """[101], the same of the rolling mean."""
    data: str = ""
    """Fingerprint of the tokens it was measured on; empty if that is not known."""

    @property
    def settings(self) -> GateSettings:
        """The calibrated gate."""
        return GateSettings(
            threshold_bits=self.threshold_bits,
            release_bits=self.release_bits,
            window=self.window,
            cooldown=self.cooldown,
        )

    def at(self, quantile: float, release_quantile: float | None = None) -> GateSettings:
        """The gate at another quantile of the same text; released, by default, where the calibrated one is, or at its
        own threshold if that is lower.

        Raises:
            HRSError: if a quantile is out of range, or the release is above the threshold.
        """
        _require_quantiles(quantile, quantile if release_quantile is None else release_quantile)
        threshold = float(np.interp(quantile, _GRID, self.rolling_quantiles))
        release = min(self.release_bits, threshold)
        if release_quantile is not None:
            release = float(np.interp(release_quantile, _GRID, self.rolling_quantiles))
        return GateSettings(threshold_bits=threshold, release_bits=release, window=self.window, cooldown=self.cooldown)

    def require_model(self, fingerprint: str) -> None:
        """Raises HRSError if it was measured with another model."""
        if self.model != fingerprint:
            raise HRSError(
                f"the gate was calibrated for model {self.model} and this is {fingerprint}: entropies of two models "
                "do not compare, so calibrate this one"
            )

    def to_json(self) -> str:
        return strict_json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Calibration":
        """What :meth:`to_json` wrote.

        Raises:
            HRSError: if it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            lists = {name: tuple(map(float, values[name])) for name in ("token_quantiles", "rolling_quantiles")}
            calibration = cls(**values | lists)
            if any(len(quantiles) != len(_GRID) for quantiles in lists.values()):
                raise ValueError("quantiles are missing")
            calibration.settings  # noqa: B018 - checks the numbers
        except (KeyError, TypeError, ValueError) as error:
            raise HRSError(f"this is no calibration of an entropy gate ({error}): calibrate the model again") from error
        return calibration

    def save(self, path: Path) -> None:
        """Write it as JSON: the whole file, or none."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: Path, fingerprint: str, data: str = "") -> "Calibration":
        """That of the model with this fingerprint.

        Args:
            data: fingerprint of the tokens that it must have been measured on, if both are known.

        Raises:
            HRSError: if the file cannot be read, is something else, or was measured with another model or other tokens.
        """
        try:
            calibration = cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise HRSError(f"calibration {path} cannot be read ({error}): calibrate the model again") from error
        calibration.require_model(fingerprint)
        if data and calibration.data not in ("", data):
            raise HRSError(
                f"calibration {path} was measured on tokens {calibration.data} and the model was trained on {data}: "
                "calibrate the model again"
            )
        return calibration


def calibrate(
    model: LanguageModel,
    text: TokenSplit,
    *,
    quantile: float = QUANTILE,
    release_quantile: float = RELEASE_QUANTILE,
    window: int = 10,
    cooldown: int = 10,
    batch_windows: int = 16,
) -> Calibration:
    """Measure a model's entropies over a split and set the gate by their quantiles.

    Args:
        quantile: of the rolling mean over ``window`` tokens; above it the gate fires.
        release_quantile: of the same; at or below it the gate can fire again.
        cooldown: tokens, see :class:`hrs.retrieval.entropy.GateSettings`.
        batch_windows: windows per pass. Changes speed and memory, and results only by rounding.

    Raises:
        HRSError: if a quantile is out of range, the model lacks ids of the text, or no document has ``window`` tokens.
    """
    bits = token_entropies(model, text, batch_windows=batch_windows)
    return calibrate_entropies(
        bits,
        text.document_starts,
        model_fingerprint(model),
        quantile=quantile,
        release_quantile=release_quantile,
        window=window,
        cooldown=cooldown,
    )


def calibrate_entropies(
    bits: Floats,
    document_starts: NDArray[np.int64],
    fingerprint: str,
    *,
    quantile: float = QUANTILE,
    release_quantile: float = RELEASE_QUANTILE,
    window: int = 10,
    cooldown: int = 10,
) -> Calibration:
    """The same of entropies that were measured before, by position in the text. Every document starts a new window.

    Raises:
        HRSError: see :func:`calibrate`.
    """
    _require_quantiles(quantile, release_quantile)
    documents = [bits[start:end].tolist() for start, end in pairwise(document_starts)]
    rolling = np.array([mean for document in documents for mean in _rolling_means(document, window)])
    if len(rolling) == 0:
        raise HRSError(
            f"no document of this text has the {window} tokens of one window: calibrate on longer text, or with a "
            "shorter window"
        )
    threshold, release = (float(np.quantile(rolling, q)) for q in (quantile, release_quantile))
    settings = GateSettings(threshold_bits=threshold, release_bits=release, window=window, cooldown=cooldown)
    scored = bits[document_starts[0] : document_starts[-1]]
    fired = firings(bits, document_starts, settings)
    ends = document_starts[np.searchsorted(document_starts, fired, side="right")]
    return Calibration(
        model=fingerprint,
        quantile=quantile,
        release_quantile=release_quantile,
        threshold_bits=threshold,
        release_bits=release,
        window=window,
        cooldown=cooldown,
        n_tokens=len(scored),
        n_documents=len(documents),
        mean_bits=float(scored.mean()),
        share_above=float((rolling > threshold).mean()),
        share_fired=len(fired) / len(scored),
        share_held=float(np.minimum(cooldown, ends - 1 - fired).sum() / len(scored)),
        token_quantiles=tuple(np.quantile(scored, _GRID).tolist()),
        rolling_quantiles=tuple(np.quantile(rolling, _GRID).tolist()),
    )


def firings(bits: Floats, document_starts: NDArray[np.int64], settings: GateSettings) -> NDArray[np.int64]:
    """Positions in the text at which a gate fires, given entropies by position; a new gate for each document."""
    fired: list[int] = []
    for start, end in pairwise(document_starts.tolist()):
        gate = Gate.of(settings)
        fired.extend(start + i for i, value in enumerate(bits[start:end].tolist()) if gate.push(value))
    return np.array(fired, dtype=np.int64)


def token_entropies(
    model: LanguageModel, text: TokenSplit, *, stride_frac: float = 0.5, batch_windows: int = 16
) -> Floats:
    """[len(text)], bits of the model's distribution of each token given those before it; NaN for the first.

    Windows overlap as in :func:`hrs.evaluation.evaluate`: at least ``1 - stride_frac`` of the context stands before
    each token, or all the text there is. The model runs in evaluation mode and is left in its own.

    Raises:
        HRSError: if the text has ids that the model lacks.
    """
    if int(text.tokens.max()) >= model.vocab_size:
        raise HRSError(
            f"the text has token {int(text.tokens.max())} and the model knows {model.vocab_size}: "
            "calibrate with the data it was trained on"
        )
    length = min(model.max_seq_len, len(text) - 1)
    stride = max(1, round(stride_frac * model.max_seq_len))
    windows = np.array(list(evaluation_windows(len(text), model.max_seq_len, stride)), dtype=np.int64)  # [N, 2]
    bits = np.full(len(text), np.nan)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in np.split(windows, range(batch_windows, len(windows), batch_windows)):
                ids, context = read_windows(model, text, batch[:, 0], length)
                found = entropies(model, model.encode(ids[:, :-1], context).hidden)
                targets = batch[:, :1] + 1 + np.arange(length)  # [B, T], positions in the text
                scored = targets >= batch[:, 1:]
                bits[targets[scored]] = found.cpu().numpy()[scored]
    finally:
        model.train(was_training)
    return bits


def entropies(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Bits [...], float64, of the distributions that follow final hidden states [..., k]; a few logits at a time."""
    chunk = max(1, _LOGITS_AT_ONCE // model.vocab_size)

    def chunks() -> Iterator[Tensor]:
        for states in hidden.flatten(0, -2).split(chunk):
            yield entropy_of(model.unembed(states))

    return torch.cat(list(chunks())).view(hidden.shape[:-1])


def entropy_of(logits: Tensor) -> Tensor:
    """Bits [...], float64, of the distributions with these logits [..., V]."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return torch.linalg.vecdot(log_p.exp(), log_p).double() / -math.log(2)


def _rolling_means(bits: list[float], window: int) -> Iterator[float]:
    rolling = RollingEntropy(window)
    return (mean for value in bits if (mean := rolling.push(value)) is not None)


def _require_quantiles(quantile: float, release_quantile: float) -> None:
    if not 0 <= release_quantile <= quantile <= 1:
        raise HRSError(
            f"quantiles must rise from 0 over release_quantile ({release_quantile:g}) and quantile ({quantile:g}) to 1"
        )
