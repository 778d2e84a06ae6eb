#!/usr/bin/env python3
"""Compute the geometry of tokens that a manifold-guided network reads, or find it, and track what came out.

    ray job submit --working-dir . -- python jobs/manifold_precompute.py --scale tiny
    python jobs/manifold_precompute.py --corpus bbc --set model.manifold.geometry.partners=32
    python jobs/manifold_precompute.py --preset manifold_v18_legacy --dry-run

Studies build what they read by themselves; this is for a look before one, and for the picture.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the submitted code, not an installed one

import jobs  # noqa: F401  (says in one line if this Python lacks the packages)
from hrs.cluster.manifold import STAGES, build_manifolds, cached_digest, reads_manifold
from hrs.cluster.preflight import preflight
from hrs.config import ExperimentConfig, GeometryConfig, parse_assignments
from hrs.data import absolute_corpus, data_fingerprint, open_tokens
from hrs.errors import HRSError
from hrs.files import read_json
from hrs.manifold.build import PICTURE, manifold_key, open_manifold, require_fit
from hrs.manifold.manifold import NOTE, Manifold
from hrs.presets import experiment
from hrs.storage import open_storage
from hrs.tracking import Tracker
from jobs.entry import run_entry
from jobs.options import Parser

STUDY = "manifolds"
"""Under which geometries are tracked, one run for each."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The job's command line."""
    parser = Parser(prog="jobs/manifold_precompute.py", description="Compute the geometry of tokens of a corpus.")
    parser.add_argument(
        "--preset", default="manifold_v18", help="whose geometry: clean, or the original's (default manifold_v18)"
    )
    parser.add_argument("--scale", default="tiny", help="micro, tiny, small or paper (default tiny)")
    parser.add_argument("--corpus", help="wiki-mini, bbc, wikitext-103, hf:NAME, text:PATH, jsonl:PATH, parquet:PATH")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override any config field")
    parser.add_argument("--dry-run", action="store_true", help="say what would be computed and stop, without Ray")
    return parser.parse_args(arguments)


def config_of(options: argparse.Namespace) -> ExperimentConfig:
    """The experiment whose data and geometry the command line names.

    Raises:
        HRSError: for unknown presets, scales or fields, or a model that reads no geometry of a text.
    """
    overrides = parse_assignments(options.set) | ({"data.corpus": options.corpus} if options.corpus else {})
    if corpus := overrides.get("data.corpus"):
        overrides["data.corpus"] = absolute_corpus(corpus)
    config = experiment(options.preset, options.scale, 0, overrides)
    if not reads_manifold(config):
        raise HRSError(
            f"{options.preset} reads no geometry that is computed from a text: choose a preset of "
            "model.family=manifold whose model.manifold.source is not none, such as manifold_v18"
        )
    require_fit(config.model.manifold.geometry, config.model.vocab_size)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute or find the geometry, track it and print what it is; always 0."""
    options = parse(arguments)
    config, storage = config_of(options), open_storage()
    geometry, fingerprint = config.model.manifold.geometry, data_fingerprint(config.data)
    key = manifold_key(geometry, fingerprint)
    folder, was_there = storage.manifolds / key, cached_digest(key, storage) is not None
    print(
        f"manifold {key} of {config.data.corpus}, {config.data.tokenizer}: {'found' if was_there else 'to be computed'}"
    )
    print(describe(geometry, config.model.vocab_size), flush=True)
    if options.dry_run:
        print(f"would be in {folder}")
        return 0
    preflight(storage)
    store = open_tokens(config.data, storage.tokens, fingerprint)
    build_manifolds([config], storage, lambda line: print(line, flush=True))
    manifold = open_manifold(geometry, store, storage.manifolds)
    stages = read_stages(folder)
    track(key, config, fingerprint, manifold, stages, folder, Tracker(storage))
    print("\n" + summary(manifold, stages))
    print(f"folder: {folder}\npicture: {folder / PICTURE}", flush=True)
    return 0


def describe(geometry: GeometryConfig, vocab_size: int) -> str:
    """What is computed, before it is."""
    pairs = "all pairs" if geometry.partners == 0 else f"the {geometry.partners} strongest partners of each token"
    parts = f"{geometry.modes} spectral, {geometry.directional} directional, {geometry.syntactic} syntactic"
    return (
        f"definition {geometry.definition}: {vocab_size:,} tokens, {pairs}, at most {geometry.steps:,} steps in "
        f"{geometry.dimensions} dimensions\n{geometry.n_coordinates} coordinates ({parts}), {geometry.neighbours} "
        "neighbours per token"
    )


def read_stages(folder: Path) -> dict[str, dict[str, float | str]]:
    """``seconds`` and ``notes`` by stage; empty if a trial built the manifold by itself, or the file is damaged."""
    with contextlib.suppress(HRSError):
        return {"seconds": {}, "notes": {}} | dict(read_json(folder / STAGES))
    return {"seconds": {}, "notes": {}}


def summary(manifold: Manifold, stages: dict[str, dict[str, float | str]]) -> str:
    """The result, a line per fact."""
    values, energies = manifold.eigenvalues, manifold.energies
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in stages["seconds"].items())
    state = "at rest" if manifold.converged else "still falling"
    lines = {
        "digest": manifold.digest,
        "tokens": f"{len(manifold.coordinates):,}, {manifold.coordinates.shape[1]} coordinates each",
        "forces": stages["notes"].get("forces", ""),
        "energy": f"{energies[-1]:.6g} after {len(energies):,} steps, {state}",
        "eigenvalues": f"{values[0]:.4g} to {values[-1]:.4g}",
        "seconds": seconds,
    }
    return "\n".join(f"{name + ':':<13}{value}" for name, value in lines.items() if value)


def track(
    key: str,
    config: ExperimentConfig,
    fingerprint: str,
    manifold: Manifold,
    stages: dict[str, dict[str, float | str]],
    folder: Path,
    tracker: Tracker,
) -> None:
    """Log energies, times, eigenvalues and the picture as a run of its own, once."""
    if key in tracker.finished([key]):
        return
    study_id = tracker.open_study(STUDY, {})
    with tracker.open_run(key, study_id, config, fingerprint) as run:
        name = f"manifold {config.data.corpus} {config.data.tokenizer} {config.model.manifold.geometry.definition}"
        run.set_tags({"mlflow.runName": name, "hrs.kind": "manifold", "digest": manifold.digest})
        for step, energy in enumerate(manifold.energies, start=1):
            run.log(step, {"energy": float(energy)})
        for mode, value in enumerate(manifold.eigenvalues):
            run.log(mode, {"eigenvalue": float(value)})
        seconds = {f"seconds/{stage}": float(value) for stage, value in stages["seconds"].items()}
        run.log(len(manifold.energies), seconds | {"converged": float(manifold.converged)})
        for file in (PICTURE, NOTE, STAGES):
            if (folder / file).exists():
                run.log_artifact(folder / file)
    tracker.close_study(study_id, "finished")


if __name__ == "__main__":
    run_entry(main)
