"""From a checkpoint to one small file, and back: the score that counts is the file's.

result = export(run_directory, Path("model.hrs"), store=store, budget=parse_budget("16MB"))
print(format_result(result))
model, config = load(Path("model.hrs"))
"""

from hrs.export.artifact import Artifact, ArtifactSummary, load_artifact, write_artifact
from hrs.export.export import ExportResult, export, format_result
from hrs.export.opening import OpenedModel, load, open_model, open_text, stored_text
from hrs.export.search import parse_budget

__all__ = [
    "Artifact", "ArtifactSummary", "ExportResult", "OpenedModel",
    "export", "format_result", "load", "load_artifact", "open_model", "open_text", "parse_budget", "stored_text",
    "write_artifact",
]  # fmt: skip
