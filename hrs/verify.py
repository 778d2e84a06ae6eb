"""``hrs verify``: read everything in a storage and name what is damaged or missing.

Nothing is changed. What can be made again says so: token stores, geometries and memory banks are built again when they
are next opened, and a study that is submitted again writes the results of its runs anew.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hrs.cluster.timing import read_config
from hrs.data.store import read_store
from hrs.errors import HRSError
from hrs.evaluation import AuditReport, Evaluation
from hrs.export.artifact import check_artifact
from hrs.files import read_json, read_manifest, sha256_of
from hrs.manifold.manifold import Manifold
from hrs.retrieval.bank.memory_bank import MANIFEST as BANK
from hrs.retrieval.store.layout import MANIFEST as ENGRAMS
from hrs.retrieval.store.view import StoreView
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.tracking.store import check_database
from hrs.training.checkpoint import STATE, TOKENIZER, check_checkpoint, latest_checkpoint

REMEDIES = {
    "database": "put back a copy; the runs' own folders hold their results",
    "tracked run": "submit their studies again",
    "token store": "it is built again when it is next opened, if its corpus is unchanged",
    "geometry": "it is computed again when it is next opened",
    "memory bank": "it is built again when it is next opened",
    "engram store": "put back a copy, or delete the folder and fill the store again",
    "checkpoint": "the one before it is used if there is one; else train again",
    "tokenizer": "delete the file: the run then takes that of its tokens",
    "run file": "delete the file and submit the run's study again",
    "result": "delete the file and run its job again",
    "artifact": "export it again",
}
"""What is checked, in this order, and what to do about it."""
_RESULTS = ("engrams", "needles", "gated", "studies", "mlflow/artifacts")
"""Folders of JSON files that jobs write."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    kind: str
    """A key of :data:`REMEDIES`."""
    path: Path
    problem: str | None
    """None if it is whole."""


Check = tuple[str, Path, Callable[[], object]]


def verify(storage: Storage) -> Iterator[Finding]:
    """Look at everything in the storage, one thing after the other."""
    for kind, path, look in _checks(storage):
        try:
            look()
        except (HRSError, OSError) as error:
            yield Finding(kind, path, str(error))
        else:
            yield Finding(kind, path, None)


def _checks(storage: Storage) -> Iterator[Check]:
    root = storage.root
    for path in (root / "mlflow" / "mlflow.db", root / "queue.db"):
        if path.exists():
            yield "database", path, partial(check_database, path)
    yield "tracked run", root / "runs", partial(_check_tracked, storage)
    for folder in _folders(storage.tokens):
        yield "token store", folder, partial(read_store, folder)
    for folder in _folders(storage.manifolds):
        yield "geometry", folder, partial(Manifold.load, folder)
    for folder in _folders(root / "memories"):
        yield "memory bank", folder, partial(read_manifest, folder / BANK)
    for folder in (path.parent for name in ("engrams", "gated") for path in sorted((root / name).rglob(ENGRAMS))):
        yield "engram store", folder, StoreView(folder).refresh
    for folder in _folders(root / "runs"):
        yield from _checks_of_run(folder, storage)
    for path in sorted(path for name in _RESULTS for path in (root / name).rglob("*.json")):
        if path.name != ENGRAMS and path.parent.name != "checkpoints" and not (path.parent / STATE).exists():
            yield "result", path, partial(read_json, path)
    for state in sorted(path for name in ("models", "mlflow/artifacts") for path in (root / name).rglob(STATE)):
        yield "checkpoint", state.parent, partial(check_checkpoint, state.parent)
    for path in sorted(root.rglob("*.hrs")):
        yield "artifact", path, partial(check_artifact, path)


def _folders(parent: Path) -> list[Path]:
    """Folders below ``parent`` that count: hidden ones are being written."""
    return sorted(p for p in parent.iterdir() if p.is_dir() and p.name[0] != ".") if parent.is_dir() else []


def _check_tracked(storage: Storage) -> None:
    """Compare what is marked as finished with the results that there are."""
    try:
        lost = Tracker(storage).lost()
    except HRSError:
        return  # the database is damaged, which its own check tells
    if lost:
        raise HRSError(f"the results of {len(lost)} finished runs are missing or damaged: {', '.join(lost)}")


# ---- runs ------------------------------------------------------------------------------------------------------------


def _checks_of_run(folder: Path, storage: Storage) -> Iterator[Check]:
    for checkpoint in sorted((folder / "checkpoints").glob("step_*")):
        yield "checkpoint", checkpoint, partial(check_checkpoint, checkpoint)
    if (newest := latest_checkpoint(folder)) is not None:
        yield "tokenizer", folder / TOKENIZER, partial(_check_tokenizer, folder, newest)
        yield "token store", folder, partial(_check_tokens, newest, storage)
    for path in sorted(folder.rglob("*.json*")):
        if path.name in ("tokenizer.json", STATE) or path.suffix not in (".json", ".jsonl"):
            continue
        look = _LOOKS.get(path.name, read_json if path.suffix == ".json" else _read_lines)
        yield "run file", path, partial(look, path)


def _check_tokenizer(folder: Path, checkpoint: Path) -> None:
    """Compare a run's tokenizer with what its checkpoint says; runs of earlier versions kept none."""
    digest = _state(checkpoint).get("tokenizer")
    path = folder / TOKENIZER
    if digest is not None and not path.is_file():
        raise HRSError(f"{path} is missing: the run takes that of its tokens while these are there")
    if digest is not None and sha256_of(path) != digest:
        raise HRSError(f"{path} is not the tokenizer that the run learned with")


def _check_tokens(checkpoint: Path, storage: Storage) -> None:
    fingerprint = _state(checkpoint).get("data")
    if fingerprint and not (storage.tokens / fingerprint).is_dir():
        raise HRSError(f"the tokens {fingerprint} that this run was trained on are missing")


def _state(checkpoint: Path) -> dict[str, str]:
    """The state of a checkpoint; empty if it is damaged, which its own check tells."""
    try:
        return dict(check_checkpoint(checkpoint))
    except HRSError:
        return {}


def _read_lines(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise HRSError(f"{path} line {number} is damaged ({error})") from error


_LOOKS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "audit.json": AuditReport.load,
    "evaluation.json": lambda path: Evaluation.load(path.parent),
}


# ---- for people ------------------------------------------------------------------------------------------------------


def format_findings(findings: list[Finding], storage: Storage) -> str:
    """Return a table of what was looked at, then what is damaged, where, and what to do about it."""
    lines = [f"{'what':<14}{'checked':>9}{'damaged':>9}"]
    for kind in REMEDIES:
        mine = [f for f in findings if f.kind == kind]
        bad = sum(f.problem is not None for f in mine)
        lines.append(f"{kind:<14}{len(mine):>9}{bad:>9}")
    for finding in (f for f in findings if f.problem is not None):
        place = finding.path.relative_to(storage.root)
        lines += ["", f"{finding.kind} {place}: {finding.problem}", f"  {REMEDIES[finding.kind]}"]
    return "\n".join(lines)
