"""Everything that only a real GPU can show, with one command, in about ten minutes on any NVIDIA GPU of 8 GB or more.

    make test-gpu                                   # in the project's environment
    python -m tests.gpu                             # in any environment with torch, numpy, pyarrow, safetensors,
                                                    # tokenizers and transformers; parts that need Ray are skipped
    python -m tests.gpu --only presets,kernels
    python -m tests.gpu --list

Each check runs in a process of its own, so one that kills its CUDA context does not stop the others. The table at the
end is Markdown: paste it into an issue. The exit status is 1 if anything failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hrs.errors import HRSError
from hrs.gpu import has_gpu, require_usable_gpus
from tests.gpu.bench import Row, format_table, rows_from_lines

ROOT = Path(__file__).resolve().parent.parent.parent
CHECK_SECONDS = 900.0
"""Longest time of one check; compilation on a slow host is most of it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the checks that were asked for and print their table; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated names of checks")
    parser.add_argument("--list", action="store_true", help="print the names of the checks and what they do")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--presets", default="", help="comma-separated presets in place of all")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    from tests.gpu.checks import CHECKS, Settings

    settings = Settings(device=args.device, presets=tuple(filter(None, args.presets.split(","))))
    if args.list:
        for name, check in CHECKS.items():
            print(f"{name:12}{(check.__doc__ or '').splitlines()[0]}")
        return 0
    if args.worker:
        return _work(args.worker, settings)
    names = list(filter(None, args.only.split(","))) or list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        print(f"error: unknown check {', '.join(unknown)}: choose of {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    try:
        require_usable_gpus()
    except HRSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not has_gpu():
        print("error: torch finds no GPU on this machine: run this where there is one", file=sys.stderr)
        return 2
    began = time.monotonic()
    rows: list[Row] = []
    for name in names:
        rows += _run_check(name, args)
    print(f"\n{format_table(rows)}\n")
    failed = sum(row.result == "FAILED" for row in rows)
    skipped = sum(row.result == "skipped" for row in rows)
    passed = len(rows) - failed - skipped
    print(f"{passed} passed, {failed} failed, {skipped} skipped in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _work(name: str, settings: object) -> int:
    """Run one check in this process; each row is a line of JSON on standard output."""
    from tests.gpu.checks import run_check

    failed = False
    with tempfile.TemporaryDirectory(prefix="hrs-gpu-") as folder:
        for row in run_check(name, settings, Path(folder)):  # type: ignore[arg-type]
            print("ROW " + json.dumps(row.as_dict()), flush=True)
            failed |= row.result == "FAILED"
    return 1 if failed else 0


def _run_check(name: str, args: argparse.Namespace) -> list[Row]:
    """Run one check in a process of its own, relaying its rows as they come."""
    print(f"--- {name}", flush=True)
    command = [sys.executable, "-m", "tests.gpu", "--worker", name, "--device", args.device, "--presets", args.presets]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    rows, other = [], []
    timer = threading.Timer(CHECK_SECONDS, process.kill)  # what hangs on the GPU prints nothing
    timer.start()
    for line in process.stdout:
        found = rows_from_lines([line])
        rows += found
        other += [] if found else [line]
        for row in found:
            print(f"{row.result:8} {row.subject:32} {row.figures}", flush=True)
    status = process.wait()
    timer.cancel()
    if status and not any(row.result == "FAILED" for row in rows):
        last = next((line.strip() for line in reversed(other) if line.strip()), "no message")
        rows.append(Row(name, "the check itself", "FAILED", f"ended with status {status}: {last}"))
        print("".join(other[-30:]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
