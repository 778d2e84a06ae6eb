"""The checks themselves. Each is a generator of rows; what it raises becomes a failed row."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hrs.config import ExperimentConfig
from hrs.data import TokenStore, open_tokens
from hrs.errors import HRSError
from hrs.evaluation import audit, evaluate
from hrs.generation import ContinuousBatch, Sampling, generate
from hrs.gpu import Gpu, nvml, open_gpu
from hrs.models import LanguageModel, build_model
from hrs.models.geometry import TokenGeometry
from hrs.nn import expert_kernels
from hrs.presets import PRESETS, experiment
from hrs.training import Progress, Runtime, load_model, train
from hrs.training.memory import CUDA_OVERHEAD_BYTES, estimate_peak
from hrs.training.optimizer import build_optimizer
from hrs.training.step import Stepper
from tests.gpu.bench import Row

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20
STEPS = 20
FINGERPRINT = "0123456789abcdef"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user chose."""

    device: str = "cuda"
    presets: tuple[str, ...] = ()
    """In place of all."""


class Bench:
    """The GPU, a folder, and a small corpus that needs no network and no package."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        gpu = open_gpu(settings.device)
        if gpu is None:
            raise HRSError(f"device {settings.device} is no GPU: this command needs one")
        self.gpu: Gpu = gpu
        self.settings, self.folder = settings, folder
        self.device = gpu.device

    @functools.cached_property
    def corpus(self) -> Path:
        """A JSON-lines file of 400 short documents of made-up words in three topics."""
        draw, topics = random.Random(0), ("sea", "sky", "farm")
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        words = {
            topic: ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)] for topic in topics
        }
        path = self.folder / "corpus.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i in range(400):
                topic = topics[i % 3]
                split = "validation" if i % 10 == 8 else "test" if i % 10 == 9 else "train"
                text = " ".join(draw.choices(words[topic], k=80))
                row = {"title": f"{topic} {i}", "text": f"{text.capitalize()}.", "topic": topic, "split": split}
                file.write(json.dumps(row) + "\n")
        return path

    def experiment(self, preset: str, scale: str = "micro", **changes: Any) -> ExperimentConfig:
        """Return a preset on the small corpus."""
        fixed = {"data.corpus": f"jsonl:{self.corpus}", "data.tokenizer": "bpe:512"}
        return experiment(preset, scale, 0, fixed | {name.replace("__", "."): value for name, value in changes.items()})

    def store(self, config: ExperimentConfig) -> TokenStore:
        """Return the tokens that an experiment reads."""
        return open_tokens(config.data, self.folder / "tokens")

    def runtime(self, **changes: Any) -> Runtime:
        """Return how runs are executed here: on the GPU, eagerly unless asked otherwise."""
        return Runtime(**({"device": self.settings.device, "compile": False, "log_every": 5} | changes))

    def model(self, config: ExperimentConfig) -> LanguageModel:
        """Return a new model on the GPU, the same for the same config."""
        torch.manual_seed(0)
        return build_model(config.model, drawn_geometry(config)).to(self.device)

    def windows(self, config: ExperimentConfig, n: int, seed: int = 0) -> Tensor:
        """Return ``n`` random windows [n, T + 1] on the GPU."""
        generator = torch.Generator().manual_seed(seed)
        shape = (n, config.model.max_seq_len + 1)
        return torch.randint(config.model.vocab_size, shape, generator=generator).to(self.device)


class DrawnMemories:
    """Memories that only the start of a window decides, for presets that read other documents."""

    fingerprint = FINGERPRINT

    def __init__(self, config: ExperimentConfig) -> None:
        torch.manual_seed(5)
        base = experiment("dense_baseline", config.scale, overrides={"data.tokenizer": config.data.tokenizer})
        self.base_weights: Mapping[str, Tensor] = build_model(base.model).state_dict()
        self._shape = (config.model.engram.slots, config.model.d_model)

    def read(
        self, split: str, starts: NDArray[np.int64], seekers: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        rows = [np.random.default_rng([int(s), split == "train"]) for s in (starts if seekers is None else seekers)]
        return np.stack([row.standard_normal(self._shape).astype(np.float32) for row in rows])


def drawn_geometry(config: ExperimentConfig) -> TokenGeometry | None:
    """Return random coordinates for a manifold-guided network; None for other families."""
    if config.model.family != "manifold":
        return None
    geometry, draw = config.model.manifold.geometry, torch.Generator().manual_seed(0)
    shape = (config.model.vocab_size, geometry.n_coordinates)
    neighbours = torch.randint(config.model.vocab_size, (shape[0], geometry.neighbours), generator=draw)
    return TokenGeometry(torch.randn(shape, generator=draw), neighbours)


def run_check(name: str, settings: Settings, folder: Path) -> Iterator[Row]:
    """Yield the rows of one check; an exception becomes a failed row with its sentence."""
    try:
        yield from CHECKS[name](Bench(settings, folder))
    except Exception as error:
        yield Row(name, "the check itself", "FAILED", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")


def judged(check: str, subject: str, passed: bool, figures: str) -> Row:
    """Return a row that passed or failed."""
    return Row(check, subject, "ok" if passed else "FAILED", figures)


def guarded(check: str, subject: str, body: Callable[[], Row]) -> Row:
    """Return the row of ``body``; an exception fails this subject alone."""
    try:
        return body()
    except Exception as error:
        return Row(check, subject, "FAILED", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")


# ---- the machine -----------------------------------------------------------------------------------------------------


def check_machine(bench: Bench) -> Iterator[Row]:
    """What GPU, driver and torch this is, and how fast its memory and its products are."""
    found = bench.gpu.properties
    yield Row(
        "machine", found.name, "ok",
        f"{found.total_bytes / 2**30:.1f} GiB, {found.free_bytes / 2**30:.1f} free, capability "
        f"{found.capability[0]}.{found.capability[1]}, driver {nvml.driver_version() or 'unknown'}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, bf16 {'yes' if found.bf16 else 'no'}",
    )  # fmt: skip
    speed, bandwidth = matmul_flops(bench), copy_bandwidth(bench)
    yield Row("machine", "measured speed", "ok", f"{speed / 1e12:.1f} TFLOP/s, copies {bandwidth / 1e9:.0f} GB/s")


def timed(bench: Bench, function: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of ``function`` after two warm-up calls, queue included."""
    taken = []
    for i in range(repeats + 2):
        bench.gpu.synchronize()
        start = time.perf_counter()
        function()
        bench.gpu.synchronize()
        if i >= 2:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def half_type(bench: Bench) -> torch.dtype:
    """Return the half precision that this GPU computes in hardware."""
    return torch.bfloat16 if bench.gpu.bf16 else torch.float16


def matmul_flops(bench: Bench) -> float:
    """Return the speed of a large product in half precision, operations per second."""
    n = 4096 if bench.device.type == "cuda" else 64
    x = torch.randn(n, n, device=bench.device, dtype=half_type(bench))
    return 2 * n**3 / timed(bench, lambda: x @ x)


def copy_bandwidth(bench: Bench) -> float:
    """Return bytes read and written per second by a large copy."""
    x = torch.empty(2**28 if bench.device.type == "cuda" else 2**16, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    return 2 * x.numel() / timed(bench, lambda: y.copy_(x))


# ---- every preset ----------------------------------------------------------------------------------------------------


def check_presets(bench: Bench) -> Iterator[Row]:
    """Every preset trains 20 steps, resumes at 10, evaluates, is audited, and decodes with its cache."""
    for preset in bench.settings.presets or PRESETS:
        yield guarded("presets", preset, functools.partial(_whole_life, bench, preset))


def _whole_life(bench: Bench, preset: str) -> Row:
    began = time.perf_counter()
    reads_memories = experiment(preset, "micro").model.engram.kind == "retrieved"
    changes: dict[str, Any] = {"training__steps": STEPS}
    if reads_memories:
        changes |= {"training__retrieval__base": "0" * 16, "training__retrieval__fingerprint": FINGERPRINT}
    config = bench.experiment(preset, **changes)
    store, directory = bench.store(config), bench.folder / preset
    memories = DrawnMemories(config) if reads_memories else None
    runtime = bench.runtime(checkpoint_every=STEPS // 2, log_every=1)

    def session() -> Iterator[Progress]:
        return train(config, store, directory, runtime, drawn_geometry(config), memories=memories)

    for progress in session():
        if progress.step == STEPS // 2 + 1:  # the checkpoint of step 10 is behind it, the work of step 11 is lost
            break
    resumed = list(session())
    steps = [progress.step for progress in resumed]
    model, _ = load_model(directory)
    scored = evaluate(model.to(bench.device), store)
    decoded = _decoding_error(model, store)
    verdict = audit(model.cpu())
    expected = not PRESETS[preset].leaks
    shutil.rmtree(directory)
    passed = (
        steps[0] in (STEPS // 2 + 1, STEPS // 2)
        and steps[-1] == STEPS
        and math.isfinite(resumed[-1].loss)
        and math.isfinite(scored.bits_per_byte)
        and verdict.causal == expected
        and decoded < 1e-3
    )
    return judged(
        "presets", preset, passed,
        f"resumed at {steps[0] - 1}, loss {resumed[-1].loss:.3f}, {scored.bits_per_byte:.3f} bits per byte, causal "
        f"{verdict.causal} (expected {expected}), cached decoding differs by {decoded:.1e}, "
        f"{time.perf_counter() - began:.1f} s",
    )  # fmt: skip


@torch.no_grad()
def _decoding_error(model: LanguageModel, store: TokenStore) -> float:
    """Return the largest difference of probability between cached decoding and one pass; 0 for models that leak."""
    if getattr(getattr(model, "engram", None), "decodes_by_rerunning", False):
        return 0.0
    n = min(24, model.max_seq_len)
    tokens = torch.from_numpy(store.validation.tokens[:n].astype(np.int64))[None]
    tokens = tokens.to(next(model.parameters()).device)
    whole = model(tokens).logits
    assert whole is not None
    cache, pieces = model.new_cache(1), []
    for piece in tokens.split([n // 2, *[1] * (n - n // 2)], dim=1):
        logits = model.decode(piece, cache).logits
        assert logits is not None
        pieces.append(logits)
    return float((torch.cat(pieces, dim=1).softmax(-1) - whole.softmax(-1)).abs().max())


# ---- precision -------------------------------------------------------------------------------------------------------


def check_precision(bench: Bench) -> Iterator[Row]:
    """Loss and gradients of one step in bf16 and fp16 against fp32, and 60 steps of training in each."""
    for preset in bench.settings.presets or ("dense_baseline", "full_hrs", "v17_peer_only"):
        for precision in ("bf16", "fp16"):
            if precision == "bf16" and not bench.gpu.bf16:
                yield Row("precision", f"{preset} bf16", "skipped", "this GPU emulates bf16")
                continue
            body = functools.partial(_compare_precision, bench, preset, precision)
            yield guarded("precision", f"{preset} {precision}", body)


def _compare_precision(bench: Bench, preset: str, precision: str) -> Row:
    loss, gradient = _gradient(bench, preset, "fp32")
    other_loss, other = _gradient(bench, preset, precision)
    cosine = float(F.cosine_similarity(gradient, other, dim=0))
    curves = {p: _final_loss(bench, preset, p) for p in ("fp32", precision)}
    passed = abs(other_loss / loss - 1) < 0.01 and cosine > 0.98 and abs(curves[precision] / curves["fp32"] - 1) < 0.1
    return judged(
        "precision", f"{preset} {precision}", passed,
        f"loss {other_loss:.4f} against {loss:.4f}, gradients' cosine {cosine:.5f}, after 60 steps "
        f"{curves[precision]:.3f} against {curves['fp32']:.3f}",
    )  # fmt: skip


def _gradient(bench: Bench, preset: str, precision: str) -> tuple[float, Tensor]:
    config = bench.experiment(preset, training__precision=precision, training__optimizer__expert_updates="dense")
    model = bench.model(config).train()
    optimizer = build_optimizer(model, config.training.optimizer)
    stepper = Stepper(model, optimizer, config.training, bench.device, config.training.batch_sequences)
    torch.manual_seed(1)
    _, total = stepper.accumulate(bench.windows(config, config.training.batch_sequences))
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    flat = torch.cat(gradients).cpu()
    return float(total), flat / flat.norm()


def _final_loss(bench: Bench, preset: str, precision: str) -> float:
    config = bench.experiment(preset, training__precision=precision, training__steps=60, training__validations=1)
    directory = bench.folder / f"{preset}-{precision}"
    *_, last = train(config, bench.store(config), directory, bench.runtime(), drawn_geometry(config))
    shutil.rmtree(directory)
    return last.metrics["validation_loss"]


# ---- kernels ---------------------------------------------------------------------------------------------------------


def check_kernels(bench: Bench) -> Iterator[Row]:
    """Triton kernels and fused operators against plain references, forward and backward."""
    triton = importlib.util.find_spec("triton") is not None
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
    for dtype in [d for d in tolerance if d is not torch.bfloat16 or bench.gpu.bf16]:
        for rows, choices, width in ((64, 128, 64), (7, 20, 200), (300, 16, 512), (4, 1, 7)):
            name = f"chosen rows {str(dtype)[6:]} {rows}x{choices}x{width}"
            if not triton:
                yield Row("kernels", name, "skipped", "Triton is not installed")
                continue
            body = functools.partial(_compare_dot, bench, name, dtype, (rows, choices, width), tolerance[dtype])
            yield guarded("kernels", name, body)
    yield guarded("kernels", "mixture of experts, gradients", functools.partial(_compare_mixture, bench))
    yield guarded("kernels", "sparsemax", functools.partial(_compare_sparsemax, bench))
    yield guarded("kernels", "cross-entropy of a large vocabulary", functools.partial(_compare_loss, bench))


def _compare_dot(bench: Bench, name: str, dtype: torch.dtype, shape: tuple[int, int, int], tolerance: float) -> Row:
    rows, choices, width = shape
    torch.manual_seed(0)
    x, table = (torch.randn(n, width, device=bench.device).to(dtype) for n in (rows, 1000))
    indices = torch.randint(1000, (rows, choices), device=bench.device)
    expected = torch.einsum("rw,rkw->rk", x.double(), table[indices].double())
    found = expert_kernels.dot(x, table, indices).double()
    error = float((found - expected).abs().max() / expected.abs().max())
    return judged("kernels", name, error < tolerance, f"largest error {error:.1e} of the largest value")


def _compare_mixture(bench: Bench) -> Row:
    from hrs.nn.expert_ops import mix_experts, mix_experts_naive

    torch.manual_seed(0)
    leaves = [torch.randn(n, 32, device=bench.device) for n in (50, 200, 200)] + [
        torch.rand(50, 8, device=bench.device)
    ]
    indices = torch.randint(200, (50, 8), device=bench.device)
    gradients = []
    for mix in (mix_experts, mix_experts_naive):
        x, down, up, weights = (leaf.clone().requires_grad_() for leaf in leaves)
        mixed = mix(x, down, up, indices, weights, F.gelu, sparse_gradients=False)
        mixed.square().sum().backward()
        gradients.append([mixed.detach(), *(leaf.grad for leaf in (x, down, up, weights))])
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True)]
    return judged("kernels", "mixture of experts, gradients", max(errors) < 1e-4, f"largest error {max(errors):.1e}")


def _compare_sparsemax(bench: Bench) -> Row:
    from hrs.nn.sparsemax import Sparsemax

    torch.manual_seed(0)
    scores, allowed = 3 * torch.randn(64, 200), torch.rand(64, 200) < 0.7
    found = Sparsemax()(scores.to(bench.device), allowed.to(bench.device)).cpu()
    error = float((found - Sparsemax()(scores, allowed)).abs().max())
    return judged("kernels", "sparsemax", error < 1e-6, f"largest difference from the CPU {error:.1e}")


def _compare_loss(bench: Bench) -> Row:
    config = bench.experiment("dense_baseline")
    vocab, width, rows = 50257 if bench.device.type == "cuda" else 3001, 64, 512
    model_type = dataclasses.replace(config.model, vocab_size=vocab, d_model=width, max_seq_len=rows)
    torch.manual_seed(0)
    model = build_model(model_type).to(bench.device).train()
    config = dataclasses.replace(config, model=model_type)
    training = dataclasses.replace(config.training, precision="auto", batch_sequences=2)
    stepper = Stepper(model, build_optimizer(model, training.optimizer), training, bench.device, 2)
    windows = bench.windows(config, 2)
    _, total = stepper.accumulate(windows)
    with torch.no_grad(), torch.autocast(bench.device.type, half_type(bench)):
        logits = model(windows[:, :-1]).logits
    assert logits is not None
    expected = float(F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten()))
    error = abs(float(total) / expected - 1)
    name = "cross-entropy of a large vocabulary"
    return judged("kernels", name, error < 1e-3, f"{float(total):.5f} against {expected:.5f}")


# ---- memory ----------------------------------------------------------------------------------------------------------


def check_memory(bench: Bench) -> Iterator[Row]:
    """Predicted against measured peak of a training step at the original's dimensions, per preset."""
    names = bench.settings.presets or (
        "dense_baseline", "full_hrs", "v4_full", "v10_control", "v14_attn_sink", "v16_peer_engram", "v17_peer_only",
        "v18_cross_attn", "dense_retrieved", "manifold_v18",
    )  # fmt: skip
    for preset in names:
        yield guarded("memory", preset, functools.partial(_compare_peak, bench, preset))


def _compare_peak(bench: Bench, preset: str) -> Row:
    reads = experiment(preset, "micro").model.engram.kind == "retrieved"
    base: dict[str, Any] = {"training.retrieval.base": "0" * 16, "training.retrieval.fingerprint": FINGERPRINT}
    overrides = {"training.batch_sequences": 4} | (base if reads else {})
    for scale in ("paper", "small", "micro"):
        config = experiment(preset, scale, overrides=overrides)
        predicted = estimate_peak(config, 2, Runtime(device="cuda", compile=False)).peak_bytes
        if predicted < 0.8 * bench.gpu.free_bytes():
            break
    model = build_model(config.model, drawn_geometry(config)).to(bench.device).train()
    optimizer = build_optimizer(model, config.training.optimizer)
    stepper = Stepper(model, optimizer, config.training, bench.device, 2)
    context = None
    if reads:
        from hrs.models import WindowContext

        slots = torch.randn(4, config.model.engram.slots, config.model.d_model, device=bench.device)
        context = WindowContext(memory=slots)
    for step in range(3):
        if step == 2:
            bench.gpu.synchronize()
            bench.gpu.reset_peak()
        stepper.step(bench.windows(config, 4, seed=step), context)
    bench.gpu.synchronize()
    peak, reserved = bench.gpu.peak_bytes(), bench.gpu.peak_reserved_bytes()
    del model, optimizer, stepper
    bench.gpu.release_cached_memory()
    tensors = predicted - CUDA_OVERHEAD_BYTES
    ratio = tensors / max(peak, 1)
    # Too low makes packed runs fail; too high only wastes memory. Small peaks are blocks and workspaces.
    passed = 0.95 < ratio < 1.5 or abs(tensors - peak) < 32 * MIB
    return judged(
        "memory", preset, passed,
        f"{scale}: predicted {tensors / MIB:,.0f} MiB of tensors, measured {peak / MIB:,.0f}, ratio {ratio:.2f}, "
        f"reserved {reserved / MIB:,.0f} (fragmentation {reserved / max(peak, 1):.2f})",
    )  # fmt: skip


def check_oom(bench: Bench) -> Iterator[Row]:
    """With ever less memory a run takes ever smaller micro-batches, at the same loss, and at last refuses."""
    losses: dict[int, float] = {}
    config = _large_step(bench)
    whole = estimate_peak(config, config.training.batch_sequences, Runtime(device="cuda", compile=False)).peak_bytes
    single = estimate_peak(config, 1, Runtime(device="cuda", compile=False)).peak_bytes
    for share in (1.0, 0.5, 0.25):
        limit = int(single + share * (whole - single)) - CUDA_OVERHEAD_BYTES + 64 * MIB
        yield guarded("oom", f"{limit / MIB:,.0f} MiB", functools.partial(_train_capped, bench, config, limit, losses))
    yield guarded("oom", "too little for one window", functools.partial(_refuse, bench, config, single))


def _large_step(bench: Bench) -> ExperimentConfig:
    """Return a run whose activations are hundreds of MiB."""
    changes = {"model.max_seq_len": 256, "model.d_model": 256, "model.d_ff": 1024, "training.batch_sequences": 32}
    fixed = {"training.steps": 4, "training.validations": 1, "training.validation_windows": 4}
    return bench.experiment("dense_baseline", **{k.replace(".", "__"): v for k, v in (changes | fixed).items()})


def _train_capped(bench: Bench, config: ExperimentConfig, limit: int, losses: dict[int, float]) -> Row:
    bench.gpu.release_cached_memory()
    bench.gpu.cap_memory(limit)
    directory = bench.folder / f"capped-{limit}"
    *_, last = train(config, bench.store(config), directory, bench.runtime(log_every=1))
    micro_batch = json.loads((directory / "training.json").read_text())["micro_batch"]
    bench.gpu.cap_memory(bench.gpu.properties.total_bytes)
    losses[micro_batch] = last.loss
    spread = max(losses.values()) - min(losses.values())
    return judged(
        "oom", f"{limit / MIB:,.0f} MiB", spread < 0.02 * last.loss,
        f"micro-batch {micro_batch}, loss {last.loss:.4f}, losses differ by {spread:.1e}",
    )  # fmt: skip


def _refuse(bench: Bench, config: ExperimentConfig, single: int) -> Row:
    bench.gpu.release_cached_memory()
    bench.gpu.cap_memory(max((single - CUDA_OVERHEAD_BYTES) // 3, 8 * MIB))
    try:
        list(train(config, bench.store(config), bench.folder / "refused", bench.runtime()))
    except HRSError as error:
        return judged("oom", "too little for one window", "does not fit" in str(error), str(error)[:200])
    finally:
        bench.gpu.cap_memory(bench.gpu.properties.total_bytes)
    return Row("oom", "too little for one window", "FAILED", "trained although the cap forbids it")


def check_sharing(bench: Bench) -> Iterator[Row]:
    """Two processes share the GPU under their caps; one runs out of memory, recovers, and both end well."""
    config = _large_step(bench)
    eager = Runtime(device="cuda", compile=False)
    whole = estimate_peak(config, 32, eager).peak_bytes - CUDA_OVERHEAD_BYTES + 96 * MIB
    part = estimate_peak(config, 8, eager).peak_bytes - CUDA_OVERHEAD_BYTES + 64 * MIB
    processes = {name: _start_capped(bench, name, limit) for name, limit in (("roomy", whole), ("tight", part))}
    found: dict[str, Any] = {}
    for name, process in processes.items():
        output, _ = process.communicate(timeout=600)
        lines = [line for line in output.splitlines() if line.startswith("DONE ")]
        if not lines:
            yield Row("sharing", name, "FAILED", (output.strip().splitlines() or ["no output"])[-1][:300])
            continue
        found[name] = json.loads(lines[-1][5:])
        micro_batch, loss, peak = (found[name][key] for key in ("micro_batch", "loss", "peak"))
        figures = f"micro-batch {micro_batch}, loss {loss:.4f}, peak {peak / MIB:,.0f} MiB"
        yield judged("sharing", name, math.isfinite(loss), figures)
    if len(found) == 2:
        recovered = found["tight"]["micro_batch"] < found["roomy"]["micro_batch"]
        close = abs(found["tight"]["loss"] - found["roomy"]["loss"]) < 0.02 * found["roomy"]["loss"]
        yield judged("sharing", "the tight one recovered, at the same loss", recovered and close, "")


def _start_capped(bench: Bench, name: str, limit: int) -> "subprocess.Popen[str]":
    code = (
        "from pathlib import Path; from tests.gpu.checks import train_under_cap; "
        f"train_under_cap({bench.settings.device!r}, Path({str(bench.folder)!r}), {name!r}, {limit})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train_under_cap(device: str, folder: Path, name: str, limit: int) -> None:
    """Train the large step in this process with a memory cap; prints a line of JSON: a worker of two."""
    own = folder / name
    own.mkdir()
    bench = Bench(Settings(device=device), own)
    config = _large_step(bench)
    bench.gpu.cap_memory(limit)
    bench.gpu.reset_peak()
    *_, last = train(config, bench.store(config), own / "run", bench.runtime(log_every=1))
    micro_batch = json.loads((own / "run" / "training.json").read_text())["micro_batch"]
    print("DONE " + json.dumps({"micro_batch": micro_batch, "loss": last.loss, "peak": bench.gpu.peak_bytes()}))


# ---- crash safety ----------------------------------------------------------------------------------------------------


def check_crash(bench: Bench) -> Iterator[Row]:
    """A process that is killed while it trains goes on from its last checkpoint."""
    config = bench.experiment("dense_baseline", training__steps=4000, training__validations=1)
    directory = bench.folder / "killed"
    code = (
        "from pathlib import Path; from tests.gpu.checks import Bench, Settings; "
        "from hrs.training import train\n"
        f"bench = Bench(Settings(device={bench.settings.device!r}), Path({str(bench.folder)!r}))\n"
        "config = bench.experiment('dense_baseline', training__steps=4000, training__validations=1)\n"
        f"for p in train(config, bench.store(config), Path({str(directory)!r}), bench.runtime(checkpoint_every=20)):\n"
        "    print('STEP', p.step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reached = 0
    for line in process.stdout:
        reached = int(line.split()[1]) if line.startswith("STEP") else reached
        if reached >= 60:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    reports = train(config, bench.store(config), directory, bench.runtime(log_every=1))
    first = next(iter(reports)).step
    reports.close()  # type: ignore[attr-defined]
    yield judged(
        "crash", "killed by SIGKILL", 1 < first <= reached + 21, f"killed after step {reached}, went on at step {first}"
    )


# ---- compilation and speed -------------------------------------------------------------------------------------------


def check_compile(bench: Bench) -> Iterator[Row]:
    """Compiled steps equal eager ones, and how much faster they are."""
    for preset in bench.settings.presets or ("dense_baseline", "full_hrs", "v17_peer_only", "manifold_v18"):
        yield guarded("compile", preset, functools.partial(_compare_compiled, bench, preset))


def _compare_compiled(bench: Bench, preset: str) -> Row:
    torch.compiler.reset()
    scale = "small" if bench.device.type == "cuda" else "micro"
    config = bench.experiment(preset, scale, model__dropout=0.0, training__batch_sequences=16)
    seconds, totals, started = {}, {}, {}
    for compiled in (False, True):
        model = bench.model(config).train()
        optimizer = build_optimizer(model, config.training.optimizer)
        stepper = Stepper(model, optimizer, config.training, bench.device, 16, compiled=compiled)
        windows = bench.windows(config, 16)
        start = time.perf_counter()
        torch.manual_seed(1)
        _, total = stepper.accumulate(windows)
        totals[compiled] = float(total)
        optimizer.zero_grad(set_to_none=True)
        started[compiled] = time.perf_counter() - start
        seconds[compiled] = timed(bench, functools.partial(stepper.step, windows), repeats=7)
        del model, optimizer, stepper
    error = abs(totals[True] / totals[False] - 1)
    # Router noise is drawn by other kernels when compiled, so routed models agree only on average.
    tolerance = 0.05 if config.model.routed else 5e-3
    return judged(
        "compile", preset, error < tolerance,
        f"{scale}: {1e3 * seconds[False]:.1f} ms eager, {1e3 * seconds[True]:.1f} ms compiled, "
        f"{seconds[False] / seconds[True]:.2f}x, losses differ by {error:.1e}, first step {started[True]:.0f} s",
    )  # fmt: skip


def check_speed(bench: Bench) -> Iterator[Row]:
    """Tokens per second, kernels per step and utilisation of dense_baseline; the waits of its step."""
    peak = matmul_flops(bench)
    on_gpu = bench.device.type == "cuda"
    for scale, micro_batch in (("tiny", 16), ("small", 16), ("paper", 8)) if on_gpu else (("micro", 2),):
        for compiled in (False, True) if on_gpu else (False,):
            name = f"{scale} {'compiled' if compiled else 'eager'}"
            yield guarded("speed", name, functools.partial(_measure_speed, bench, scale, micro_batch, compiled, peak))


def _measure_speed(bench: Bench, scale: str, micro_batch: int, compiled: bool, peak: float) -> Row:
    torch.compiler.reset()
    config = experiment("dense_baseline", scale, overrides={"training.batch_sequences": micro_batch})
    model = bench.model(config).train()
    optimizer = build_optimizer(model, config.training.optimizer)
    stepper = Stepper(model, optimizer, config.training, bench.device, micro_batch, compiled=compiled)
    windows = bench.windows(config, micro_batch)
    for _ in range(3):
        stepper.step(windows)
    seconds = timed(bench, functools.partial(stepper.step, windows), repeats=10)
    kernels = _kernels(functools.partial(stepper.step, windows)) if bench.device.type == "cuda" else 0
    tokens = micro_batch * config.model.max_seq_len
    flops = 6 * model.count_parameters() + 6 * config.model.n_layers * config.model.max_seq_len * config.model.d_model
    return Row(
        "speed", f"{scale} {'compiled' if compiled else 'eager'}", "ok",
        f"{tokens / seconds:,.0f} tokens/s, {1e3 * seconds:.1f} ms for {tokens:,} tokens, {kernels} kernels, "
        f"{flops * tokens / seconds / peak:.2f} of the measured product speed",
    )  # fmt: skip


def _kernels(function: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
    kinds = [event for event in found.events() if "Memcpy" not in event.name and "Memset" not in event.name]
    return len(kinds)


# ---- generation and serving ------------------------------------------------------------------------------------------


def check_generation(bench: Bench) -> Iterator[Row]:
    """Greedy texts on the GPU are those of the CPU, alone and batched; tokens per second of eight texts."""
    for preset in bench.settings.presets or ("dense_baseline", "full_hrs", "v17_peer_only", "manifold_v18"):
        yield guarded("generation", preset, functools.partial(_compare_texts, bench, preset))


def _compare_texts(bench: Bench, preset: str) -> Row:
    scale = "small" if bench.device.type == "cuda" else "micro"
    config = bench.experiment(preset, scale)
    model = bench.model(config).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.vocab_size, (n,), generator=draw).tolist() for n in range(3, 11)]
    n_new = 48
    greedy = Sampling(temperature=0, max_new_tokens=n_new)
    start = time.perf_counter()
    batch = ContinuousBatch(model, n_slots=8)
    numbers = [batch.add(prompt, greedy) for prompt in prompts]
    while batch.n_active:
        batch.step()
    bench.gpu.synchronize()
    seconds = time.perf_counter() - start
    together = [batch.text(number) for number in numbers]
    alone = [list(prompt) for prompt in prompts[:2]]
    for row, prompt in enumerate(prompts[:2]):
        alone[row] += [token.id for step in generate(model, [prompt], greedy) for token in step]
    cpu = model.cpu()
    reference = list(prompts[0]) + [token.id for step in generate(cpu, [prompts[0]], greedy) for token in step]
    shared = sum(a == b for a, b in zip(together[0], reference, strict=True)) - len(prompts[0])
    # Half precision may choose the other of two tokens that nearly tie, after which texts differ.
    return judged(
        "generation", preset, together[0][: len(prompts[0]) + 1] == reference[: len(prompts[0]) + 1],
        f"{scale}: {8 * n_new / seconds:,.0f} tokens/s for 8 texts, {shared} of {n_new} tokens as on the CPU, "
        f"alone and batched {'equal' if alone == together[:2] else 'differ'}",
    )  # fmt: skip


def check_ray(bench: Bench) -> Iterator[Row]:
    """The main job on this GPU through Ray, and an endpoint that answers; needs the whole environment."""
    if any(importlib.util.find_spec(name) is None for name in ("ray", "mlflow", "fastapi")):
        yield Row("ray", "jobs/ablation_sweep.py", "skipped", "Ray, MLflow or FastAPI is not installed")
        return
    environment = os.environ | {"HRS_STORAGE": str(bench.folder / "storage")}
    overrides = ["--set", f"data.corpus=jsonl:{bench.corpus}", "--set", "data.tokenizer=bpe:512"]
    sweep = [sys.executable, "jobs/ablation_sweep.py", "--presets", "dense_baseline,full_hrs", "--scale", "micro"]
    done = subprocess.run(
        [*sweep, *overrides, "--seeds", "1"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    lines = done.stdout.strip().splitlines()
    yield judged("ray", "jobs/ablation_sweep.py", done.returncode == 0, (lines or ["no output"])[-1][:200])
    runs = sorted((bench.folder / "storage" / "runs").glob("*/training.json"))
    if not done.returncode and runs:
        yield guarded("ray", "hrs serve", functools.partial(_serve, runs[0].parent, environment))


def _serve(run: Path, environment: Mapping[str, str]) -> Row:
    import urllib.request

    command = [sys.executable, "-m", "hrs.cli", "serve", str(run), "--port", "8137"]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, text=True)
    try:
        deadline, body = time.monotonic() + 300, json.dumps({"model": "x", "prompt": "The", "max_tokens": 8}).encode()
        while time.monotonic() < deadline and process.poll() is None:
            request = urllib.request.Request(
                "http://127.0.0.1:8137/v1/completions", body, {"content-type": "application/json"}
            )
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as answer:
                text = json.loads(answer.read())["choices"][0]["text"]
                return judged("ray", "hrs serve", bool(text), f"answered {text!r}")
            time.sleep(1)
        return Row("ray", "hrs serve", "FAILED", f"no answer, status {process.poll()}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


CHECKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "machine": check_machine,
    "kernels": check_kernels,
    "precision": check_precision,
    "memory": check_memory,
    "oom": check_oom,
    "sharing": check_sharing,
    "crash": check_crash,
    "compile": check_compile,
    "speed": check_speed,
    "generation": check_generation,
    "presets": check_presets,
    "ray": check_ray,
}
