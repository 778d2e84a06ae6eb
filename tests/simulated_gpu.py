"""GPUs for tests on a machine without one: tensors stay in the memory of the host, errors are those of CUDA.

    with simulated_gpus(SimulatedGpu(total_bytes=8 * 2**30)) as cuda:
        ...                                     # hrs.gpu.cuda and hrs.gpu.nvml are the simulated ones
    assert cuda.calls == ["init", "set_device(0)"]

The device of GPU N is ``cpu:N``, which torch accepts everywhere and whose tensors say ``cpu``. Every method of
:class:`SimulatedCuda` refuses what the method of ``torch.cuda`` refuses, in its words (torch 2.13). Allocations are
counted for one GPU, the current one, and only if ``count_memory`` is True: a dispatch mode then sees every operator.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hrs.gpu
from hrs.gpu import Cuda, Nvml
from hrs.training.memory_trace import StorageCounter

GIB = 2**30

CONTEXT_BYTES = 400 * 2**20
"""What CUDA keeps of a GPU for every process that has opened it."""

OUT_OF_MEMORY: dict[str, Callable[[], Exception]] = {
    "caching allocator": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.57 GiB of which 1.20 GiB is "
        "free. Process 4711 has 14.36 GiB memory in use."
    ),
    "driver": lambda: torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
        "stacktrace below might be incorrect."
    ),
    "driver, older torch": lambda: RuntimeError("CUDA error: out of memory"),
    "driver API": lambda: RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS handle": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "NCCL": lambda: RuntimeError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: "
        "Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "host": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python": lambda: MemoryError("Unable to allocate 2.00 GiB for an array"),
}
"""Every wording in which torch, CUDA's libraries, Triton and the host say that memory ran out."""

GONE: dict[str, Callable[[], Exception]] = {
    "assert": lambda: torch.AcceleratorError("CUDA error: device-side assert triggered"),
    "address": lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "launch": lambda: torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "ECC": lambda: torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    "lost": lambda: RuntimeError("Unable to determine the device handle for GPU0: GPU is lost"),
    "removed": lambda: torch.AcceleratorError("CUDA error: no CUDA-capable device is detected"),
    "Triton": lambda: RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
}
"""Errors after which nothing can run on the GPU in the same process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedGpu:
    """One GPU of a simulated machine."""

    name: str = "NVIDIA RTX 4080"
    total_bytes: int = 16 * GIB
    used_bytes: int = 0
    """By other processes."""
    capability: tuple[int, int] = (8, 9)


class SimulatedCuda(Cuda):
    """CUDA of a machine with ``gpus``; ``old_driver`` is one that torch cannot use."""

    def __init__(self, gpus: Sequence[SimulatedGpu], *, old_driver: bool = False) -> None:
        super().__init__()
        self.gpus = tuple(gpus)
        self.old_driver = old_driver
        self.calls: list[str] = []
        """Every call that a real process would make of CUDA, in order, with the index of its GPU."""
        self.caps: dict[int, int] = {}
        """Bytes that the allocator may take, by index of the GPU."""
        self.out_of_memory = "caching allocator"
        """Key of :data:`OUT_OF_MEMORY`: how an allocation beyond the memory fails."""
        self.counter: StorageCounter | None = None
        self.tf32 = False
        self._opened: set[int] = set()
        self._current = 0
        self._initialized = False

    # ---- opening -----------------------------------------------------------------------------------------------------

    def is_available(self) -> bool:
        return bool(self.gpus) and not self.old_driver

    def is_initialized(self) -> bool:
        return self._initialized

    def init(self) -> None:
        self.calls.append("init")
        if self.old_driver:
            raise RuntimeError(
                "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"
            )
        if not self.gpus:
            raise RuntimeError("No CUDA GPUs are available")
        self._initialized = True

    def device_count(self) -> int:
        return len(self.gpus)  # torch asks NVML first, so a driver that is too old does not hide them

    def current_device(self) -> int:
        self._initialized = True
        return self._current

    def set_device(self, device: torch.device) -> None:
        self._current = self._index("set_device", device, optional=True)
        self._opened.add(self._current)

    def allow_tf32(self) -> None:
        self.tf32 = True

    # ---- memory ------------------------------------------------------------------------------------------------------

    def get_device_properties(self, device: torch.device) -> Any:
        index = self._index("get_device_properties", device, optional=True)
        gpu = self.gpus[index]
        major, minor = gpu.capability
        return SimpleNamespace(
            name=gpu.name, total_memory=gpu.total_bytes, major=major, minor=minor, uuid=uuid_of(index)[4:]
        )

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        index = self._index("mem_get_info", device, optional=True)
        self._opened.add(index)
        return self.free_bytes(index), self.gpus[index].total_bytes

    def free_bytes(self, index: int) -> int:
        """Return what no process uses: total memory without others, this one's context and its tensors."""
        gpu = self.gpus[index]
        own = CONTEXT_BYTES if index in self._opened else 0
        if self.counter is not None and index == self._current:
            own += self.counter.live_bytes
        return max(gpu.total_bytes - gpu.used_bytes - own, 0)

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        index = self._index("set_per_process_memory_fraction", device)
        if not isinstance(fraction, float):
            raise TypeError("Invalid type for fraction argument, must be `float`")
        if not 0 <= fraction <= 1:
            raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
        self.caps[index] = int(fraction * self.gpus[index].total_bytes)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        if not self._initialized:
            raise RuntimeError(f"Invalid device argument {device.index or 0}: did you call init?")
        self._index("reset_peak_memory_stats", device, optional=True)
        if self.counter is not None:
            self.counter.peak_bytes = self.counter.live_bytes

    def max_memory_allocated(self, device: torch.device) -> int:
        if not self._initialized:
            return 0
        self._index("max_memory_allocated", device, optional=True)
        return 0 if self.counter is None else self.counter.peak_bytes

    def max_memory_reserved(self, device: torch.device) -> int:
        return self.max_memory_allocated(device)

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    # ---- the queue ---------------------------------------------------------------------------------------------------

    def synchronize(self, device: torch.device) -> None:
        self._index("synchronize", device, optional=True)

    def get_rng_state(self, device: torch.device) -> Tensor:
        self._index("get_rng_state", device, optional=True)
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self._index("set_rng_state", device, optional=True)
        torch.set_rng_state(state)

    def pinned_empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        self.calls.append(f"pinned_empty({dtype.itemsize * shape.numel()} bytes)")
        return torch.empty(shape, dtype=dtype)

    def record_event(self, device: torch.device) -> Any:
        self._index("record_event", device, optional=True)
        return SimpleNamespace(synchronize=lambda: None, query=lambda: True)

    def capture(
        self, device: torch.device, function: Callable[[], Any], warm_up: int
    ) -> tuple[Callable[[], None], Any]:
        """Replay by calling ``function`` again and copying what it returns over what it returned at the capture."""
        self._index("capture", device, optional=True)
        for _ in range(warm_up):
            function()
        result = function()

        def replay() -> None:
            flat, _ = torch.utils._pytree.tree_flatten(result)
            again, _ = torch.utils._pytree.tree_flatten(function())
            for old, new in zip(flat, again, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, result

    # ---- where tensors live ------------------------------------------------------------------------------------------

    def tensor_device(self, index: int) -> torch.device:
        return torch.device("cpu", index)

    def index_of(self, device: torch.device) -> int | None:
        return device.index if device.type == "cpu" else None

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Count the module's tensors, which stay where they are."""
        if self.counter is not None:
            self.counter.see([*module.parameters(), *module.buffers()])
            self.require_memory()

    def require_memory(self) -> None:
        """Raise an out-of-memory error if the counted tensors need more than the cap or the GPU's memory."""
        assert self.counter is not None
        gpu = self.gpus[self._current]
        limit = min(gpu.total_bytes - gpu.used_bytes - CONTEXT_BYTES, self.caps.get(self._current, gpu.total_bytes))
        if self.counter.live_bytes > limit:
            raise OUT_OF_MEMORY[self.out_of_memory]()

    def probe(self) -> str:
        """Print the GPUs as a new process would: with a CUDA that has opened none of them."""
        fresh = SimulatedCuda(self.gpus, old_driver=self.old_driver)
        output = io.StringIO()
        with _replaced(fresh, SimulatedNvml(fresh)), contextlib.redirect_stdout(output):
            hrs.gpu.print_gpus()
        assert json.loads(output.getvalue()) is not None
        return output.getvalue()

    def _index(self, call: str, device: torch.device, *, optional: bool = False) -> int:
        """Return the index that torch takes ``device`` to mean, in a process that has opened CUDA or does so now."""
        if device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        if device.index is None and not optional:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        if not self._initialized:
            self.init()
        index = self._current if device.index is None else device.index
        if not 0 <= index < len(self.gpus):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        self.calls.append(f"{call}({index})")
        return index


class SimulatedNvml(Nvml):
    """The driver of the machine that ``cuda`` simulates."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda = cuda

    def driver_version(self) -> str | None:
        if not self._cuda.gpus:
            return None
        return "550.54" if self._cuda.old_driver else "580.65"

    def memory(self) -> dict[str, tuple[int, int]]:
        gpus = self._cuda.gpus
        return {uuid_of(index): (self._cuda.free_bytes(index), gpu.total_bytes) for index, gpu in enumerate(gpus)}

    def device_count(self) -> int:
        return len(self._cuda.gpus)


def uuid_of(index: int) -> str:
    """Return the UUID of a simulated GPU as NVML spells it; torch leaves the prefix out."""
    return f"GPU-00000000-0000-0000-0000-{index:012d}"


@contextlib.contextmanager
def simulated_gpus(
    *gpus: SimulatedGpu, old_driver: bool = False, count_memory: bool = False
) -> Iterator[SimulatedCuda]:
    """Replace CUDA and NVML by those of a machine with ``gpus``; without arguments by one without a GPU.

    With ``count_memory`` the tensors that operators touch inside count as the current GPU's, up to its free memory or
    the process's cap; a test says by :attr:`SimulatedCuda.out_of_memory` how going beyond it is reported.
    """
    cuda = SimulatedCuda(gpus, old_driver=old_driver)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(cuda, SimulatedNvml(cuda)))
        if count_memory:
            stack.enter_context(_Allocator(cuda))
        yield cuda


@contextlib.contextmanager
def _replaced(cuda: Cuda, nvml: Nvml) -> Iterator[None]:
    before = hrs.gpu.cuda, hrs.gpu.nvml
    hrs.gpu.cuda, hrs.gpu.nvml = cuda, nvml
    try:
        yield
    finally:
        hrs.gpu.cuda, hrs.gpu.nvml = before


class _Allocator(StorageCounter):
    """Count storages for a simulated GPU, and fail in the wording that the test chose."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__(block_bytes=512)
        self._cuda = cuda
        cuda.counter = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._cuda.require_memory()
        return result


class FailAbove(TorchDispatchMode):
    """Raise ``error()`` when an embedding of more than ``rows`` windows is looked up.

    Every pass of a language model over windows starts with one, so this is a memory that holds ``rows`` windows,
    whatever else is allocated. ``failures`` counts them.
    """

    def __init__(self, rows: int, error: Callable[[], Exception]) -> None:
        super().__init__()
        self.rows = rows
        self.error = error
        self.failures = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default and args[1].ndim == 2 and len(args[1]) > self.rows:
            self.failures += 1
            raise self.error()
        return func(*args, **(kwargs or {}))
