"""``hrs.gpu`` on simulated GPUs: the order of its calls, what it tells of a machine, and the errors it knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hrs.gpu
from hrs.errors import HRSError
from hrs.gpu import Gpu, Nvml, gpu_of, has_gpu, is_gone, is_out_of_memory, open_gpu, probe_gpus, require_usable_gpus
from tests.simulated_gpu import (
    CONTEXT_BYTES,
    GIB,
    GONE,
    OUT_OF_MEMORY,
    SimulatedCuda,
    SimulatedGpu,
    simulated_gpus,
)

ROOT = Path(__file__).parents[1]
TURING = SimulatedGpu(name="Tesla T4", total_bytes=15 * GIB, capability=(7, 5))


# ---- the simulation is as strict as torch ----------------------------------------------------------------------------


def test_simulation_refuses_what_torch_refuses() -> None:
    cuda = SimulatedCuda([SimulatedGpu()])
    with pytest.raises(RuntimeError, match="Invalid device argument"):
        cuda.reset_peak_memory_stats(torch.device("cuda", 0))
    with pytest.raises(
        ValueError, match=r"Expected a torch\.device with a specified index or an integer, but got:cuda"
    ):
        cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    with pytest.raises(ValueError, match="Expected a cuda device, but got: cpu"):
        cuda.synchronize(torch.device("cpu"))
    with pytest.raises(ValueError, match="Allowed range"):
        cuda.set_per_process_memory_fraction(1.5, torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        cuda.set_device(torch.device("cuda", 1))


def test_simulation_overrides_every_call() -> None:
    ours = {name for name in vars(hrs.gpu.Cuda) if not name.startswith("_")}
    assert ours <= set(vars(SimulatedCuda)), "a call would reach the real CUDA"


# ---- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_opening_initialises_before_anything_else_and_gives_a_device_with_an_index(name: str) -> None:
    with simulated_gpus(SimulatedGpu()) as cuda:
        gpu = open_gpu(name)
        assert gpu is not None and gpu.device.index == 0
        assert cuda.calls == ["init", "set_device(0)"]


@pytest.mark.parametrize("first", ["reset_peak", "peak_bytes", "free_bytes", "synchronize", "get_rng_state", "bf16"])
def test_every_method_is_valid_as_the_first_one(first: str) -> None:
    with simulated_gpus(SimulatedGpu()):
        value = getattr(Gpu(0), first)
        if callable(value):
            value()


def test_cap_is_in_bytes_and_may_exceed_the_gpu() -> None:
    with simulated_gpus(SimulatedGpu(total_bytes=16 * GIB)) as cuda:
        gpu = Gpu(0)
        gpu.cap_memory(4 * GIB)
        assert cuda.caps == {0: 4 * GIB}
        gpu.cap_memory(32 * GIB)
        assert cuda.caps == {0: 16 * GIB}


def test_second_gpu_is_opened_by_its_index() -> None:
    with simulated_gpus(SimulatedGpu(), TURING) as cuda:
        gpu = open_gpu("cuda:1")
        assert gpu is not None and gpu.properties.name == "Tesla T4"
        assert cuda.calls[:2] == ["init", "set_device(1)"]
        assert gpu_of(gpu.device) is not None
        assert gpu_of(torch.device("cpu")) is None


def test_unusable_devices_are_refused_in_a_sentence() -> None:
    with simulated_gpus(SimulatedGpu()):
        with pytest.raises(HRSError, match="cuda:3 does not exist: there are 1 GPUs"):
            open_gpu("cuda:3")
        with pytest.raises(HRSError, match="unknown device 'warp'"):
            open_gpu("warp")
        assert open_gpu("cpu") is None
    with simulated_gpus():
        assert open_gpu("auto") is None and not has_gpu()
        with pytest.raises(HRSError, match="torch finds no GPU on this machine; use --device cpu"):
            open_gpu("cuda")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_driver_too_old_is_an_error_not_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with simulated_gpus(SimulatedGpu(), old_driver=True):
        for call in (lambda: open_gpu(name), require_usable_gpus, probe_gpus):
            with pytest.raises(HRSError, match=r"this machine has 1 GPU \(driver 550.54\) that torch .* cannot use"):
                call()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        require_usable_gpus()


def test_bf16_is_for_ampere_and_later() -> None:
    with simulated_gpus(SimulatedGpu(capability=(8, 0)), TURING):
        assert Gpu(0).bf16 and Gpu(0).properties.bf16
        assert not Gpu(1).bf16 and not Gpu(1).properties.bf16


# ---- looking without opening -----------------------------------------------------------------------------------------


def test_probe_tells_free_memory_without_its_own_context_and_opens_nothing() -> None:
    with simulated_gpus(SimulatedGpu(used_bytes=3 * GIB), TURING) as cuda:
        first, second = probe_gpus()
        assert cuda.calls == [] and not cuda.is_initialized()
    assert (first.name, first.total_bytes, first.free_bytes) == ("NVIDIA RTX 4080", 16 * GIB, 13 * GIB)
    assert (second.index, second.capability, second.free_bytes) == (1, (7, 5), 15 * GIB)
    assert first.kind == "NVIDIA RTX 4080 16 GiB"
    with simulated_gpus(SimulatedGpu()):
        assert Gpu(0).properties.free_bytes == 16 * GIB - CONTEXT_BYTES


def test_machine_without_a_driver_has_no_gpus() -> None:
    with simulated_gpus():
        assert probe_gpus() == ()


def test_allocator_is_configured_before_cuda_starts_unless_the_user_did() -> None:
    script = """
import importlib, os, hrs.gpu
print(os.environ["PYTORCH_ALLOC_CONF"], os.environ["CUDA_DEVICE_ORDER"])
del os.environ["PYTORCH_ALLOC_CONF"]
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:native"
importlib.reload(hrs.gpu)
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""
    set_here = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_ORDER")
    clean = {name: value for name, value in os.environ.items() if name not in set_here}
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["expandable_segments:True", "PCI_BUS_ID", "None"]


def test_without_nvml_the_kernel_module_tells_version_and_number(tmp_path: Path) -> None:
    class Unbound(Nvml):
        proc = tmp_path

        def _ask(self, question: object) -> None:
            return None

    assert (Unbound().driver_version(), Unbound().device_count()) == (None, 0)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:02:00.0").mkdir()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    assert (Unbound().driver_version(), Unbound().device_count()) == ("570.86.15", 2)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wording", OUT_OF_MEMORY)
def test_out_of_memory_is_recognised_in_every_wording(wording: str) -> None:
    error = OUT_OF_MEMORY[wording]()
    assert is_out_of_memory(error) and not is_gone(error)


@pytest.mark.parametrize("wording", GONE)
def test_failed_gpu_is_recognised_in_every_wording(wording: str) -> None:
    error = GONE[wording]()
    assert is_gone(error) and not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5"),
        ValueError("CUDA out of memory"),  # a text, not a report of torch
        KeyError("out of memory"),
    ],
)
def test_other_errors_are_neither(error: Exception) -> None:
    assert not is_out_of_memory(error) and not is_gone(error)


def test_counted_memory_runs_out_at_the_cap_and_at_what_others_left() -> None:
    with simulated_gpus(SimulatedGpu(total_bytes=GIB, used_bytes=GIB // 2), count_memory=True) as cuda:
        gpu = Gpu(0)
        gpu.cap_memory(2**20)
        kept = torch.zeros(2**17)  # half of the cap
        gpu.reset_peak()
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2**18)
        cuda.out_of_memory = "driver"
        with pytest.raises(torch.AcceleratorError, match="CUDA error: out of memory"):
            torch.zeros(2**18)
        assert gpu.peak_bytes() == 2**19 + 2**20
        del kept
        gpu.cap_memory(GIB)
        with pytest.raises(torch.AcceleratorError):
            torch.empty(GIB // 4)  # 1 GiB, and others have half


# ---- who uses it -----------------------------------------------------------------------------------------------------


def test_only_hrs_gpu_calls_cuda() -> None:
    """The rule is ruff's; this checks that it sees every way to write it."""
    source = "import torch\nfrom torch import cuda\n\ntorch.cuda.synchronize()\ntorch.accelerator.synchronize()\n"
    ruff = [str(Path(sys.executable).parent / "ruff"), "check", "--output-format", "concise", "--stdin-filename"]
    found = {
        name: subprocess.run([*ruff, name, "-"], input=source, capture_output=True, text=True, cwd=ROOT).stdout
        for name in ("hrs/training/new.py", "hrs/gpu.py")
    }
    assert found["hrs/training/new.py"].count("TID251") == 3
    assert "TID251" not in found["hrs/gpu.py"]
