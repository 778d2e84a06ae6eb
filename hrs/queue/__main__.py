"""Make one attempt that another process has claimed for this one: how :class:`ProcessExecutor` starts its processes.

A module of its own: what runs as ``__main__`` is not the module that others import, and its exceptions are not theirs.
"""

import json
import sys
from pathlib import Path

from hrs.queue.attempts import run_attempt
from hrs.queue.queue import open_queue
from hrs.queue.states import Outcome


def main() -> int:
    """Make the attempt that the first argument names, as JSON; returns 0 if it finished its stage."""
    arguments = json.loads(sys.argv[1])
    root = Path(arguments["root"])
    queue = open_queue(root)
    claim = queue.open_claim(arguments["attempt"])
    outcome = run_attempt(queue, claim, root, lease_seconds=arguments["lease_seconds"], catch_signals=True)
    return 0 if outcome is Outcome.FINISHED else 1


if __name__ == "__main__":
    sys.exit(main())
