"""A process that the operating system ends leaves the signal and the place with its run."""

import faulthandler
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hrs.tracking.crash import recording_crashes, why_it_ended

CRASH = """
import ctypes, os, sys
from pathlib import Path
from hrs.tracking.crash import recording_crashes

def read_memory_that_is_not_there():
    ctypes.string_at(0)

with recording_crashes(Path(sys.argv[1])):
    read_memory_that_is_not_there() if sys.argv[2] == "crash" else os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("how", "sent", "sentence"),
    [
        ("crash", signal.SIGSEGV, r"crashed: Segmentation fault in string_at \(__init__.py:\d+\)"),
        ("kill", signal.SIGKILL, "was killed from outside"),
    ],
)
def test_a_crash_is_told_from_a_kill(how: str, sent: signal.Signals, sentence: str, tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), how], stderr=subprocess.DEVNULL)
    assert ended.returncode == -sent
    reason = why_it_ended(tmp_path, "host:1:2")
    assert reason.startswith("its process host:1:2 ") and "\n" not in reason
    assert re.search(sentence, reason), reason


def test_a_run_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    before = faulthandler.is_enabled()
    with recording_crashes(tmp_path):
        assert faulthandler.is_enabled()
    assert list(tmp_path.iterdir()) == [] and faulthandler.is_enabled() == before
