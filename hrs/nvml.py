"""What NVIDIA's driver tells of GPUs: without CUDA and without torch, so that asking is cheap."""

import contextlib
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Nvml:
    """What the driver tells of GPUs without CUDA.

    Where NVML or its Python binding is missing, version and number come from the files of the kernel module, so that a
    GPU is not overlooked for want of the binding.
    """

    proc = Path("/proc/driver/nvidia")
    """Where the kernel module of the driver describes itself."""

    def driver_version(self) -> str | None:
        """Return the version of the NVIDIA driver, such as ``570.86``; None if there is no driver."""
        told = self._ask(lambda nvml: str(nvml.nvmlSystemGetDriverVersion()))
        if told is None:
            with contextlib.suppress(OSError):
                found = re.search(r"\b\d{3,}(?:\.\d+)+", (self.proc / "version").read_text(encoding="utf-8"))
                told = found[0] if found else None
        return told

    def memory(self) -> dict[str, tuple[int, int]]:
        """Return free and total bytes of every GPU of the machine by UUID; empty if NVML cannot tell."""

        def ask(nvml: Any) -> dict[str, tuple[int, int]]:
            found = {}
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                info = nvml.nvmlDeviceGetMemoryInfo(handle)
                found[str(nvml.nvmlDeviceGetUUID(handle))] = (int(info.free), int(info.total))
            return found

        return self._ask(ask) or {}

    def used_by(self, pids: set[int]) -> int:
        """Return the bytes that processes hold on all GPUs together; 0 if NVML cannot tell."""

        def ask(nvml: Any) -> int:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            processes = [p for handle in handles for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
            return sum(int(p.usedGpuMemory or 0) for p in processes if p.pid in pids)

        return self._ask(ask) or 0

    def device_count(self) -> int:
        """Return the number of GPUs of the machine, whatever ``CUDA_VISIBLE_DEVICES`` says; 0 if nothing can tell."""
        count = self._ask(lambda nvml: int(nvml.nvmlDeviceGetCount()))
        if count is None:
            with contextlib.suppress(OSError):
                count = len(list((self.proc / "gpus").iterdir()))
        return count or 0

    def _ask(self, question: Callable[[Any], T]) -> T | None:
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
        except Exception:  # no binding (the `gpu` extra), no driver, or a driver of another version than its library
            return None
        try:
            return question(nvml)
        except nvml.NVMLError:  # such as "not supported" by a GPU that is divided
            return None
        finally:
            nvml.nvmlShutdown()
