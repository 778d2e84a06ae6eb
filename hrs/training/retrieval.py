"""What a run with retrieval in its loop starts from and reads."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from hrs.data.windows import WindowMemories
from hrs.errors import HRSError
from hrs.models.base import LanguageModel


class TrainingMemories(WindowMemories, Protocol):
    """The memories of windows, and the base model that made them."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the base's weights."""

    @property
    def base_weights(self) -> Mapping[str, Tensor]:
        """The base's state_dict."""


def start_from(weights: Mapping[str, Tensor], model: LanguageModel) -> None:
    """Give ``model`` the base's weights; what the base lacks, its cross-attention alone, keeps its own.

    Raises:
        HRSError: if anything else differs.
    """
    own = model.state_dict()
    lacking = [name for name in own if name not in weights and ".cross." not in name]
    strange = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    if lacking or strange:
        raise HRSError(
            f"the base does not fit this model at {(lacking + strange)[0]}: a run with training.retrieval.base must be "
            "of the base's shape, and differ from it in its cross-attention alone"
        )
    model.load_state_dict(weights, strict=False)
