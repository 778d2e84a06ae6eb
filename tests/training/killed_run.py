"""A process that trains and kills itself with SIGKILL: python killed_run.py CONFIG_JSON TOKENS DIRECTORY WHERE COUNT.

WHERE is ``report`` (after that many progress reports), ``fsync`` or ``replace`` (at that call, counted from 1, which
happens only inside the writing of a checkpoint or after training), or ``while writing``: checkpoints are due after
every step, that call of fsync never returns, and the process ends at the fourth report. Reports go to standard output
as JSON lines.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from hrs.config import ExperimentConfig, from_dict
from hrs.data import open_tokens
from hrs.training import Runtime, train
from hrs.training.checkpoint_writer import THREAD_NAME


def _die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def main(config_json: str, tokens: str, directory: str, where: str, count: int) -> None:
    config = from_dict(ExperimentConfig, json.loads(config_json))
    store = open_tokens(config.data, Path(tokens))
    hangs = threading.Event()
    if where != "report":
        name, calls = "replace" if where == "replace" else "fsync", [0]
        original = getattr(os, name)

        def counted(*args):
            calls[0] += 1
            if calls[0] == count and where == "while writing":
                hangs.set()
                threading.Event().wait()
            if calls[0] == count:
                _die()
            return original(*args)

        setattr(os, name, counted)
    schedule = {"checkpoint_minutes": 1e-9} if where == "while writing" else {"checkpoint_every": 3}
    runtime = Runtime(device="cpu", log_every=2, **schedule)
    for number, progress in enumerate(train(config, store, Path(directory), runtime), 1):
        print(json.dumps([progress.step, progress.metrics]))
        if where == "report" and number == count:
            _die()
        if where == "while writing":
            while number < 3 and not hangs.is_set() and THREAD_NAME in {t.name for t in threading.enumerate()}:
                time.sleep(0.01)  # each of the first two checkpoints is complete, or the one that hangs
            if number == 4:
                assert hangs.is_set()
                _die()


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
