"""Rolling entropy against exact arithmetic, the gate against its definition, thresholds on a model that was trained."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrs.data import TokenStore
from hrs.data.windows import TrainingWindows
from hrs.errors import HRSError
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval.calibration import Calibration, calibrate, calibrate_entropies, firings, token_entropies
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.entropy import Gate, GateSettings, RollingEntropy

BITS = st.floats(0, 16, allow_nan=False)


# ---- the rolling mean ------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.lists(BITS, max_size=40))
def test_the_rolling_mean_is_that_of_the_last_tokens(window: int, stream: list[float]) -> None:
    """Equal to exact rational arithmetic but for one rounding of the sum and one of the quotient."""
    rolling = RollingEntropy(window)
    for n, bits in enumerate(stream, start=1):
        mean = rolling.push(bits)
        assert mean == rolling.mean
        if n < window:
            assert mean is None
        else:
            assert mean == float(sum(map(Fraction, stream[n - window : n]))) / window


def test_the_rolling_mean_does_not_drift() -> None:
    """After 200,000 tokens, and after a value that swallows all others, it is that of a fresh start, to the bit."""
    stream = np.random.default_rng(0).uniform(0, 16, 200_000).tolist()
    stream[-20] = 1e18  # a running sum would never be rid of what this one rounded away
    rolling, fresh = RollingEntropy(10), RollingEntropy(10)
    for bits in stream:
        rolling.push(bits)
    for bits in stream[-10:]:
        fresh.push(bits)
    assert rolling.mean == fresh.mean


def test_a_value_that_is_no_number_passes() -> None:
    gate = Gate(threshold_bits=3.0, window=4, cooldown=0)
    assert [gate.push(bits) for bits in (5.0, 5.0, math.nan, 5.0, 5.0, 5.0, 5.0)] == [False] * 6 + [True]


def test_a_window_has_a_token() -> None:
    with pytest.raises(HRSError, match="at least 1 token"):
        RollingEntropy(0)


# ---- the gate --------------------------------------------------------------------------------------------------------


def reference_gate(stream: list[float], settings: GateSettings) -> list[bool]:
    """The definition, looking back over the whole stream at every token."""
    n, fired = settings.window, list[bool]()
    means = [None if t + 1 < n else math.fsum(stream[t + 1 - n : t + 1]) / n for t in range(len(stream))]
    for t, mean in enumerate(means):
        last = max((u for u in range(t) if fired[u]), default=None)
        down = settings.release_bits is None or last is None
        if not down:
            down = any(m is not None and m <= settings.release_bits for m in means[last + 1 : t + 1])
        rested = last is None or t - last > settings.cooldown
        fired.append(mean is not None and mean > settings.threshold_bits and rested and down)
    return fired


@given(
    st.lists(st.integers(0, 6).map(float), max_size=60),
    st.integers(0, 6).map(float),
    st.none() | st.integers(0, 6).map(float),
    st.integers(1, 4),
    st.integers(0, 8),
)
def test_the_gate_follows_its_definition(
    stream: list[float], threshold: float, release: float | None, window: int, cooldown: int
) -> None:
    release = None if release is None else min(release, threshold)
    settings = GateSettings(threshold_bits=threshold, release_bits=release, window=window, cooldown=cooldown)
    gate = Gate.of(settings)
    assert [gate.push(bits) for bits in stream] == reference_gate(stream, settings)


def test_one_rise_fires_once() -> None:
    """Without hysteresis a plateau fires again after each cooldown; with it, only after a fall to the release."""
    plateau = [1.0] * 4 + [5.0] * 20 + [1.0] * 4 + [5.0] * 4
    with_release = Gate(threshold_bits=4.0, release_bits=2.0, window=2, cooldown=3)
    without = Gate(threshold_bits=4.0, window=2, cooldown=3)
    assert [t for t, bits in enumerate(plateau) if with_release.push(bits)] == [5, 29]
    assert [t for t, bits in enumerate(plateau) if without.push(bits)] == [5, 9, 13, 17, 21, 29]


def test_the_fixed_threshold_of_the_original() -> None:
    """4 bits, 10 tokens, cooldown 10, on entropies of 4.8: at token 9 and every 11th after, as its own log has it."""
    gate = Gate(threshold_bits=4.0, window=10, cooldown=10)
    fired = [t for t in range(256) if gate.push(4.8)]
    assert fired == list(range(9, 256, 11))
    held = {t + i for t in fired for i in range(1, 11) if t + i < 256}
    assert len(held) / 256 > 0.85


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"cooldown": -1}, "cooldown must be at least 0"),
        ({"release_bits": 5.0}, "at or below the entropy that fires it"),
        ({"threshold_bits": math.nan}, "got NaN"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(HRSError, match=said):
        Gate(**{"threshold_bits": 4.0} | changes)  # type: ignore[arg-type]


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(small_store: TokenStore) -> LanguageModel:
    """A micro transformer after 80 steps on the small corpus: its entropy falls within words and rises between."""
    torch.manual_seed(0)
    config = experiment("dense_baseline", "micro", overrides={"data.tokenizer": "bpe:300"}).model
    model = build_model(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = TrainingWindows(small_store.train.tokens, model.max_seq_len, batch=8, seed=0)
    for step in range(80):
        ids = torch.from_numpy(windows.batch(step))
        logits = model(ids[:, :-1]).logits
        assert logits is not None
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def calibration(model: LanguageModel, small_store: TokenStore) -> Calibration:
    return calibrate(model, small_store.validation)


def test_entropies_are_those_of_the_models_distributions(model: LanguageModel, small_store: TokenStore) -> None:
    """Against one forward pass per window and the definition, at the first window and wherever others score."""
    text, double = small_store.validation, copy.deepcopy(model).double().train()
    bits = token_entropies(double, text, stride_frac=0.25)
    assert double.training, "the model's mode is left as it was"
    assert np.isnan(bits[0]) and np.isfinite(bits[1:]).all()
    double.eval()
    size, stride = model.max_seq_len, model.max_seq_len // 4
    for target in (1, 2, size, size + 1, size + stride, size + stride + 1, 3 * size + 7):
        start = 0 if target <= size else -(-(target - size) // stride) * stride
        ids = torch.from_numpy(text.tokens[start:target].astype(np.int64))[None]
        logits = double(ids).logits
        assert logits is not None
        p = logits[0, -1].detach().softmax(-1)
        assert bits[target] == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-9), target


def test_a_fixed_threshold_fires_constantly_and_a_calibrated_one_on_its_share(
    model: LanguageModel, small_store: TokenStore, calibration: Calibration
) -> None:
    """On text that neither the model nor the calibration has seen."""
    text = small_store.test
    bits, starts = token_entropies(model, text), text.document_starts
    n_tokens = len(bits) - 1
    below_mean = GateSettings(threshold_bits=0.8 * calibration.mean_bits)
    often = firings(bits, starts, below_mean)
    seldom = firings(bits, starts, calibration.settings)
    assert len(often) / n_tokens > 0.85 / (below_mean.cooldown + 1), "at most every 11th token can fire"
    means = calibrate_entropies(bits, starts, calibration.model)  # the same quantiles, of this text
    above = np.interp(calibration.threshold_bits, means.rolling_quantiles, np.linspace(0, 1, 101))
    assert 1 - above == pytest.approx(1 - calibration.quantile, abs=0.05), "nominal share of the rolling mean"
    assert len(seldom) / n_tokens == pytest.approx(calibration.share_fired, rel=0.4)
    assert means.share_held < 0.4 * (10 * len(often) / n_tokens), "of the text that would be written with memory"


def test_the_calibration_says_what_it_measured(
    model: LanguageModel, small_store: TokenStore, calibration: Calibration
) -> None:
    text = small_store.validation
    bits = token_entropies(model, text)
    assert calibration.n_tokens == len(text) - 1 and calibration.n_documents == len(text.titles)
    assert calibration.mean_bits == pytest.approx(bits[1:].mean())
    assert calibration.share_above == pytest.approx(0.1, abs=0.01)
    fired = firings(bits, text.document_starts, calibration.settings)
    assert calibration.share_fired == len(fired) / (len(text) - 1)
    documents = text.document_of(np.arange(len(text)))
    held = {t + i for t in fired for i in range(1, 11) if t + i < len(text) and documents[t + i] == documents[t]}
    assert calibration.share_held == len(held) / (len(text) - 1)
    assert calibration.token_quantiles[50] == pytest.approx(np.median(bits[1:]))
    assert calibration.rolling_quantiles[90] == pytest.approx(calibration.threshold_bits)
    assert calibration.release_bits < calibration.threshold_bits
    assert calibration.at(0.95).threshold_bits > calibration.threshold_bits


def test_a_rolling_window_does_not_reach_into_another_document() -> None:
    """Two documents of 3 tokens have no window of 4; two of 4 have one each, and a gate of their own."""
    bits = np.array([np.nan, 1, 1, 1, 9, 9, 9])
    with pytest.raises(HRSError, match="no document of this text has the 4 tokens"):
        calibrate_entropies(bits, np.array([1, 4, 7]), "m", window=4)
    bits = np.array([np.nan, 1, 1, 1, 1, 9, 9, 9, 9])
    found = calibrate_entropies(bits, np.array([1, 5, 9]), "m", window=4, quantile=0.5, release_quantile=0.0)
    assert (found.rolling_quantiles[0], found.rolling_quantiles[-1], found.threshold_bits) == (1, 9, 5)
    assert firings(bits, np.array([1, 5, 9]), found.settings).tolist() == [8]
    assert (found.share_above, found.share_fired, found.share_held) == (0.5, 1 / 8, 0), "no token comes after the 8th"
    high = GateSettings(threshold_bits=0.5, release_bits=0.1, window=4)
    assert firings(bits, np.array([1, 5, 9]), high).tolist() == [4, 8], "the second gate knows nothing of the first"


# ---- its file --------------------------------------------------------------------------------------------------------


def test_a_calibration_survives_its_file(tmp_path: Path, calibration: Calibration) -> None:
    calibration.save(tmp_path / "gate.json")
    assert Calibration.load(tmp_path / "gate.json", calibration.model) == calibration
    assert [p.name for p in tmp_path.iterdir()] == ["gate.json"]


def test_another_models_calibration_is_refused(tmp_path: Path, model: LanguageModel, calibration: Calibration) -> None:
    """One changed weight makes another model."""
    calibration.save(tmp_path / "gate.json")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1
    assert calibration.model == model_fingerprint(model)
    with pytest.raises(HRSError, match=f"calibrated for model {calibration.model} and this is"):
        Calibration.load(tmp_path / "gate.json", model_fingerprint(other))


def test_a_calibration_on_other_text_is_refused_where_both_are_known(tmp_path: Path, calibration: Calibration) -> None:
    path = tmp_path / "gate.json"
    dataclasses.replace(calibration, data="a").save(path)
    assert Calibration.load(path, calibration.model, "a").data == "a" == Calibration.load(path, calibration.model).data
    with pytest.raises(HRSError, match="was measured on tokens a and the model was trained on b"):
        Calibration.load(path, calibration.model, "b")
    calibration.save(path)
    assert Calibration.load(path, calibration.model, "b") == calibration, "of an earlier version"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: json.dumps(json.loads(text) | {"surprise": 1}),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "threshold_bits"}),
        lambda text: json.dumps(json.loads(text) | {"threshold_bits": "high"}),
        lambda text: json.dumps(json.loads(text) | {"rolling_quantiles": [1.0]}),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(
    spoil: Callable[[str], str], tmp_path: Path, calibration: Calibration
) -> None:
    (tmp_path / "gate.json").write_text(spoil(calibration.to_json()))
    with pytest.raises(HRSError, match="no calibration of an entropy gate"):
        Calibration.load(tmp_path / "gate.json", calibration.model)
    with pytest.raises(HRSError, match="cannot be read"):
        Calibration.load(tmp_path / "missing.json", calibration.model)


def test_quantiles_must_be_in_order(calibration: Calibration) -> None:
    with pytest.raises(HRSError, match="quantiles must rise"):
        calibration.at(0.5, 0.6)
    with pytest.raises(HRSError, match="quantiles must rise"):
        calibrate_entropies(np.zeros(20), np.array([1, 20]), "m", quantile=1.1)
    assert dataclasses.asdict(calibration.at(0.9, 0.7)) == pytest.approx(dataclasses.asdict(calibration.settings))
