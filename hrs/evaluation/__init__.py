"""What a trained model is worth: its loss over a whole split, and whether that loss means anything."""

from hrs.evaluation.audit import AuditReport, AuditTest, audit
from hrs.evaluation.perplexity import evaluate
from hrs.evaluation.result import Evaluation

__all__ = ["AuditReport", "AuditTest", "Evaluation", "audit", "evaluate"]
