#!/usr/bin/env python3
"""One run trained by several workers, each on its part of every batch; then evaluated, audited and tracked as any.

    ray job submit --working-dir . -- python jobs/train_parallel.py dense_baseline --workers 2 --scale tiny
    python jobs/train_parallel.py dual_head_router --workers 2 --unshared router,expert --set training.steps=200

The workers' gradients are averaged, so the result is that of one process. With --unshared, the groups that are named
learn from the first worker's part alone. Submitting the same run again goes on from its last checkpoint. The run is
known by its content: a study with the same fields finds it trained, whoever computed the parts.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs import strict_json
from hrs.cluster.hardware import Hardware
from hrs.cluster.inline import train_inline
from hrs.cluster.preflight import connect, preflight
from hrs.cluster.study import Study
from hrs.cluster.timing import DEVICE_FILE
from hrs.cluster.workers import train_with_workers
from hrs.config import ExperimentConfig, parse_assignments
from hrs.data import TokenStore
from hrs.files import write_whole
from hrs.models.geometry import TokenGeometry
from hrs.storage import open_storage
from hrs.training import Progress, Runtime
from jobs.entry import run_entry
from jobs.options import CHECKPOINT_STEPS, MINUTES, SEED, THREADS, Parser, whole


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/train_parallel.py", description="Train one run with several workers.")
    parser.add_argument("preset", help="what to train; `hrs presets` lists them")
    parser.add_argument(
        "--workers",
        type=whole(1, 4096),
        default=2,
        help="processes, which must divide the batch (default 2)",
    )
    parser.add_argument("--unshared", default="", help="comma-separated parameter groups that only worker 0 trains")
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper (default tiny)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the run (default 0)")
    parser.add_argument("--corpus", help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override any config field")
    parser.add_argument("--threads", type=THREADS, default=1, help="cores of each worker (default 1)")
    parser.add_argument(
        "--micro-batch",
        type=whole(1),
        help="windows per forward pass of each worker (default: its part)",
    )
    parser.add_argument(
        "--checkpoint-minutes",
        type=MINUTES,
        help="minutes between checkpoints (default: 1 second per MB, 10 s to 10 min)",
    )
    parser.add_argument(
        "--checkpoint-every", type=CHECKPOINT_STEPS, help="steps between checkpoints, instead of minutes"
    )
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs alone")
    return parser.parse_args(arguments)


def study_of(options: argparse.Namespace) -> Study:
    """The study of one run that the command line names.

    Raises:
        HRSError: if there is no worker.
    """
    overrides = parse_assignments(options.set) | ({"data.corpus": options.corpus} if options.corpus else {})
    unshared = tuple(options.unshared.split(",")) if options.unshared else ()
    sharing = {"training.sharing.workers": options.workers, "training.sharing.unshared": unshared}
    title, seeds = f"parallel-{options.preset}", (options.seed,)
    return Study(
        title=title, presets=(options.preset,), scale=options.scale, seeds=seeds, overrides=overrides | sharing
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, evaluate and audit the run, and print its row and where it lies; always 0."""
    options = parse(arguments)
    study, storage = study_of(options), open_storage()
    study.runs()  # fails now, not after Ray has started
    preflight(storage)
    hardware = Hardware.of_cluster(connect(storage))
    gpus = 1 if hardware.nodes and not options.cpu else 0
    # This process reserves no GPU, so it evaluates on the CPU while the workers train on theirs.
    runtime = Runtime(
        device="cpu",
        threads=options.threads,
        micro_batch=options.micro_batch,
        checkpoint_minutes=options.checkpoint_minutes,
        checkpoint_every=options.checkpoint_every,
    )

    def trainer(
        config: ExperimentConfig, store: TokenStore, directory: Path, runtime: Runtime, geometry: TokenGeometry | None
    ) -> Iterator[Progress]:
        runtime = replace(runtime, device="cuda" if gpus else "cpu")
        # The speed of several workers tells nothing of one process, which may train the same config.
        facts = {"device": f"{options.workers} workers", "tenants": 1}
        write_whole(directory / DEVICE_FILE, strict_json.dumps(facts))
        return train_with_workers(
            config, storage.tokens, directory, runtime, geometry, gpus=gpus, fingerprint=store.fingerprint
        )

    print(f"{options.workers} workers on {hardware}", flush=True)
    train_inline(study, runtime, trainer)
    return 0


if __name__ == "__main__":
    run_entry(main)
