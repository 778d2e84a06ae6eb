"""Nothing in a training or decoding step waits for a GPU: every model runs on the meta device, which has no values.

There ``item()``, ``tolist()``, ``nonzero()``, boolean indices and ``bool(tensor)`` raise. What the meta device does not
refuse is watched: tensors of the host and of the device in one operator, and copies between the two.
"""

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from distinct_models import DISTINCT
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from hrs.config import ExperimentConfig
from hrs.models import LanguageModel, build_model
from hrs.nn.engrams.memory import MemoryEngrams
from hrs.nn.expert_retrieval import product_key_top_k
from hrs.nn.sparsemax import _threshold_by_sorting
from hrs.presets import experiment
from hrs.training.loss import GPU_CHUNKING, cross_entropy
from hrs.training.memory_step import context_of
from hrs.training.step import Stepper

META = torch.device("meta")

KINDS = [
    "dense_baseline",
    "attention_alibi",
    "kernel_soft_rank",
    "dense_retrieved",
    "full_hrs",
    "full_hrs_legacy",
    "full_hrs_recurrence",
    "full_hrs_running",
    "v5_replace",
    "v5_replace_legacy",
    "v7_full",
    "v9_learnable_legacy",
    "v14_attn_sink",
    "v16_peer_engram",
    "v17_peer_only",
    "v18_cross_attn",
    "v18_cross_attn_legacy",
    "manifold_v18",
    "manifold_v18_legacy",
]
"""Presets that together have every layer; the others are other compositions of the same."""


class _Operators(TorchDispatchMode):
    """Notes operators that read tensors of the host beside those of the device, or copy from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kinds = {t.device.type for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)}
        if len(kinds) > 1:
            self.found.append(str(func))
        return result


class _Constructors(TorchFunctionMode):
    """Notes tensors that are made on the device from numbers of the host: a copy that waits."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor", "new_tensor") and result.device.type == "meta":
            self.found.append(name)
        return result


class _Still(torch.optim.AdamW):
    """Torch's fused AdamW has no kernel for the meta device, and waits for nothing (test_check_every.py runs it)."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.found_inf.device == META


@pytest.fixture(autouse=True)
def _meta_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no meta device, and is off in all that is run here; norms refuse foreach operators there."""
    monkeypatch.setattr("torch.nn.utils.clip_grad._device_has_foreach_support", lambda device: True)
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "autocast", lambda d, *a, **k: nullcontext() if d == "meta" else autocast(d, *a, **k))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *a: a != ("meta",) and is_enabled(*a))


def _waits(function: Callable[[], object]) -> list[str]:
    with _Operators() as operators, _Constructors(operators.found):
        function()
    return operators.found


def _small(preset: str) -> ExperimentConfig:
    return experiment(preset, "micro", overrides={"model.n_layers": 3, "model.dropout": 0.1})


def _on_meta(config: ExperimentConfig) -> LanguageModel:
    model = build_model(config.model).train().to(META)
    for module in model.modules():
        if isinstance(module, MemoryEngrams):
            module._last_update = 0  # slots rest; when they move, a few times in a run, they do wait
    return model


@pytest.mark.parametrize(
    "preset", [*KINDS, *(pytest.param(p, marks=pytest.mark.slow) for p in DISTINCT if p not in KINDS)]
)
def test_no_model_waits_in_a_training_step(preset: str) -> None:
    """Gradients, their norm, clipping, and what is remembered; an evaluation pass and its loss."""
    config = _small(preset)
    model = _on_meta(config)
    stepper = Stepper(model, _Still(model.parameters()), config.training, META, 4, chunking=GPU_CHUNKING)
    windows = torch.zeros(4, config.model.max_seq_len + 1, dtype=torch.int64, device=META)
    context = context_of(model, len(windows))
    context = context and context.to(META)
    assert _waits(lambda: stepper.step_without_waiting(windows, context)) == []
    model.eval()

    def validate() -> None:
        with torch.no_grad():
            hidden = model.encode(windows[:, :-1], context).hidden
            cross_entropy(
                model.unembed, hidden, windows[:, 1:], vocab_size=model.vocab_size, unembedding=model.unembedding()
            )

    assert _waits(validate) == []


@pytest.mark.parametrize("preset", KINDS)
def test_no_model_waits_while_it_decodes(preset: str) -> None:
    """A prompt, its next token, and a step of two texts in slots, whose shapes are static."""
    model = _on_meta(_small(preset)).eval()
    tokens = torch.zeros(2, 6, dtype=torch.int64, device=META)
    context = context_of(model, 2)
    context = context and context.to(META)
    constants: dict[Hashable, object] = {}

    def decode() -> None:
        with torch.no_grad():
            cache = model.new_cache(2, context and context.history, context and context.memory)
            model.decode(tokens[:, :5], cache)
            model.decode(tokens[:, 5:], cache)
            if model.batches_ragged:
                slots = model.new_slots(2)
                slots.table.constants = constants
                slots.join(cache)
                slots.stage(torch.zeros(2, 1, dtype=torch.int64, device=META), end=model.max_seq_len)
                model.decode(tokens[:, :1], slots)

    decode()  # constants of the model are copied to the device, once
    assert _waits(decode) == []


def test_operators_of_our_own_do_not_wait_inside() -> None:
    """What they do on a GPU, run on the meta device: a dispatch mode does not see into them."""
    query, keys = torch.zeros(5, 2, 2, 8, device=META), torch.zeros(2, 2, 16, 8, device=META)
    retrieve = product_key_top_k._init_fn
    retrieve(query, keys, 4)  # copies constants of k to the device, once
    assert _waits(lambda: retrieve(query, keys, 4)) == []
    assert _waits(lambda: _threshold_by_sorting(torch.zeros(3, 7, device=META))) == []


@pytest.mark.parametrize("wait", ["item", "nonzero", "index", "copy", "constant", "mixed"])
def test_the_watch_sees_what_waits(wait: str) -> None:
    x, host = torch.zeros(3, device=META), torch.zeros(3)
    waits: dict[str, Callable[[], object]] = {
        "item": lambda: x.sum().item(),
        "nonzero": lambda: x.nonzero(),
        "index": lambda: x[x > 0],
        "copy": lambda: host.to(META),
        "constant": lambda: x.new_tensor([1.0]),
        "mixed": lambda: torch.where(x > 0, x, host.sum()),
    }
    try:
        assert _waits(waits[wait])
    except (RuntimeError, NotImplementedError) as error:
        assert "meta" in str(error).lower()
