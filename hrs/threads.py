"""CPU threads of a process that is not a trial: one, unless the user says otherwise.

Torch takes a thread per core by default. Its threads spin while they wait for each other, so on a busy machine small
models take many times as much processor time with two threads as with one.
"""

import os
import sys

VARIABLE = "OMP_NUM_THREADS"
MOST_THREADS = 4096


def set_threads(threads: int | None = None) -> None:
    """Let torch, and the linear algebra libraries that are not loaded yet, use ``threads`` threads in this process.

    Args:
        threads: None for the number in the environment variable ``OMP_NUM_THREADS``, or one if that is not set.
    """
    if threads is None:
        if VARIABLE in os.environ:
            return  # torch has read it, or will
        threads = 1
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
    else:  # importing it would take seconds, which a command without a model does not need
        os.environ[VARIABLE] = str(threads)
