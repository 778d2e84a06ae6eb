"""Commands on what a storage holds: a study's report, the list of runs, what can be removed."""

import errno
import sys
from typing import Annotated

import typer

from hrs.errors import HRSError


def complete_study(incomplete: str) -> list[str]:
    """Studies that begin with what was typed."""
    from hrs.storage import open_storage
    from hrs.tracking import Tracker

    return [name for name in Tracker(open_storage(writable=False)).studies() if name.startswith(incomplete)]


StudyName = Annotated[str, typer.Argument(autocompletion=complete_study, help="The study's name, such as v1-tiny.")]


def report(
    study: StudyName,
    code_version: Annotated[
        str | None, typer.Option(help="Runs of an earlier code version instead of the newest one's.")
    ] = None,
) -> None:
    """Print a study's table and write its page again from what was tracked."""
    from hrs.cluster.pages import study_table, write_page
    from hrs.storage import open_storage
    from hrs.tracking import Tracker

    storage = open_storage(writable=False)
    tracker = Tracker(storage)
    records = tracker.study_records(study, code_version=code_version)
    print(study_table(records), flush=True)
    try:
        print(write_page(study, records, tracker, storage))
    except HRSError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"the page is as it was: {error}", file=sys.stderr)  # reading was what could be asked of it


def runs(
    study: Annotated[
        str | None, typer.Argument(autocompletion=complete_study, help="Only the runs of this study.")
    ] = None,
    last: Annotated[int, typer.Option(min=0, help="Only so many of the newest; 0 for all.")] = 50,
) -> None:
    """List runs with their keys, presets, scores and sizes."""
    from hrs.cluster.listing import list_runs
    from hrs.storage import open_storage

    print(list_runs(open_storage(writable=False), study, last))


def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete it; without this nothing is deleted.")] = False,
    old_code: Annotated[
        bool, typer.Option("--old-code", help="Also runs of code versions that their studies no longer show.")
    ] = False,
) -> None:
    """Show what no study needs and what killed processes left, and delete it with --yes."""
    from hrs.cluster.cleaning import find_leftovers, remove
    from hrs.storage import open_storage

    n_bytes, n_found = 0, 0
    for leftover in find_leftovers(open_storage(), old_code=old_code):
        n_found, n_bytes = n_found + 1, n_bytes + leftover.n_bytes
        print(f"{leftover.n_bytes / 2**20:>10,.1f} MiB  {leftover.path}  {leftover.reason}", flush=True)
        if yes:
            remove(leftover)
    what = f"{n_found} folder{'s' * (n_found != 1)}, {n_bytes / 2**20:,.1f} MiB"
    print(f"deleted {what}" if yes else f"{what}: `hrs clean --yes` deletes them" if n_found else "nothing to delete")
