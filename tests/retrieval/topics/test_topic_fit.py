"""Topics fitted to a model: what is kept, what it is worth, and that engrams with a common mean are told apart."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hrs.config import DataConfig
from hrs.data import TokenStore, open_tokens
from hrs.errors import HRSError
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval.engrams import engrams, model_fingerprint
from hrs.retrieval.topics.fit import LEAST_AUC, TopicFit, best_thresholds, conversations, fit_path, fit_topics
from hrs.retrieval.topics.stress_result import Thresholds, pair_rates, route
from hrs.retrieval.topics.stress_texts import TOPICS


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Forty articles, each in words of its own."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("prose")
    with (folder / "prose.jsonl").open("w", encoding="utf-8") as file:
        for number, topic in enumerate(list(TOPICS)[:40]):
            row = {"title": topic, "text": " ".join(rng.choice(TOPICS[topic], 120))}
            file.write(json.dumps(row | {"split": ("train", "validation", "validation", "test")[number % 4]}) + "\n")
    return open_tokens(DataConfig(corpus=f"jsonl:{folder / 'prose.jsonl'}", tokenizer="bpe:300"), folder)


@pytest.fixture(scope="module")
def model(prose: TokenStore) -> LanguageModel:
    """Random weights, whose states have a large mean in common, as those of trained models do."""
    config = experiment("dense_baseline", "micro", overrides={"data.tokenizer": "bpe:300", "model.max_seq_len": "64"})
    torch.manual_seed(0)
    made = build_model(config.model).eval()
    final = next(module for name, module in made.named_modules() if name.endswith("norm") and "blocks" not in name)
    original = final.forward
    final.forward = lambda states: original(states) + 4.0  # type: ignore[method-assign]
    return made


@pytest.fixture(scope="module")
def fit(model: LanguageModel, prose: TokenStore) -> TopicFit:
    return fit_topics(model, prose.validation)


def test_five_subjects_end_in_one_topic_without_the_fit_and_in_several_with_it(
    model: LanguageModel, prose: TokenStore, fit: TopicFit
) -> None:
    text = prose.split("test")
    starts = text.document_starts[:5]
    pieces = [text.tokens[start + 32 * n : start + 32 * (n + 1)].tolist() for start in starts for n in range(4)]
    raw = engrams(model, pieces)
    order = np.random.default_rng(0).permutation(20)
    assert len(set(route(list(raw[order]), Thresholds())[1])) == 1
    centred = [fit.centred(raw[i]) for i in order]
    assert len(set(route(centred, Thresholds(join=fit.join, merge=fit.merge))[1])) > 2
    assert fit.together + fit.apart > 1.3, "1 is what labels without meaning reach"
    assert fit.auc > 0.8 and fit.why_off() is None
    assert fit.low <= fit.auc <= fit.high
    assert (fit.n_fitted_documents, fit.n_documents, fit.piece_tokens) == (10, 10, 32)


def test_engrams_that_know_nothing_are_below_the_bar(model: LanguageModel, prose: TokenStore, fit: TopicFit) -> None:
    text, rng = prose.validation, np.random.default_rng(0)
    ends = set((text.document_starts[1:] - 1).tolist())
    mixed = np.array([t if i in ends else rng.integers(1, 300) for i, t in enumerate(text.tokens)])
    nothing = fit_topics(model, dataclasses.replace(text, tokens=mixed))
    assert nothing.auc < LEAST_AUC
    assert "below 0.70" in str(nothing.why_off())
    assert nothing.why_off(least_auc=0.0) is None


def test_thresholds_lie_between_what_is_alike_and_what_is_not() -> None:
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(8), 4)
    vectors = np.eye(8)[documents] + 0.05 * rng.normal(size=(32, 8))
    thresholds = best_thresholds(vectors, documents)
    assert 0.2 < thresholds.join < 0.99
    for rows in conversations(documents, 1):
        assert pair_rates(documents[rows], route(list(vectors[rows]), thresholds)[1]) == (1.0, 1.0)


def test_a_fit_is_kept_and_is_of_one_model(fit: TopicFit, model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "topic_fit.json"
    fit.save(path)
    assert TopicFit.load(path, model_fingerprint(model)) == fit
    for fingerprint, block in (("0" * 16, None), (fit.model, 1)):
        with pytest.raises(HRSError, match="fit again with hrs topics"):
            TopicFit.load(path, fingerprint, block)
    values = json.loads(path.read_text())
    for damaged in ("{", "[]", json.dumps(values | {"join": 1.0}), json.dumps(values | {"mean": ["x"]})):
        path.write_text(damaged)
        with pytest.raises(HRSError, match="cannot be read"):
            TopicFit.load(path, fit.model)


def test_a_fit_lies_with_its_run_or_beside_its_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.hrs").write_bytes(b"")
    assert fit_path(tmp_path / "run") == fit_path(tmp_path / "run" / "checkpoints" / "last")
    assert fit_path(tmp_path / "run") == tmp_path / "run" / "topic_fit.json"
    assert fit_path(tmp_path / "model.hrs") == tmp_path / "model.hrs.topics.json"


def test_too_little_text_is_said(model: LanguageModel, prose: TokenStore) -> None:
    text = prose.validation
    starts = text.document_starts[:7]
    few = dataclasses.replace(text, tokens=text.tokens[: starts[-1]], document_starts=starts)
    with pytest.raises(HRSError, match="fitted on 8 documents"):
        fit_topics(model, few)
