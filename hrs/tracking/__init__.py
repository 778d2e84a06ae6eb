"""What happened: studies and runs in MLflow. Nothing outside this package knows MLflow.

A study is a parent run and a trial its child; both are found again by name or run key and continued, never doubled.
MLflow itself is imported when a :class:`Tracker` is made, so importing this package is cheap.
"""

from hrs.tracking.logger import Outcome, RunLogger
from hrs.tracking.owner import SILENT_SECONDS
from hrs.tracking.registry import Promotion, format_promotion, promote, resolve_model
from hrs.tracking.store import ui_command
from hrs.tracking.tracker import RunBusy, Tracker, close_open_studies

__all__ = [
    "SILENT_SECONDS", "Outcome", "Promotion", "RunBusy", "RunLogger", "Tracker",
    "close_open_studies", "format_promotion", "promote", "resolve_model", "ui_command",
]  # fmt: skip
