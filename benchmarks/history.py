"""How long reading takes with years of runs in a storage: a report, the list of runs, a dry run, a large plan.

    python -m benchmarks.history --runs 5000 --study 300 --plan 800

The runs are made up (real configs, made-up curves) in a temporary folder. Times are processor seconds of one process,
without imports: a busy machine does not change them much.
"""

import argparse
import json
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from hrs.cluster.hardware import Hardware
from hrs.cluster.listing import list_runs
from hrs.cluster.pages import study_table
from hrs.cluster.plan import plan_runs
from hrs.cluster.study import Run, Study
from hrs.config import ExperimentConfig, canonical_json, to_dict
from hrs.identity import code_version
from hrs.presets import PRESETS, experiment
from hrs.report import write_report
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.training import Runtime

CURVES = ("train_loss", "grad_norm", "lr", "tokens_per_second", "phase", "skipped_steps")
POINTS = 80
STUDY = "large-micro"


def main() -> None:
    """Fill a storage and time what reads it."""
    parser = argparse.ArgumentParser(description="Time what reads a large history.")
    parser.add_argument("--runs", type=int, default=5000, help="runs in the history (default 5000)")
    parser.add_argument("--study", type=int, default=300, help="runs of one study (default 300)")
    parser.add_argument("--plan", type=int, default=800, help="runs to plan (default 800)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(Path(folder))
        configs = [experiment(preset, "micro", seed) for seed in range(200) for preset in PRESETS][: options.runs]
        keys = [f"{i:016x}" for i in range(len(configs))]
        fill(storage, keys, configs, options.study)
        seeds = tuple(range(-(-options.plan // 8)))
        presets = list(PRESETS)[:8]
        to_plan = [
            Run(key=f"f{i:015x}", config=config, data_fingerprint="data")
            for i, config in enumerate(experiment(p, "micro", s) for p in presets for s in seeds)
        ][: options.plan]
        timed("records of the study", lambda: Tracker(storage).study_records(STUDY))
        records = Tracker(storage).study_records(STUDY)
        timed("its table", lambda: study_table(records))
        timed("its page, with figures", lambda: write_report(STUDY, records, storage.report(STUDY)))
        timed("list of all runs", lambda: list_runs(storage))
        few = to_plan[:: max(1, len(to_plan) // 8)]
        timed("dry run of 8 runs", lambda: dry_run(few, storage))
        timed(f"plan of {len(to_plan)} runs", lambda: dry_run(to_plan, storage))
        study = Study(title="x", presets=tuple(presets), scale="micro", seeds=seeds)
        timed(f"keys of {len(presets) * len(seeds)} runs", study.runs)


def timed(what: str, action: Callable[[], object]) -> None:
    """Print the processor seconds and the seconds of an action."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    print(
        f"{what:<28} {time.process_time() - cpu:6.2f} s of the processor, {time.perf_counter() - wall:6.2f} s",
        flush=True,
    )


def dry_run(runs: list[Run], storage: Storage) -> None:
    """Plan runs as ``--dry-run`` does."""
    finished = Tracker(storage).finished([run.key for run in runs])
    plan_runs(runs, finished, Hardware(cpus=2), storage, Runtime(device="cpu"))


def fill(storage: Storage, keys: list[str], configs: list[ExperimentConfig], n_study: int) -> None:
    """Write the folders and the database rows of made-up runs; the first ``n_study`` are a study's."""
    Tracker(storage).connect()
    draw = random.Random(0)
    planned = {}
    with sqlite3.connect(storage.root / "mlflow" / "mlflow.db") as database:
        (experiment_id,) = database.execute("SELECT experiment_id FROM experiments WHERE name = 'hrs'").fetchone()
        for i, (key, config) in enumerate(zip(keys, configs, strict=True)):
            in_study = i < n_study
            tags = {
                "hrs.kind": "trial",
                "hrs.run_key": key,
                "hrs.study": STUDY if in_study else f"study{i // 50}-micro",
                "hrs.outcome": "finished",
                "hrs.code_version": code_version(),
                "preset": config.preset,
                "scale": config.scale,
                "seed": str(config.seed),
                "causal": "true",
            }
            artifacts = storage.artifacts / f"{i:032x}" / "artifacts"
            add_run(database, experiment_id, f"{i:032x}", tags, artifacts, draw)
            write_run(storage.run(key), config)
            if in_study:
                planned[key] = {"preset": config.preset, "scale": "micro", "seed": config.seed}
                planned[key]["code_version"] = code_version()
                write_artifacts(artifacts, config, i)
        tags = {"hrs.kind": "study", "hrs.study": STUDY, "hrs.code_version": code_version()}
        artifacts = storage.artifacts / "study" / "artifacts"
        add_run(database, experiment_id, "study", tags, artifacts, draw)
        artifacts.mkdir(parents=True)
        (artifacts / "study.json").write_text(json.dumps(planned))


def add_run(
    database: sqlite3.Connection,
    experiment_id: int,
    run_id: str,
    tags: dict[str, str],
    artifacts: Path,
    draw: random.Random,
) -> None:
    """Add one run with its tags and curves, machine measurements included."""
    database.execute(
        "INSERT INTO runs (run_uuid, name, status, start_time, lifecycle_stage, artifact_uri, experiment_id) "
        "VALUES (?, ?, 'FINISHED', 0, 'active', ?, ?)",
        (run_id, run_id, artifacts.as_uri(), experiment_id),
    )
    database.executemany("INSERT INTO tags VALUES (?, ?, ?)", [(k, v, run_id) for k, v in tags.items()])
    if tags["hrs.kind"] == "study":
        return
    names = (*CURVES, *(f"system/{i}" for i in range(12)))
    n_points = POINTS if tags["hrs.study"] == STUDY else 1
    points = [(name, draw.random(), step, run_id, step) for name in names for step in range(n_points)]
    database.executemany(
        "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)", points
    )
    last = [(n, draw.random(), 0, POINTS, 0, run_id) for n in (*names, "bits_per_byte", "parameters")]
    database.executemany("INSERT INTO latest_metrics VALUES (?, ?, ?, ?, ?, ?)", last)


def write_run(directory: Path, config: ExperimentConfig) -> None:
    """Write what a plan reads of a trained run."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(canonical_json(config))
    (directory / "training.json").write_text(json.dumps({"tokens_per_second": 5000.0}))
    facts = {"device": "cpu", "tenants": 1, "evaluation_seconds": 10.0}
    (directory / "device.json").write_text(json.dumps(facts))


def write_artifacts(folder: Path, config: ExperimentConfig, seed: int) -> None:
    """Write what a report reads of a finished run: 400 documents."""
    folder.mkdir(parents=True)
    n_bytes = np.random.default_rng(7).integers(200, 4000, 400)
    nats = np.random.default_rng(seed).normal(1.2, 0.1, 400) * n_bytes
    table = pa.table(
        {
            "document": np.arange(400, dtype=np.int32),
            "title": [f"document {i}" for i in range(400)],
            "nats": nats,
            "text_nats": nats,
            "tokens": n_bytes // 3 + 1,
            "bytes": n_bytes,
        }
    )
    with pa.OSFile(str(folder / "documents.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "training.json").write_text(json.dumps({"tokens_per_second": 5000.0, "peak_memory_bytes": 10**8}))
    (folder / "evaluation.json").write_text(json.dumps({"loss_by_position": [3.0] * 64}))
    (folder / "audit.json").write_text(json.dumps({"causal": True, "tests": []}))


if __name__ == "__main__":
    main()
