"""A study's page and table from what was tracked, for the jobs and for ``hrs report``."""

from hrs.errors import HRSError
from hrs.files import write_whole
from hrs.report import RunRecord, format_table, write_report
from hrs.report.search_table import as_overrides, best_of, final_loss, is_search, search_table
from hrs.storage import Storage
from hrs.tracking import Tracker


def study_table(records: list[RunRecord]) -> str:
    """Return the table of a study's runs: the comparison, or the record of a search with its best run.

    Raises:
        HRSError: if there are no runs, or they cannot stand in one table.
    """
    if not is_search(records):
        return format_table(records)
    best = best_of(records)
    if best is None:
        return f"{search_table(records)}\n\nno schedule came to its end with a finite loss yet\n"
    loss = final_loss(best)
    return f"{search_table(records)}\n\nbest: run {best.key}, {loss:.4f} nats per token\n{as_overrides(best)}\n"


def write_page(study: str, records: list[RunRecord], tracker: Tracker, storage: Storage) -> str:
    """Write what a study's report folder holds and return the sentence that says where, or why it could not be written.

    Raises:
        HRSError: if the records cannot stand in one table.
    """
    folder = storage.report(study)
    try:
        if is_search(records):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "search.txt", search_table(records) + "\n")
            return f"report: {folder / 'search.txt'}"
        study_page, run_pages = tracker.pages(study, [record.key for record in records])
        written = write_report(
            study, records, folder,
            commands=tracker.study_commands(study), study_page=study_page, run_pages=run_pages,
        )  # fmt: skip
        return f"report: {written.html}"
    except OSError as error:
        raise HRSError(
            f"the report cannot be written to {folder} ({error.strerror}): the table above is whole"
        ) from error
