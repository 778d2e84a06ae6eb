"""A full disk is one sentence, in whatever words it arrives."""

import errno

import pytest

from hrs.errors import is_full, reason_of
from jobs.entry import run_entry


def as_mlflow_says_it() -> Exception:
    try:
        try:
            raise OSError("(sqlite3.OperationalError) database or disk is full")
        except OSError as cause:
            raise RuntimeError("the transaction was rolled back\n[SQL: INSERT INTO runs ...]") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "/x/y"), as_mlflow_says_it()])
def test_a_full_disk_is_one_sentence(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_full(error) and not is_full(OSError(errno.EACCES, "Permission denied"))

    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line == f"error: {reason_of(error)}"
    assert line.startswith("error: the disk is full (") and line.endswith("make room, then run the same command again")
