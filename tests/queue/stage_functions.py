"""Functions of stages for tests of executors."""

import os
import signal
import time
from typing import Any

from hrs.errors import HRSError
from hrs.queue.attempts import Preempted, StageContext, TooLarge
from hrs.queue.records import Resources


def add(context: StageContext, a: int, b: int) -> int:
    return a + b


def total(context: StageContext, keys: list[str]) -> int:
    return sum(context.input_result(key) for key in keys)


def refuse(context: StageContext) -> None:
    raise HRSError("the config is wrong: mend it")


def bug(context: StageContext) -> None:
    {}["bug"]


def too_large(context: StageContext) -> int:
    wanted = context.claim.stage.resources
    if context.claim.rung < 2:
        raise TooLarge("out of memory", Resources(cpus=wanted.cpus, minutes=wanted.minutes + 1))
    return context.claim.rung


def die_once(context: StageContext) -> str:
    mark = context.directory / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def count(context: StageContext, steps: int) -> dict[str, Any]:
    """Count in a file, one by one, and go on from there when it is called again."""
    path = context.directory / "step"
    step = int(path.read_text()) if path.exists() else 0
    while step < steps:
        if context.should_stop:
            raise Preempted
        step += 1
        path.write_text(str(step))
        context.report(step=step, steps=steps)
        time.sleep(0.01)
    return {"step": step, "device": os.environ.get("CUDA_VISIBLE_DEVICES")}
