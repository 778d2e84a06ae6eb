"""How long the queue takes with many stages in it: submit, list what can be claimed, claim, renew, finish.

    python -m benchmarks.queue_scale --stages 10000

A study of runs with three stages each over one shared stage, on SQLite below a temporary folder, or on the database
that ``--url`` names. Prints milliseconds per call (median and 99th percentile) and the growth of resident memory.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from sqlalchemy import URL, make_url

from hrs.queue import Queue, RunSpec, StageSpec, StudySpec
from hrs.queue.database import Database


def study_of(n_stages: int) -> StudySpec:
    """Return a study of about ``n_stages`` stages."""
    stages = [StageSpec(key="tokens", kind="tokens", label="tokens", function="a:b")]
    runs = []
    for i in range(n_stages // 3):
        kinds = ("train", "evaluate", "audit")
        keys = [f"{kind}-{i:06}" for kind in kinds]
        for kind, key, read in zip(kinds, keys, ("tokens", keys[0], keys[0]), strict=True):
            stages.append(StageSpec(key=key, kind=kind, label=key, function="a:b", inputs=(read,), payload={"seed": i}))
        runs.append(RunSpec(key=f"run-{i:06}", label=f"row/{i}", definition={"seed": i}, stages=("tokens", *keys)))
    return StudySpec(title="many", definition={"n": n_stages}, runs=tuple(runs), stages=tuple(stages))


def timed(n: int, function: Callable[[], object]) -> list[float]:
    """Return the milliseconds of ``n`` calls."""
    found = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def report(name: str, milliseconds: list[float]) -> None:
    last = sorted(milliseconds)[int(0.99 * (len(milliseconds) - 1))]
    print(f"{name:34}{statistics.median(milliseconds):10.2f}{last:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--finish", type=int, default=2_000, help="stages to work through at the end")
    parser.add_argument("--url", help="of an empty database; default: SQLite in a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = make_url(args.url) if args.url else URL.create("sqlite", database=str(Path(folder, "queue.db")))
        queue = Queue(Database(url))
        study = study_of(args.stages)
        (seconds,) = timed(1, lambda: queue.submit(study))
        print(f"{len(study.stages):,} stages in {url.get_backend_name()}; milliseconds: median, 99th percentile")
        print(f"{'submit, per stage':34}{seconds / len(study.stages):10.3f}")
        worker = queue.add_worker("here", 1)
        queue.finish(queue.claim("tokens", worker))
        report("list of 100 candidates", timed(args.calls, queue.candidates))
        claims = []
        report("claim", timed(args.calls, lambda: claims.append(queue.claim(queue.candidates(1)[0].key, worker))))
        report("renew", timed(args.calls, lambda: queue.renew(claims[-1], {"step": 1})))
        report("finish", timed(args.calls, lambda: queue.finish(claims.pop())))
        process = psutil.Process()
        before = process.memory_info().rss
        took = timed(args.finish, lambda: queue.finish(queue.claim(queue.candidates(1)[0].key, worker)))
        report(f"claim and finish, {args.finish:,} times", took)
        print(f"{'growth of memory meanwhile, MiB':34}{(process.memory_info().rss - before) / 2**20:10.1f}")


if __name__ == "__main__":
    main()
