"""All runs of a storage as a table: keys, presets, scores and sizes."""

import os
from pathlib import Path

from hrs.errors import HRSError
from hrs.report.table import aligned, significant
from hrs.storage import Storage
from hrs.tracking import Tracker
from hrs.tracking.naming import run_keys
from hrs.tracking.reading import status_of


def list_runs(storage: Storage, study: str | None = None, last: int = 0) -> str:
    """Return one line per run, the oldest first: of one study, or of the whole storage.

    Args:
        last: only so many of the newest; 0 for all.

    Raises:
        HRSError: if there are no runs, or no such study.
    """
    tracker = Tracker(storage)
    wanted = None if study is None else tracker.study_keys(study)
    rows: list[tuple[str, ...]] = [
        (
            run.tags["hrs.run_key"],
            f"{run.tags['preset']}/{run.tags['seed']}",
            run.tags["scale"],
            run.tags.get("hrs.study", ""),
            status_of(run),
            _number(run.metrics.get("bits_per_byte")),
            {"true": "yes", "false": "NO"}.get(run.tags.get("causal", ""), "-"),
            significant(run.metrics["parameters"], 3) if "parameters" in run.metrics else "-",
        )
        for run in tracker.tracked(wanted)
    ]
    known = {row[0] for row in rows}
    rows += [(key, *["-"] * 7) for key in run_keys(storage) if wanted is None and key not in known]
    if not rows:
        raise HRSError(f"there are no runs in {storage.root} yet: start one with `hrs train` or jobs/ablation_sweep.py")
    shown = rows[-last:] if last else rows
    head = ("run", "preset/seed", "scale", "study", "status", "bits/byte", "causal", "params", "on disk")
    lines = aligned([head, *((*row, _size(storage.run(row[0]))) for row in shown)])
    if len(shown) < len(rows):
        lines.append(f"... and {len(rows) - len(shown)} older: --last 0 lists all")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(folder: Path) -> str:
    n_bytes = folder_bytes(folder)
    return f"{n_bytes / 2**20:,.1f} MiB" if n_bytes else "gone"


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder, or of one file; 0 if it is not there. Links are not followed."""
    if not folder.is_dir() or folder.is_symlink():
        return folder.lstat().st_size if folder.is_file() else 0
    total = 0
    for entry in os.scandir(folder):
        is_folder = entry.is_dir(follow_symlinks=False)
        total += folder_bytes(Path(entry.path)) if is_folder else entry.stat(follow_symlinks=False).st_size
    return total
