"""What several tests of training compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hrs.training import Progress, load_model

_TIMING = ("tokens_per_second",)


def weights(directory: Path) -> dict[str, Tensor]:
    """The weights of a run's last checkpoint."""
    return load_model(directory)[0].state_dict()


def different(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def largest_gap(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of any element."""
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def curve(reports: Sequence[Progress]) -> dict[int, dict[str, float]]:
    """Metrics by step, without those that measure time."""
    return {p.step: {k: v for k, v in p.metrics.items() if k not in _TIMING} for p in reports}
