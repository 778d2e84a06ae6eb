"""What MLflow's own pages show of an experiment and a study: kind, notes with links, the best score."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from hrs.tracking.history import Tracked

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOTE_TAG = "mlflow.note.content"
"""MLflow's tag of the Markdown text at the head of a page."""
_KIND_TAG, _TRAINING = "mlflow.experimentKind", "custom_model_development"
"""MLflow's tag and value for an experiment that trains models: it opens on the table of runs and their charts."""
UI_PORT = 5000
_NOTE = (
    "A run whose name is a study's is the parent of its trials: its note links to the report, and "
    "`best_bits_per_byte` is that of its best causal trial. Parameters are the fields that decide something in a run; "
    "all fields are in its artifact `config.json`."
)


def prepare_experiment(client: "MlflowClient", experiment_id: str) -> None:
    """Set the kind and the note of the experiment where it has none."""
    from mlflow.exceptions import MlflowException

    there = client.get_experiment(experiment_id).tags
    for tag, value in ((_KIND_TAG, _TRAINING), (NOTE_TAG, _NOTE)):
        if tag not in there:
            try:
                client.set_experiment_tag(experiment_id, tag, value)
            except MlflowException:  # MLflow looks and then inserts: another process may have done so in between
                if tag not in client.get_experiment(experiment_id).tags:
                    raise


def note_of_report(experiment_id: str, study_id: str, folder: Path) -> str:
    """Return Markdown that links to the copy of a report among a study's artifacts, and names the folder."""
    page = f"#/experiments/{experiment_id}/runs/{study_id}/artifacts/{quote(folder.name)}/report.html"
    return f"[Report]({page}): table, figures and how to get them again. Its folder is `{folder}`."


def best_trial(runs: Iterable[Tracked]) -> Tracked | None:
    """Return the run with the fewest bits per byte of those that passed the causality audit; None without one."""
    scored = [run for run in runs if run.tags.get("causal") == "true" and "bits_per_byte" in run.metrics]
    finite = [run for run in scored if run.metrics["bits_per_byte"] == run.metrics["bits_per_byte"]]
    return min(finite, key=lambda run: run.metrics["bits_per_byte"], default=None)


def page_of(run: Tracked, tracking_uri: str) -> str:
    """Return the address of a run's page: on its server, or where ``hrs ui`` shows a local store."""
    return f"{ui_address(tracking_uri)}/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def ui_address(tracking_uri: str) -> str:
    """Return where MLflow's pages are; credentials in the address of a server are left out."""
    parts = urlsplit(tracking_uri)
    if parts.scheme not in ("http", "https"):
        return f"http://127.0.0.1:{UI_PORT}"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl().rstrip("/")
