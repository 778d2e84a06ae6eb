"""What a decoding step costs (kernels, calls of the model, waits) and that static shapes and graphs change no token."""

import functools

import pytest
import torch
from simulated_gpu import SimulatedGpu, simulated_gpus
from torch import nn

from benchmarks.card_model import trace_decoding
from hrs.generation import Sampling, generate, inference
from hrs.generation.batching import ContinuousBatch
from hrs.generation.inference import Inference, SlotDecoder, with_half_matrices
from hrs.gpu import Gpu
from hrs.models import LanguageModel, build_model
from hrs.presets import experiment
from hrs.training.gpu_time import KernelTrace

VOCABULARY, CONTEXT = 300, 32
SMALL = {
    "data.tokenizer": f"bpe:{VOCABULARY}",
    "model.max_seq_len": CONTEXT,
    "model.engram.window": 8,
    "model.engram.per_window": 2,
    "model.locality.window": 4,
    "model.test_time_memory.chunk": 8,
}
GRAPHS = ("dense_baseline", "full_hrs", "full_hrs_running", "v5_replace", "dense_recurrence", "v2_attn_conv")
TEXTS = 8


@functools.cache
def micro(preset: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    model = build_model(experiment(preset, "micro", overrides=SMALL).model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("embedding.weight"):
                parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model.to(dtype).eval()


def ids(n: int) -> list[int]:
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def continued(model: LanguageModel, lengths: tuple[int, ...], n_slots: int) -> list[list[int]]:
    """Texts of ContinuousBatch, some of which come when others have ended, and windows of which end."""
    batch = ContinuousBatch(model, n_slots=n_slots, keep=6)
    for n in lengths:
        batch.add(ids(n), Sampling(max_new_tokens=n + 9, seed=n, top_k=40))
    while batch.n_active:
        batch.step()
    return [batch.text(number) for number in range(len(lengths))]


# ---- what a step costs -----------------------------------------------------------------------------------------------


def test_kernels_of_a_decoding_step_stay_within_their_budget() -> None:
    trace, calls = trace_decoding("dense_baseline", "micro", TEXTS)
    assert calls == 1
    assert len(trace.kernels) <= 60


@pytest.mark.parametrize("preset", ["full_hrs", "full_hrs_running", "dense_recurrence", "v5_replace", "v18_cross_attn"])
def test_eight_texts_are_one_call_of_the_model(preset: str) -> None:
    trace, calls = trace_decoding(preset, "micro", TEXTS)
    assert calls == 1
    assert trace.syncs == ["tolist"]


def test_the_host_waits_once_per_step() -> None:
    """Of a batch whose requests sample alike, and of one whose requests do not; with a repetition penalty too."""
    for ways in ([Sampling(seed=n) for n in range(3)], [Sampling(top_p=0.9), Sampling(repetition_penalty=1.2)]):
        batch = ContinuousBatch(micro("dense_baseline"))
        for n, sampling in enumerate(ways):
            batch.add(ids(n + 3), sampling)
        batch.step()
        batch.step()
        with KernelTrace() as trace:
            assert len(batch.step()) == len(ways)
        assert trace.syncs == ["tolist"]
    steps = generate(micro("dense_baseline"), [ids(3), ids(3)], Sampling(repetition_penalty=1.2))
    next(steps)
    next(steps)
    with KernelTrace() as trace:
        next(steps)
    assert trace.syncs == ["tolist"]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", GRAPHS)
def test_static_shapes_and_graphs_change_no_token(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and keys are padded, and steps that complete no window are replayed; three slots are padded to four."""
    model, lengths = micro(preset), (3, 14, 9, 5)
    plain = continued(model, lengths, 3)
    prompts = [ids(7), ids(7)[::-1]]
    alone = [[t.id for t in step] for step in generate(model, prompts, Sampling(max_new_tokens=20), keep=6)]
    monkeypatch.setattr(inference, "KEYS_AT_ONCE", 8)
    with simulated_gpus(SimulatedGpu()) as cuda:
        monkeypatch.setattr(inference, "gpu_of", lambda device: Gpu(0))
        assert continued(model, lengths, 3) == plain
        assert [[t.id for t in step] for step in generate(model, prompts, Sampling(max_new_tokens=20), keep=6)] == alone
        assert "capture(0)" in cuda.calls


def test_each_shape_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "KEYS_AT_ONCE", 16)
    with simulated_gpus(SimulatedGpu()) as cuda:
        monkeypatch.setattr(inference, "gpu_of", lambda device: Gpu(0))
        decoder = SlotDecoder(Inference(micro("dense_baseline")), 2)
        cache = micro("dense_baseline").new_cache(2)
        micro("dense_baseline").decode(torch.tensor([ids(2), ids(2)]), cache)
        decoder.slots.join(cache)
        for _ in range(20):
            decoder.step([1, 2])
        assert decoder.slots.lengths == [22, 22]
        assert cuda.calls.count("capture(0)") == 2  # up to 16 keys, and up to 32


def test_a_gpu_computes_in_the_half_precision_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro("full_hrs", torch.float32)
    for capability, dtype in (((8, 9), torch.bfloat16), ((7, 5), torch.float16)):
        with simulated_gpus(SimulatedGpu(capability=capability)):
            monkeypatch.setattr(inference, "gpu_of", lambda device: Gpu(0))
            half = Inference(model)
        layers = [m for m in half.model.modules() if isinstance(m, nn.Linear)]
        assert layers and all(layer.weight.dtype == dtype for layer in layers)
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_cpu_runs_the_model_itself() -> None:
    model = micro("dense_baseline", torch.float32)
    assert Inference(model).model is model


@pytest.mark.parametrize("preset", ["dense_baseline", "attention_alibi", "full_hrs_running"])
def test_half_precision_is_close_and_its_distribution_is_float32(preset: str) -> None:
    """Of a prompt, of a step, and of a step in slots, to within a few rounding errors of bfloat16 (2^-8)."""
    torch.manual_seed(0)
    model = build_model(experiment(preset, "micro", overrides=SMALL).model).eval()
    half = Inference(model, torch.bfloat16)
    tokens = torch.tensor([ids(9), ids(9)[::-1]])
    cache, reference = half.new_cache(2), model.new_cache(2)
    for found, expected in (
        (half.decode(tokens, cache), model.decode(tokens, reference).logits[:, -1]),
        (half.decode(tokens[:, :1], cache), model.decode(tokens[:, :1], reference).logits[:, -1]),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
    slots = half.model.new_slots(2)
    slots.join(cache)
    found, expected = half.decode(tokens[:, 1:2], slots), model.decode(tokens[:, 1:2], reference).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def test_a_copy_in_half_precision_shares_all_but_its_matrices() -> None:
    model = micro("v17_peer_only", torch.float32)
    half = with_half_matrices(model, torch.bfloat16)
    own, theirs = dict(model.named_parameters()), dict(half.named_parameters())
    assert own.keys() == theirs.keys()
    changed = {name for name in own if own[name] is not theirs[name]}
    assert "embedding.weight" in changed and not any("down" in name or "norm" in name for name in changed)
