"""Whether an endpoint sorts prompts into topics, how well that works with its model, and why not if it does not."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrs.errors import HRSError
from hrs.export.opening import OpenedModel, stored_text
from hrs.retrieval.engrams import model_fingerprint
from hrs.retrieval.topics.fit import TopicFit, fit_path, fit_topics
from hrs.storage import Storage
from serve.errors import bad_request
from serve.settings import Settings

_log = logging.getLogger("serve")
_NO_FIT = "they were never fitted to this model, and its validation text is not at hand: run hrs topics MODEL"


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicState:
    """Topics are on if there is a fit and nothing that speaks against it."""

    fit: TopicFit | None
    why_off: str | None

    def require(self, field: str) -> TopicFit:
        """Return the fit.

        Raises:
            ApiError: 400 if topics are off.
        """
        if self.fit is None or self.why_off is not None:
            raise bad_request(f"topics are off at this endpoint: {self.why_off}", field, "topics_off")
        return self.fit

    def line(self) -> str:
        """Return what who runs the endpoint is told."""
        if self.fit is None or self.why_off is not None:
            return f"off, {self.why_off}"
        return f"on, {self.fit.sentence()}"

    def document(self) -> dict[str, Any]:
        """Return what clients are told."""
        told: dict[str, Any] = {"on": self.why_off is None, "reason": self.why_off}
        names = ("auc", "low", "high", "together", "apart", "n_documents", "join")
        return told | {name: None if self.fit is None else getattr(self.fit, name) for name in names}


NO_TOPICS = TopicState(fit=None, why_off=_NO_FIT)


def topic_state(opened: OpenedModel, path: Path, settings: Settings, storage: Storage, folder: Path) -> TopicState:
    """Return the state by the fit that lies beside the model at ``path``, or the one in the endpoint's own ``folder``,
    which is made now if the model's validation text is at hand."""
    fit = _stored(opened, path, settings, folder)
    try:
        if fit is None:
            if (text := stored_text(opened, storage.tokens)) is None:
                return NO_TOPICS
            fit = fit_topics(opened.model, text.validation, block=settings.memory_block)
    except HRSError as error:
        return TopicState(fit=None, why_off=str(error))
    return TopicState(fit=fit, why_off=fit.why_off(settings.topic_least_auc))


def keep_fit(state: TopicState, folder: Path) -> None:
    """Keep the fit in the endpoint's folder, for its replicas and the next start."""
    try:
        if state.fit is not None:
            state.fit.save(folder / "topic_fit.json")
    except HRSError as error:
        _log.warning("how topics were fitted is not kept, and is found out again by each process: %s", error)


def _stored(opened: OpenedModel, path: Path, settings: Settings, folder: Path) -> TopicFit | None:
    for place in (fit_path(path), folder / "topic_fit.json"):
        if place.is_file():
            try:
                return TopicFit.load(place, model_fingerprint(opened.model), settings.memory_block)
            except HRSError as error:
                _log.warning("%s", error)
    return None
