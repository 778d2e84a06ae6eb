"""The constraints file follows the NVIDIA driver, and the two files differ in CUDA alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import choose_constraints
from choose_constraints import choose, driver_version, main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("driver", "file"),
    [
        (None, "constraints.txt"),
        ("525.60.13", "constraints-cu12.txt"),
        ("535.183.01", "constraints-cu12.txt"),
        ("570.86.15", "constraints-cu12.txt"),
        ("579.99", "constraints-cu12.txt"),
        ("580.65.06", "constraints.txt"),
        ("610.12", "constraints.txt"),
        ("1000.1", "constraints.txt"),
    ],
)
def test_every_driver_has_its_file(driver: str | None, file: str) -> None:
    chosen, why = choose(driver)
    assert chosen == file
    assert file in why and (driver or "no NVIDIA driver") in why


@pytest.mark.parametrize("driver", ["470.256.02", "524.99"])
def test_a_driver_before_cuda_12_is_refused_in_one_sentence(driver: str) -> None:
    with pytest.raises(ValueError, match=f"driver {driver} is older than 525") as caught:
        choose(driver)
    assert "\n" not in str(caught.value)


def test_the_kernel_module_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: 12.2.0\n"
    )
    monkeypatch.setattr(choose_constraints, "KERNEL_MODULE", version)
    assert driver_version() == "570.86.15"
    assert main(["--extras", "dev"]) == 0
    said = capsys.readouterr()
    assert said.out == "constraints-cu12.txt dev,gpu\n"
    assert said.err == "setup: NVIDIA driver 570.86.15 -> CUDA 12, constraints-cu12.txt\n"


def test_nvidia_smi_is_asked_without_a_kernel_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_constraints, "KERNEL_MODULE", tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 535.183.01\necho 535.183.01\n")
    tool.chmod(0o755)
    assert driver_version() == "535.183.01"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed because it could not communicate with the driver\nexit 9\n")
    assert driver_version() is None


def test_the_script_runs_without_any_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "choose_constraints.py", "--constraints", "constraints.txt"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "constraints.txt")


def pins(file: str) -> dict[str, str]:
    return dict(line.split("==", 1) for line in (ROOT / file).read_text().splitlines())


def test_the_files_differ_in_torch_and_cuda_alone() -> None:
    cuda_13, cuda_12 = pins("constraints.txt"), pins("constraints-cu12.txt")
    changed = {name for name in cuda_13 | cuda_12 if cuda_13.get(name) != cuda_12.get(name)}
    assert "torch" in changed
    assert all(re.match(r"torch$|triton$|cuda-|nvidia-", name) for name in changed), changed
    assert not [name for name in cuda_13 if name.endswith("-cu12")]
    assert not [name for name in cuda_12 if name.endswith("-cu13") or name == "cuda-toolkit"]
