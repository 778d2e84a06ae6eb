"""Engrams are plain means of hidden states, and a fingerprint names the weights that made them."""

import functools
import threading

import numpy as np
import pytest
import torch
from torch import nn

from hrs.errors import HRSError
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.retrieval.engrams import engrams, model_fingerprint

CONTEXT, VOCABULARY = 16, 300
SMALL = {
    "data.tokenizer": f"bpe:{VOCABULARY}",
    "model.max_seq_len": CONTEXT,
    "model.engram.window": 4,
    "model.engram.per_window": 2,
    "model.locality.window": 4,
}
SEGMENTS = [list(range(7, 7 + n)) for n in (5, 1, CONTEXT, 5, 9)] + [[3, 1, 4, 1, 5]]


def new_model(preset: str) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(experiment(preset, "micro", overrides=SMALL).model).double().eval()


@functools.cache
def micro(preset: str) -> LanguageModel:
    return new_model(preset)


@pytest.mark.parametrize("preset", ["dense_baseline", "full_hrs", "full_hrs_legacy", "v18_cross_attn"])
def test_means_of_final_states(preset: str) -> None:
    """Of segments of many lengths at once, each as if it were read alone; a prefix of summaries has no part in it."""
    model = micro(preset)
    found = engrams(model, SEGMENTS, batch_size=2)
    assert found.dtype == np.float32 and found.shape == (len(SEGMENTS), model.d_model)
    last = engrams(model, SEGMENTS, block=-1)
    for segment, mean, of_block in zip(SEGMENTS, found, last, strict=True):
        with torch.no_grad():
            states: list[torch.Tensor] = []
            handle = model.blocks[-1].register_forward_hook(lambda m, a, out, kept=states: kept.append(out[0]))
            hidden = model.encode(torch.tensor([segment])).hidden[0, :, : model.d_model]
            handle.remove()
        np.testing.assert_allclose(mean, hidden.mean(dim=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(of_block, states[-1][0, -len(segment) :].mean(dim=0), rtol=1e-6, atol=1e-7)
        assert isinstance(model.norm, nn.LayerNorm)
        normalised = model.norm(states[-1][0, -len(segment) :])
        torch.testing.assert_close(normalised, hidden)  # the rows taken are those of the tokens


def test_blocks_count_from_either_end() -> None:
    model = micro("dense_baseline")
    n = len(model.blocks)
    for block in range(n):
        np.testing.assert_array_equal(engrams(model, SEGMENTS, block=block), engrams(model, SEGMENTS, block=block - n))
    assert not np.allclose(engrams(model, SEGMENTS, block=0), engrams(model, SEGMENTS, block=n - 1))
    for block in (n, -n - 1):
        with pytest.raises(HRSError, match=f"block {block} is none of the model's {n}"):
            engrams(model, SEGMENTS, block=block)


def test_the_mode_is_restored_and_has_no_influence() -> None:
    model = new_model("full_hrs")
    expected = engrams(model, SEGMENTS)
    model.train()
    np.testing.assert_array_equal(engrams(model, SEGMENTS), expected)
    assert model.training


def test_a_pass_of_another_thread_is_not_mistaken_for_the_own() -> None:
    model = micro("dense_baseline")
    expected = engrams(model, SEGMENTS, block=0)
    done = threading.Event()

    def decode() -> None:
        while not done.is_set():
            with torch.no_grad():
                model.encode(torch.full((1, 5), 9))

    other = threading.Thread(target=decode)
    other.start()
    try:
        for _ in range(30):
            np.testing.assert_allclose(engrams(model, SEGMENTS, block=0), expected, rtol=1e-6, atol=1e-7)
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize(
    ("segment", "said"),
    [
        ([], "segment 1 has 0 tokens and the model reads 1 to 16"),
        ([1] * (CONTEXT + 1), "segment 1 has 17 tokens"),
        ([VOCABULARY], "segment 1 has an id outside"),
        ([-1], "segment 1 has an id outside"),
    ],
)
def test_unreadable_segments_are_refused(segment: list[int], said: str) -> None:
    with pytest.raises(HRSError, match=said):
        engrams(micro("dense_baseline"), [[1, 2], segment])


def test_no_segments_and_no_batch() -> None:
    model = micro("dense_baseline")
    assert engrams(model, []).shape == (0, model.d_model)
    with pytest.raises(HRSError, match="batch_size must be 1 or more"):
        engrams(model, SEGMENTS, batch_size=0)


def test_fingerprint_names_weights_and_buffers() -> None:
    """Equal models have equal fingerprints; one number in any tensor, its type or its shape changes it."""
    model = new_model("v18_cross_attn")
    name = model_fingerprint(model)
    assert len(name) == 16 and int(name, 16) >= 0
    copy = new_model("v18_cross_attn")
    copy.load_state_dict(model.state_dict())
    assert model_fingerprint(copy) == name
    assert list(dict(model.named_buffers())), "this model was chosen for its buffers"
    for tensor in copy.state_dict().values():
        flat = tensor.view(-1)
        before = flat[-1].clone()
        flat[-1] = ~before if before.dtype == torch.bool else before + 1
        assert model_fingerprint(copy) != name
        flat[-1] = before
    assert model_fingerprint(copy) == name
    assert model_fingerprint(copy.float()) != name
    assert model_fingerprint(micro("dense_baseline")) != name
    assert len(model_fingerprint(copy.bfloat16())) == 16
