"""Batched, cached generation against a forward pass per token over exactly the tokens that the model should read."""

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hrs.errors import HRSError
from hrs.generation import SampledToken, Sampling, decoding, generate, window_length
from hrs.generation.sampling import next_tokens
from hrs.models import Cache, LanguageModel, ModelOutput, WindowContext, build_model
from hrs.presets import PRESETS, experiment

CONTEXT, VOCABULARY = 16, 300
SMALL = {
    "data.tokenizer": f"bpe:{VOCABULARY}",
    "model.max_seq_len": CONTEXT,
    "model.engram.window": 4,
    "model.engram.per_window": 2,
    "model.locality.window": 4,
}
DISTINCT = {experiment(name, "micro", overrides=SMALL).model: name for name in reversed(PRESETS)}.values()
"""One preset of each composition; those of equal composition differ in training only."""
PROMPTS = [[5, 6, 7], [8], list(range(40, 40 + CONTEXT)), list(range(100, 145))]
"""Shorter than the context, as long, and longer."""


@functools.cache
def micro(preset: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """With weights large enough that no component is a rounding error."""
    torch.manual_seed(0)
    model = build_model(experiment(preset, "micro", overrides=SMALL).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("embedding.weight"):
                parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model.to(dtype).eval()


class Remembering(LanguageModel):
    """Logits from the sum of all embeddings so far and of those before the window, each weighted by its distance."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.max_seq_len, self.d_model, self.history_tokens = VOCABULARY, CONTEXT, 8, 5
        self.blocks = nn.ModuleList()
        self.embedding = nn.Embedding(VOCABULARY, 8).double()

    @property
    def input_embedding(self) -> nn.Module:
        return self.embedding

    def _before(self, history: Tensor | None) -> Tensor:
        if history is None:
            return torch.zeros(1, 1, 8, dtype=torch.float64)
        weights = torch.arange(1.0, 6.0, dtype=torch.float64) * (history >= 0)  # [B, 5]
        return weights.unsqueeze(1) @ self.embedding(history.clamp_min(0))

    def encode(self, tokens: Tensor, context: WindowContext | None = None) -> ModelOutput:
        before = self._before(None if context is None else context.history)
        return ModelOutput(hidden=self.embedding(tokens).cumsum(dim=1) + before)

    def unembed(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embedding.weight.T

    def new_cache(self, batch_size: int, history: Tensor | None = None) -> Cache:
        cache = Cache()
        cache.sum = self._before(history).expand(batch_size, 1, 8)  # type: ignore[attr-defined]
        return cache

    def decode(self, tokens: Tensor, cache: Cache) -> ModelOutput:
        hidden = self.embedding(tokens).cumsum(dim=1) + cache.sum  # type: ignore[attr-defined]
        cache.sum = hidden[:, -1:]  # type: ignore[attr-defined]
        cache.length += tokens.shape[1]
        return ModelOutput(hidden=hidden, logits=self.unembed(hidden))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": list(self.parameters())}


def remembering() -> Remembering:
    torch.manual_seed(0)
    return Remembering().eval()


def window_of(text: Sequence[int], context: int, keep: int) -> int:
    """Where the window begins that a reader of this text, token by token, has arrived at."""
    start = 0
    for length in range(1, len(text) + 1):
        if length - start > context:
            start = length - keep
    return start


@torch.no_grad()
def reference_logits(model: LanguageModel, text: list[int], keep: int) -> Tensor:
    """[1, V] of one forward pass over the window, told what stands before it."""
    start, n = window_of(text, model.max_seq_len, keep), model.history_tokens
    before = ([-1] * n + text[:start])[-n:] if n else []
    context = WindowContext(history=torch.tensor([before])) if n else None
    logits = model(torch.tensor([text[start:]]), context).logits
    return logits[:, -1]


Rows = list[list[SampledToken]]
Prompts = list[list[int]]


def rows_of(model: LanguageModel, prompts: Prompts, sampling: Sampling, **options: int) -> Rows:
    rows: Rows = [[] for _ in prompts]
    for step in generate(model, prompts, sampling, **options):
        for token in step:
            rows[token.row].append(token)
    return rows


def check(
    model: LanguageModel, sampling: Sampling, keep: int, tolerance: float, *, exact: bool, prompts: Prompts = PROMPTS
) -> None:
    """Every token, log-probability and entropy of a batch of unequal prompts is what the reference says."""
    rows = rows_of(model, prompts, sampling, keep=keep)
    for number, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        text, chance = list(prompt), np.random.default_rng((sampling.seed, number))
        assert len(tokens) == sampling.max_new_tokens
        for token in tokens:
            logits = reference_logits(model, text, keep)
            uniform = torch.tensor([chance.random()], dtype=torch.float64)
            seen = torch.zeros(1, model.vocab_size, dtype=torch.bool)
            seen[0, text] = True
            if exact:
                assert token.id == int(next_tokens(logits, uniform, sampling, seen))
            log_p = logits.double().log_softmax(-1)[0]
            entropy = -(log_p.exp() * log_p).sum() / np.log(2)
            assert token.log_prob == pytest.approx(float(log_p[token.id]), rel=tolerance, abs=tolerance)
            assert token.entropy == pytest.approx(float(entropy), rel=tolerance, abs=tolerance)
            text.append(token.id)


@pytest.mark.parametrize("preset", DISTINCT)
def test_equals_a_forward_pass_over_the_kept_tokens(preset: str) -> None:
    """Across several windows; a model that leaks gives what it says of the text so far, as decode does."""
    sampling = Sampling(max_new_tokens=18)
    check(micro(preset), sampling, keep=8, tolerance=1e-10, exact=True, prompts=[PROMPTS[0], PROMPTS[3]])


@pytest.mark.parametrize(
    "preset", ["dense_baseline", "dual_head_router", "full_hrs", "full_hrs_trc", "full_hrs_legacy"]
)
def test_equals_a_forward_pass_in_float32(preset: str) -> None:
    check(micro(preset, torch.float32), Sampling(max_new_tokens=20), keep=8, tolerance=1e-5, exact=False)


@pytest.mark.parametrize("keep", [1, 5, CONTEXT])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=25, temperature=0.0, repetition_penalty=1.3),
        Sampling(max_new_tokens=25, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3),
    ],
)
def test_every_way_to_sample_and_to_slide(sampling: Sampling, keep: int) -> None:
    check(micro("full_hrs"), sampling, keep, 1e-10, exact=True)


@pytest.mark.parametrize("keep", [1, 8, CONTEXT])
def test_what_slid_out_is_handed_on_as_history(keep: int) -> None:
    model = remembering()
    check(model, Sampling(max_new_tokens=30), keep, 1e-10, exact=True)
    text = list(range(100, 145))
    told = reference_logits(model, text, 8)
    model.history_tokens = 0
    assert (told - reference_logits(model, text, 8)).abs().max() > 1  # the history matters to this model


@given(st.integers(1, 60), st.data())
def test_window_length_follows_a_reader(context: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, context))
    n = data.draw(st.integers(1, 4 * context))
    length = window_length(n, context, keep)
    assert length == n - window_of(range(n), context, keep)
    assert min(n, keep) <= length <= context


# ---- rows are independent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs_trc", "full_hrs_legacy"])
def test_a_batch_equals_its_rows_one_by_one(preset: str) -> None:
    """Also when rows end at different times and are gone when a new window begins."""
    model, sampling = micro(preset), Sampling(max_new_tokens=60, temperature=1.5, seed=1)
    common = rows_of(model, PROMPTS, Sampling(max_new_tokens=60, temperature=1.5, seed=1))
    end_id = common[2][20].id  # so that at least one row ends early
    together = rows_of(model, PROMPTS, sampling, end_id=end_id)
    assert together[2][-1].finish == "end_of_text"
    assert len({len(row) for row in together}) > 1
    for number, prompt in enumerate(PROMPTS):
        (alone,) = rows_of(model, [prompt], sampling, end_id=end_id, first_row=number)
        assert [token.id for token in alone] == [token.id for token in together[number]]
        assert [token.finish for token in alone] == [token.finish for token in together[number]]


def ids(rows: Rows) -> list[list[int]]:
    return [[token.id for token in row] for row in rows]


def test_the_seed_and_the_row_decide_and_nothing_else() -> None:
    model, prompts = micro("dense_baseline"), [[1, 2]] * 3
    before = torch.get_rng_state()
    first = ids(rows_of(model, prompts, Sampling(seed=5, max_new_tokens=20)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert first == ids(rows_of(model, prompts, Sampling(seed=5, max_new_tokens=20)))
    assert first != ids(rows_of(model, prompts, Sampling(seed=6, max_new_tokens=20)))
    assert first[0] != first[1] != first[2] != first[0]
    assert first[2:] == ids(rows_of(model, prompts[2:], Sampling(seed=5, max_new_tokens=20), first_row=2))


def test_where_the_prompt_ends_changes_nothing_for_the_best_tokens() -> None:
    """The model's own continuation, given as prompt, goes on as before, windows included."""
    model, sampling = micro("full_hrs"), Sampling(temperature=0.0, repetition_penalty=1.2, max_new_tokens=50)
    (whole,) = ids(rows_of(model, [[3, 4, 5]], sampling))
    for n in (1, 13, 14, 30):
        prompt = [3, 4, 5, *whole[:n]]
        assert ids(rows_of(model, [prompt], sampling))[0][: 50 - n] == whole[n:]


# ---- work and ends ---------------------------------------------------------------------------------------------------


def test_no_token_is_computed_twice_within_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk as long as the shortest prompt, then single tokens; what only long prompts still have, in one chunk."""
    model, shapes = micro("dense_baseline"), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x, cache: (shapes.append(tuple(x.shape)), decode(x, cache))[1])
    list(generate(model, [[1] * 4, [2] * 6], Sampling(max_new_tokens=5)))
    assert shapes == [(2, 4)] + [(2, 1)] * 6
    shapes.clear()
    list(generate(model, [[1] * 4, [2] * 12], Sampling(max_new_tokens=1)))
    assert shapes == [(2, 4), (2, 8)]
    shapes.clear()
    list(generate(model, [[1] * 14, [2] * 14], Sampling(max_new_tokens=4), keep=8))
    assert shapes == [(2, 14), (2, 1), (2, 1), (2, 8)]


def test_a_prompt_is_read_in_pieces_where_its_scores_would_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = micro("full_hrs"), Sampling(max_new_tokens=20)
    whole = ids(rows_of(model, PROMPTS, sampling))
    monkeypatch.setattr(decoding, "_MAX_LOGITS", 3 * len(PROMPTS) * VOCABULARY)
    assert ids(rows_of(model, PROMPTS, sampling)) == whole


def test_every_end_has_its_reason() -> None:
    model, sampling = micro("dense_baseline"), Sampling(max_new_tokens=20)
    (row,) = rows_of(model, [[1]], sampling)
    assert [token.finish for token in row] == [None] * 19 + ["length"]
    end_id = row[7].id
    first = ids([row])[0].index(end_id)
    (ended,) = rows_of(model, [[1]], sampling, end_id=end_id)
    assert ended == [*row[:first], SampledToken(0, end_id, row[first].log_prob, row[first].entropy, "end_of_text")]


def test_a_row_can_be_finished_from_outside() -> None:
    steps = generate(micro("dense_baseline"), [[1], [2]], Sampling(max_new_tokens=40))
    rows: list[int] = []
    for n, step in enumerate(steps, start=1):
        rows += [token.row for token in step]
        if n == 3:
            steps.finish(0)
        if n == 25:
            steps.finish(1)
    assert rows.count(0) == 3
    assert rows.count(1) == 25


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, VOCABULARY]], {}, f"prompt 1 has an id outside the model's vocabulary of {VOCABULARY}"),
        ([[-1]], {}, "prompt 0 has an id outside"),
        ([[1]], {"keep": 0}, f"keep must lie between 1 and the model's context of {CONTEXT}"),
        ([[1]], {"keep": CONTEXT + 1}, "keep must lie between"),
        ([[1]], {"sampling": Sampling(stop=("x",))}, "use generate_text"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(prompts: list, options: dict, message: str) -> None:
    with pytest.raises(HRSError, match=message):
        generate(micro("dense_baseline"), prompts, options.pop("sampling", Sampling()), **options)


def test_no_prompts_give_nothing_and_training_mode_is_refused() -> None:
    model = remembering()
    assert list(generate(model, [], Sampling())) == []
    with pytest.raises(HRSError, match=r"model\.eval"):
        generate(model.train(), [[1]], Sampling())
