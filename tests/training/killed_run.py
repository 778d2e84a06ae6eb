"""A process that trains and kills itself with SIGKILL: python killed_run.py CONFIG_JSON TOKENS DIRECTORY WHERE COUNT.

WHERE is ``report`` (after that many progress reports), ``fsync`` or ``replace`` (at that call, counted from 1, which
happens only inside the writing of a checkpoint or after training). Reports go to standard output as JSON lines.
"""

import json
import os
import signal
import sys
from pathlib import Path

from hrs.config import ExperimentConfig, from_dict
from hrs.data import open_tokens
from hrs.training import Runtime, train


def _die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def main(config_json: str, tokens: str, directory: str, where: str, count: int) -> None:
    config = from_dict(ExperimentConfig, json.loads(config_json))
    store = open_tokens(config.data, Path(tokens))
    if where in ("fsync", "replace"):
        original, calls = getattr(os, where), [0]

        def counted(*args):
            calls[0] += 1
            if calls[0] == count:
                _die()
            return original(*args)

        setattr(os, where, counted)
    runtime = Runtime(device="cpu", log_every=2, checkpoint_every=3)
    for number, progress in enumerate(train(config, store, Path(directory), runtime), 1):
        print(json.dumps([progress.step, progress.metrics]))
        if where == "report" and number == count:
            _die()


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
