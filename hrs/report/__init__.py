"""From run records to a comparison one can believe: paired intervals, a table, figures, a page."""

from hrs.report.page import ReportFiles, write_report
from hrs.report.records import RunRecord
from hrs.report.table import format_table

__all__ = ["ReportFiles", "RunRecord", "format_table", "write_report"]
