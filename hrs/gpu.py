"""The GPUs of this machine: the only module that calls CUDA through torch and the driver through NVML.

    for gpu in probe_gpus():            # without opening CUDA in this process
        print(gpu.name, gpu.free_bytes)

    gpu = open_gpu("cuda")              # opens CUDA; always carries an index, so every later call is valid
    gpu.cap_memory(6 * 2**30)
    model.to(gpu.device)

A ruff rule forbids ``torch.cuda`` everywhere else. CUDA has traps that depend on the order of calls: statistics cannot
be reset before CUDA is initialised, a memory cap needs a device with an index, and a process that has opened CUDA keeps
several hundred MiB of a GPU until it ends. They are handled here once. Tests replace :class:`Cuda` and :class:`Nvml` by
simulations that raise the errors of the real ones (``tests/simulated_gpu.py``).
"""

import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hrs import strict_json
from hrs.errors import HRSError
from hrs.nvml import Nvml

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

_log = logging.getLogger(__name__)

PROBE_SECONDS = 120.0
"""Longest time that the probing process may take to import torch and open every GPU."""

FIRST_BF16_CAPABILITY = (8, 0)
"""Ampere. Older GPUs emulate bfloat16, and ``torch.cuda.is_bf16_supported()`` counts the emulation."""

# CUDA lists the fastest GPU first by default and NVML by PCI bus: with mixed GPUs an index would mean two of them.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
# Segments that grow lose little to fragmentation, which counts against a cap. torch reads this when CUDA first starts.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProperties:
    """What one GPU is and how much of it is free."""

    index: int
    """Among the GPUs that this process may use (``CUDA_VISIBLE_DEVICES``), from 0."""
    name: str
    uuid: str = ""
    total_bytes: int
    free_bytes: int
    """Not in use by any process at the time of the probe."""
    capability: tuple[int, int]
    """Compute capability, such as (8, 9)."""

    @property
    def bf16(self) -> bool:
        """True if bfloat16 is computed in hardware."""
        return self.capability >= FIRST_BF16_CAPABILITY

    @property
    def kind(self) -> str:
        """Name and memory: GPUs of one kind are interchangeable for a plan."""
        return f"{self.name} {self.total_bytes / 2**30:.0f} GiB"


class Cuda:
    """The calls of ``torch.cuda`` that HRS makes; a simulation overrides all of them."""

    def __init__(self) -> None:
        self.failures: dict[int, str] = {}
        """Why GPUs cannot be used any more by this process, by index."""

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def is_initialized(self) -> bool:
        return torch.cuda.is_initialized()

    def init(self) -> None:
        torch.cuda.init()

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def allow_tf32(self) -> None:
        torch.set_float32_matmul_precision("high")

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def set_device(self, device: torch.device) -> None:
        torch.cuda.set_device(device)

    def get_device_properties(self, device: torch.device) -> Any:
        return torch.cuda.get_device_properties(device)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.mem_get_info(device)

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        torch.cuda.set_per_process_memory_fraction(fraction, device)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        torch.cuda.reset_peak_memory_stats(device)

    def max_memory_allocated(self, device: torch.device) -> int:
        return torch.cuda.max_memory_allocated(device)

    def max_memory_reserved(self, device: torch.device) -> int:
        return torch.cuda.max_memory_reserved(device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def get_rng_state(self, device: torch.device) -> Tensor:
        return torch.cuda.get_rng_state(device)

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.cuda.set_rng_state(state, device)

    def pinned_empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def record_event(self, device: torch.device) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def capture(
        self, device: torch.device, function: Callable[[], Any], warm_up: int
    ) -> tuple[Callable[[], None], Any]:
        """Capture ``function`` in a CUDA graph; the replay function and what ``function`` returned."""
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return graph.replay, result

    def tensor_device(self, index: int) -> torch.device:
        """Where tensors of GPU ``index`` live; a simulation keeps them in the memory of the host."""
        return torch.device("cuda", index)

    def index_of(self, device: torch.device) -> int | None:
        """Return the index of the GPU whose tensors live on ``device``; None for another kind of device."""
        return (device.index or 0) if device.type == "cuda" else None

    def move(self, module: nn.Module, device: torch.device) -> None:
        module.to(device)

    def probe(self) -> str:
        """Return what a new process prints that calls :func:`print_gpus` and ends.

        Raises:
            HRSError: if it fails or does not end.
        """
        command = [sys.executable, "-c", "from hrs.gpu import print_gpus; print_gpus()"]
        root = str(Path(__file__).resolve().parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment)
        except subprocess.TimeoutExpired:
            raise HRSError(f"the GPUs did not answer within {PROBE_SECONDS:.0f} s: check `nvidia-smi`") from None
        if done.returncode:
            raise HRSError(f"the GPUs cannot be opened ({_last_line(done.stderr)}): check `nvidia-smi`")
        return done.stdout


cuda: Cuda = Cuda()
nvml: Nvml = Nvml()


class Gpu:
    """One GPU opened by this process.

    Opening initialises CUDA and makes the GPU the current one, so every method is valid at any time. Products of
    float32 matrices use TF32 from then on (10 bits of mantissa, where the GPU has it), which is several times as fast.

    Raises:
        HRSError: if the GPU does not exist or CUDA cannot be initialised.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._device = torch.device("cuda", index)
        if index in cuda.failures:
            raise _gone(index)
        try:
            cuda.init()
            count = cuda.device_count()
            if not 0 <= index < count:
                raise HRSError(f"device cuda:{index} does not exist: there are {count} GPUs, numbered from 0")
            cuda.set_device(self._device)
            cuda.allow_tf32()
        except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without CUDA
            raise HRSError(f"GPU {index} cannot be opened ({_first_line(error)}): check `nvidia-smi`") from error

    @property
    def device(self) -> torch.device:
        """The device of this GPU's tensors, with its index."""
        return cuda.tensor_device(self.index)

    @property
    def properties(self) -> GpuProperties:
        """Return name, memory and capability; ``free_bytes`` is measured now."""
        found = cuda.get_device_properties(self._device)
        free, total = cuda.mem_get_info(self._device)
        return GpuProperties(
            index=self.index,
            name=found.name,
            uuid=_uuid(found),
            total_bytes=total,
            free_bytes=free,
            capability=(found.major, found.minor),
        )

    @property
    def bf16(self) -> bool:
        """True if bfloat16 is computed in hardware."""
        found = cuda.get_device_properties(self._device)
        return (found.major, found.minor) >= FIRST_BF16_CAPABILITY

    def free_bytes(self) -> int:
        """Return the memory that no process uses now."""
        return cuda.mem_get_info(self._device)[0]

    def cap_memory(self, limit_bytes: int) -> None:
        """Make the allocator of this process raise ``torch.OutOfMemoryError`` beyond ``limit_bytes``.

        The CUDA context and libraries allocate outside of the allocator and are not counted.
        """
        total = cuda.get_device_properties(self._device).total_memory
        cuda.set_per_process_memory_fraction(min(max(limit_bytes / total, 0.0), 1.0), self._device)

    def reset_peak(self) -> None:
        """Begin a new measurement of :meth:`peak_bytes`."""
        cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Return the most bytes that tensors took at once since :meth:`reset_peak`."""
        return cuda.max_memory_allocated(self._device)

    def peak_reserved_bytes(self) -> int:
        """Return the most bytes that the allocator held at once since :meth:`reset_peak`, fragmentation included."""
        return cuda.max_memory_reserved(self._device)

    def release_cached_memory(self) -> None:
        """Return unused memory of the allocator to the GPU, that of unreachable objects too."""
        gc.collect()  # a run that ended is held by reference cycles, and its tensors with it
        cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until everything queued on this GPU is done."""
        cuda.synchronize(self._device)

    def get_rng_state(self) -> Tensor:
        """Return the state of the GPU's random generator, uint8 on the CPU."""
        return cuda.get_rng_state(self._device)

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_rng_state` returned."""
        cuda.set_rng_state(state, self._device)

    def use_in_this_thread(self) -> None:
        """Make this GPU the current one of the calling thread: every thread begins with GPU 0."""
        cuda.set_device(self._device)

    def pinned_empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in page-locked host memory, to and from which copies can be asynchronous.

        The allocator of torch rounds each one up to a power of two bytes.
        """
        return cuda.pinned_empty(shape, dtype)

    def record_event(self) -> Any:
        """Mark this point of the queue; the event's ``synchronize()`` waits until the GPU has reached it."""
        return cuda.record_event(self._device)

    def capture(self, function: Callable[[], Any], warm_up: int = 3) -> tuple[Callable[[], None], Any]:
        """Capture ``function`` in a CUDA graph after ``warm_up`` calls.

        Returns:
            A function that runs it again on the same tensors, and what ``function`` returned: tensors that every
            replay overwrites. Inputs are read where they were at the capture.
        """
        return cuda.capture(self._device, function, warm_up)


def open_gpu(name: str) -> Gpu | None:
    """Open the GPU that a device name means: ``cuda:N``, ``cuda`` (the first one), or ``auto`` (the first one, if any).

    Returns:
        None for ``cpu``, and for ``auto`` on a machine without a GPU.

    Raises:
        HRSError: if the name means no device of this machine, or if the machine has a GPU that torch cannot use: a
            run that silently takes the CPU instead would need a hundred times as long.
    """
    if name == "auto":
        if cuda.is_available():
            return Gpu(0)
        require_usable_gpus()
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HRSError(f"unknown device '{name}': choose auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return None
    if not cuda.is_available():
        require_usable_gpus()
        raise HRSError(f"device {name} does not exist: torch finds no GPU on this machine; use --device cpu")
    return Gpu(device.index or 0)


def gpu_of(device: torch.device) -> Gpu | None:
    """Open the GPU whose tensors live on ``device``; None for a device that is not a GPU."""
    index = cuda.index_of(device)
    return None if index is None else Gpu(index)


def has_gpu() -> bool:
    """True if torch can use a GPU; opens no CUDA context."""
    return cuda.is_available()


def gpu_count() -> int:
    """Return how many GPUs torch can use; opens no CUDA context."""
    return cuda.device_count() if cuda.is_available() else 0


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on ``device`` is done; the CPU queues nothing."""
    gpu = gpu_of(device)
    if gpu is not None:
        gpu.synchronize()


def require_usable_gpus() -> None:
    """Refuse a machine that has GPUs which torch cannot use.

    Raises:
        HRSError: naming driver and torch, and what to install. GPUs hidden by ``CUDA_VISIBLE_DEVICES`` do not count.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or cuda.is_available():
        return
    count = nvml.device_count()
    if count:
        built_for = torch.version.cuda or "the CPU only"
        raise HRSError(
            f"this machine has {count} GPU{'s' if count > 1 else ''} (driver {nvml.driver_version()}) that torch "
            f"{torch.__version__}, built for CUDA {built_for}, cannot use: run `make setup` again, which chooses torch "
            "by the driver, or hide the GPUs with CUDA_VISIBLE_DEVICES= to use the CPU"
        )


# ---- looking without touching ----------------------------------------------------------------------------------------


def probe_gpus() -> tuple[GpuProperties, ...]:
    """Return the GPUs that this process may use, asked in a process of its own that ends before this returns.

    A process that opens CUDA keeps several hundred MiB of every GPU it touches; planners and drivers must not.

    Raises:
        HRSError: if the machine has GPUs that torch cannot use, or they do not answer.
    """
    if not _driver_present():
        return ()
    require_usable_gpus()
    return tuple(
        GpuProperties(**{**values, "capability": tuple(values["capability"])})
        for values in json.loads(cuda.probe().splitlines()[-1])
    )


def print_gpus() -> None:
    """Print the properties of all usable GPUs as one line of JSON: the probing process."""
    idle = nvml.memory()  # before CUDA is opened: afterwards the context of this process would count as in use
    found = []
    for index in range(cuda.device_count()):
        gpu = Gpu(index).properties
        free, _ = idle.get(gpu.uuid, (gpu.free_bytes, gpu.total_bytes))
        found.append(asdict(gpu) | {"free_bytes": min(free, gpu.total_bytes)})
    print(strict_json.dumps(found))


def _driver_present() -> bool:
    """True if this machine has an NVIDIA driver: importing torch to ask would take seconds on one that has none."""
    return cuda.is_available() or nvml.device_count() > 0


def _uuid(properties: Any) -> str:
    uuid = str(getattr(properties, "uuid", ""))
    return uuid if not uuid or uuid.startswith("GPU-") else f"GPU-{uuid}"


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


# ---- out of memory ---------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = (
    "CUDA out of memory",  # torch's caching allocator, as torch.OutOfMemoryError
    "CUDA error: out of memory",  # the driver, as torch.AcceleratorError
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS makes its handle when it is first used, and says this if that fails
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
    "Cuda failure 'out of memory'",  # NCCL, some versions
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)

_GONE = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "hardware stack error",
    "launch timed out",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "GPU is lost",
    "no CUDA-capable device",
    "CUDA error: unknown error",
)
"""Errors after which a process cannot use its CUDA context any more (CUDA Runtime API, section on ``cudaError``)."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if ``error`` says that memory ran out, in any wording of torch, CUDA's libraries, Triton or the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(wording in str(error) for wording in _OUT_OF_MEMORY)


def is_gone(error: BaseException) -> bool:
    """True if ``error`` says that the GPU itself failed, so that nothing can run on it in this process any more."""
    return isinstance(error, RuntimeError) and any(wording in str(error) for wording in _GONE)


def explain(error: BaseException, device: torch.device, what: str, remedy: str) -> HRSError | None:
    """Return one sentence for an error that ran out of memory or lost the GPU; None for any other error.

    Args:
        what: what was being done, such as "the averages of the weights are too much".
        remedy: what the user can change, as an imperative.
    """
    if is_gone(error):
        index = cuda.index_of(device) or 0
        cuda.failures[index] = _first_line(error)
        return _gone(index)
    if not is_out_of_memory(error):
        return None
    gpu = gpu_of(device)
    if gpu is None:
        where = str(device)
    else:
        found = gpu.properties
        where = (
            f"GPU {gpu.index} ({found.name}, {found.total_bytes / 2**30:.1f} GiB, {found.free_bytes / 2**30:.1f} free)"
        )
    return HRSError(f"the model does not fit on {where}: {what} ({_first_line(error)}); {remedy}")


@contextlib.contextmanager
def explained(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """Raise the sentence of :func:`explain` instead of an error inside that has one."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        sentence = explain(error, device, what, remedy)
        if sentence is None:
            raise
        raise sentence from error


def move(module: Module, device: torch.device) -> Module:
    """Move ``module`` to ``device`` and return it.

    Raises:
        HRSError: if it does not fit there.
    """
    weights = sum(p.nbytes for p in (*module.parameters(), *module.buffers()))
    remedy = "free memory of the GPU, use a larger one, or a smaller scale"
    with explained(device, f"its weights take {weights / 2**30:.2f} GiB", remedy):
        cuda.move(module, device)
    return module


def with_batch_that_fits(call: Callable[[int], T], batch: int, device: torch.device, what: str) -> tuple[T, int]:
    """Call ``call(batch)`` with half the batch again and again while memory runs out.

    Args:
        call: starts from the beginning each time and keeps nothing of a call that failed.
        batch: windows at a time, at first.
        what: the work, such as "evaluation".

    Returns:
        What it returned, and the batch that fitted.

    Raises:
        HRSError: if not even one window at a time fits, or the GPU is gone.
    """
    while True:
        try:
            return call(batch), batch
        except (RuntimeError, MemoryError) as error:
            remedy = "free memory of the GPU or use a larger one"
            sentence = explain(error, device, f"{what} of one window at a time is too much", remedy)
            if sentence is None:
                raise
            final = batch == 1 or is_gone(error)
        # Outside the except block: the exception's traceback keeps the activations alive.
        if final:
            raise sentence
        gpu = gpu_of(device)
        if gpu is not None:
            gpu.release_cached_memory()
        _log.warning("%s ran out of memory with %d windows at a time, going on with %d", what, batch, batch // 2)
        batch //= 2


def _gone(index: int) -> HRSError:
    return HRSError(
        f"GPU {index} failed ({cuda.failures[index]}) and cannot be used again by this process: check `nvidia-smi`, "
        "then start the same command again, which goes on from the last checkpoint"
    )
