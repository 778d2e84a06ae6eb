"""What a process leaves when the operating system ends it in the middle of a run: the signal and the Python stack."""

import contextlib
import faulthandler
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_FILE = "crash.txt"
_SIGNAL = re.compile(r"Fatal Python error: (.+)")
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (\S+)')


@contextlib.contextmanager
def recording_crashes(directory: Path) -> Iterator[None]:
    """Let a segmentation fault, an abort or a bus error write the stack of this process into a run's directory."""
    path, was_enabled = directory / _FILE, faulthandler.is_enabled()
    with path.open("w", encoding="utf-8") as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield
        finally:
            faulthandler.disable()
            if was_enabled and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__, all_threads=False)
    path.unlink(missing_ok=True)


def why_it_ended(directory: Path, owner: str) -> str:
    """Return one line on why the process ``owner``, which wrote a run into ``directory``, is gone."""
    path = directory / _FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if (signal := _SIGNAL.search(text)) is None:
        return (
            f"its process {owner} was killed from outside (the kernel does that when memory runs out: see `dmesg`), "
            "or its machine went away"
        )
    frame = _FRAME.search(text)
    place = f" in {frame[3]} ({os.path.basename(frame[1])}:{frame[2]})" if frame else ""
    return f"its process {owner} crashed: {signal[1]}{place}"
