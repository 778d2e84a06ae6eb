"""Keys of content: the same whatever surrounds the code, and whoever asks at once."""

import gc
import threading
import time
from pathlib import Path

import pytest

from hrs.identity import code_fingerprint

CODE = '''
def area(width, height):
    """Of a rectangle."""
    return width * height  # square units
'''


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.py" for number in range(3)]
    for path in paths:
        path.write_text(CODE * 20)
    return paths


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("  # square units", "", True),
        ("Of a rectangle.", "Of a circle.", True),
        ("    return", "\n\n    return", True),
        ("width * height", "width + height", False),
    ],
)
def test_only_what_runs_counts(files: list[Path], old: str, new: str, same: bool) -> None:
    before = code_fingerprint(files)
    files[1].write_text(files[1].read_text().replace(old, new))
    assert (code_fingerprint(files) == before) is same


def test_threads_may_ask_at_once(files: list[Path]) -> None:
    expected, seen = code_fingerprint(files), []

    def switch_threads(*_: object) -> None:
        time.sleep(0)

    askers = [threading.Thread(target=lambda: seen.append(code_fingerprint(files))) for _ in range(3)]
    threshold = gc.get_threshold()
    gc.callbacks.append(switch_threads)
    gc.set_threshold(50)
    try:
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(switch_threads)
    assert seen == [expected] * 3
