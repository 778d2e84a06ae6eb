"""Decoding sequences of unequal length side by side against each on its own."""

import functools

import pytest
import torch
from distinct_models import DISTINCT
from torch import Tensor

from hrs.models import Cache, LanguageModel, build_model
from hrs.models.hrs import HRSModel
from hrs.presets import PRESETS, experiment

VOCABULARY, CONTEXT = 300, 32
SMALL = {
    "data.tokenizer": f"bpe:{VOCABULARY}",
    "model.max_seq_len": CONTEXT,
    "model.engram.window": 8,
    "model.engram.per_window": 2,
    "model.locality.window": 4,
}


@functools.cache
def micro(preset: str, dtype: torch.dtype, **changes: object) -> LanguageModel:
    """In float64 with weights so large that no component is a rounding error, as in the tests of decoding."""
    torch.manual_seed(0)
    overrides = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    model = build_model(experiment(preset, "micro", overrides=overrides).model).to(dtype).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("embedding.weight"):
                parameter.mul_(5 if parameter.ndim > 1 and dtype is torch.float64 else 1)
    for _ in range(3):  # slots that open once training has shown something
        model(torch.randint(VOCABULARY, (4, CONTEXT)))
        model.keep_observations()
    return model.eval()


RAGGED = [name for name in DISTINCT if micro(name, torch.float32).batches_ragged]


def text(n: int) -> list[int]:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def begun(model: LanguageModel, ids: list[int], memory: Tensor | None = None) -> Cache:
    cache = model.new_cache(1)
    cache.memory = memory
    model.decode(torch.tensor([ids]), cache)
    return cache


def check(model: LanguageModel, bound: float) -> None:
    """Four sequences in three slots: one leaves while the others go on, another takes its place."""
    slots, alone = model.new_slots(3), [begun(model, text(n)) for n in (1, 17, 9, 24)]
    for n in (1, 17, 9):
        slots.join(begun(model, text(n)))
    order = [0, 1, 2]
    for step in range(7):
        if step == 3:
            slots.leave(0)
            order = [2, 1]
        if step == 5:
            slots.join(begun(model, text(24)))
            order = [2, 1, 3]
        tokens = torch.tensor([[(7 * row + 31 * step) % VOCABULARY] for row in order])
        together = model.decode(tokens, slots).logits
        for row, ids, logits in zip(order, tokens, together, strict=True):
            expected = model.decode(ids[None], alone[row]).logits
            torch.testing.assert_close(logits[None], expected, rtol=0, atol=bound)
        assert slots.lengths == [alone[row].length for row in order]


@pytest.mark.parametrize("preset", RAGGED)
def test_every_row_decodes_as_if_alone(preset: str) -> None:
    check(micro(preset, torch.float64), 1e-10)
    check(micro(preset, torch.float32), 1e-5)


@pytest.mark.parametrize("n", [1, 3, 5])  # up to three rows the matrices are copied after some steps
@pytest.mark.parametrize("preset", ["dense_baseline", "attention_learned"])
def test_the_step_for_the_cpu_is_that_of_the_modules(preset: str, n: int) -> None:
    """Rows of one length and, after one has left and another joined, of several."""
    model = micro(preset, torch.float64)
    assert isinstance(model, HRSModel)
    slots, modules = model.new_slots(n), model.new_slots(n)
    assert slots.cpu_step is not None
    modules.cpu_step = None
    for each in (slots, modules):
        for _ in range(n):
            each.join(begun(model, text(4)))
    for step in range(24):
        if step == 18:
            for each in (slots, modules):
                each.leave(0)
                each.join(begun(model, text(2)))
        tokens = torch.tensor([[(7 * row + 31 * step) % VOCABULARY] for row in range(n)])
        found, expected = model.decode(tokens, slots), model.decode(tokens, modules)
        for ours, theirs in ((found.logits, expected.logits), (found.hidden, expected.hidden)):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["full_hrs", "v2_attn_conv", "attention_alibi", "kernel_l1", "v17_peer_only"])
def test_the_step_for_the_cpu_is_not_used_for_what_it_lacks(preset: str) -> None:
    model = micro(preset, torch.float32)
    assert isinstance(model, HRSModel)
    assert model.new_slots(2).cpu_step is None


def test_routing_consistency_reaches_as_far_back_as_each_row_does() -> None:
    check(micro("dual_head_router", torch.float64, model__router__trc_window=8), 1e-10)


def test_every_hrs_model_batches_but_those_that_run_the_whole_text_for_each_token() -> None:
    for name in DISTINCT:
        model = micro(name, torch.float32)
        reruns = not isinstance(model, HRSModel) or (model.engram is not None and model.engram.decodes_by_rerunning)
        assert model.batches_ragged == (not reruns)
        if reruns:
            assert PRESETS[name].leaks or not isinstance(model, HRSModel)
            with pytest.raises(NotImplementedError, match="equal length"):
                model.new_slots(2)


@pytest.mark.parametrize("preset", ["dense_recurrence", "full_hrs"])
def test_a_batch_joins_with_all_its_rows(preset: str) -> None:
    """With the history in front of the window where the model reads one; the window ends while it decodes."""
    model = micro(preset, torch.float64)
    tokens = torch.tensor([text(15), text(15)[::-1]])
    n = model.history_tokens
    history = torch.tensor([text(n), [-1] * n]) if n else None
    cache, slots = model.new_cache(2, history), model.new_slots(3)
    model.decode(tokens[:, :5], cache)
    slots.join(cache)
    for t in range(5, 15):
        together = model.decode(tokens[:, t : t + 1], slots).logits
        torch.testing.assert_close(together, model.decode(tokens[:, t : t + 1], cache).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_row_reads_its_own_memory(dtype: torch.dtype) -> None:
    """Of any number of vectors, none included, and another one from one token to the next."""
    model = micro("dense_baseline", dtype, model__engram__kind="retrieved")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".cross.output" in name:  # it starts at zero, as if there were no memory
                parameter.normal_()
    memories = [torch.randn(n, model.d_model, dtype=dtype) for n in (2, 5)]
    batched = [None, memories[0][None], memories[1][None]]
    slots, alone = model.new_slots(3), [begun(model, text(n), m) for n, m in zip((3, 8, 5), batched, strict=True)]
    for n, memory in zip((3, 8, 5), batched, strict=True):
        slots.join(begun(model, text(n), memory))
    tokens = torch.tensor([[4], [5], [6]])

    def same() -> Tensor:
        logits = model.decode(tokens, slots).logits
        expected = torch.cat([model.decode(ids[None], cache).logits for ids, cache in zip(tokens, alone, strict=True)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10 if dtype is torch.float64 else 1e-4)
        return logits

    before = same()
    for row, memory in enumerate((memories[1], None, memories[0])):
        slots.set_memory(row, memory)
        alone[row].memory = None if memory is None else memory[None]
    assert (same() - before).abs().max() > 1e-2
    slots.leave(0)
    alone, tokens = [alone[2], alone[1]], tokens[[2, 1]]
    same()


def test_too_long_a_text_and_a_wrong_batch_are_refused() -> None:
    model = micro("dense_baseline", torch.float32)
    slots = model.new_slots(2)
    for n in (5, CONTEXT):
        slots.join(begun(model, text(n)))
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens exceed"):
        model.decode(torch.tensor([[1], [2]]), slots)
    slots.leave(1)
    with pytest.raises(ValueError, match="batch size"):
        model.decode(torch.tensor([[1], [2]]), slots)
    assert model.decode(torch.tensor([[1]]), slots).logits.isfinite().all()
