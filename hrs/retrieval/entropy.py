"""When to look something up: the model's own uncertainty over its last tokens, and a gate with hysteresis.

Entropy is that of the model's distribution of the next token, in bits, before temperature and filters. The thresholds
of a gate belong to one model and its vocabulary: :func:`hrs.retrieval.calibration.calibrate` measures them.
"""

import math
from collections import deque
from dataclasses import dataclass

from hrs.config.checks import require_at_least
from hrs.errors import HRSError


class RollingEntropy:
    """Mean of the last ``window`` entropies.

    They are summed anew at each token, correctly rounded: a running sum would drift over long texts and never recover
    from one value that is not a number.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise HRSError(f"window must be at least 1 token, got {window}")
        self.window = window
        self._bits: deque[float] = deque(maxlen=window)

    def push(self, bits: float) -> float | None:
        """Take the entropy of one more token.

        Returns:
            The mean in bits, None before ``window`` tokens have come.
        """
        self._bits.append(bits)
        return self.mean

    @property
    def mean(self) -> float | None:
        """Of the last ``window`` tokens, in bits; None before they have come."""
        if len(self._bits) < self.window:
            return None
        return math.fsum(self._bits) / self.window


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSettings:
    """When a gate fires."""

    threshold_bits: float
    """It fires when the rolling mean is above this."""
    release_bits: float | None = None
    """After firing, the rolling mean must come down to this or lower before it can fire again. None: it need not come
    down at all, as in the original, whose gate is then open on every hard text."""
    window: int = 10
    """Tokens of the rolling mean."""
    cooldown: int = 10
    """Tokens after a firing at which it cannot fire again."""

    def __post_init__(self) -> None:
        require_at_least(self, window=1, cooldown=0)
        values = [self.threshold_bits] if self.release_bits is None else [self.threshold_bits, self.release_bits]
        if any(math.isnan(value) for value in values):
            raise HRSError("threshold_bits and release_bits must be numbers, got NaN: calibrate the gate again")
        if self.release_bits is not None and self.release_bits > self.threshold_bits:
            raise HRSError(
                f"release_bits {self.release_bits:g} is above threshold_bits {self.threshold_bits:g}: "
                "a gate must be released at or below the entropy that fires it"
            )


class Gate:
    """Fires where entropy rises above a threshold, once for each rise."""

    def __init__(
        self, threshold_bits: float, release_bits: float | None = None, window: int = 10, cooldown: int = 10
    ) -> None:
        self.settings = GateSettings(
            threshold_bits=threshold_bits, release_bits=release_bits, window=window, cooldown=cooldown
        )
        self.rolling = RollingEntropy(window)
        self.armed = True
        """Whether the entropy has come down since it last fired."""
        self._wait = 0

    @classmethod
    def of(cls, settings: GateSettings) -> "Gate":
        """A new gate, armed, which has seen no token."""
        return cls(settings.threshold_bits, settings.release_bits, settings.window, settings.cooldown)

    def push(self, bits: float) -> bool:
        """Take the entropy of one more token, in bits; whether the gate fires on it."""
        mean = self.rolling.push(bits)
        waiting, self._wait = self._wait > 0, max(self._wait - 1, 0)
        if mean is None:
            return False
        release = self.settings.release_bits
        self.armed = self.armed or release is None or mean <= release
        if waiting or not self.armed or not mean > self.settings.threshold_bits:
            return False
        self.armed, self._wait = False, self.settings.cooldown
        return True
