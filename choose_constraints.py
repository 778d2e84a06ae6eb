"""Choose the pinned versions that fit this machine's NVIDIA driver; needs nothing but Python 3.11.

    python3 choose_constraints.py        # prints "constraints-cu12.txt dev,gpu" and says why on stderr

torch 2.13, which ``constraints.txt`` pins, is built for CUDA 13 and needs driver 580. torch 2.10 is the last release
whose build on PyPI is for CUDA 12 (12.8); programs built for any CUDA 12 run on drivers from 525 on ("CUDA minor
version compatibility" in NVIDIA's documentation). Without a driver the CUDA 13 build runs on the CPU.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

CUDA_13, CUDA_12 = "constraints.txt", "constraints-cu12.txt"
FIRST_DRIVER_OF_CUDA_13 = 580
FIRST_DRIVER_OF_CUDA_12 = 525

KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, such as ``570.86.15``; None if there is none."""
    try:
        found = re.search(r"\b\d{3,}(?:\.\d+)+", KERNEL_MODULE.read_text())
    except OSError:
        found = None
    if found:
        return found[0]
    try:  # Windows' Linux has no kernel module of its own
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"\d{3,}(?:\.\d+)+", done.stdout.strip())
    return found[0] if found and not done.returncode else None


def choose(driver: str | None) -> tuple[str, str]:
    """Return the constraints file for a driver, and the sentence that says why.

    Raises:
        ValueError: if no build of torch on PyPI works with the driver.
    """
    if driver is None:
        return CUDA_13, f"no NVIDIA driver -> the CPU, {CUDA_13}"
    major = int(driver.split(".")[0])
    if major >= FIRST_DRIVER_OF_CUDA_13:
        return CUDA_13, f"NVIDIA driver {driver} -> CUDA 13, {CUDA_13}"
    if major >= FIRST_DRIVER_OF_CUDA_12:
        return CUDA_12, f"NVIDIA driver {driver} -> CUDA 12, {CUDA_12}"
    raise ValueError(
        f"NVIDIA driver {driver} is older than {FIRST_DRIVER_OF_CUDA_12}, the first one for CUDA 12: update it, or run "
        f"`make setup CONSTRAINTS={CUDA_13}` to use the CPU with CUDA_VISIBLE_DEVICES= set"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the constraints file and the extras to install; 1 if the driver is too old."""
    parser = argparse.ArgumentParser(description="Choose constraints by the NVIDIA driver.")
    parser.add_argument("--extras", default="", help="comma-separated extras to install besides gpu")
    parser.add_argument("--constraints", default="", help="use this file whatever the driver is")
    options = parser.parse_args(arguments)
    driver = driver_version()
    try:
        file, why = (options.constraints, f"{options.constraints} as asked") if options.constraints else choose(driver)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"setup: {why}", file=sys.stderr)
    extras = [extra for extra in options.extras.split(",") if extra] + (["gpu"] if driver else [])
    print(file, ",".join(extras))
    return 0


if __name__ == "__main__":
    sys.exit(main())
