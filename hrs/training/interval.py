"""Means of diagnostics between two progress reports, without waiting for the device at every step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hrs import strict_json


class IntervalMeans:
    """Running sums in float64 by name; values are scalars or vectors. Its state is part of a checkpoint, so that a
    resumed run reports the same curve.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._pending: dict[str, list[Tensor]] = {}
        self._taken: dict[str, list[Tensor | None]] = {}
        self._sums: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}
        if state:
            self._sums = {name: [strict_json.number(v) for v in sums] for name, sums in state["sums"].items()}
            self._counts = dict(state["counts"])

    def add(self, values: Mapping[str, Sequence[Tensor]], taken: Tensor | None = None) -> None:
        """Take in detached values by name, each scalar or [k]; none if ``taken``, a boolean scalar, is False."""
        for name, items in values.items():
            self._pending.setdefault(name, []).extend(items)
            self._taken.setdefault(name, []).extend([taken] * len(items))

    def state(self) -> dict[str, Any]:
        """Everything so far, for JSON."""
        self._flush()
        return {"sums": self._sums, "counts": self._counts}

    def take(self) -> dict[str, list[float]]:
        """Means by name, one number per element, and start anew."""
        self._flush()
        means = {name: [value / self._counts[name] for value in sums] for name, sums in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def _flush(self) -> None:
        for name, items in self._pending.items():
            rows = torch.stack([item.reshape(-1) for item in items]).double().tolist()  # [n, k]
            if flags := [flag for flag in self._taken[name] if flag is not None]:
                values = iter(torch.stack(flags).tolist())
                rows = [row for row, flag in zip(rows, self._taken[name], strict=True) if flag is None or next(values)]
            if not rows:
                continue
            sums = self._sums.get(name, [0.0] * len(rows[0]))
            for row in rows:  # one after another: the sum must not depend on where a checkpoint cut the interval
                sums = [a + b for a, b in zip(sums, row, strict=True)]
            self._sums[name] = sums
            self._counts[name] = self._counts.get(name, 0) + len(rows)
        self._pending, self._taken = {}, {}
